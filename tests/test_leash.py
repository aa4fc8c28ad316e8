"""Beta from update to update: the published figures, the bounds, and a state that survives a restart."""

import math
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kleash.errors import ValueRangeError
from kleash.leash import (
    CALM,
    BudgetLeash,
    FixedLeash,
    Leash,
    Measurement,
    ScheduledLeash,
    ZieglerLeash,
    beta_for_budget,
)

LEASHES = [
    FixedLeash(beta=0.15),
    ScheduledLeash(peak=0.15, final=0.15),
    ZieglerLeash(beta=0.15, target_kl_per_sequence=6.0),
    BudgetLeash(beta=0.15, target_kl_per_sequence=6.0),
]


def measured(kl: float, *, sequences: int = 64, update: int = 1) -> Measurement:
    return Measurement(update=update, kl_policy_ref_per_sequence=kl, sequences=sequences)


def after_many(leash: Leash, kl: float, *, sequences: int, updates: int) -> Leash:
    for update in range(updates):
        leash = leash.after(measured(kl, sequences=sequences, update=update + 1))
    return leash


def test_a_fixed_leash_stays_whatever_is_measured():
    leash = FixedLeash(beta=0.05)
    assert after_many(leash, 1000.0, sequences=64, updates=3).beta == 0.05
    assert leash.after(measured(-1.0, sequences=1)).beta == 0.05
    assert FixedLeash(beta=0).beta == 0


@pytest.mark.parametrize(("kl", "beta"), [(12.0, 0.154655), (3.0, 0.145439), (6.0, 0.15)])
def test_three_updates_of_ziegler_give_the_published_figures(kl, beta):
    leash = ZieglerLeash(beta=0.15, target_kl_per_sequence=6.0, horizon=10_000)
    assert after_many(leash, kl, sequences=512, updates=3).beta == pytest.approx(beta, abs=5e-7)


def test_inside_the_clip_ziegler_follows_the_relative_error():
    leash = ZieglerLeash(beta=0.1, target_kl_per_sequence=10.0, horizon=1000)
    assert leash.after(measured(11.0, sequences=100)).beta == pytest.approx(0.1 * (1 + 0.1 * 0.1))
    assert leash.after(measured(9.5, sequences=100)).beta == pytest.approx(0.1 * (1 - 0.05 * 0.1))


def test_the_error_is_clipped_at_a_fifth_both_ways():
    leash = ZieglerLeash(beta=0.1, target_kl_per_sequence=10.0, horizon=1000)
    assert leash.after(measured(1e9, sequences=100)) == leash.after(measured(12.0, sequences=100))
    assert leash.after(measured(-5.0, sequences=100)) == leash.after(measured(8.0, sequences=100))
    assert leash.after(measured(1e9, sequences=100)).beta == pytest.approx(0.102)


@pytest.mark.parametrize(("sequences", "updates"), [(512, 68), (64, 542)])
def test_at_common_settings_ziegler_takes_68_or_542_updates_to_double_beta(sequences, updates):
    leash = ZieglerLeash(beta=0.15, target_kl_per_sequence=6.0, horizon=10_000)
    beta = after_many(leash, 100.0, sequences=sequences, updates=updates).beta
    assert beta == pytest.approx(0.3, rel=1e-3)


def test_more_than_five_horizons_at_once_cannot_turn_beta_negative():
    leash = ZieglerLeash(beta=0.15, target_kl_per_sequence=6.0, horizon=100)
    assert leash.after(measured(0.0, sequences=501)).beta == leash.beta_min == 1e-6
    assert leash.after(measured(0.0, sequences=499)).beta == pytest.approx(0.15 * 0.002)
    assert after_many(leash, 100.0, sequences=501, updates=100).beta == leash.beta_max == 1e3


def test_a_beta_at_its_floor_comes_back_when_the_policy_drifts():
    leash = ZieglerLeash(beta=0.15, target_kl_per_sequence=6.0, horizon=100).after(measured(0.0, sequences=501))
    assert leash.after(measured(100.0, sequences=100)).beta == pytest.approx(1.2e-6)


def test_a_token_mean_fed_to_a_target_in_sequence_sums_loosens_the_leash():
    leash = ZieglerLeash(beta=0.15, target_kl_per_sequence=6.0)
    kl_per_sequence, tokens = 12.0, 24
    assert leash.after(measured(kl_per_sequence, sequences=512)).beta > 0.15
    assert leash.after(measured(kl_per_sequence / tokens, sequences=512)).beta < 0.15


# --- a budget ---


@pytest.mark.parametrize(("sigma", "budget", "beta"), [(1.0, 6.0, 0.28868), (1.0, 10.0, 0.22361), (2.0, 6.0, 0.57735)])
def test_the_beta_for_a_budget_is_the_published_one(sigma, budget, beta):
    assert beta_for_budget(sigma, budget) == pytest.approx(beta, abs=5e-6)


@pytest.mark.parametrize(("sigma", "budget"), [(0.0, 6.0), (math.nan, 6.0), (1.0, 0.0), (1.0, math.inf)])
def test_no_beta_follows_from_scores_that_are_all_equal_or_from_no_budget(sigma, budget):
    with pytest.raises(ValueRangeError, match="finite and > 0"):
        beta_for_budget(sigma, budget)


def test_at_the_budget_a_steady_drift_leaves_beta_as_it_is():
    leash = BudgetLeash(beta=0.1, target_kl_per_sequence=6.0, last_error=0.0)
    assert leash.after(measured(6.0)) == leash


def test_the_integral_part_moves_log_beta_by_each_error_and_the_proportional_one_by_its_change():
    leash = BudgetLeash(beta=0.1, target_kl_per_sequence=10.0, integral=0.3, proportional=2.0, last_error=0.0)
    once = leash.after(measured(12.0))
    assert math.log(once.beta / 0.1) == pytest.approx(0.3 * 0.2 + 2.0 * 0.2)
    twice = once.after(measured(12.0, update=2))
    assert math.log(twice.beta / once.beta) == pytest.approx(0.3 * 0.2)  # the drift did not change
    back = twice.after(measured(10.0, update=3))
    assert math.log(back.beta / twice.beta) == pytest.approx(-2.0 * 0.2)


def test_where_the_drift_changes_in_large_steps_both_gains_are_damped():
    """The running mean of the changes 0.8 and -0.8, a fifth of the way each: 0.16, then 0.288."""
    leash = BudgetLeash(beta=0.1, target_kl_per_sequence=10.0, integral=0.3, proportional=2.0, last_error=0.0)
    once = leash.after(measured(18.0))
    assert math.log(once.beta / 0.1) == pytest.approx(CALM / 0.16 * (0.3 * 0.8 + 2.0 * 0.8))
    back = once.after(measured(10.0, update=2))
    assert math.log(back.beta / once.beta) == pytest.approx(CALM / 0.288 * (-2.0 * 0.8))


def test_an_error_beyond_its_limit_counts_as_the_limit():
    leash = BudgetLeash(beta=0.1, target_kl_per_sequence=10.0, error_max=2.0, last_error=0.0)
    assert leash.after(measured(1e12)) == leash.after(measured(30.0))
    assert leash.after(measured(-5.0)) == leash.after(measured(0.0))


def test_before_the_first_update_the_policy_is_its_reference_so_a_drift_of_0_is_no_change():
    leash = BudgetLeash(beta=0.1, target_kl_per_sequence=10.0, integral=0.3)
    assert math.log(leash.after(measured(0.0)).beta / 0.1) == pytest.approx(-0.3)


def test_at_a_bound_nothing_winds_up():
    """A hundred updates below the budget, and the first one above it raises beta at once."""
    leash = BudgetLeash(beta=0.1, target_kl_per_sequence=10.0, beta_min=0.01)
    low = after_many(leash, 0.0, sequences=64, updates=100)
    assert low.beta == pytest.approx(0.01)
    assert low.after(measured(11.0, update=101)).beta > 0.01 * math.exp(1.0)


@pytest.mark.parametrize("start", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize("budget", [2.0, 12.0])
@pytest.mark.parametrize("speed", [0.05, 0.1, 0.3])
def test_a_policy_that_follows_its_beta_slowly_comes_to_rest_at_the_budget(start, budget, speed):
    """A plant with the closed form of Gaussian scores: KL* = sigma^2 / (2 beta^2), approached by a share per update."""
    leash, distance, drift = BudgetLeash(beta=start, target_kl_per_sequence=budget), 0.0, []
    for update in range(1, 301):
        drift.append(distance**2 / 2)
        leash = leash.after(measured(drift[-1], update=update))
        distance += speed * (min(1.0 / leash.beta, 20.0) - distance)
    assert sum(drift[-100:]) / 100 == pytest.approx(budget, rel=0.01)
    for kl in drift[-100:]:
        assert kl == pytest.approx(budget, rel=0.06)  # the quickest plant answers within an update, and trembles


@pytest.mark.parametrize("stride", [0.02, 0.1, 0.3])
def test_a_policy_that_moves_at_one_pace_whatever_beta_is_does_not_swing_the_leash(stride):
    """Whitened advantages: the sign of score - beta KL steers, its size does not. Three updates' momentum besides."""
    leash, log_kl, velocity, betas = BudgetLeash(beta=1.0, target_kl_per_sequence=3.0), -4.0, 0.0, []
    for update in range(1, 1001):
        leash = leash.after(measured(math.exp(log_kl), update=update))
        pull = math.log(beta_for_budget(1.0, math.exp(log_kl)) / leash.beta)
        velocity += (stride * math.tanh(pull) - velocity) / 3
        log_kl += velocity
        betas.append(leash.beta)
    assert math.exp(log_kl) == pytest.approx(3.0, rel=1e-3)
    assert max(betas[-100:]) < 1.01 * min(betas[-100:])


# --- a schedule ---


def scheduled(leash: ScheduledLeash, updates: int) -> list[float]:
    betas = []
    for update in range(1, updates + 1):
        betas.append(leash.beta)
        leash = leash.after(measured(3.0, update=update))
    return betas


@pytest.mark.parametrize(
    ("shape", "betas"),
    [
        ("linear", [0.2, 0.4, 0.325, 0.25, 0.175, 0.1, 0.1]),
        ("cosine", [0.2, 0.4, 0.25 + 0.15 * math.sqrt(0.5), 0.25, 0.25 - 0.15 * math.sqrt(0.5), 0.1, 0.1]),
        ("exponential", [0.2, 0.4, 0.4 / 2**0.5, 0.2, 0.2 / 2**0.5, 0.1, 0.1]),
    ],
)
def test_a_schedule_rises_over_its_warm_up_and_falls_to_its_end(shape, betas):
    leash = ScheduledLeash(peak=0.4, final=0.1, warmup_updates=2, decay_updates=4, shape=shape)
    assert scheduled(leash, 7) == pytest.approx(betas)


def test_without_a_warm_up_the_first_update_has_the_peak_and_without_a_decay_it_stays():
    assert scheduled(ScheduledLeash(peak=0.4, final=0.1, decay_updates=2), 4) == pytest.approx([0.4, 0.25, 0.1, 0.1])
    assert scheduled(ScheduledLeash(peak=0.4, final=0.4, warmup_updates=4), 5) == pytest.approx(
        [0.1, 0.2, 0.3, 0.4, 0.4]
    )


def test_a_schedule_may_rise_and_may_end_at_0():
    assert scheduled(ScheduledLeash(peak=0.1, final=0.3, decay_updates=2), 3) == pytest.approx([0.1, 0.2, 0.3])
    assert scheduled(ScheduledLeash(peak=0.1, final=0.0, decay_updates=1), 3) == [0.1, 0.0, 0.0]


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"peak": 0.1, "final": 0.0, "shape": "exponential"}, "exponential schedule"),
        ({"peak": 0.1, "final": -0.1}, "beta finite and >= 0"),
        ({"peak": 2e3, "final": 0.1}, "beta_max"),
        ({"peak": 0.1, "final": 0.1, "warmup_updates": -1}, "warmup_updates"),
        ({"peak": 0.1, "final": 0.1, "update": 0}, "update >= 1"),
    ],
)
def test_a_schedule_that_cannot_be_followed_is_refused(settings, found):
    with pytest.raises(ValueRangeError, match=found):
        ScheduledLeash(**settings)


# --- whatever is measured ---


@st.composite
def leashes(draw: st.DrawFn) -> Leash:
    """Any leash that can be built, with any bounds."""
    beta_min = draw(st.floats(1e-12, 1.0))
    beta_max = draw(st.floats(beta_min, 1e9))
    beta = draw(st.floats(beta_min, beta_max))
    bounds = {
        "beta": beta,
        "beta_min": beta_min,
        "beta_max": beta_max,
        "target_kl_per_sequence": draw(st.floats(1e-3, 1e3)),
    }
    gains = {name: draw(st.floats(1e-3, 1e3)) for name in ("integral", "proportional", "error_max")}
    return draw(
        st.sampled_from(
            [
                FixedLeash(beta=beta, beta_max=beta_max),
                ScheduledLeash(
                    peak=beta, final=beta_min, warmup_updates=draw(st.integers(0, 9)),
                    decay_updates=draw(st.integers(0, 9)), beta_max=beta_max,
                    shape=draw(st.sampled_from(["linear", "cosine", "exponential"])),
                ),
                ZieglerLeash(**bounds, horizon=draw(st.floats(0.1, 1e5))),
                BudgetLeash(**bounds, **gains),
            ]
        )
    )  # fmt: skip


def bounds_of(leash: Leash) -> tuple[float, float]:
    return getattr(leash, "beta_min", 0.0), leash.beta_max  # type: ignore[attr-defined]


@given(
    leashes(),
    st.lists(
        st.tuples(st.floats(-1e300, 1e300), st.integers(1, 10**12), st.none() | st.floats(1.001, 1e6)),
        min_size=1,
        max_size=20,
    ),
)
def test_no_leash_leaves_its_bounds_whatever_is_measured_in_batches_however_large(leash, measurements):
    """Nor is any beta NaN or negative; tightening raises it, or it is at its bound."""
    low, high = bounds_of(leash)
    for update, (kl, sequences, factor) in enumerate(measurements, start=1):
        leash = leash.after(measured(kl, sequences=sequences, update=update))
        assert math.isfinite(leash.beta)
        assert low <= leash.beta <= high
        if factor is not None and leash.beta > 0:
            before, leash = leash.beta, leash.tightened(factor)
            assert low <= leash.beta <= high
            assert leash.beta >= before


@given(leashes(), st.lists(st.floats(0, 50), min_size=2, max_size=10), st.integers(0, 10), st.booleans())
def test_a_restart_from_the_saved_state_changes_no_bit_of_the_future(fresh, measurements, stop, tightened):
    assume(fresh.beta > 0)
    straight = fresh.tightened(1.7) if tightened else fresh
    restarted = straight
    for update, kl in enumerate(measurements, start=1):
        if update == stop:
            restarted = fresh.restored(dict(restarted.state))
        straight, restarted = (leash.after(measured(kl, update=update)) for leash in (straight, restarted))
    assert straight == restarted


@pytest.mark.parametrize("leash", LEASHES)
def test_what_a_checkpoint_keeps_is_plain_floats(leash):
    state = leash.after(measured(9.0)).state
    assert state
    assert all(type(value) is float for value in state.values())


def test_the_integrator_is_part_of_the_state():
    leash = after_many(BudgetLeash(beta=0.1, target_kl_per_sequence=6.0), 9.0, sequences=64, updates=3)
    assert set(leash.state) == {"beta", "last_error", "pace"}
    fresh = BudgetLeash(beta=0.5, target_kl_per_sequence=6.0).restored(leash.state)
    assert replace(fresh, beta=leash.beta) == leash


@pytest.mark.parametrize("leash", LEASHES)
def test_an_update_leaves_the_old_leash_as_it_was(leash):
    state = leash.state
    leash.after(measured(12.0, sequences=512))
    assert leash.beta == 0.15
    assert leash.state == state
    with pytest.raises(AttributeError):
        leash.beta = 0.2


@pytest.mark.parametrize("leash", LEASHES)
def test_a_tightened_leash_pulls_harder_and_keeps_to_its_bound(leash):
    assert leash.tightened(2.0).beta == pytest.approx(0.3)
    assert leash.tightened(1e9).beta == leash.beta_max
    for factor in (1.0, 0.5, -1.0, math.nan, math.inf):
        with pytest.raises(ValueRangeError, match="factor above 1"):
            leash.tightened(factor)


def test_a_leash_that_is_off_cannot_be_tightened():
    with pytest.raises(ValueRangeError, match="beta above 0"):
        FixedLeash(beta=0.0).tightened(2.0)


@pytest.mark.parametrize("leash", [leash for leash in LEASHES if "beta" in leash.state])
def test_a_saved_beta_replaces_the_configured_one(leash):
    assert leash.restored({**leash.state, "beta": 0.2}).beta == 0.2
    with pytest.raises(ValueRangeError, match="beta"):
        leash.restored({**leash.state, "beta": math.nan})


@pytest.mark.parametrize("kl", [math.nan, math.inf, -math.inf])
def test_a_measurement_that_is_not_finite_is_an_error_and_not_a_beta(kl):
    with pytest.raises(ValueRangeError, match="finite mean KL"):
        measured(kl)


def test_a_measurement_of_no_sequence_is_refused():
    with pytest.raises(ValueRangeError, match="at least 1 sequence, found 0"):
        measured(6.0, sequences=0)


CONTROLLERS = [ZieglerLeash, BudgetLeash]


@pytest.mark.parametrize("beta", [-0.1, math.nan, math.inf])
def test_no_leash_takes_a_beta_that_pays_for_drift(beta):
    with pytest.raises(ValueRangeError, match="beta"):
        FixedLeash(beta=beta)
    for kind in CONTROLLERS:
        with pytest.raises(ValueRangeError, match="beta"):
            kind(beta=beta, target_kl_per_sequence=6.0)


@pytest.mark.parametrize("kind", CONTROLLERS)
def test_a_controller_that_multiplies_cannot_start_at_zero_or_beyond_its_bounds(kind):
    with pytest.raises(ValueRangeError, match="cannot leave 0"):
        kind(beta=0.0, target_kl_per_sequence=6.0)
    with pytest.raises(ValueRangeError, match=r"beta_max 0\.1"):
        kind(beta=0.15, target_kl_per_sequence=6.0, beta_max=0.1)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *((kind, name) for kind in CONTROLLERS for name in ("target_kl_per_sequence", "beta_min", "beta_max")),
        (ZieglerLeash, "horizon"),
        (BudgetLeash, "integral"),
        (BudgetLeash, "error_max"),
    ],
)
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_settings_that_are_not_positive_are_refused_by_name(kind, name, value):
    settings = {"beta": 0.15, "target_kl_per_sequence": 6.0, name: value}
    with pytest.raises(ValueRangeError, match=f"Expected {name} finite and > 0"):
        kind(**settings)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("proportional", -1.0),
        ("last_error", -1.5),
        ("last_error", math.nan),
    ],
)
def test_a_budget_leash_without_sense_is_refused_by_name(name, value):
    with pytest.raises(ValueRangeError, match=f"Expected {name}"):
        BudgetLeash(**{"beta": 0.15, "target_kl_per_sequence": 6.0, name: value})
