"""A response token by token (kleash.token_map): each figure in its place, and texts that join to the response."""

import json
import math

import pytest
import torch
from answers import some_answers
from tiny import WORDS, tiny_tokenizer

from kleash.pieces import Pieces
from kleash.reading import Alternatives, Likeliest
from kleash.token_class import TOKEN_CLASSES
from kleash.token_map import token_maps

LENGTHS = [4, 6, 1]


def some_alternatives(kept: torch.Tensor) -> Alternatives:
    """Three tokens a position; the third of the reference is forbidden."""
    shape = (*kept.shape, 3)
    tokens = torch.arange(kept.numel() * 3).view(shape) % len(WORDS)
    logprobs = -torch.arange(1.0, 4.0).expand(shape)
    forbidden = torch.where(torch.arange(3) == 2, -math.inf, logprobs - 0.5)
    return Alternatives(
        kept=kept,
        policy=Likeliest(tokens=tokens, logprobs=logprobs),
        ref=Likeliest(tokens=tokens.flip(-1), logprobs=forbidden),
    )


def test_each_token_has_its_figures_and_none_stands_for_padding():
    rollout, reading, tokens = some_answers(0, LENGTHS)
    found = token_maps(tokens, None, Pieces(tiny_tokenizer()), rows=3)
    assert len(found) == 3
    for row, (mapped, length) in enumerate(zip(found, LENGTHS, strict=True)):
        assert mapped["token_ids"] == rollout.responses[row, :length].tolist()
        assert mapped["classes"] == [TOKEN_CLASSES[number] for number in tokens.classes[row, :length].tolist()]
        for name, column in (
            ("kl_policy_ref", reading.kl_policy_ref_per_token),
            ("policy_logprobs", reading.policy_logprobs),
            ("ref_logprobs", reading.ref_logprobs),
        ):
            assert mapped[name] == pytest.approx(column[row, :length].tolist(), rel=1e-5), name
        assert "".join(mapped["pieces"]) == "".join(f" {WORDS[token]}" for token in mapped["token_ids"]).replace(
            " .", "."
        )
        assert mapped["alternatives"] == [None] * length


def test_only_the_first_responses_are_mapped():
    _, _, tokens = some_answers(0, LENGTHS)
    pieces = Pieces(tiny_tokenizer())
    assert token_maps(tokens, None, pieces, rows=2) == token_maps(tokens, None, pieces, rows=3)[:2]
    assert token_maps(tokens, None, pieces, rows=0) == []


def test_alternatives_stand_where_they_were_kept_likeliest_first_and_without_the_impossible():
    rollout, _, tokens = some_answers(0, LENGTHS)
    kept = torch.zeros_like(rollout.response_mask)
    kept[0, 2] = kept[1, 0] = True
    found = token_maps(tokens, some_alternatives(kept), Pieces(tiny_tokenizer()), rows=3)
    places = [(row, t) for row, mapped in enumerate(found) for t, one in enumerate(mapped["alternatives"]) if one]
    assert places == [(0, 2), (1, 0)]
    first = 3 * 2
    names = [Pieces(tiny_tokenizer()).of_token((first + number) % len(WORDS)) for number in range(3)]
    assert found[0]["alternatives"][2] == {
        "policy": [[names[0], -1.0], [names[1], -2.0], [names[2], -3.0]],
        "ref": [[names[2], -1.5], [names[1], -2.5]],
    }


def test_a_map_is_json_also_where_a_figure_is_infinite():
    _, _, tokens = some_answers(0, LENGTHS)
    tokens.ref_logprobs[0, 1] = -math.inf
    found = token_maps(tokens, None, Pieces(tiny_tokenizer()), rows=1)
    assert found[0]["ref_logprobs"][1] is None
    assert json.loads(json.dumps(found, allow_nan=False)) == found
