"""The clipped losses of PPO, per token; the caller takes the mean over the response tokens."""

import torch
from torch import Tensor

from kleash.checks import require_between, require_mask, require_same_shape
from kleash.masking import masked


def policy_ratio(policy_logprobs: Tensor, old_logprobs: Tensor, response_mask: Tensor) -> Tensor:
    """pi_new / pi_old of each sampled token: [batch, time], exactly 1 off the mask.

    >>> policy_ratio(torch.tensor([[0.0, 5.0]]), torch.tensor([[0.0, 0.0]]), torch.tensor([[True, False]]))
    tensor([[1., 1.]])
    """
    require_mask(response_mask)
    require_same_shape(policy_logprobs=policy_logprobs, old_logprobs=old_logprobs, response_mask=response_mask)
    return (masked(policy_logprobs, response_mask) - masked(old_logprobs, response_mask)).exp()


def clipped_policy_loss_per_token(ratio: Tensor, advantages: Tensor, *, clip_range: float) -> Tensor:
    """PPO's pessimistic surrogate, as a loss: max(-A r, -A clip(r, 1 - c, 1 + c)), [batch, time].

    At ratio 1 its gradient is the policy gradient, -A * grad log pi.

    Args:
      ratio: [batch, time] pi_new / pi_old, with gradient.
      advantages: [batch, time], without gradient.
      clip_range: c, above 0.

    Raises:
      ShapeError: the shapes differ.
      ValueRangeError: clip_range is not positive.

    Source: Schulman et al. 2017, equation 7.

    >>> clipped_policy_loss_per_token(torch.tensor([[1.5]]), torch.tensor([[2.0]]), clip_range=0.2)
    tensor([[-2.4000]])
    """
    require_same_shape(ratio=ratio, advantages=advantages)
    require_between(1e-9, 1e9, clip_range=clip_range)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantages * ratio, -advantages * clipped)


def clipped_value_loss_per_token(values: Tensor, old_values: Tensor, returns: Tensor, *, clip_range: float) -> Tensor:
    """max((V - R)^2, (V_clipped - R)^2) / 2 with V_clipped within clip_range of the old value, [batch, time].

    Raises:
      ShapeError: the shapes differ.
      ValueRangeError: clip_range is not positive.

    Source: the reference code of Schulman et al. 2017.

    >>> new, old, returns = torch.tensor([[1.0]]), torch.tensor([[0.0]]), torch.tensor([[1.0]])
    >>> clipped_value_loss_per_token(new, old, returns, clip_range=0.2)
    tensor([[0.3200]])
    """
    require_same_shape(values=values, old_values=old_values, returns=returns)
    require_between(1e-9, 1e9, clip_range=clip_range)
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    return torch.maximum((values - returns).square(), (clipped - returns).square()) / 2
