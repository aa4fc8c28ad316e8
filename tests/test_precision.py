"""How narrow an interval shall be: what is understood, when it is met, and how many responses it takes."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kleash.errors import ConfigError
from kleash.estimators import Interval
from kleash.precision import Precision, precision_from


def interval(mean: float, half_width: float, n: int = 100) -> Interval:
    return Interval(mean=mean, low=mean - half_width, high=mean + half_width, n=n)


@pytest.mark.parametrize(
    "text", ["±0.05", "+-0.05", "+/-0.05", "0.05", "± 0.05", " .05 ", "5e-2", "±5e-2", 0.05, "0.050"]
)
def test_a_half_width_in_nats_is_understood_however_it_is_written(text):
    assert precision_from(text) == Precision(nats=0.05)


@pytest.mark.parametrize("text", ["5%", "±5%", "+-5 %", "5.0%", " 5 %", "50e-1%"])
def test_a_share_of_the_kl_is_understood_however_it_is_written(text):
    assert precision_from(text) == Precision(share=0.05)


@pytest.mark.parametrize(
    "text", ["", "narrow", "0", "±0", "0%", "-0.05", "0.05 nats", "5%%", "1.2.3", "nan", "inf", "1e999", "%", "±", "1e"]
)
def test_anything_else_is_refused_in_one_sentence(text):
    with pytest.raises(ConfigError, match=r"^Expected a half-width such as ±0\.05 .* or 5%, found .*; change it\.$"):
        precision_from(text)


def test_nats_allow_the_same_width_whatever_the_mean_and_a_share_allows_more_of_a_larger_one():
    assert [Precision(nats=0.1).half_width(mean) for mean in (0.0, 2.0, -4.0)] == [0.1, 0.1, 0.1]
    assert [Precision(share=0.25).half_width(mean) for mean in (0.0, 2.0, -4.0)] == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("asked", [Precision(nats=0.5), Precision(share=0.25)])
def test_it_is_met_by_an_interval_just_so_narrow_and_by_no_wider_one(asked):
    assert asked.is_met(interval(2.0, 0.5))
    assert asked.is_met(interval(2.0, 0.4))
    assert not asked.is_met(interval(2.0, 0.5 + 1e-9))
    assert not asked.is_met(interval(2.0, math.inf))


def test_a_model_against_itself_meets_every_precision():
    assert Precision(share=0.01).is_met(interval(0.0, 0.0))
    assert Precision(nats=1e-9).is_met(interval(0.0, 0.0))


def test_a_width_four_times_too_large_takes_sixteen_times_the_responses():
    assert Precision(nats=0.5).responses_needed(interval(2.0, 2.0, n=100)) == 1600
    assert Precision(share=0.25).responses_needed(interval(2.0, 2.0, n=100)) == 1600


def test_what_is_narrow_enough_takes_no_more_and_what_can_never_be_takes_for_ever():
    assert Precision(nats=0.5).responses_needed(interval(2.0, 0.3, n=77)) == 77
    assert Precision(share=0.1).responses_needed(interval(0.0, 0.3)) == math.inf
    assert Precision(nats=0.1).responses_needed(interval(2.0, math.inf, n=1)) == math.inf


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.integers(2, 10_000))
def test_after_so_many_responses_an_interval_that_shrinks_with_their_root_is_narrow_enough(asked, found, n):
    needed = Precision(nats=asked).responses_needed(interval(0.0, found, n=n))
    assert needed >= n
    assert found * math.sqrt(n / needed) <= asked * (1 + 1e-9)
