"""What policy and reference say of every token of some responses, without a value model and without gradients."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kleash.batch import Rollout, micro_batch_of
from kleash.language_model import LanguageModel
from kleash.masking import unpacked
from kleash.scoring import require_finite_per_token

ALTERNATIVES = 5


@dataclass(frozen=True, kw_only=True)
class Likeliest:
    """The tokens that a model finds likeliest at each position, likeliest first: [batch, time, count] ids and nats."""

    tokens: Tensor
    logprobs: Tensor


@dataclass(frozen=True, kw_only=True)
class Alternatives:
    """What policy and reference find likeliest where `kept` [batch, time] is True; zeros elsewhere."""

    kept: Tensor
    policy: Likeliest
    ref: Likeliest


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What both models say of each response token; each [batch, time] nats, exactly 0 off the mask.

    kl_policy_ref_per_token is exact; the entropies are those of the distributions that the token was drawn from.
    """

    policy_logprobs: Tensor
    ref_logprobs: Tensor
    kl_policy_ref_per_token: Tensor
    policy_entropy: Tensor
    ref_entropy: Tensor
    alternatives: Alternatives | None


@torch.no_grad()
def reading_of(
    policy: LanguageModel,
    reference: LanguageModel,
    rollout: Rollout,
    *,
    temperature: float,
    alternatives_at_most: int = 0,
) -> Reading:
    """One forward pass of each model over the rollout: log-probs, exact KL, entropies, and the likeliest tokens.

    Args:
      policy, reference: over one vocabulary.
      rollout: responses, by whomever.
      temperature: of all distributions.
      alternatives_at_most: at how many positions the likeliest tokens are looked for, those with the largest KL.

    Raises:
      NonFiniteError: a log-prob, entropy or KL is not finite; the KL is not where the reference forbids a token that
        the policy allows.
    """
    part = micro_batch_of(rollout, torch.arange(len(rollout.sequences)))
    states, ref = policy.states(part), reference.ref_states(part)
    stats = policy.statistics(states, part, ref, temperature=temperature, ref_entropy=True)
    columns = {name: values for name, values in vars(stats).items() if values is not None}
    for name, values in columns.items():
        require_finite_per_token(name, values)
    reading = Reading(**columns, alternatives=None)
    if not alternatives_at_most:
        return reading
    kept = largest_of(columns["kl_policy_ref_per_token"], part.response_mask, alternatives_at_most)
    chosen = kept[part.response_mask]
    alternatives = Alternatives(
        kept=kept,
        policy=likeliest_tokens(policy, states[chosen], kept, temperature=temperature),
        ref=likeliest_tokens(reference, ref.states[chosen], kept, temperature=temperature),
    )
    return replace(reading, alternatives=alternatives)


def largest_of(values: Tensor, mask: Tensor, count: int) -> Tensor:
    """[batch, time] bool, True at the `count` largest values on the mask; of equal ones the first comes first.

    >>> largest_of(torch.tensor([[3.0, 1.0, 9.0]]), torch.tensor([[True, True, False]]), 1)
    tensor([[ True, False, False]])
    """
    order = torch.where(mask, values, -torch.inf).flatten().sort(descending=True, stable=True).indices[:count]
    chosen = torch.zeros_like(mask).flatten()
    chosen[order] = True
    return chosen.view_as(mask) & mask


def likeliest_tokens(model: LanguageModel, states: Tensor, kept: Tensor, *, temperature: float) -> Likeliest:
    """The likeliest tokens at the kept positions, in their places.

    Args:
      model: whose distributions.
      states: [kept positions, ..] row by row; see LanguageModel.states.
      kept: [batch, time] bool.
      temperature: of the distributions.
    """
    tokens, logprobs = model.most_likely(states, count=ALTERNATIVES, temperature=temperature)
    return Likeliest(tokens=unpacked(tokens, kept), logprobs=unpacked(logprobs, kept))
