"""Where it drifts, as tables and bars: shares, sums and words of a small drift map."""

import math
from dataclasses import replace

import pytest
from mapped import a_drift_map

from kleash import drift_tables
from kleash.verdict import Run


def run_of_nothing() -> Run:
    return Run("run", {}, [], [], [])


@pytest.mark.parametrize("width", [1, 3, 7, 200])
def test_the_bars_over_the_positions_add_up_to_the_drift(width: int) -> None:
    row = a_drift_map(5, [place / 10 for place in range(100)])
    bars = drift_tables.drawn_positions(row, width)
    assert math.fsum(bars["kl"]) == pytest.approx(drift_tables.total_drift(row), rel=1e-4)
    ranges = [range(first, last + 1) for first, last in zip(bars["first"], bars["last"], strict=True)]
    assert [place for part in ranges for place in part] == list(range(100))
    assert all(len(part) == width for part in ranges[:-1])
    assert bars["reached"] == [4 - first % 2 for first in bars["first"]]


def test_all_runs_share_a_width_of_bars_that_keeps_them_few() -> None:
    runs = [replace(run_of_nothing(), drift_maps=[a_drift_map(5, [0.1] * length)]) for length in (10, 150)]
    assert drift_tables.bar_width(runs) == 3
    assert drift_tables.bar_width(runs[:1]) == 1
    assert drift_tables.bar_width([run_of_nothing()]) == 1


def test_each_class_has_its_share_of_the_tokens_beside_that_of_the_drift() -> None:
    first, other = drift_tables.class_rows(a_drift_map(5, [2.0, 1.0, 1.0]))
    assert (first["name"], first["share_of_tokens"], first["share_of_kl"], first["per_token"]) == (
        *("First token", 0.25, 0.5, 2.0),
    )
    assert (other["name"], other["share_of_tokens"], other["share_of_kl"]) == ("Other", 0.75, 0.5)
    assert drift_tables.class_rows({"update": 1}) == []


def test_a_place_of_large_drift_says_the_token_its_context_and_how_likely_it_was() -> None:
    [place] = drift_tables.drift_summary(replace(run_of_nothing(), drift_maps=[a_drift_map(5, [2.0, 1.0])]))["places"]
    assert place == {
        "token": "\u2423Use",
        "context": " Use\u21b5wash",
        "position": 1,
        "kl": 1.5,
        "policy": 0.9641,
        "ref": 0.1882,
        "likelihood": "5.1\u00d7 more likely",
    }
    assert drift_tables.place_row({})["likelihood"] == "-"
    assert drift_tables.drift_summary(run_of_nothing()) is None
