"""k1 as a control variate of the exact KL: the same expected gradient, with as little noise as the two can have.

The sampled token's x_t = -beta (k1_t - KL_t) has mean 0 in every state. Added to advantages it changes no expectation
but one: E[grad log pi(y_t) x_t] = -beta grad KL_t, the very term that the exact form has in the loss. So for any
share c, fixed before the responses are seen,

    advantage_t + c sum_{k >= t} (gamma lambda)^(k - t) x_k,    and beta (1 - c) KL_t in the loss

has the gradient of the exact form: c = 0 is the exact form, c = 1 that of k1 with KL_t as a baseline. Noise of k1 that
runs against that of the score is worth having: at the optimum score - beta log(pi / rho) is the same for every
response, and only k1 cancels it. Far from there it is noise upon noise. The share is the one that leaves the least
variance in the advantages.
"""

import torch
from torch import Tensor

from kleash.advantages import generalized_advantages
from kleash.checks import require_beta, require_mask, require_same_shape
from kleash.masking import Reduce, masked, one_process


def control_variate(
    k1: Tensor, kl_policy_ref_per_token: Tensor, response_mask: Tensor, *, beta: float, gamma: float, gae_lambda: float
) -> Tensor:
    """The discounted sum of the x from each token on: [batch, time], score units, 0 off the mask.

    Args:
      k1: [batch, time] log pi(y) - log rho(y), nats.
      kl_policy_ref_per_token: [batch, time] exact KL(policy || reference), nats.
      response_mask: [batch, time] bool.
      beta, gamma, gae_lambda: as in the rewards and advantages.

    Raises:
      ShapeError, ValueRangeError: as in kleash.rewards and kleash.advantages.

    >>> mask = torch.tensor([[True, True, False]])
    >>> k1, kl = torch.tensor([[0.5, 0.25, 9.0]]), torch.tensor([[0.25, 0.5, 9.0]])
    >>> control_variate(k1, kl, mask, beta=1.0, gamma=1.0, gae_lambda=1.0)
    tensor([[0.0000, 0.2500, 0.0000]])
    """
    require_beta(beta)
    require_mask(response_mask)
    require_same_shape(k1=k1, kl_policy_ref_per_token=kl_policy_ref_per_token, response_mask=response_mask)
    noise = -beta * (masked(k1, response_mask) - masked(kl_policy_ref_per_token, response_mask))
    sums, _ = generalized_advantages(noise, torch.zeros_like(noise), response_mask, gamma=gamma, gae_lambda=gae_lambda)
    return sums


def control_shares(
    advantages: Tensor, control: Tensor, response_mask: Tensor, *, reduce: Reduce = one_process
) -> Tensor:
    """The share c in [0, 1] that leaves the least variance in advantages + c control, for each response.

    c = -cov(advantages, control) / var(control) over response tokens, held between the two forms that it blends:
    beyond them the KL in the loss would push the policy away, and only the sampled noise would hold it. The share of
    each response is fitted on the responses of the other parity alone: what multiplies a response has not seen it,
    so the gradient stays unbiased.

    Args:
      advantages, control: [batch, time].
      response_mask: [batch, time] bool.
      reduce: adds a tensor over processes.

    Returns:
      [batch] float64; 0 where the other responses have no noise to fit.
    """
    pairs = torch.stack([advantages, control], -1).double()
    parity = torch.arange(len(advantages), device=advantages.device) % 2
    shares = []
    for half in (0, 1):
        rows = pairs[response_mask & (parity == half).unsqueeze(1)]
        count = reduce(rows.new_tensor(len(rows))).clamp_min(1)
        centred = rows - reduce(rows.sum(0)) / count
        covariance, variance = reduce(centred.T @ centred[:, 1])
        shares.append(torch.where(variance > 0, -covariance / variance, 0.0).clamp(0, 1))
    return torch.stack(shares).flip(0)[parity]
