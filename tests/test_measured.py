"""What a measurement says: its intervals, and every figure that goes into the JSON file."""

import json
import math

import pytest
import torch
from answers import some_answers
from tiny import tiny_tokenizer

from kleash import measured as measured_module
from kleash.batch import Prompts
from kleash.estimators import Interval, mean_with_interval, skewness
from kleash.measured import (
    MeasuredDrift,
    by_prompt,
    k1_responses_for_same_interval,
    measured_drift,
)
from kleash.tally import Tally, as_json

PROMPTS = Prompts(texts=["one", "two", [{"role": "user", "content": "three"}]], tokens=[[3], [4], [5]], columns={})
UNEVEN, EVEN = [2, 0, 2, 0, 2], [2, 0, 0, 2, 2, 0]


def tally_of(prompts: list[int]) -> Tally:
    tally = Tally(tokenizer=tiny_tokenizer())
    for start in range(0, len(prompts), 2):
        rows = prompts[start : start + 2]
        tally.add(torch.tensor(rows), *some_answers(start, [3, 5][: len(rows)]))
    return tally


def found(
    prompts: list[int] = UNEVEN, *, written_by_policy: bool = True, sampled: bool = True, narrow_enough: bool = True
) -> MeasuredDrift:
    settings = {"policy": "p", "written_by_policy": written_by_policy}
    return measured_drift(
        tally_of(prompts),
        PROMPTS,
        settings,
        sampled=sampled,
        token_maps=[{"index": 0}],
        narrow_enough=narrow_enough,
    )


INTERVALS = {
    "kl_policy_ref_per_sequence": ("kl_policy_ref", False),
    "log_ratio_per_sequence": ("kl_policy_ref_k1", False),
    "kl_policy_ref_per_token": ("kl_policy_ref", True),
    "policy_entropy_per_token": ("policy_entropy", True),
    "ref_entropy_per_token": ("ref_entropy", True),
    "response_length": ("length", False),
}


@pytest.mark.parametrize(("prompts", "strata"), [(UNEVEN, None), (EVEN, torch.tensor(EVEN))])
def test_every_interval_is_of_its_own_sums_and_of_the_prompts_where_each_has_as_many(prompts, strata):
    measured, tally = found(prompts), tally_of(prompts)
    for name, (column, per_token) in INTERVALS.items():
        lengths = tally.column("length") if per_token else None
        expected = mean_with_interval(tally.column(column), lengths, strata=strata)
        assert getattr(measured, name) == expected, name
        key = "kl_policy_ref_per_sequence_k1" if name == "log_ratio_per_sequence" else name
        assert measured.figures[key] == as_json(expected), name
    covers = "the responses and the choice of prompts" if strata is None else "the responses"
    assert measured.figures["interval_covers"] == covers


def test_of_responses_that_somebody_else_wrote_no_figure_is_called_k1():
    own, others = found().figures, found(written_by_policy=False).figures
    assert own["convergence"]
    assert others["log_ratio_per_sequence"] == own["kl_policy_ref_per_sequence_k1"]
    assert "_k1" not in json.dumps({key: value for key, value in others.items() if key[:3] != "k1_"})
    assert others["k1_responses_for_same_interval"] is None
    assert own["k1_responses_for_same_interval"] > 0
    assert "log_ratio" not in json.dumps(own)


def test_sampler_and_scorer_are_held_against_each_other_where_there_was_a_sampler():
    own, given = found().figures, found(sampled=False).figures
    tally = tally_of(UNEVEN)
    k3, apart, length = map(tally.column, ("kl_rollout_policy_k3", "logprob_mismatch", "length"))
    assert own["kl_rollout_policy_per_token_k3"] == pytest.approx(float(k3.sum() / length.sum()), rel=1e-5)
    assert own["logprob_mismatch_max"] == pytest.approx(float(apart.max()), rel=1e-5)
    assert given["kl_rollout_policy_per_token_k3"] is given["logprob_mismatch_max"] is None


def test_the_settings_stand_first_and_the_counts_are_those_of_what_was_answered():
    figures = found().figures
    assert list(figures)[:2] == ["policy", "written_by_policy"]
    assert (figures["prompts_count"], figures["responses_count"]) == (2, 5)
    assert figures["finished_share"] == pytest.approx(0.4)


def test_the_figures_are_json_without_nan_or_infinity_also_from_one_response():
    for prompts in (UNEVEN, EVEN, [1]):
        figures = found(prompts).figures
        assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    assert figures["kl_policy_ref_per_sequence"]["low"] is None
    assert figures["k1_responses_for_same_interval"] is None
    assert figures["convergence"] == []


def test_maps_and_whether_it_is_narrow_enough_are_handed_on():
    assert found().token_maps == [{"index": 0}]
    assert found().narrow_enough
    assert not found(narrow_enough=False).narrow_enough


def test_each_prompt_that_was_answered_has_its_own_drift_in_the_order_of_the_file():
    tally = tally_of(UNEVEN)
    rows = by_prompt(tally, PROMPTS, log_ratio="k1")
    assert [row["prompt"] for row in rows] == ["one", PROMPTS.texts[2]]
    for row, places in zip(rows, ([1, 3], [0, 2, 4]), strict=True):
        kl, k1, length = (tally.column(name)[places] for name in ("kl_policy_ref", "kl_policy_ref_k1", "length"))
        assert row["responses"] == len(places)
        assert row["kl_policy_ref_per_sequence"] == as_json(mean_with_interval(kl))
        assert row["k1"] == pytest.approx(float(k1.mean()), rel=1e-5)
        assert row["response_length"] == pytest.approx(float(length.mean()))


def interval(half_width: float, n: int = 100) -> Interval:
    return Interval(mean=1.0, low=1.0 - half_width, high=1.0 + half_width, n=n)


def test_five_times_the_width_is_twenty_five_times_the_responses():
    assert k1_responses_for_same_interval(interval(0.25), interval(1.25)) == 2500
    assert k1_responses_for_same_interval(interval(0.5), interval(0.25)) == 25


@pytest.mark.parametrize("exact", [interval(0.0), interval(math.inf, n=1)])
def test_without_a_width_or_from_one_response_there_is_no_such_number(exact):
    assert k1_responses_for_same_interval(exact, interval(0.5)) is None


@pytest.mark.parametrize("prompts", [UNEVEN, [0, 2, 0, 2, 2, 0]])
def test_the_skewness_is_that_of_the_exact_sums_about_what_the_interval_covers(prompts):
    tally = tally_of(prompts)
    expected = skewness(tally.column("kl_policy_ref"), strata=tally.strata)
    assert found(prompts).figures["kl_policy_ref_per_sequence_skewness"] == pytest.approx(expected, rel=1e-5)


def test_the_writer_is_doubted_only_where_the_policy_is_said_to_have_written_what_was_given(monkeypatch):
    monkeypatch.setattr(measured_module, "doubt_of_the_writer", lambda exact, k1, strata: "not its own")
    asked = {(own, sampled): found(written_by_policy=own, sampled=sampled) for own in (0, 1) for sampled in (0, 1)}
    said = {key: one.figures["writer_doubt"] for key, one in asked.items()}
    assert said == {(0, 0): None, (0, 1): None, (1, 0): "not its own", (1, 1): None}
