"""Beta from update to update: the published figures, the bounds, and a state that survives a restart."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kleash.errors import ValueRangeError
from kleash.leash import FixedLeash, ZieglerLeash

LEASHES = [FixedLeash(beta=0.15), ZieglerLeash(beta=0.15, target_kl_per_sequence=6.0)]


def after_many(leash, kl, *, sequences, updates):
    for _ in range(updates):
        leash = leash.after(kl, sequences=sequences)
    return leash


def test_a_fixed_leash_stays_whatever_is_measured():
    leash = FixedLeash(beta=0.05)
    assert after_many(leash, 1000.0, sequences=64, updates=3).beta == 0.05
    assert leash.after(-1.0, sequences=1).beta == 0.05
    assert FixedLeash(beta=0).beta == 0


@pytest.mark.parametrize(("kl", "beta"), [(12.0, 0.154655), (3.0, 0.145439), (6.0, 0.15)])
def test_three_updates_of_ziegler_give_the_published_figures(kl, beta):
    leash = ZieglerLeash(beta=0.15, target_kl_per_sequence=6.0, horizon=10_000)
    assert after_many(leash, kl, sequences=512, updates=3).beta == pytest.approx(beta, abs=5e-7)


def test_inside_the_clip_ziegler_follows_the_relative_error():
    leash = ZieglerLeash(beta=0.1, target_kl_per_sequence=10.0, horizon=1000)
    assert leash.after(11.0, sequences=100).beta == pytest.approx(0.1 * (1 + 0.1 * 0.1))
    assert leash.after(9.5, sequences=100).beta == pytest.approx(0.1 * (1 - 0.05 * 0.1))


def test_the_error_is_clipped_at_a_fifth_both_ways():
    leash = ZieglerLeash(beta=0.1, target_kl_per_sequence=10.0, horizon=1000)
    assert leash.after(1e9, sequences=100) == leash.after(12.0, sequences=100)
    assert leash.after(-5.0, sequences=100) == leash.after(8.0, sequences=100)
    assert leash.after(1e9, sequences=100).beta == pytest.approx(0.102)


@pytest.mark.parametrize(("sequences", "updates"), [(512, 68), (64, 542)])
def test_at_common_settings_ziegler_takes_68_or_542_updates_to_double_beta(sequences, updates):
    leash = ZieglerLeash(beta=0.15, target_kl_per_sequence=6.0, horizon=10_000)
    beta = after_many(leash, 100.0, sequences=sequences, updates=updates).beta
    assert beta == pytest.approx(0.3, rel=1e-3)


def test_more_than_five_horizons_at_once_cannot_turn_beta_negative():
    leash = ZieglerLeash(beta=0.15, target_kl_per_sequence=6.0, horizon=100)
    assert leash.after(0.0, sequences=501).beta == leash.beta_min == 1e-6
    assert leash.after(0.0, sequences=499).beta == pytest.approx(0.15 * 0.002)
    assert after_many(leash, 100.0, sequences=501, updates=100).beta == leash.beta_max == 1e3


def test_a_beta_at_its_floor_comes_back_when_the_policy_drifts():
    leash = ZieglerLeash(beta=0.15, target_kl_per_sequence=6.0, horizon=100).after(0.0, sequences=501)
    assert leash.after(100.0, sequences=100).beta == pytest.approx(1.2e-6)


def test_a_token_mean_fed_to_a_target_in_sequence_sums_loosens_the_leash():
    leash = ZieglerLeash(beta=0.15, target_kl_per_sequence=6.0)
    kl_per_sequence, tokens = 12.0, 24
    assert leash.after(kl_per_sequence, sequences=512).beta > 0.15
    assert leash.after(kl_per_sequence / tokens, sequences=512).beta < 0.15


@given(
    st.floats(1e-6, 1e3),
    st.lists(st.tuples(st.floats(-1e6, 1e12), st.integers(1, 10**6)), min_size=1, max_size=20),
    st.floats(0.1, 1e5),
)
def test_beta_stays_finite_and_between_its_bounds_whatever_is_measured(beta, measurements, horizon):
    leash = ZieglerLeash(beta=beta, target_kl_per_sequence=6.0, horizon=horizon)
    for kl, sequences in measurements:
        before, leash = leash.beta, leash.after(kl, sequences=sequences)
        assert math.isfinite(leash.beta)
        assert leash.beta_min <= leash.beta <= leash.beta_max
        assert leash.beta >= before if kl > 6 else leash.beta <= before


@given(st.lists(st.floats(0, 50), min_size=2, max_size=10), st.integers(0, 10))
def test_a_restart_from_the_saved_state_changes_no_bit_of_the_future(measurements, stop):
    fresh = ZieglerLeash(beta=0.15, target_kl_per_sequence=6.0)
    straight = restarted = fresh
    for update, kl in enumerate(measurements):
        if update == stop:
            restarted = fresh.restored(dict(restarted.state))
        straight, restarted = straight.after(kl, sequences=512), restarted.after(kl, sequences=512)
    assert straight == restarted


@pytest.mark.parametrize("leash", LEASHES)
def test_an_update_leaves_the_old_leash_as_it_was(leash):
    leash.after(12.0, sequences=512)
    assert leash.beta == 0.15
    assert leash.state == {"beta": 0.15}
    with pytest.raises(AttributeError):
        leash.beta = 0.2


@pytest.mark.parametrize("leash", LEASHES)
def test_a_saved_beta_replaces_the_configured_one(leash):
    assert leash.restored({"beta": 0.2}).beta == 0.2
    with pytest.raises(ValueRangeError, match="beta"):
        leash.restored({"beta": math.nan})


@pytest.mark.parametrize("leash", LEASHES)
@pytest.mark.parametrize("kl", [math.nan, math.inf, -math.inf])
def test_a_measurement_that_is_not_finite_is_an_error_and_not_a_beta(leash, kl):
    with pytest.raises(ValueRangeError, match="finite mean KL"):
        leash.after(kl, sequences=512)


def test_a_measurement_of_no_sequence_is_refused():
    with pytest.raises(ValueRangeError, match="at least 1 sequence, found 0"):
        LEASHES[1].after(6.0, sequences=0)


@pytest.mark.parametrize("beta", [-0.1, math.nan, math.inf])
def test_no_leash_takes_a_beta_that_pays_for_drift(beta):
    with pytest.raises(ValueRangeError, match="beta"):
        FixedLeash(beta=beta)
    with pytest.raises(ValueRangeError, match="beta"):
        ZieglerLeash(beta=beta, target_kl_per_sequence=6.0)


def test_a_controller_that_multiplies_cannot_start_at_zero_or_beyond_its_bounds():
    with pytest.raises(ValueRangeError, match="cannot leave 0"):
        ZieglerLeash(beta=0.0, target_kl_per_sequence=6.0)
    with pytest.raises(ValueRangeError, match=r"beta_max 0\.1"):
        ZieglerLeash(beta=0.15, target_kl_per_sequence=6.0, beta_max=0.1)


@pytest.mark.parametrize("name", ["target_kl_per_sequence", "horizon", "beta_min", "beta_max"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_settings_that_are_not_positive_are_refused_by_name(name, value):
    settings = {"beta": 0.15, "target_kl_per_sequence": 6.0, name: value}
    with pytest.raises(ValueRangeError, match=f"Expected {name} finite and > 0"):
        ZieglerLeash(**settings)
