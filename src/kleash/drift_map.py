"""Where the policy drifts: the exact KL(policy || reference) of an update by position, by class, by token.

The KL at a position compares two distributions before a token is drawn there; the token that stands beside it is
the one that was drawn. So a token with a large KL marks a place of large drift, and its ratio policy / reference
says whether the policy writes it more often than the reference would, or less.
"""

import math
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kleash.drift import CONTEXT, TokenFigures
from kleash.token_class import TOKEN_CLASSES

LISTED = 10  # tokens in each of the two lists


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
    top_tokens:     the positions with the largest KL, each with the token drawn there and what stood before it.
    drifted_tokens: the token types with the largest sum of KL over the places where they were drawn.

    The rows of by_position, and those of by_class, add up to the record's kl_policy_ref_per_sequence. Both lists
    hold at most LISTED entries, and none whose KL is 0.
    """
    return {
        "update": update,
        "by_position": _by_position(tokens),
        "by_class": {name: _of_class(tokens, name) for name in TOKEN_CLASSES},
        "top_tokens": _top_tokens(tokens, tokenizer),
        "drifted_tokens": _drifted_tokens(tokens, tokenizer),
    }


def _by_position(tokens: TokenFigures) -> list[dict[str, Any]]:
    reached = tokens.response_mask.sum(0).tolist()
    kl = (tokens.kl_policy_ref.double().sum(0) / len(tokens.tokens)).tolist()
    return [
        {"position": t, "sequences": reached[t], "kl_policy_ref_per_sequence": _rounded(kl[t])}
        for t in range(len(reached))
        if reached[t]
    ]


def _of_class(tokens: TokenFigures, name: str) -> dict[str, Any]:
    mask = tokens.of_class(name)
    count, kl = int(mask.sum()), float(tokens.kl_policy_ref.double()[mask].sum())
    return {
        "tokens": count,
        "kl_policy_ref_per_sequence": _rounded(kl / len(mask)),
        "kl_policy_ref_per_token": _rounded(kl / count) if count else None,
    }


def _top_tokens(tokens: TokenFigures, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    time = tokens.tokens.shape[1]
    return [_top_token(tokens, place // time, place % time, tokenizer) for place in _largest(tokens.kl_policy_ref)]


def _top_token(tokens: TokenFigures, row: int, position: int, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    token = int(tokens.tokens[row, position])
    policy, ref = float(tokens.policy_logprobs[row, position]), float(tokens.ref_logprobs[row, position])
    return {
        "token": tokenizer.decode([token]),
        "token_id": token,
        "class": TOKEN_CLASSES[int(tokens.classes[row, position])],
        "position": position,
        "sequence": row,
        "kl_policy_ref": _rounded(float(tokens.kl_policy_ref[row, position])),
        "policy_prob": _rounded(_exp(policy)),
        "ref_prob": _rounded(_exp(ref)),
        "ratio": _rounded(_exp(policy - ref)),
        "context": tokenizer.decode(_before(tokens, row, position)),
    }


def _before(tokens: TokenFigures, row: int, position: int) -> list[int]:
    """The last CONTEXT tokens before a response token, those of the prompt included."""
    prompt = tokens.prompt_ends[row][tokens.prompt_ends_mask[row]].tolist()
    written: list[int] = [*prompt, *tokens.tokens[row, :position].tolist()]
    return written[-CONTEXT:]


def _drifted_tokens(tokens: TokenFigures, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    mask = tokens.response_mask
    types, places, counts = torch.unique(tokens.tokens[mask], return_inverse=True, return_counts=True)
    zeros = torch.zeros(len(types), dtype=torch.float64)
    kl = zeros.index_add(0, places, tokens.kl_policy_ref[mask].double())
    log_ratio = zeros.index_add(0, places, (tokens.policy_logprobs.double() - tokens.ref_logprobs.double())[mask])
    return [
        {
            "token": tokenizer.decode([int(types[i])]),
            "token_id": int(types[i]),
            "count": int(counts[i]),
            "kl_policy_ref_per_sequence": _rounded(float(kl[i]) / len(mask)),
            "mean_ratio": _rounded(_exp(float(log_ratio[i] / counts[i]))),
        }
        for i in _largest(kl)
    ]


def _largest(kl: Tensor) -> list[int]:
    """Places, in the flattened tensor, of the LISTED largest values above 0; of equal ones the first comes first."""
    values, order = kl.flatten().sort(descending=True, stable=True)
    return [place for value, place in zip(values[:LISTED].tolist(), order[:LISTED].tolist(), strict=True) if value > 0]


def _exp(value: float) -> float:
    """exp in float64, infinite where it overflows."""
    return float(torch.tensor(value, dtype=torch.float64).exp())


def _rounded(value: float) -> float | None:
    """6 significant digits; None for what JSON cannot say."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
