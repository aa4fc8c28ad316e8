"""Where the policy drifts: the exact KL(policy || reference) of an update by position, by class, by token.

The KL at a position compares two distributions before a token is drawn there; the token that stands beside it is
the one that was drawn. So a token with a large KL marks a place of large drift, and its ratio policy / reference
says whether the policy writes it more often than the reference would, or less.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kleash.drift import CONTEXT, TokenFigures
from kleash.token_class import TOKEN_CLASSES

LISTED = 10  # tokens in each of the two lists
LARGEST_RATIO = 1e300  # of two probabilities, so that a sharp model's do not overflow


def special_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that structure a text: the special ones, and those added ones that the chat template writes.

    The second kind are for example the marks of a tool call, which many tokenizers do not call special.
    """
    template = str(tokenizer.chat_template or "")
    added = tokenizer.added_tokens_decoder.items()
    marks = {number for number, token in added if token.special or (token.content and token.content in template)}
    return sorted(marks | set(tokenizer.all_special_ids))


def drift_map(update: int, tokens: TokenFigures, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The line that drift.jsonl gets for an update; floats have 6 significant digits, null = not finite.

    by_position:    for each position that a response reaches: how many do, and the sum of their KL there / batch.
    by_class:       for each class: its tokens, its KL per sequence and per token (null without tokens).
    top_tokens:     the positions with the largest KL, one for each token that was drawn, and what stood before it.
    drifted_tokens: the token types with the largest sum of KL over the places where they were drawn.

    The rows of by_position, and those of by_class, add up to the record's kl_policy_ref_per_sequence. Both lists
    hold at most LISTED entries, and none whose KL is 0.
    """
    return {
        "update": update,
        "by_position": _by_position(tokens),
        "by_class": {name: _of_class(tokens, name) for name in TOKEN_CLASSES},
        "top_tokens": top_tokens(tokens, tokenizer),
        "drifted_tokens": drifted_tokens(type_sums(tokens), len(tokens.tokens), tokenizer),
    }


def _by_position(tokens: TokenFigures) -> list[dict[str, Any]]:
    reached = tokens.response_mask.sum(0).tolist()
    kl = (tokens.kl_policy_ref.double().sum(0) / len(tokens.tokens)).tolist()
    return [
        {"position": t, "sequences": reached[t], "kl_policy_ref_per_sequence": rounded(kl[t])}
        for t in range(len(reached))
        if reached[t]
    ]


def _of_class(tokens: TokenFigures, name: str) -> dict[str, Any]:
    mask = tokens.of_class(name)
    count, kl = int(mask.sum()), float(tokens.kl_policy_ref.double()[mask].sum())
    return {
        "tokens": count,
        "kl_policy_ref_per_sequence": rounded(kl / len(mask)),
        "kl_policy_ref_per_token": rounded(kl / count) if count else None,
    }


def top_tokens(tokens: TokenFigures, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Where the KL is largest, one place for each token: the token drawn there, what stood before it; none of KL 0."""
    time = tokens.tokens.shape[1]
    return [_top_token(tokens, place // time, place % time, tokenizer) for place in _largest_of_each_type(tokens)]


def _largest_of_each_type(tokens: TokenFigures) -> list[int]:
    """Flat places of the largest KL of each token type, the LISTED largest of them."""
    values, order = tokens.kl_policy_ref.flatten().sort(descending=True, stable=True)
    order = order[values > 0]
    place_of_type: dict[int, int] = {}
    for token, place in zip(tokens.tokens.flatten()[order].tolist(), order.tolist(), strict=True):
        place_of_type.setdefault(token, place)
        if len(place_of_type) == LISTED:
            break
    return list(place_of_type.values())


def _top_token(tokens: TokenFigures, row: int, position: int, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    token = int(tokens.tokens[row, position])
    policy, ref = float(tokens.policy_logprobs[row, position]), float(tokens.ref_logprobs[row, position])
    return {
        "token": tokenizer.decode([token]),
        "token_id": token,
        "class": TOKEN_CLASSES[int(tokens.classes[row, position])],
        "position": position,
        "sequence": row,
        "kl_policy_ref": rounded(float(tokens.kl_policy_ref[row, position])),
        "policy_prob": rounded(_exp(policy)),
        "ref_prob": rounded(_exp(ref)),
        "ratio": rounded(_ratio(policy - ref)),
        "context": tokenizer.decode(_before(tokens, row, position)),
    }


def _before(tokens: TokenFigures, row: int, position: int) -> list[int]:
    """The last CONTEXT tokens before a response token, those of the prompt included."""
    prompt = tokens.prompt_ends[row][tokens.prompt_ends_mask[row]].tolist()
    written: list[int] = [*prompt, *tokens.tokens[row, :position].tolist()]
    return written[-CONTEXT:]


@dataclass(frozen=True, kw_only=True)
class TypeSums:
    """Sums over all places where a token was drawn; each [token types], float64 sums in nats."""

    ids: Tensor
    counts: Tensor
    kl: Tensor
    log_ratio: Tensor


def type_sums(tokens: TokenFigures) -> TypeSums:
    """How often each token was drawn, the KL at those places, and the sum of log policy - log reference."""
    mask = tokens.response_mask
    log_ratio = (tokens.policy_logprobs.double() - tokens.ref_logprobs.double())[mask]
    ids = tokens.tokens[mask]
    return _summed(ids, torch.ones_like(ids), tokens.kl_policy_ref[mask].double(), log_ratio)


def joined_type_sums(parts: Sequence[TypeSums]) -> TypeSums:
    """The sums over all parts together."""
    columns = [torch.cat([getattr(part, name) for part in parts]) for name in ("ids", "counts", "kl", "log_ratio")]
    return _summed(*columns)


def _summed(ids: Tensor, counts: Tensor, kl: Tensor, log_ratio: Tensor) -> TypeSums:
    types, places = torch.unique(ids, return_inverse=True)

    def sums(column: Tensor) -> Tensor:
        return column.new_zeros(len(types)).index_add(0, places, column)

    return TypeSums(ids=types, counts=sums(counts), kl=sums(kl), log_ratio=sums(log_ratio))


def drifted_tokens(sums: TypeSums, sequences: int, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """The LISTED token types with the largest sum of KL over the places where they were drawn, none whose sum is 0."""
    return [
        {
            "token": tokenizer.decode([int(sums.ids[i])]),
            "token_id": int(sums.ids[i]),
            "count": int(sums.counts[i]),
            "kl_policy_ref_per_sequence": rounded(float(sums.kl[i]) / sequences),
            "mean_ratio": rounded(_ratio(float(sums.log_ratio[i] / sums.counts[i]))),
        }
        for i in _largest(sums.kl)
    ]


def _largest(kl: Tensor) -> list[int]:
    """Places, in the flattened tensor, of the LISTED largest values above 0; of equal ones the first comes first."""
    values, order = kl.flatten().sort(descending=True, stable=True)
    return [place for value, place in zip(values[:LISTED].tolist(), order[:LISTED].tolist(), strict=True) if value > 0]


def _exp(value: float) -> float:
    """exp in float64, infinite where it overflows."""
    return float(torch.tensor(value, dtype=torch.float64).exp())


def _ratio(log_ratio: float) -> float:
    """exp, held between 1 / LARGEST_RATIO and LARGEST_RATIO where the logarithm is finite."""
    most = math.log(LARGEST_RATIO)
    return math.exp(max(-most, min(most, log_ratio))) if math.isfinite(log_ratio) else _exp(log_ratio)


def rounded(value: float) -> float | None:
    """6 significant digits; None for what JSON cannot say."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
