"""The reward that PPO maximises: the score of the whole response, less beta times the drift."""

import torch
from torch import Tensor

from kleash.checks import require_beta, require_mask, require_same_shape
from kleash.errors import ShapeError
from kleash.masking import masked


def last_response_position(response_mask: Tensor) -> Tensor:
    """Index of the last True of each row of the mask: [batch, time] -> [batch] int64; -1 where there is none.

    >>> last_response_position(torch.tensor([[True, True, False], [False, False, False]]))
    tensor([ 1, -1])
    """
    require_mask(response_mask)
    positions = torch.arange(response_mask.shape[1], device=response_mask.device)
    return torch.where(response_mask, positions, -1).amax(-1)


def adjusted_rewards(scores: Tensor, kl_policy_ref_per_token: Tensor, response_mask: Tensor, *, beta: float) -> Tensor:
    """Per-token rewards: -beta * KL at each response token, and the score on the last one.

    rewards[i, t] = -beta * kl[i, t] + scores[i] * [t is the last response token of i]
    so that the sum over a response is score - beta * sum_t KL_t. Nothing lands on padding. With a
    one-token estimate (k1) this is the InstructGPT form. The exact KL of a position does not depend on
    the token drawn there, so as a reward at its own position it has no gradient: it is no leash.

    Args:
      scores: [batch] output of the reward model, in its own unit.
      kl_policy_ref_per_token: [batch, time] one-token estimates of KL(policy || reference), nats.
      response_mask: [batch, time] bool, True on response tokens; every response has at least one.
      beta: KL coefficient, score units per nat, >= 0.

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
    rewards = masked(-beta * kl_policy_ref_per_token, response_mask)
    return rewards.scatter_add(1, last.unsqueeze(1), scores.to(rewards.dtype).unsqueeze(1))


def missing_eos_penalised(scores: Tensor, finished: Tensor, *, penalty: float) -> Tensor:
    """Scores less `penalty` where a response did not close with an EOS token: both [batch].

    >>> missing_eos_penalised(torch.tensor([1.0, 1.0]), torch.tensor([True, False]), penalty=0.5)
    tensor([1.0000, 0.5000])
    """
    require_same_shape(scores=scores, finished=finished)
    return torch.where(finished, scores, scores - penalty)
