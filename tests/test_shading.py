"""Token maps as a page carries them: nothing is lost in packing, and what does not fit is left out as promised."""

import base64
import json
import math
import struct
from typing import Any

import pytest
from mapped import a_token_map, many_token_maps

from kleash import shading
from kleash.page import embedded_json
from kleash.shading import LIKELIEST, NOTHING, MapSet, packed, shaded, shared_beginning
from kleash.token_class import TOKEN_CLASSES


def halves(column: str) -> list[float]:
    raw = base64.b64decode(column)
    return list(struct.unpack(f"<{len(raw) // 2}e", raw))


def places(column: str) -> list[int]:
    raw = base64.b64decode(column)
    return [int.from_bytes(raw[at : at + 3], "little") for at in range(0, len(raw), 3)]


def unpacked(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The token maps that a packed set holds, figures in halves."""
    types = places(found["type"])
    columns = {"kl_policy_ref": "kl", "policy_logprobs": "policy", "ref_logprobs": "ref"}
    numbers = {name: halves(found[key]) for name, key in columns.items()}
    likeliest = likeliest_of(found)
    rows, start = [], 0
    for row in found["responses"]:
        end = start + row["tokens"]
        rows.append(
            {
                "index": row["index"],
                "prompt": found["prompts"][row["prompt"]],
                "pieces": [found["strings"][found["types"]["piece"][place]] for place in types[start:end]],
                "token_ids": [found["types"]["id"][place] for place in types[start:end]],
                "classes": [TOKEN_CLASSES[int(letter)] for letter in found["class"][start:end]],
                **{name: column[start:end] for name, column in numbers.items()},
                "alternatives": [likeliest.get(place) for place in range(start, end)],
            }
        )
        start = end
    assert start == len(types) == len(found["class"]) == len(numbers["kl_policy_ref"])
    return rows


def likeliest_of(found: dict[str, Any]) -> dict[int, dict[str, list[list[Any]]]]:
    """{position: both models' likeliest tokens} of a packed set."""
    part = found["likeliest"]
    strings = [None if place == NOTHING else found["strings"][place] for place in places(part["piece"])]
    pairs = [[piece, value] for piece, value in zip(strings, halves(part["logprob"]), strict=True)]
    kept = {}
    for count, at in enumerate(places(part["at"])):
        own = pairs[2 * LIKELIEST * count : 2 * LIKELIEST * (count + 1)]
        both = {"policy": own[:LIKELIEST], "ref": own[LIKELIEST:]}
        kept[at] = {model: [pair for pair in some if pair[0] is not None] for model, some in both.items()}
    return kept


def one(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return packed(MapSet("", "", rows), 1)


def test_what_is_packed_is_what_was_there_to_three_digits() -> None:
    rows = [
        a_token_map([" So", "", "ak\n", "<eos>"], [3.90708, 0.00094, 1e-5, 0.0], index=7, prompt="caf\u00e9 </script>"),
        a_token_map(["\ud83d", " So", "\u0644"], [0.1, 12.25, 7.5], prompt=[{"role": "user", "content": "hello"}]),
    ]
    for row, found in zip(rows, unpacked(one(rows)), strict=True):
        assert found["pieces"] == row["pieces"]
        for key in ("index", "token_ids", "classes"):
            assert found[key] == row[key]
        for key in ("kl_policy_ref", "policy_logprobs", "ref_logprobs"):
            assert found[key] == pytest.approx(row[key], rel=1e-3, abs=1e-7)
        for own, kept in zip(row["alternatives"], found["alternatives"], strict=True):
            for model in ("policy", "ref"):
                assert [piece for piece, _ in kept[model]] == [piece for piece, _ in own[model]]
                assert [value for _, value in kept[model]] == pytest.approx([v for _, v in own[model]], rel=1e-3)
    assert [found["prompt"] for found in unpacked(one(rows))] == ["caf\u00e9 </script>", "user: hello"]


def test_a_response_keeps_its_own_figures_and_lacks_those_that_it_lacks() -> None:
    row = a_token_map(["a", "b"], [2.0, 0.25], index=4, score=0.5, eval_score=None, finished=False)
    [found] = one([row])["responses"]
    assert found == {
        "index": 4, "prompt": 0, "tokens": 2, "finished": False, "kl": 2.25, "k1": 2.75, "score": 0.5
    }  # fmt: skip
    given = {key: value for key, value in row.items() if not key.endswith("_k1")} | {"log_ratio_per_sequence": -1.5}
    assert one([given])["responses"][0]["log_ratio"] == -1.5
    assert "k1" not in one([given])["responses"][0]


def test_figures_that_are_not_finite_stand_beyond_every_bound() -> None:
    row = a_token_map(["a", "b"], [None, 1e6]) | {"ref_logprobs": [None, -1e6]}
    found = one([row])
    assert halves(found["kl"]) == [math.inf, math.inf]
    assert halves(found["ref"]) == [-math.inf, -math.inf]
    assert json.loads(embedded_json(found)) == found


def test_a_prompt_and_a_piece_are_there_once_and_cut_where_they_are_long() -> None:
    rows = [a_token_map([" a", " b", " a"], [0.0] * 3, index=index, prompt="p" * 9000) for index in range(3)]
    found = one([*rows, a_token_map(["x" * 900], [0.0])])
    assert found["strings"] == [" a", " b", "x" * 199 + "\u2026", "else", "other"]
    assert [len(prompt) for prompt in found["prompts"]] == [4000, len("Why?")]
    assert found["total"] == 4


def test_tokens_of_one_piece_and_several_ids_stay_apart() -> None:
    row = a_token_map(["", ""], [0.0, 0.0]) | {"token_ids": [7, 9]}
    found = one([row])
    assert found["types"] == {"piece": [0, 0], "id": [7, 9]}


def test_the_first_responses_are_kept_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [a_token_map([" a", " b"], [1.0, 0.0], index=index) for index in range(501)]
    found = one(rows)
    assert (found["total"], [row["index"] for row in found["responses"]]) == (501, list(range(500)))
    assert packed(MapSet("", "", rows, among=2000), 1)["total"] == 2000
    monkeypatch.setattr(shading, "MOST_BYTES", 2000)
    kept = one(rows)["responses"]
    assert [row["index"] for row in kept] == list(range(len(kept)))
    assert 5 <= len(kept) <= 15
    monkeypatch.setattr(shading, "MOST_BYTES", 0)
    assert len(one(rows)["responses"]) == 1


def test_the_likeliest_tokens_are_kept_where_the_kl_is_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [a_token_map(["a", "b", "c"], [0.1, 3.0, 0.2]), a_token_map(["a", "b", "c"], [2.0, 0.3, None])]
    monkeypatch.setattr(shading, "MOST_LIKELIEST_BYTES", 3.5 * shading.BYTES_PER_LIKELIEST)
    kept = [[both is not None for both in row["alternatives"]] for row in unpacked(one(rows))]
    assert kept == [[False, True, False], [True, False, True]]


def test_a_position_without_alternatives_has_none() -> None:
    row = a_token_map(["a", "b"], [1.0, 2.0], alternatives=[None, {"policy": [["b", -0.1]], "ref": []}])
    [found] = unpacked(one([row]))
    assert found["alternatives"] == [None, {"policy": [["b", pytest.approx(-0.1, rel=1e-3)]], "ref": []}]


def test_sets_without_responses_are_left_out_and_the_others_share_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [a_token_map([" a"] * 40, [1.0] * 40, index=index) for index in range(60)]
    monkeypatch.setattr(shading, "MOST_BYTES", 20_000)
    [alone] = shaded([MapSet("A", "", rows), MapSet("B", "b-", [])])
    first, second = shaded([MapSet("A", "", rows), MapSet("B", "b-", rows)])
    assert (first["label"], first["key"], second["label"], second["key"]) == ("A", "", "B", "b-")
    assert len(first["responses"]) == len(second["responses"])
    assert len(alone["responses"]) == pytest.approx(2 * len(first["responses"]), abs=1)
    assert shaded([]) == []


@pytest.mark.parametrize(("count", "length"), [(500, 64), (120, 512)])
def test_the_packed_size_stays_within_what_was_reckoned(
    count: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = many_token_maps(count, length)
    for budget in (300_000, shading.MOST_BYTES):
        monkeypatch.setattr(shading, "MOST_BYTES", budget)
        monkeypatch.setattr(shading, "MOST_LIKELIEST_BYTES", budget // 2)
        found = one(rows)
        assert len(embedded_json(found).encode()) < 1.5 * budget + 20_000
    assert len(found["responses"]) == count


def test_what_half_of_the_responses_begin_with_is_found() -> None:
    same = [a_token_map(["So", "ak", " it", "<eos>"], [0.0] * 4, prompt=prompt) for prompt in "aab"]
    other = [a_token_map(["No", "<eos>"], [0.0] * 2, prompt=prompt) for prompt in "cde"]
    expected = {"text": "Soak it<eos>", "tokens": 4, "count": 3, "of": 6, "prompts": 2, "whole": True}
    assert shared_beginning([*same, *other]) == expected
    unlike = [a_token_map([word, "<eos>"], [0.0] * 2, prompt=word) for word in ("No", "Yes", "Well", "Now")]
    assert shared_beginning([*same, *unlike]) is None, "3 of 7 are not half"
    assert shared_beginning(same[:2]) is None, "one prompt"
    longer = a_token_map(["So", "ak", " it", " up"], [0.0] * 4, prompt="f")
    found = shared_beginning([*same[1:], longer, *other])
    assert found == {"text": "Soak it", "tokens": 3, "count": 3, "of": 6, "prompts": 3, "whole": False}
    assert shared_beginning([]) is None
