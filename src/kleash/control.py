"""k1 as a control variate of the exact KL: the same expected gradient, with as little noise as the two can have.

The sampled token's x_t = -beta (k1_t - KL_t) has mean 0 in every state. Added to advantages it changes no expectation
but one: E[grad log pi(y_t) x_t] = -beta grad KL_t, the very term that the exact form has in the loss. So for any
shares c, fixed before the responses are seen,

    advantage_t + c_own x_t + c_later sum_{k > t} (gamma lambda)^(k - t) x_k,    and beta (1 - c_own) KL_t in the loss

has the gradient of the exact form. c = 0 is the exact form, c = 1 that of k1 with KL_t as a baseline. Noise of k1 that
runs against that of the score is worth having: at the optimum score - beta log(pi / rho) is the same for every
response, and only k1 cancels it. The shares are those that leave the least variance in the advantages.
"""

import torch
from torch import Tensor

from kleash.advantages import generalized_advantages
from kleash.checks import require_beta, require_mask, require_same_shape
from kleash.masking import Reduce, masked, one_process


def control_variates(
    k1: Tensor, kl_policy_ref_per_token: Tensor, response_mask: Tensor, *, beta: float, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """(own, later): x_t and the discounted sum of the x after it, each [batch, time], score units, 0 off the mask.

    Args:
      k1: [batch, time] log pi(y) - log rho(y), nats.
      kl_policy_ref_per_token: [batch, time] exact KL(policy || reference), nats.
      response_mask: [batch, time] bool.
      beta, gamma, gae_lambda: as in the rewards and advantages.

    Raises:
      ShapeError, ValueRangeError: as in kleash.rewards and kleash.advantages.

    >>> mask = torch.tensor([[True, True, False]])
    >>> k1, kl = torch.tensor([[0.5, 0.25, 9.0]]), torch.tensor([[0.25, 0.5, 9.0]])
    >>> control_variates(k1, kl, mask, beta=1.0, gamma=1.0, gae_lambda=1.0)
    (tensor([[-0.2500,  0.2500,  0.0000]]), tensor([[0.2500, 0.0000, 0.0000]]))
    """
    require_beta(beta)
    require_mask(response_mask)
    require_same_shape(k1=k1, kl_policy_ref_per_token=kl_policy_ref_per_token, response_mask=response_mask)
    own = -beta * (masked(k1, response_mask) - masked(kl_policy_ref_per_token, response_mask))
    from_here, _ = generalized_advantages(own, torch.zeros_like(own), response_mask, gamma=gamma, gae_lambda=gae_lambda)
    return own, from_here - own


def control_shares(
    advantages: Tensor, own: Tensor, later: Tensor, response_mask: Tensor, *, reduce: Reduce = one_process
) -> Tensor:
    """The shares (c_own, c_later) that leave the least variance in advantages + c_own own + c_later later.

    Least squares over the response tokens, where the shares of each response are fitted on the responses of the
    other parity alone: what multiplies a response has not seen it, so the gradient stays unbiased.

    Args:
      advantages, own, later: [batch, time].
      response_mask: [batch, time] bool.
      reduce: adds a tensor over processes.

    Returns:
      [batch, 2] float64; 0 where the other responses have no noise to fit.
    """
    design = torch.stack([own, later], -1).double()
    parity = torch.arange(len(advantages), device=advantages.device) % 2
    shares = []
    for half in (0, 1):
        mask = response_mask & (parity == half).unsqueeze(1)
        rows = design[mask]
        count = reduce(mask.sum().double()).clamp_min(1)
        centred = advantages[mask].double() - reduce(masked(advantages.double(), mask).sum()) / count
        gram, target = reduce(rows.T @ rows), reduce(rows.T @ centred)
        shares.append(-torch.linalg.pinv(gram, hermitian=True, rtol=1e-9) @ target)
    return torch.stack(shares).flip(0)[parity]
