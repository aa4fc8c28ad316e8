"""Generalised advantage estimation over the response tokens, and only there."""

import torch
from torch import Tensor

from kleash.checks import require_between, require_mask, require_same_shape
from kleash.masking import masked


def generalized_advantages(
    rewards: Tensor, values: Tensor, response_mask: Tensor, *, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of every response token.

    delta_t = r_t + gamma * V_{t+1} - V_t
    A_t     = delta_t + gamma * lambda * A_{t+1},   R_t = A_t + V_t

    The response ends at its last token: V and A beyond it are 0, whether it closed with EOS or was cut
    by the length limit, so nothing is bootstrapped from text that was never written.

    Args:
      rewards: [batch, time] per-token rewards, score units.
      values: [batch, time] value estimates before each token, score units.
      response_mask: [batch, time] bool, True on response tokens, which stand together in each row.
      gamma: discount per token, in [0, 1].
      gae_lambda: in [0, 1]; 1 is return minus value, 0 is the one-step error.

    Returns:
      (advantages, returns), each [batch, time], exactly 0 off the mask, without gradient.

    Raises:
      ShapeError: the shapes differ, or response_mask is not bool.
      ValueRangeError: gamma or gae_lambda outside [0, 1].

    Source: Schulman et al. 2016, equation 16.

    >>> rewards, values = torch.tensor([[0.0, 1.0, 5.0]]), torch.tensor([[0.5, 0.5, 5.0]])
    >>> mask = torch.tensor([[True, True, False]])
    >>> generalized_advantages(rewards, values, mask, gamma=1.0, gae_lambda=1.0)
    (tensor([[0.5000, 0.5000, 0.0000]]), tensor([[1., 1., 0.]]))
    """
    require_mask(response_mask)
    require_same_shape(rewards=rewards, values=values, response_mask=response_mask)
    require_between(0, 1, gamma=gamma, gae_lambda=gae_lambda)
    rewards, values = masked(rewards.detach(), response_mask), masked(values.detach(), response_mask)
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])
    for t in range(rewards.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = delta + gamma * gae_lambda * next_advantage
        next_value, next_advantage = values[:, t], advantages[:, t]
    return masked(advantages, response_mask), masked(advantages + values, response_mask)
