"""The reward that PPO maximises: the score of the whole response, less beta times the drift."""

import torch
from torch import Tensor, nn

from kleash.checks import require_beta, require_between, require_mask, require_same_shape
from kleash.errors import ShapeError
from kleash.masking import masked


def last_response_position(response_mask: Tensor) -> Tensor:
    """Index of the last True of each row of the mask: [batch, time] -> [batch] int64; -1 where there is none.

    >>> last_response_position(torch.tensor([[True, True, False], [False, False, False]]))
    tensor([ 1, -1])
    """
    require_mask(response_mask)
    numbers = torch.arange(1, response_mask.shape[1] + 1, device=response_mask.device)
    return nn.functional.pad(response_mask * numbers, (1, 0)).amax(-1) - 1


def adjusted_rewards(scores: Tensor, kl_policy_ref_per_token: Tensor, response_mask: Tensor, *, beta: float) -> Tensor:
    """Per-token rewards: -beta * KL at each response token, and the score on the last one.

    rewards[i, t] = -beta * kl[i, t] + scores[i] * [t is the last response token of i]
    so that the sum over a response is score - beta * sum_t KL_t. Nothing lands on padding. With a
    one-token estimate (k1) this is the InstructGPT form. The exact KL of a position does not depend on
    the token drawn there, so as a reward at its own position it has no gradient: it is no leash. For the exact KL
    see adjusted_rewards_exact.

    Args:
      scores: [batch] output of the reward model, in its own unit.
      kl_policy_ref_per_token: [batch, time] one-token estimates of KL(policy || reference), nats.
      response_mask: [batch, time] bool, True on response tokens; every response has at least one.
      beta: KL coefficient, score units per nat, >= 0; 0 leaves the KL out, also an infinite one.

    Returns:
      [batch, time] rewards, exactly 0 off the mask.

    Raises:
      ShapeError: shapes differ, the mask is not bool, or a response has no token to carry its score.
      ValueRangeError: beta negative or not finite.

    Source: Ouyang et al. 2022 (InstructGPT), Stiennon et al. 2020.

    >>> kl = torch.tensor([[0.5, 1.0, 7.0]])
    >>> adjusted_rewards(torch.tensor([2.0]), kl, torch.tensor([[True, True, False]]), beta=0.1)
    tensor([[-0.0500,  1.9000,  0.0000]])
    """
    require_beta(beta)
    require_mask(response_mask)
    require_same_shape(kl_policy_ref_per_token=kl_policy_ref_per_token, response_mask=response_mask)
    rewards = masked(
        -beta * kl_policy_ref_per_token if beta else torch.zeros_like(kl_policy_ref_per_token), response_mask
    )
    return _scored_at_the_end(scores, rewards, response_mask)


def adjusted_rewards_exact(
    scores: Tensor, kl_policy_ref_per_token: Tensor, response_mask: Tensor, *, beta: float, gamma: float = 1.0
) -> Tensor:
    """Per-token rewards of the exact leash: each token answers for the drift of the position after it.

    rewards[i, t] = -beta * gamma * kl[i, t + 1] + scores[i] * [t is the last response token of i]

    The exact KL of a position follows from the text before it, so it is the token before that has earned it. This
    is one half of the leash: the KL of each position in the loss, + beta * KL_t differentiated through the policy, is
    the other. Together, and only together, their gradient is that of E[score - beta * KL]. Where advantages are
    divided by a scale, beta in the loss is divided by it too; both halves take the same mean over tokens.

    Args:
      scores: [batch] output of the reward model, in its own unit.
      kl_policy_ref_per_token: [batch, time] exact KL(policy || reference), nats.
      response_mask: [batch, time] bool, True on response tokens, which stand together in each row.
      beta: KL coefficient, score units per nat, >= 0; 0 leaves the KL out, also an infinite one.
      gamma: discount per token; the KL of the next position is one token away.

    Returns:
      [batch, time] rewards, exactly 0 off the mask. Their sum lacks the KL of the first position, which no token
      of the response has earned.

    Raises:
      ShapeError: shapes differ, the mask is not bool, or a response has no token to carry its score.
      ValueRangeError: beta negative or not finite, or gamma outside [0, 1].

    Source: the split of the gradient of sum_t E[KL_t] into the policy's own step and its later states.

    >>> kl = torch.tensor([[0.5, 1.0, 7.0]])
    >>> adjusted_rewards_exact(torch.tensor([2.0]), kl, torch.tensor([[True, True, False]]), beta=0.1)
    tensor([[-0.1000,  2.0000,  0.0000]])
    """
    require_between(0, 1, gamma=gamma)
    later = masked(kl_policy_ref_per_token, response_mask).roll(-1, dims=1)
    later[:, -1:] = 0
    return adjusted_rewards(scores, gamma * later, response_mask, beta=beta)


def _scored_at_the_end(scores: Tensor, rewards: Tensor, response_mask: Tensor) -> Tensor:
    """The rewards with each score added on the last token of its response."""
    if scores.shape != response_mask.shape[:1]:
        raise ShapeError(
            f"Expected scores [{response_mask.shape[0]}], one per response, found {list(scores.shape)}; "
            "give the reward model's output per sequence."
        )
    last = last_response_position(response_mask)
    if bool((last < 0).any()):
        empty = (last < 0).nonzero().flatten().tolist()
        raise ShapeError(
            f"Expected every response to have at least one token, found none in rows {empty}; drop those rows."
        )
    return rewards.scatter_add(1, last.unsqueeze(1), scores.to(rewards.dtype).unsqueeze(1))


def missing_eos_penalised(scores: Tensor, finished: Tensor, *, penalty: float) -> Tensor:
    """Scores less `penalty` where a response did not close with an EOS token: both [batch].

    >>> missing_eos_penalised(torch.tensor([1.0, 1.0]), torch.tensor([True, False]), penalty=0.5)
    tensor([1.0000, 0.5000])
    """
    require_same_shape(scores=scores, finished=finished)
    return torch.where(finished, scores, scores - penalty)
