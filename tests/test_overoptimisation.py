"""The over-optimisation curve: its oracle, its fit, where its peak may be named."""

import math

import pytest
import torch
from exact import generator
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kleash.errors import ShapeError, ValueRangeError
from kleash.overoptimisation import BEYOND, OveroptimisationCurve, overoptimisation_curve


def on_the_curve(d: Tensor, alpha_rl: float, beta_rl: float, start: float = 0.0) -> Tensor:
    return start + d * (alpha_rl - beta_rl * d.log())


def curve_of(alpha_rl: float = 1.0, beta_rl: float = 0.3, **changes: float) -> OveroptimisationCurve:
    fitted = {"start_score": 0.0, "points": 9, "sqrt_kl_min": 0.1, "sqrt_kl_max": 20.0}
    fit = {"residual_std": 0.0, "r_squared": 1.0, **fitted, **changes}
    return OveroptimisationCurve(alpha_rl=alpha_rl, beta_rl=beta_rl, **fit)


def test_the_peak_has_its_known_value() -> None:
    peak = curve_of().peak
    assert peak is not None
    assert (peak.sqrt_kl, peak.score_above_start) == pytest.approx((10.3123, 3.0937), abs=1e-4)
    assert peak.kl_policy_ref_per_sequence == pytest.approx(peak.sqrt_kl**2)


@given(st.floats(-2, 2), st.floats(-2, 2), st.floats(-5, 5))
def test_points_on_a_curve_give_the_curve_back(alpha_rl: float, beta_rl: float, start: float) -> None:
    d = torch.tensor([0.3, 1.0, 2.0, 5.0, 9.0], dtype=torch.float64)
    fit = overoptimisation_curve(d**2, on_the_curve(d, alpha_rl, beta_rl, start), start_score=start)
    assert (fit.alpha_rl, fit.beta_rl) == pytest.approx((alpha_rl, beta_rl), abs=1e-9)
    assert fit.residual_std == pytest.approx(0, abs=1e-9)
    assert fit.score_at(2.0) == pytest.approx(start + 2 * (alpha_rl - beta_rl * math.log(2)), abs=1e-8)
    assert fit.score_at(0.0) == start


def test_the_peak_is_where_the_curve_is_highest() -> None:
    curve = curve_of(0.7, 0.4, start_score=-2.0)
    top = curve.peak
    assert top is not None
    assert curve.score_at(top.sqrt_kl) == pytest.approx(-2.0 + top.score_above_start)
    assert curve.score_at(top.sqrt_kl) > max(curve.score_at(top.sqrt_kl * x) for x in (0.99, 1.01))


def test_noise_around_a_curve_is_told_by_its_residual_and_r_squared() -> None:
    d = torch.linspace(0.1, 6, 400, dtype=torch.float64)
    noise = 0.2 * torch.randn(400, generator=generator(0), dtype=torch.float64)
    fit = overoptimisation_curve(d**2, on_the_curve(d, 1.0, 0.6) + noise, start_score=0.0)
    assert (fit.alpha_rl, fit.beta_rl) == pytest.approx((1.0, 0.6), abs=0.05)
    assert fit.residual_std == pytest.approx(0.2, rel=0.1)
    gains = on_the_curve(d, 1.0, 0.6) + noise
    fitted = on_the_curve(d, fit.alpha_rl, fit.beta_rl)
    unexplained = float((gains - fitted).square().sum())
    assert fit.residual_std == pytest.approx((unexplained / 398) ** 0.5, rel=1e-6)
    assert fit.r_squared == pytest.approx(1 - unexplained / float(gains.var() * 399))
    assert (fit.points, fit.sqrt_kl_min, fit.sqrt_kl_max) == (400, pytest.approx(0.1), pytest.approx(6))


def test_points_that_do_not_vary_have_no_r_squared() -> None:
    fit = overoptimisation_curve(torch.tensor([1.0, 4.0, 9.0]), torch.zeros(3), start_score=0.0)
    assert (fit.r_squared, fit.alpha_rl, fit.beta_rl) == (None, 0.0, 0.0)
    assert fit.peak is None


def test_points_that_have_not_moved_say_nothing() -> None:
    kl, scores = torch.tensor([0.0, 1.0, 4.0, 9.0]), torch.tensor([7.0, 1.0, 1.5, 1.2])
    fit = overoptimisation_curve(kl, scores, start_score=0.0)
    assert fit == overoptimisation_curve(kl[1:], scores[1:], start_score=0.0)
    assert fit.points == 3


@pytest.mark.parametrize(
    ("ends", "beta_rl", "place"),
    [
        ((0.1, 10.4), 0.3, "inside"),
        ((0.1, 10.2), 0.3, "beyond"),
        ((0.1, 10.3 / BEYOND - 0.1), 0.3, "none"),
        ((10.4, 20.0), 0.3, "none"),
        ((0.1, 20.0), -0.3, "none"),
        ((0.1, 20.0), 0.0, "none"),
        ((0.1, 20.0), 1e-9, "none"),
    ],
)
def test_a_peak_is_named_only_in_or_near_the_data(ends: tuple[float, float], beta_rl: float, place: str) -> None:
    assert curve_of(1.0, beta_rl, sqrt_kl_min=ends[0], sqrt_kl_max=ends[1]).peak_place == place


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(ValueRangeError, match=r"Expected at least 3 different drifts above 0 .*, found 2"):
        overoptimisation_curve(torch.tensor([0.0, 1.0, 4.0, 4.0]), torch.zeros(4), start_score=0.0)
    for kl, score in ((-1.0, 0.0), (1.0, math.nan), (math.inf, 0.0)):
        with pytest.raises(ValueRangeError, match="Expected finite scores at finite drifts"):
            overoptimisation_curve(torch.tensor([1.0, 4.0, kl]), torch.tensor([0.0, 0.0, score]), start_score=0.0)
    with pytest.raises(ShapeError, match="Expected tensors of one shape"):
        overoptimisation_curve(torch.zeros(3), torch.zeros(2), start_score=0.0)
    with pytest.raises(ValueRangeError, match="Expected sqrt_kl between 0"):
        curve_of().score_at(-1.0)
