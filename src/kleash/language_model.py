"""Policy and reference as training sees them: what they say of the response tokens, from one forward pass.

Where the logits are a plain product of the last hidden states, no logits are kept: see kleash.fused. Any other
model is served by its full logits.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kleash.batch import MicroBatch
from kleash.divergence import entropy, kl_divergence
from kleash.errors import KleashWarning
from kleash.fused.stats import logprobs_of, stats_of
from kleash.linear_head import LinearHead, last_hidden_states, linear_head_of
from kleash.logprobs import full_log_probs
from kleash.masking import unpacked
from kleash.models import response_logits

PLAIN_ROWS = 1024
LOGITS_AT_ONCE = 2**23  # of one model, where the likeliest tokens are looked for: 32 MiB of float32


@dataclass(frozen=True, kw_only=True)
class PositionStats:
    """What is known of each response token, [rows, time] nats, exactly 0 off the mask.

    Without a reference, ref_logprobs and kl_policy_ref_per_token are None; without a first reference beside it,
    kl_policy_first_ref_per_token is; unless it is asked for, ref_entropy is.
    """

    policy_logprobs: Tensor
    policy_entropy: Tensor
    ref_logprobs: Tensor | None = None
    kl_policy_ref_per_token: Tensor | None = None
    ref_entropy: Tensor | None = None
    kl_policy_first_ref_per_token: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class RefStates:
    """What a reference keeps of a micro-batch, and the model that turns it into logits: see LanguageModel.states."""

    model: "LanguageModel"
    states: Tensor


class LanguageModel(nn.Module):
    """A causal model whose forward pass gives the statistics of response tokens.

    It is a module so that a data-parallel wrapper may stand around it; all of its parameters are the model's.

    Args:
      model: the causal language model.
      linear: how its logits follow from its last hidden states; None = by its full logits.
      vocab: how many tokens exist; what a head has beyond them is padding.
    """

    def __init__(self, model: PreTrainedModel, *, linear: LinearHead | None, vocab: int) -> None:
        super().__init__()
        self.model = model
        self.linear = linear
        self.vocab = vocab

    def states(self, part: MicroBatch) -> Tensor:
        """What a reference keeps of a forward pass: last hidden states [tokens, hidden], or logits [tokens, vocab].

        Tokens are the response tokens, row by row; the state is the one that the token was drawn from.
        """
        inputs = (self.model, part.sequences, part.attention_mask, part.time)
        if self.linear is None:
            logits: Tensor = response_logits(*inputs)[part.response_mask]
            return logits[:, : self.vocab]
        return last_hidden_states(*inputs)[part.response_mask]

    def ref_states(self, part: MicroBatch) -> RefStates:
        """This model as the reference of a micro-batch, after one forward pass."""
        return RefStates(model=self, states=self.states(part))

    def forward(
        self, part: MicroBatch, ref: RefStates | None, first_ref: RefStates | None = None, *, temperature: float
    ) -> PositionStats:
        """Statistics of the micro-batch's response tokens, differentiable through this model.

        Args:
          part: the micro-batch.
          ref: what the KL is measured to; None = this model's log-probs and entropy alone.
          first_ref: what else the KL is measured to, from the same forward pass.
          temperature: of all distributions.
        """
        return self.statistics(self.states(part), part, ref, first_ref, temperature=temperature)

    def statistics(
        self,
        states: Tensor,
        part: MicroBatch,
        ref: RefStates | None,
        first_ref: RefStates | None = None,
        *,
        temperature: float,
        ref_entropy: bool = False,
    ) -> PositionStats:
        """What `forward` gives, from this model's states of the micro-batch: no forward pass is made.

        Args:
          ref_entropy: also the entropy of the reference.
        """
        mask = part.response_mask
        tokens = part.responses[mask]
        columns = self._columns(states, ref, tokens, temperature, ref_entropy=ref_entropy)
        if first_ref is not None:
            to_first = self._columns(states, first_ref, tokens, temperature)
            columns["kl_policy_first_ref_per_token"] = to_first["kl_policy_ref_per_token"]
        return PositionStats(**{name: unpacked(column, mask) for name, column in columns.items()})

    @torch.no_grad()
    def most_likely(self, states: Tensor, *, count: int, temperature: float) -> tuple[Tensor, Tensor]:
        """The tokens that this model finds likeliest at each position, and their log-probs.

        Args:
          states: [tokens, ..] what `states` gave.
          count: how many; fewer where the vocabulary is smaller.
          temperature: of the distribution.

        Returns:
          ([tokens, count] int64 ids, likeliest first; [tokens, count] log-probs in nats).
        """
        head = None if self.linear is None else self.linear.of(self.model)
        shape = (len(states), min(count, self.vocab))
        # Made before the loop: small tensors that outlive a turn would lie where its logits lay, and the next logits,
        # which then do not fit there, would take new memory every time.
        tokens = states.new_empty(shape, dtype=torch.int64)
        logprobs = states.new_empty(shape, dtype=torch.promote_types(states.dtype, torch.float32))
        height = max(1, LOGITS_AT_ONCE // self.vocab)
        for start in range(0, len(states), height):
            some = slice(start, start + height)
            logits = states[some] if head is None else head.logits(states[some])[:, : self.vocab]
            logprobs[some], tokens[some] = full_log_probs(logits, temperature=temperature).topk(shape[1])
        return tokens, logprobs

    def _columns(
        self, states: Tensor, ref: RefStates | None, tokens: Tensor, temperature: float, *, ref_entropy: bool = False
    ) -> dict[str, Tensor]:
        """What is known of each token, under the names of PositionStats; each [tokens]."""
        if self.linear is None:
            ref_logits = None if ref is None else ref.states
            return _plain_columns(states, ref_logits, tokens, temperature, ref_entropy=ref_entropy)
        head = self.linear.of(self.model)
        how: dict[str, Any] = {"temperature": temperature, "vocab": self.vocab}
        if ref is None:
            logprobs, policy_entropy = logprobs_of(states, head, tokens, **how)
            return {"policy_logprobs": logprobs, "policy_entropy": policy_entropy}
        assert ref.model.linear is not None
        ref_head = ref.model.linear.of(ref.model.model)
        stats = stats_of(states, head, ref.states, ref_head, tokens, **how, ref_entropy=ref_entropy)
        return {name: column for name, column in vars(stats).items() if column is not None}


@dataclass(frozen=True, kw_only=True)
class Models:
    """The models of an update; policy (a LanguageModel) and value may be wrapped for several processes.

    first_reference is where a reference that moves began; None for one that does not.
    """

    policy: nn.Module
    value: nn.Module
    reference: LanguageModel
    first_reference: LanguageModel | None = None


def _plain_columns(
    logits: Tensor, ref_logits: Tensor | None, tokens: Tensor, temperature: float, *, ref_entropy: bool
) -> dict[str, Tensor]:
    """The columns from full logits, a limited number of positions at a time."""
    rows = zip(
        torch.split(logits, PLAIN_ROWS),
        torch.split(logits if ref_logits is None else ref_logits, PLAIN_ROWS),
        torch.split(tokens, PLAIN_ROWS),
        strict=True,
    )
    parts: list[dict[str, Tensor]] = []
    for some, some_ref, chosen in rows:
        policy = full_log_probs(some, temperature=temperature)
        part = {"policy_logprobs": _chosen(policy, chosen), "policy_entropy": entropy(policy)}
        if ref_logits is not None:
            ref = full_log_probs(some_ref, temperature=temperature)
            part["ref_logprobs"] = _chosen(ref, chosen)
            part["kl_policy_ref_per_token"] = kl_divergence(policy, ref)
            if ref_entropy:
                part["ref_entropy"] = entropy(ref)
        parts.append(part)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _chosen(logprobs: Tensor, tokens: Tensor) -> Tensor:
    return logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def language_models(
    policy: PreTrainedModel, reference: PreTrainedModel, *, vocab: int
) -> tuple[LanguageModel, LanguageModel]:
    """Policy and reference, both by their hidden states or, if one of them cannot, both by their full logits."""
    heads = {"policy": linear_head_of(policy), "reference": linear_head_of(reference)}
    for role, head in heads.items():
        if isinstance(head, str):
            warnings.warn(
                f"Expected a {role} whose logits are a product of its last hidden states, found {head}; "
                "full logits are used instead, which takes more memory.",
                KleashWarning,
                stacklevel=2,
            )
    own, other = (head if isinstance(head, LinearHead) else None for head in heads.values())
    if own is None or other is None:
        own = other = None
    return LanguageModel(policy, linear=own, vocab=vocab), LanguageModel(reference, linear=other, vocab=vocab)
