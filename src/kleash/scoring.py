"""What policy, reference and value model say of a rollout, before the update moves them.

Scoring walks through the rollout in the very micro-batches that the first epoch will use, so at the first
step the ratio is 1 to the last bit, and so is the KL 0 of a policy that has not moved.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kleash.batch import Rollout, micro_batch_of
from kleash.errors import NonFiniteError
from kleash.language_model import Models
from kleash.masking import masked, unpacked

OF_THE_REFERENCE = ("ref_logprobs", "kl_policy_ref_per_token", "kl_policy_first_ref_per_token")


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What the models say of a rollout, before the update; each [batch, time], 0 off the mask, no gradient.

    policy_logprobs, ref_logprobs, values, and from the full distributions kl_policy_ref_per_token,
    kl_policy_first_ref_per_token (both exact) and policy_entropy. Nats, except values, which are in score units. The
    first reference is the one the run started with; for a reference that does not move, both KLs are one tensor.
    ref_states [batch, time, hidden] are the reference's last hidden states where they were asked for and its logits
    follow from them, else None.
    """

    policy_logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    kl_policy_ref_per_token: Tensor
    kl_policy_first_ref_per_token: Tensor
    policy_entropy: Tensor
    ref_states: Tensor | None = None


@torch.no_grad()
def score_rollout(
    models: Models,
    rollout: Rollout,
    micro_batches: list[Tensor],
    *,
    temperature: float,
    keep_ref_states: bool = False,
) -> Scored:
    """Log-probs of both models, values, exact KL (to the first reference too) and entropy for every response token.

    Args:
      models: policy, value, reference, and the first reference if the reference moves.
      rollout: what the policy sampled.
      micro_batches: rows of each forward pass, the first epoch's.
      temperature: the one that the rollout was sampled at.
      keep_ref_states: whether the steps will need the reference again.

    Raises:
      NonFiniteError: a log-prob, value, entropy or exact KL is not finite; the KL is not where the reference
        forbids a token that the policy allows.
    """
    columns: dict[str, Tensor] = {}
    for rows in micro_batches:
        part = micro_batch_of(rollout, rows)
        ref = models.reference.ref_states(part)
        first_ref = None if models.first_reference is None else models.first_reference.ref_states(part)
        stats = models.policy(part, ref, first_ref, temperature=temperature)
        values = models.value(part.sequences, part.attention_mask, part.time)
        found = {name: own for name, own in vars(stats).items() if own is not None}
        found["values"] = masked(values, part.response_mask)
        if keep_ref_states and models.reference.linear is not None:
            found["ref_states"] = unpacked(ref.states, part.response_mask)
        for name, own in found.items():
            column = columns.setdefault(name, own.new_zeros(rollout.response_mask.shape + own.shape[2:]))
            column[part.rows, : part.time] = own
    for name, values in columns.items():
        if name != "ref_states":
            require_finite_per_token(name, values)
    if models.first_reference is None:
        columns["kl_policy_first_ref_per_token"] = columns["kl_policy_ref_per_token"]
    return Scored(**columns)


def require_finite_per_token(name: str, values: Tensor) -> None:
    """Raise NonFiniteError naming the first position where `values` [batch, time] is NaN or infinite."""
    wrong = ~values.isfinite()
    if bool(wrong.any()):
        row, position = wrong.nonzero()[0].tolist()
        found = float(values[row, position])
        remedy = (
            "the reference forbids a token that the policy allows: take one that allows it."
            if math.isinf(found) and name in OF_THE_REFERENCE
            else "lower the learning rate, or look for -inf or NaN in the model's logits."
        )
        raise NonFiniteError(
            f"Expected finite {name}, found {found} at sequence {row}, response token {position}; {remedy}"
        )
