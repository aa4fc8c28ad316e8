"""What policy, reference and value model say of a rollout, before the update moves them.

Scoring walks through the rollout in the very micro-batches that the first epoch will use, so at the first
step the ratio is 1 to the last bit, and so is the KL 0 of a policy that has not moved.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kleash.batch import MicroBatch, Rollout, micro_batch_of
from kleash.divergence import entropy, kl_divergence
from kleash.errors import NonFiniteError
from kleash.logprobs import full_log_probs
from kleash.masking import masked
from kleash.models import Models, response_logits

SCORING_ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What the models say of a rollout, before the update; each [batch, time], 0 off the mask, no gradient.

    policy_logprobs, ref_logprobs, values, and from the full distributions kl_policy_ref_per_token (exact)
    and policy_entropy_per_token. Nats, except values, which are in score units.
    """

    policy_logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    kl_policy_ref_per_token: Tensor
    policy_entropy_per_token: Tensor


@torch.no_grad()
def score_rollout(models: Models, rollout: Rollout, micro_batches: list[Tensor], *, temperature: float) -> Scored:
    """Log-probs of both models, values, exact KL and entropy for every response token.

    Args:
      models: policy, value and reference.
      rollout: what the policy sampled.
      micro_batches: rows of each forward pass, the first epoch's.
      temperature: the one that the rollout was sampled at.

    Raises:
      NonFiniteError: a log-prob, value, entropy or exact KL is not finite; the KL is not where the reference
        forbids a token that the policy allows.
    """
    empty = torch.zeros(rollout.response_mask.shape, device=rollout.sequences.device)
    columns = {name: empty.clone() for name in Scored.__dataclass_fields__}
    for rows in micro_batches:
        part = micro_batch_of(rollout, rows)
        inputs = (part.sequences, part.attention_mask, part.time)
        policy_logits, ref_logits = response_logits(models.policy, *inputs), response_logits(models.reference, *inputs)
        stats = _position_stats(policy_logits, ref_logits, part, temperature=temperature)
        stats["values"] = masked(models.value(*inputs).to(empty.dtype), part.response_mask)
        for name, values in stats.items():
            columns[name][part.rows, : part.time] = values
    for name, values in columns.items():
        require_finite_per_token(name, values)
    return Scored(**columns)


def _position_stats(
    policy_logits: Tensor, ref_logits: Tensor, part: MicroBatch, *, temperature: float
) -> dict[str, Tensor]:
    """The figures of a micro-batch that need the whole vocabulary, a limited number of positions at a time."""
    mask = part.response_mask
    stats = {
        name: torch.zeros(mask.shape, device=mask.device)
        for name in ("policy_logprobs", "ref_logprobs", "kl_policy_ref_per_token", "policy_entropy_per_token")
    }
    for positions in torch.split(mask.nonzero(), SCORING_ROWS):
        at = positions.unbind(1)
        tokens = part.responses[at].unsqueeze(-1)
        policy = full_log_probs(policy_logits[at], temperature=temperature)
        ref = full_log_probs(ref_logits[at], temperature=temperature)
        stats["policy_logprobs"][at] = policy.gather(-1, tokens).squeeze(-1).float()
        stats["ref_logprobs"][at] = ref.gather(-1, tokens).squeeze(-1).float()
        stats["kl_policy_ref_per_token"][at] = kl_divergence(policy, ref).float()
        stats["policy_entropy_per_token"][at] = entropy(policy).float()
    return stats


def require_finite_per_token(name: str, values: Tensor) -> None:
    """Raise NonFiniteError naming the first position where `values` [batch, time] is NaN or infinite."""
    wrong = ~values.isfinite()
    if bool(wrong.any()):
        row, position = wrong.nonzero()[0].tolist()
        raise NonFiniteError(
            f"Expected finite {name}, found {float(values[row, position])} at sequence {row}, "
            f"response token {position}; lower the learning rate, or look for -inf or NaN in the model's logits."
        )
