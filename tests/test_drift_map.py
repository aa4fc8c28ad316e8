"""The drift map: sums and lists of a small update, each against a loop over its tokens."""

import json
import math
from dataclasses import replace

import pytest
import torch
from exact import generator
from tiny import WORDS, tiny_tokenizer
from transformers import AddedToken

from kleash.drift import CONTEXT, TokenFigures
from kleash.drift_map import LISTED, drift_map, special_token_ids
from kleash.token_class import TOKEN_CLASSES, token_classes

EOS, SPECIAL = [1], [0, 1, 2]
LENGTHS = [6, 1, 4, 3, 6]


def some_figures(seed: int = 0, *, time: int = 8) -> TokenFigures:
    """Five responses of up to six tokens to prompts of several lengths; nobody reaches the last two positions."""
    draw = generator(seed)
    batch = len(LENGTHS)
    tokens = torch.randint(len(WORDS), (batch, time), generator=draw)
    mask = torch.arange(time) < torch.tensor(LENGTHS).unsqueeze(1)
    numbers = [torch.rand(batch, time, generator=draw) * mask for _ in range(3)]
    return TokenFigures(
        tokens=tokens,
        response_mask=mask,
        policy_logprobs=-numbers[0],
        ref_logprobs=-4 * numbers[1],
        kl_policy_ref=numbers[2] ** 4,
        classes=token_classes(tokens, mask, eos_token_ids=EOS, special_token_ids=SPECIAL),
        prompt_ends=torch.randint(3, len(WORDS), (batch, CONTEXT), generator=draw),
        prompt_ends_mask=torch.arange(CONTEXT) >= torch.tensor([0, 2, CONTEXT - 3, CONTEXT - 1, 5]).unsqueeze(1),
    )


def mapped(figures: TokenFigures) -> dict:
    return drift_map(3, figures, tiny_tokenizer())


def places(figures: TokenFigures) -> list[tuple[int, int]]:
    return [(row, position) for row, position in figures.response_mask.nonzero().tolist()]


def exactly(value: float) -> object:
    return pytest.approx(value, rel=1e-5, abs=1e-12)


def test_each_position_has_its_share_of_the_kl_and_the_responses_that_reach_it():
    figures = some_figures()
    rows = mapped(figures)["by_position"]
    assert [row["position"] for row in rows] == list(range(6))
    for row in rows:
        there = [place for place in places(figures) if place[1] == row["position"]]
        assert row["sequences"] == len(there)
        assert row["kl_policy_ref_per_sequence"] == exactly(sum(float(figures.kl_policy_ref[p]) for p in there) / 5)


def test_positions_and_classes_each_add_up_to_the_kl_per_sequence():
    figures = some_figures()
    found, total = mapped(figures), float(figures.kl_policy_ref.double().sum()) / 5
    assert sum(row["kl_policy_ref_per_sequence"] for row in found["by_position"]) == exactly(total)
    assert sum(row["kl_policy_ref_per_sequence"] for row in found["by_class"].values()) == exactly(total)
    assert sum(row["tokens"] for row in found["by_class"].values()) == sum(LENGTHS)


def test_each_class_has_its_tokens_and_their_mean():
    figures = some_figures()
    found = mapped(figures)["by_class"]
    assert list(found) == list(TOKEN_CLASSES)
    for number, name in enumerate(TOKEN_CLASSES):
        kl = [float(figures.kl_policy_ref[place]) for place in places(figures) if figures.classes[place] == number]
        assert kl, "every class occurs"
        assert found[name] == {
            "tokens": len(kl),
            "kl_policy_ref_per_sequence": exactly(sum(kl) / 5),
            "kl_policy_ref_per_token": exactly(sum(kl) / len(kl)),
        }


def test_a_class_without_tokens_has_no_mean():
    figures = some_figures()
    nobody = replace(figures, classes=torch.where(figures.response_mask, TOKEN_CLASSES.index("other"), -1))
    assert mapped(nobody)["by_class"]["eos"] == {
        "tokens": 0,
        "kl_policy_ref_per_sequence": 0.0,
        "kl_policy_ref_per_token": None,
    }


def first_of_each_token(figures: TokenFigures, ordered: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The places at which a token stands that stood at none before."""
    seen: dict[int, tuple[int, int]] = {}
    for place in ordered:
        seen.setdefault(int(figures.tokens[place]), place)
    return list(seen.values())


def test_the_top_tokens_are_each_tokens_place_of_the_largest_kl_with_what_stood_before_it():
    figures = some_figures()
    found = mapped(figures)["top_tokens"]
    by_kl = sorted(places(figures), key=lambda place: -float(figures.kl_policy_ref[place]))
    ordered = first_of_each_token(figures, by_kl)
    assert len(ordered) < len(by_kl), "some token stands twice"
    assert [(token["sequence"], token["position"]) for token in found] == ordered[:LISTED]
    for token, (row, position) in zip(found, ordered, strict=False):
        number = int(figures.tokens[row, position])
        policy, ref = float(figures.policy_logprobs[row, position]), float(figures.ref_logprobs[row, position])
        prompt = figures.prompt_ends[row][figures.prompt_ends_mask[row]].tolist()
        before = [*prompt, *figures.tokens[row, :position].tolist()][-CONTEXT:]
        assert token == {
            "token": WORDS[number],
            "token_id": number,
            "class": TOKEN_CLASSES[int(figures.classes[row, position])],
            "position": position,
            "sequence": row,
            "kl_policy_ref": exactly(float(figures.kl_policy_ref[row, position])),
            "policy_prob": exactly(math.exp(policy)),
            "ref_prob": exactly(math.exp(ref)),
            "ratio": exactly(math.exp(policy - ref)),
            "context": tiny_tokenizer().decode(before),
        }


def test_the_drifted_tokens_are_the_types_with_the_largest_sum():
    figures = some_figures()
    expected = []
    for number, word in enumerate(WORDS):
        there = [place for place in places(figures) if figures.tokens[place] == number]
        if there:
            ratios = [float(figures.policy_logprobs[p]) - float(figures.ref_logprobs[p]) for p in there]
            kl = sum(float(figures.kl_policy_ref[p]) for p in there) / 5
            expected.append(
                {
                    "token": word,
                    "token_id": number,
                    "count": len(there),
                    "kl_policy_ref_per_sequence": exactly(kl),
                    "mean_ratio": exactly(math.exp(sum(ratios) / len(ratios))),
                    "order": -kl,
                }
            )
    expected.sort(key=lambda token: token.pop("order"))
    assert mapped(figures)["drifted_tokens"] == expected[:LISTED]
    assert max(token["count"] for token in expected) > 1


def test_a_policy_that_has_not_moved_has_no_drifted_tokens():
    figures = some_figures()
    still = replace(
        figures, ref_logprobs=figures.policy_logprobs, kl_policy_ref=torch.zeros_like(figures.kl_policy_ref)
    )
    found = mapped(still)
    assert found["top_tokens"] == found["drifted_tokens"] == []
    assert all(row["kl_policy_ref_per_sequence"] == 0 for row in found["by_position"])


def test_equal_kls_are_listed_in_the_order_of_the_prompts():
    figures = some_figures()
    same = replace(figures, kl_policy_ref=figures.response_mask.float())
    found = mapped(same)["top_tokens"]
    first = first_of_each_token(figures, places(figures))
    assert [(token["sequence"], token["position"]) for token in found] == first[:LISTED]


@pytest.mark.parametrize(("ref", "ratio"), [(-2000.0, 1e300), (2000.0, 1e-300), (-math.inf, None)])
def test_a_ratio_that_would_overflow_is_held_and_the_line_stays_json(ref, ratio):
    figures = some_figures()
    found = mapped(replace(figures, ref_logprobs=torch.where(figures.response_mask, ref, 0.0)))
    assert found["top_tokens"]
    assert found["drifted_tokens"]
    assert {token["ratio"] for token in found["top_tokens"]} == {ratio}
    assert {token["mean_ratio"] for token in found["drifted_tokens"]} == {ratio}
    assert all(token["ref_prob"] == 0 for token in found["top_tokens"] if ref < 0)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_floats_have_six_significant_digits():
    line = json.dumps(mapped(some_figures()))
    numbers: list[str] = []
    json.loads(line, parse_float=lambda text: numbers.append(text))
    assert len(numbers) > 40
    assert all(len(text.lower().split("e")[0].replace(".", "").lstrip("0")) <= 6 for text in numbers)


def test_special_tokens_are_the_tokenizers_and_the_marks_of_its_template():
    tokenizer = tiny_tokenizer()
    assert special_token_ids(tokenizer) == [0, 1, 2]
    marks = [AddedToken("<think>", special=False), AddedToken("<name>", special=False)]
    tokenizer.add_tokens(marks)
    tokenizer.add_tokens([AddedToken("<turn>", special=True)], special_tokens=True)
    think, name, turn = tokenizer.convert_tokens_to_ids(["<think>", "<name>", "<turn>"])
    assert special_token_ids(tokenizer) == [0, 1, 2, turn]
    tokenizer.chat_template = "{{ messages }}<think>"
    assert special_token_ids(tokenizer) == sorted([0, 1, 2, think, turn])
    assert name not in special_token_ids(tokenizer)
    tokenizer.pad_token = "cat"
    assert WORDS.index("cat") in special_token_ids(tokenizer)
