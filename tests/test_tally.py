"""Sums over batches, each against a loop over all responses; and the same sums whatever the batches were."""

import math

import pytest
import torch
from answers import some_answers
from tiny import tiny_tokenizer

from kleash.drift_map import LISTED, drift_map
from kleash.estimators import Interval, mean_with_interval
from kleash.tally import CONVERGENCE_POINTS, K1, KL, LOG_RATIO, Tally, as_json, even_strata
from kleash.token_class import TOKEN_CLASSES

BATCHES = [(0, [4, 6, 1], [0, 1, 2]), (1, [3, 5], [2, 0]), (2, [8, 2, 6], [1, 1, 0])]


def tally_of(batches: list[tuple[int, list[int], list[int]]] = BATCHES) -> Tally:
    tally = Tally(tokenizer=tiny_tokenizer())
    for seed, lengths, prompts in batches:
        tally.add(torch.tensor(prompts), *some_answers(seed, lengths))
    return tally


def each_response() -> list[dict[str, list[float]]]:
    """Every response with the figures of its tokens, in the order of sampling."""
    found = []
    for seed, lengths, _ in BATCHES:
        _, reading, tokens = some_answers(seed, lengths)
        for row, length in enumerate(lengths):
            figures = {
                name: column[row, :length].double().tolist()
                for name, column in vars(reading).items()
                if name != "alternatives"
            }
            found.append(
                {
                    **figures,
                    "tokens": tokens.tokens[row, :length].tolist(),
                    "classes": tokens.classes[row, :length].tolist(),
                }
            )
    return found


def exactly(value: float) -> object:
    return pytest.approx(value, rel=1e-5, abs=1e-9)


def test_each_response_has_its_sums():
    tally, responses = tally_of(), each_response()
    assert tally.responses == len(responses) == 8
    assert tally.column("prompt").tolist() == [0, 1, 2, 2, 0, 1, 1, 0]
    sums = {
        "kl_policy_ref": [sum(one["kl_policy_ref_per_token"]) for one in responses],
        "kl_policy_ref_k1": [sum(one["policy_logprobs"]) - sum(one["ref_logprobs"]) for one in responses],
        "policy_entropy": [sum(one["policy_entropy"]) for one in responses],
        "ref_entropy": [sum(one["ref_entropy"]) for one in responses],
        "length": [len(one["tokens"]) for one in responses],
        "kl_rollout_policy_k3": [sum(math.exp(x) - 1 - x for x in one["policy_logprobs"]) for one in responses],
        "logprob_mismatch": [max(-x for x in one["policy_logprobs"]) for one in responses],
        "finished": [1, 0, 1, 1, 0, 0, 1, 1],
    }
    for name, expected in sums.items():
        assert tally.column(name).dtype == torch.float64
        assert tally.column(name).tolist() == pytest.approx(expected, abs=1e-5), name


def test_an_interval_is_that_of_the_sums():
    tally = tally_of()
    kl, lengths = tally.column("kl_policy_ref"), tally.column("length")
    assert tally.interval("kl_policy_ref") == mean_with_interval(kl)
    assert tally.interval("kl_policy_ref", per_token=True) == mean_with_interval(kl, lengths)
    strata = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1])
    assert tally.interval("kl_policy_ref", strata=strata) == mean_with_interval(kl, strata=strata)


def test_each_position_has_its_part_of_the_drift_and_an_interval_among_those_that_reach_it():
    rows, responses = tally_of().positions(), each_response()
    assert [row["position"] for row in rows] == list(range(8))
    for row in rows:
        there = [
            one["kl_policy_ref_per_token"][row["position"]] for one in responses if len(one["tokens"]) > row["position"]
        ]
        assert row["sequences"] == len(there)
        assert row["kl_policy_ref_per_sequence"] == exactly(sum(there) / 8)
        assert row["kl_policy_ref_per_token"] == exactly(sum(there) / len(there))
        interval = mean_with_interval(torch.tensor(there, dtype=torch.float64))
        if len(there) == 1:
            assert (row["low"], row["high"]) == (None, None)
        else:
            assert (row["low"], row["high"]) == (exactly(interval.low), exactly(interval.high))
    assert sum(row["kl_policy_ref_per_sequence"] for row in rows) == exactly(tally_of().interval("kl_policy_ref").mean)


def test_a_position_where_all_agree_has_an_interval_without_width():
    rollout, reading, tokens = some_answers(0, [2, 2])
    reading.kl_policy_ref_per_token[:, 0] = tokens.kl_policy_ref[:, 0] = 0.1
    tally = Tally(tokenizer=tiny_tokenizer())
    tally.add(torch.tensor([0, 0]), rollout, reading, tokens)
    row = tally.positions()[0]
    assert row["low"] == row["high"] == row["kl_policy_ref_per_token"] == 0.1


def test_each_class_has_its_tokens_and_its_part_of_the_drift():
    found, responses = tally_of().classes(), each_response()
    assert list(found) == list(TOKEN_CLASSES)
    for number, name in enumerate(TOKEN_CLASSES):
        kl = [
            value
            for one in responses
            for value, own in zip(one["kl_policy_ref_per_token"], one["classes"], strict=True)
            if own == number
        ]
        assert found[name]["tokens"] == len(kl)
        assert found[name]["kl_policy_ref_per_sequence"] == exactly(sum(kl) / 8)
        assert found[name]["kl_policy_ref_per_token"] == (exactly(sum(kl) / len(kl)) if kl else None)
    assert found["eos"]["tokens"] == 5
    assert found["special"]["kl_policy_ref_per_token"] is None


def test_the_drifted_tokens_are_summed_over_all_batches():
    found, responses = tally_of().drifted_tokens(), each_response()
    sums: dict[int, list[float]] = {}
    for one in responses:
        for token, kl in zip(one["tokens"], one["kl_policy_ref_per_token"], strict=True):
            sums.setdefault(token, []).append(kl)
    ordered = sorted(sums, key=lambda token: -sum(sums[token]))[:LISTED]
    assert [entry["token_id"] for entry in found] == ordered
    for entry in found:
        assert entry["count"] == len(sums[entry["token_id"]])
        assert entry["kl_policy_ref_per_sequence"] == exactly(sum(sums[entry["token_id"]]) / 8)


def test_the_top_places_are_each_tokens_place_of_the_largest_kl_over_all_batches():
    found, responses = tally_of().places, each_response()
    places = [
        (-kl, sequence, position, one["tokens"][position])
        for sequence, one in enumerate(responses)
        for position, kl in enumerate(one["kl_policy_ref_per_token"])
    ]
    first: dict[int, tuple[int, int]] = {}
    for _, sequence, position, token in sorted(places):
        first.setdefault(token, (sequence, position))
    assert [(entry["sequence"], entry["position"]) for entry in found] == list(first.values())[:LISTED]
    assert len({entry["token_id"] for entry in found}) == len(found)


def test_of_places_with_one_kl_the_first_response_is_named_also_across_batches():
    tally = Tally(tokenizer=tiny_tokenizer())
    for _ in range(2):
        rollout, reading, tokens = some_answers(0, [1, 1])
        tokens.tokens[:], tokens.kl_policy_ref[:] = torch.tensor([[5], [6]]), 0.25
        tally.add(torch.tensor([0, 0]), rollout, reading, tokens)
    assert [(entry["token_id"], entry["sequence"]) for entry in tally.places] == [(5, 0), (6, 1)]


def test_the_sums_are_those_of_one_batch_of_all_responses():
    """The drift map of an update is the same sums over one batch."""
    whole = Tally(tokenizer=tiny_tokenizer())
    rollout, reading, tokens = some_answers(0, [4, 6, 1])
    whole.add(torch.tensor([0, 1, 2]), rollout, reading, tokens)
    expected = drift_map(1, tokens, tiny_tokenizer())
    for row, mapped in zip(whole.positions(), expected["by_position"], strict=True):
        assert row["kl_policy_ref_per_sequence"] == exactly(mapped["kl_policy_ref_per_sequence"])
    assert whole.places == expected["top_tokens"]
    for name in TOKEN_CLASSES:
        assert whole.classes()[name]["tokens"] == expected["by_class"][name]["tokens"]
        assert whole.classes()[name]["kl_policy_ref_per_sequence"] == exactly(
            expected["by_class"][name]["kl_policy_ref_per_sequence"]
        )


def test_a_response_of_the_last_batch_is_found_by_its_place_among_all():
    tally = tally_of()
    kl, k1 = tally.column("kl_policy_ref"), tally.column("kl_policy_ref_k1")
    assert tally.of_response(6, written_by_policy=True) == {
        "kl_policy_ref_per_sequence": exactly(float(kl[6])),
        "kl_policy_ref_per_sequence_k1": exactly(float(k1[6])),
    }
    assert "log_ratio_per_sequence" in tally.of_response(5, written_by_policy=False)


@pytest.mark.parametrize(("written_by_policy", "other"), [(True, K1), (False, LOG_RATIO)])
def test_the_figures_converge_to_those_of_all_responses_and_have_their_names(written_by_policy, other):
    tally = tally_of()
    found = tally.convergence(written_by_policy=written_by_policy)
    assert [entry["n"] for entry in found] == list(range(2, 9))
    for entry in found:
        assert list(entry) == ["n", KL, other]
        for name, column in ((KL, "kl_policy_ref"), (other, "kl_policy_ref_k1")):
            assert entry[name] == as_json(mean_with_interval(tally.column(column)[: entry["n"]]), n=False)


def test_with_several_responses_to_each_prompt_the_estimates_after_whole_passes_are_those_of_the_header():
    lengths = [3, 4, 5, 2, 6, 4, 3, 3]
    tally = tally_of([(seed, lengths, [0, 1, 2, 3, 3, 2, 1, 0]) for seed in range(3)])
    found = tally.convergence(written_by_policy=True)
    assert {entry["n"] for entry in found} == {2, 3, 4, 8, 12, 16, 20, 24}
    last = tally.interval("kl_policy_ref", strata=tally.strata)
    assert found[-1][KL] == as_json(last, n=False)
    assert last != tally.interval("kl_policy_ref")


def test_few_points_say_how_thousands_of_responses_converge():
    tally = tally_of()
    tally.columns = {name: [torch.cat(values).repeat(1000)] for name, values in tally.columns.items()}
    tally.columns["prompt"] = [torch.arange(8000)]
    counts = [entry["n"] for entry in tally.convergence(written_by_policy=True)]
    assert (counts[0], counts[-1]) == (2, 8000)
    assert len(counts) <= CONVERGENCE_POINTS
    assert counts == sorted(set(counts))


def test_one_response_converges_to_nothing():
    assert tally_of([(0, [3], [0])]).convergence(written_by_policy=True) == []


@pytest.mark.parametrize("prompts", [[0], [0, 1, 2], [0, 0, 1], [0, 0, 0, 1, 1], []])
def test_prompts_that_do_not_stand_equally_often_and_twice_are_no_strata(prompts):
    if prompts:
        assert even_strata(torch.tensor(prompts)) is None


def test_as_json_has_six_digits_and_null_for_an_end_that_is_infinite():
    assert as_json(Interval(mean=1.23456789, low=-math.inf, high=math.inf, n=1)) == {
        "mean": 1.23457,
        "low": None,
        "high": None,
        "n": 1,
    }
    assert as_json(Interval(mean=1.0, low=0.5, high=1.5, n=4), n=False) == {"mean": 1.0, "low": 0.5, "high": 1.5}
