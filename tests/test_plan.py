"""How many responses a measurement takes."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kleash.dealing import is_even
from kleash.estimators import Interval
from kleash.plan import Plan
from kleash.precision import Precision


def plan(**changes: object) -> Plan:
    return Plan(**{"prompts": 10, "samples": 64, "at_most": 1000, "width": 16, "precision": None, **changes})


def interval(half_width: float, n: int) -> Interval:
    return Interval(mean=2.0, low=2.0 - half_width, high=2.0 + half_width, n=n)


def stops(plan: Plan, spread: float = math.inf) -> list[int]:
    """Every number of responses at which it looks, where the half-width is spread / sqrt(n)."""
    found, done = [], 0
    while (stop := plan.stop_after(done, interval(spread / math.sqrt(done), done) if done else None)) > done:
        found.append(stop)
        done = stop
    return found


def test_without_a_precision_it_ends_at_its_samples_rounded_up_to_as_many_for_each_prompt():
    assert stops(plan(samples=7))[-1] == 7
    assert stops(plan(samples=64))[-1] == 70
    assert stops(plan(samples=2000))[-1] == 2000  # at_most belongs to a precision


def test_with_a_precision_it_ends_at_the_first_stop_that_is_narrow_enough():
    asked = plan(precision=Precision(nats=0.1))
    assert stops(asked, spread=1.5)[-1] == 230  # 1.5 / sqrt(220) is just above 0.1
    assert stops(plan(precision=Precision(share=0.05)), spread=1.5)[-1] == 230


def test_nobody_asks_before_the_first_samples_are_there():
    asked = plan(samples=64, precision=Precision(nats=0.1))
    assert stops(asked, spread=0.0)[-1] == 70
    assert stops(plan(samples=8, prompts=10, precision=Precision(nats=0.1)), spread=0.0)[-1] == 8
    assert stops(plan(samples=64, prompts=8, width=64, precision=Precision(nats=0.1)), spread=0.0) == [8, 64]


def test_what_never_gets_narrow_enough_ends_at_the_largest_even_number_that_is_not_above_the_limit():
    asked = {"precision": Precision(nats=1e-9)}
    assert stops(plan(at_most=105, **asked), spread=1.0)[-1] == 100
    assert stops(plan(at_most=7, **asked), spread=1.0)[-1] == 7
    assert stops(plan(at_most=19, **asked), spread=1.0)[-1] == 10
    assert stops(plan(at_most=1, **asked), spread=1.0) == [1]


def test_the_limit_holds_also_where_the_check_would_begin_later():
    assert stops(plan(samples=64, at_most=30, precision=Precision(nats=0.1)), spread=0.0)[-1] == 30


@given(
    st.integers(1, 50),
    st.integers(1, 300),
    st.integers(1, 300),
    st.integers(1, 70),
    st.floats(0.01, 30),
    st.booleans(),
)
def test_every_stop_is_even_and_none_lies_beyond_the_last_one(prompts, samples, at_most, width, spread, asked):
    precision = Precision(nats=0.5) if asked else None
    found = plan(prompts=prompts, samples=samples, at_most=at_most, width=width, precision=precision)
    all_stops = stops(found, spread)
    assert all_stops
    assert all(is_even(stop, prompts) for stop in all_stops)
    assert all_stops[-1] <= found.last
    assert all_stops[-1] <= (max(at_most, prompts) if asked else max(samples, prompts) + samples)
    n = all_stops[-1]
    assert n == found.last or spread / math.sqrt(n) <= 0.5


def test_it_is_met_where_nothing_was_asked_and_else_by_a_narrow_interval_alone():
    assert plan().is_met(interval(math.inf, 1))
    assert plan(precision=Precision(nats=0.125)).is_met(interval(0.125, 50))
    assert not plan(precision=Precision(nats=0.125)).is_met(interval(0.25, 50))


@pytest.mark.parametrize(
    ("half_width", "n", "expected"),
    [(0.25, 100, 400), (0.125, 100, 100), (0.0625, 20, 70), (0.249, 100, 400), (5.0, 100, 1000), (math.inf, 1, 1000)],
)
def test_it_expects_what_the_width_so_far_asks_for_in_whole_passes_between_its_first_samples_and_its_limit(
    half_width, n, expected
):
    assert plan(precision=Precision(nats=0.125)).expected(interval(half_width, n)) == expected


def test_before_the_first_response_it_expects_its_samples():
    assert plan(samples=64).expected(None) == 70
    assert plan(samples=64, precision=Precision(nats=0.1)).expected(None) == 64
    assert plan(samples=64, at_most=30, precision=Precision(nats=0.1)).expected(None) == 30
