"""One-token estimates against enumerated expectations, known tables and one another; intervals against Student's."""

import math
import statistics

import pytest
import torch
from exact import World, generator, gradient, markov_sum_moments, one_token
from hypothesis import given
from hypothesis import strategies as st

import kleash.estimators
from kleash.divergence import kl_divergence, kl_policy_ref_per_token
from kleash.errors import ShapeError, ValueRangeError
from kleash.estimators import (
    kl_policy_ref_per_token_k1,
    kl_policy_ref_per_token_k2,
    kl_policy_ref_per_token_k3,
    mean_with_interval,
    per_sequence,
    skewness,
    student_quantile,
)

ESTIMATORS = {
    "k1": kl_policy_ref_per_token_k1,
    "k2": kl_policy_ref_per_token_k2,
    "k3": kl_policy_ref_per_token_k3,
}
POISON = [math.nan, math.inf, -math.inf]
PI, RHO = one_token([0.4, 0.35, 0.25]), one_token([0.5, 0.3, 0.2])


def of_tokens(name, policy_logprobs, ref_logprobs):
    """The estimate for a plain list of tokens, all of them counted."""
    mask = torch.ones(1, len(policy_logprobs), dtype=torch.bool)
    return ESTIMATORS[name](policy_logprobs.unsqueeze(0), ref_logprobs.unsqueeze(0), mask)[0]


# --- values


def test_certainly_is_five_times_likelier_than_under_the_reference():
    policy, ref = one_token([0.25]), one_token([0.05])
    assert float(policy) == pytest.approx(-1.39, abs=5e-3)
    assert float(ref) == pytest.approx(-3.00, abs=5e-3)
    assert float(of_tokens("k1", policy, ref)) == pytest.approx(math.log(5), abs=1e-15)
    assert float(of_tokens("k2", policy, ref)) == pytest.approx(math.log(5) ** 2 / 2, abs=1e-15)
    assert float(of_tokens("k3", policy, ref)) == pytest.approx(1 / 5 - 1 + math.log(5), abs=1e-15)


def test_swapping_policy_and_reference_turns_the_sign_of_k1_and_keeps_k2():
    k1, k2, k3 = (of_tokens(name, PI, RHO) for name in ESTIMATORS)
    torch.testing.assert_close(of_tokens("k1", RHO, PI), -k1, atol=0, rtol=0)
    torch.testing.assert_close(of_tokens("k2", RHO, PI), k2, atol=0, rtol=0)
    torch.testing.assert_close(of_tokens("k3", RHO, PI), k1.exp() - 1 - k1)
    assert (of_tokens("k3", RHO, PI) - k3).abs().max() > 1e-3


def test_a_token_likelier_under_the_policy_counts_as_positive_drift():
    assert of_tokens("k1", torch.tensor([-1.0]), torch.tensor([-1.5])) == 0.5


@pytest.mark.parametrize("name", ["k1", "k3"])
def test_expected_over_the_policys_tokens_k1_and_k3_are_the_kl_of_the_direction_in_their_name(name):
    expected = (PI.exp() * of_tokens(name, PI, RHO)).sum()
    assert float(expected) == pytest.approx(0.020481, abs=5e-7)
    torch.testing.assert_close(expected, kl_divergence(PI, RHO), atol=1e-16, rtol=0)
    swapped = (RHO.exp() * of_tokens(name, RHO, PI)).sum()
    torch.testing.assert_close(swapped, kl_divergence(RHO, PI), atol=1e-16, rtol=0)


def test_expected_k2_is_not_the_kl():
    by_hand = sum(p * math.log(p / q) ** 2 / 2 for p, q in [(0.4, 0.5), (0.35, 0.3), (0.25, 0.2)])
    expected = (PI.exp() * of_tokens("k2", PI, RHO)).sum()
    assert float(expected) == pytest.approx(by_hand, abs=1e-16)
    assert abs(float(expected) - 0.020481) > 1e-4


def test_under_truncated_sampling_the_one_token_estimate_is_negative_for_ever():
    k1 = of_tokens("k1", PI, RHO)
    greedy = k1[0]
    top_two = (PI.exp()[:2] * k1[:2]).sum() / PI.exp()[:2].sum()
    assert float(greedy) == pytest.approx(-0.223144, abs=5e-7)
    assert float(top_two) == pytest.approx(-0.047073, abs=5e-7)
    assert float(kl_divergence(PI, RHO)) == pytest.approx(0.020481, abs=5e-7)


SCHULMAN = {  # (mu, estimator): bias and standard deviation, in units of the true KL mu^2 / 2
    (0.1, "k1"): (0, 20),
    (0.1, "k2"): (0.0025, 1.418),
    (0.1, "k3"): (0, 1.417),
    (1.0, "k1"): (0, 2),
    (1.0, "k2"): (0.25, 1.732),
    (1.0, "k3"): (0, 1.695),
}


@pytest.mark.parametrize(("mu", "name"), SCHULMAN)
def test_bias_and_spread_on_schulmans_gaussians_by_integration(mu, name):
    x = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    policy, ref = -x.square() / 2, -(x - mu).square() / 2
    weights = torch.softmax(policy, 0)
    true_kl = mu**2 / 2
    estimate = of_tokens(name, policy, ref)
    mean = (weights * estimate).sum()
    std = (weights * (estimate - mean).square()).sum().sqrt()
    bias_in_units, std_in_units = SCHULMAN[mu, name]
    assert float(mean / true_kl - 1) == pytest.approx(bias_in_units, abs=1e-8)
    assert float(std / true_kl) == pytest.approx(std_in_units, abs=5e-4)


def test_k3_keeps_its_digits_where_policy_and_reference_nearly_agree():
    policy = torch.tensor([-1.0], dtype=torch.float64)
    drift = 1e-6
    assert float(of_tokens("k3", policy + drift, policy)) == pytest.approx(drift**2 / 2, rel=1e-6)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_policy_is_exactly_zero_away_from_itself(name):
    assert torch.equal(of_tokens(name, PI, PI), torch.zeros(3, dtype=torch.float64))


@given(st.floats(-50, 0), st.floats(-50, 0))
def test_k2_and_k3_are_never_negative_and_k1_has_the_sign_of_the_drift(policy, ref):
    policy, ref = torch.tensor([policy], dtype=torch.float64), torch.tensor([ref], dtype=torch.float64)
    assert of_tokens("k1", policy, ref) == policy - ref
    assert of_tokens("k2", policy, ref) >= 0
    assert of_tokens("k3", policy, ref) >= -1e-15


# --- infinities and padding


@pytest.mark.parametrize(("dtype", "ref"), [(torch.float32, 0.0), (torch.float64, 0.0)])
def test_k3_that_overflows_is_reported_as_infinite_and_not_as_nan(dtype, ref):
    policy = torch.tensor([-1e3, -20.0], dtype=dtype)
    k3 = of_tokens("k3", policy, torch.full_like(policy, ref))
    assert k3[0] == math.inf
    assert float(k3[1]) == pytest.approx(math.exp(20) - 21, rel=1e-6)


def test_nothing_is_clamped_where_the_drift_is_worst_and_the_gradient_lives():
    ref = torch.tensor([-1.0], dtype=torch.float64)
    for name, value, slope in [("k1", 16, 1), ("k2", 128, 16), ("k3", math.exp(-16) + 15, 1 - math.exp(-16))]:
        policy = ref + 16
        assert float(of_tokens(name, policy, ref)) == pytest.approx(value)
        assert float(gradient(lambda x, name=name: of_tokens(name, x, ref).sum(), policy)) == pytest.approx(slope)


@pytest.mark.parametrize(
    ("policy", "ref", "expected"),
    [
        (-1.0, -math.inf, {"k1": math.inf, "k2": math.inf, "k3": math.inf}),
        (-math.inf, -1.0, {"k1": -math.inf, "k2": math.inf, "k3": math.inf}),
    ],
)
def test_a_token_that_one_model_forbids_is_infinite_and_not_nan(policy, ref, expected):
    for name, value in expected.items():
        assert of_tokens(name, torch.tensor([policy]), torch.tensor([ref])) == value


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_nan_on_the_mask_is_not_hidden(name):
    assert of_tokens(name, torch.tensor([math.nan]), torch.tensor([-1.0])).isnan()
    assert of_tokens(name, torch.tensor([-math.inf]), torch.tensor([-math.inf])).isnan()


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("policy_pad", [*POISON, -1e4])
@pytest.mark.parametrize("ref_pad", [*POISON, 1e4])
def test_padding_reaches_neither_the_estimate_nor_its_gradient(name, policy_pad, ref_pad):
    policy = torch.tensor([[-1.0, policy_pad], [policy_pad, policy_pad]], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([[-1.5, ref_pad], [ref_pad, ref_pad]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, False], [False, False]])
    estimate = ESTIMATORS[name](policy, ref, mask)
    estimate.sum().backward()
    value = {"k1": 0.5, "k2": 0.125, "k3": math.exp(-0.5) - 0.5}[name]
    slope = {"k1": 1.0, "k2": 0.5, "k3": 1 - math.exp(-0.5)}[name]
    assert estimate.tolist() == [[pytest.approx(value, abs=1e-15), 0], [0, 0]]
    assert policy.grad.tolist() == [[pytest.approx(slope, abs=1e-15), 0], [0, 0]]
    assert ref.grad.tolist() == [[pytest.approx(-slope, abs=1e-15), 0], [0, 0]]
    assert per_sequence(estimate, mask).tolist() == [pytest.approx(value, abs=1e-15), 0]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_tensors_that_do_not_fit_are_refused(name):
    two, three, mask = torch.zeros(1, 2), torch.zeros(1, 3), torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ShapeError, match=r"policy_logprobs \[1, 2\], ref_logprobs \[1, 3\]"):
        ESTIMATORS[name](two, three, mask)
    with pytest.raises(ShapeError, match=r"response_mask \[1, 2\]"):
        ESTIMATORS[name](three, three, mask)
    with pytest.raises(ShapeError, match=r"torch\.bool"):
        ESTIMATORS[name](two, two, mask.long())


# --- gradients of one step, in exact expectation


@pytest.fixture
def one_step():
    """Policy logits, the log-probs of the reference, and the true gradients of the KL both ways."""
    z = torch.randn(5, dtype=torch.float64, generator=generator(3))
    log_rho = torch.log_softmax(torch.randn(5, dtype=torch.float64, generator=generator(4)), -1)
    forward = gradient(lambda x: kl_divergence(torch.log_softmax(x, -1), log_rho), z)
    backward = gradient(lambda x: kl_divergence(log_rho, torch.log_softmax(x, -1)), z)
    return z, log_rho, forward, backward


def in_the_loss(name, z, log_rho):
    """E over sampled tokens of the gradient of the estimate: the sampling weights are constants."""

    def loss(x):
        log_pi = torch.log_softmax(x, -1)
        return (log_pi.exp().detach() * of_tokens(name, log_pi, log_rho)).sum()

    return gradient(loss, z)


def in_the_reward(cost_of, z):
    """E over sampled tokens of (gradient of the log-prob) * (detached cost of the token)."""

    def loss(x):
        log_pi = torch.log_softmax(x, -1)
        return (log_pi.exp().detach() * log_pi * cost_of(log_pi.detach())).sum()

    return gradient(loss, z)


def test_in_the_loss_k1_pulls_nowhere_k2_along_the_kl_and_k3_along_the_reverse_kl(one_step):
    z, log_rho, forward, backward = one_step
    torch.testing.assert_close(in_the_loss("k1", z, log_rho), torch.zeros_like(z), atol=1e-15, rtol=0)
    torch.testing.assert_close(in_the_loss("k2", z, log_rho), forward)
    torch.testing.assert_close(in_the_loss("k3", z, log_rho), backward)


def test_in_the_reward_k1_pulls_along_the_kl_and_k3_along_the_difference_of_both(one_step):
    z, log_rho, forward, backward = one_step
    k1 = in_the_reward(lambda log_pi: of_tokens("k1", log_pi, log_rho), z)
    k3 = in_the_reward(lambda log_pi: of_tokens("k3", log_pi, log_rho), z)
    torch.testing.assert_close(k1, forward)
    torch.testing.assert_close(k3, forward - backward)


def test_in_the_detached_reward_of_its_own_step_the_exact_kl_pulls_nowhere(one_step):
    z, log_rho, forward, _ = one_step
    exact = in_the_reward(lambda log_pi: kl_divergence(log_pi, log_rho).expand(5), z)
    torch.testing.assert_close(exact, torch.zeros_like(z), atol=1e-15, rtol=0)
    assert forward.norm() > 0.1


# --- sums over sequences


def test_a_sequence_sums_its_response_tokens_and_an_empty_one_is_zero():
    values = torch.tensor([[1.0, 2.0, 9.0], [math.nan, math.inf, 9.0]])
    mask = torch.tensor([[True, True, False], [False, False, False]])
    assert per_sequence(values, mask).tolist() == [3, 0]


@pytest.mark.parametrize("eos", [None, 0])
@pytest.mark.parametrize("prompts", [1, 2])
def test_summed_over_sequences_k1_k3_and_the_exact_kl_share_one_mean_and_the_exact_one_varies_least(eos, prompts):
    world = World(vocab=4, length=3, eos=eos, prompts=prompts)
    ref = world.random_logits(0)
    policy = ref + world.random_logits(1, scale=0.5)
    inputs = world.token_logprobs(policy), world.token_logprobs(ref), world.response_mask
    k1, k3 = (per_sequence(ESTIMATORS[name](*inputs), world.response_mask) for name in ("k1", "k3"))
    exact = per_sequence(
        kl_policy_ref_per_token(world.log_probs(policy), world.log_probs(ref), world.response_mask),
        world.response_mask,
    )
    for estimate in (k1, k3, exact):
        torch.testing.assert_close(
            world.expectation(policy, estimate), world.sequence_kl(policy, ref), atol=1e-14, rtol=0
        )
    torch.testing.assert_close(k1, world.sequence_logprobs(policy) - world.sequence_logprobs(ref))
    assert float(world.variance(policy, exact)) < float(world.variance(policy, k1)) / 3
    assert float(world.variance(policy, exact)) < float(world.variance(policy, k3)) / 3


@pytest.fixture(scope="module")
def markov():
    """200 tokens, 24 steps: (policy logits, reference logits), a sequence KL of about 5.2 nats."""
    ref = torch.randn(201, 200, dtype=torch.float64, generator=generator(10))
    return ref + 0.655 * torch.randn(201, 200, dtype=torch.float64, generator=generator(0)), ref


def test_on_a_markov_model_of_200_tokens_the_exact_kl_varies_far_less_than_one_token_estimates(markov):
    policy, ref = torch.log_softmax(markov[0], -1), torch.log_softmax(markov[1], -1)
    mask = torch.ones(201, 200, dtype=torch.bool)  # every state and every token, as if a batch
    exact = kl_divergence(policy, ref).unsqueeze(1).expand(-1, 200)
    moments = {
        name: markov_sum_moments(markov[0], values, length=24)
        for name, values in {
            "k1": kl_policy_ref_per_token_k1(policy, ref, mask),
            "k3": kl_policy_ref_per_token_k3(policy, ref, mask),
            "exact": exact,
        }.items()
    }
    means, variances = ({name: pair[i] for name, pair in moments.items()} for i in (0, 1))
    assert means["exact"] == pytest.approx(5.23, abs=0.05)
    assert means["k1"] == pytest.approx(means["exact"], abs=1e-12)
    assert means["k3"] == pytest.approx(means["exact"], abs=1e-12)
    assert math.sqrt(variances["k1"]) == pytest.approx(3.20, abs=0.05)
    assert variances["exact"] < variances["k3"] / 20 < variances["k1"] / 50


def test_sampled_from_that_model_one_sequence_in_twenty_reads_negative_by_k1_and_none_by_the_exact_kl(markov):
    policy, ref = (torch.log_softmax(logits, -1) for logits in markov)
    draw, state, states, tokens = generator(5), torch.zeros(2000, dtype=torch.int64), [], []
    for _ in range(24):
        token = torch.multinomial(policy[state].exp(), 1, generator=draw).squeeze(1)
        states, tokens, state = [*states, state], [*tokens, token], token + 1
    states, tokens = torch.stack(states, 1), torch.stack(tokens, 1)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    k1 = per_sequence(kl_policy_ref_per_token_k1(policy[states, tokens], ref[states, tokens], mask), mask)
    exact = per_sequence(kl_divergence(policy, ref)[states], mask)
    assert float((k1 < 0).double().mean()) == pytest.approx(0.05, abs=0.015)
    assert (exact > 0).all()
    wide, narrow = mean_with_interval(k1), mean_with_interval(exact)
    true_kl = markov_sum_moments(markov[0], policy - ref, length=24)[0]
    assert wide.low < true_kl < wide.high
    assert narrow.low < true_kl < narrow.high
    assert (narrow.high - narrow.low) < (wide.high - wide.low) / 7


# --- intervals


@pytest.mark.parametrize(
    ("probability", "degrees_of_freedom", "quantile"),
    [
        (0.975, 1, 12.7062),
        (0.975, 2, 4.3027),
        (0.975, 3, 3.1824),
        (0.975, 10, 2.2281),
        (0.975, 30, 2.0423),
        (0.975, 1000, 1.9623),
        (0.95, 5, 2.0150),
        (0.995, 4, 4.6041),
        (0.9995, 7, 5.4079),
    ],
)
def test_student_quantiles_are_those_of_the_tables(probability, degrees_of_freedom, quantile):
    assert student_quantile(probability, degrees_of_freedom=degrees_of_freedom) == pytest.approx(quantile, abs=5.1e-5)


def test_the_median_is_zero_and_quantiles_that_students_t_has_not_are_refused():
    assert student_quantile(0.5, degrees_of_freedom=3) == pytest.approx(0, abs=1e-12)
    for probability in (0.49, 1.0, math.nan):
        with pytest.raises(ValueRangeError, match="probability"):
            student_quantile(probability, degrees_of_freedom=3)
    with pytest.raises(ValueRangeError, match="degrees_of_freedom"):
        student_quantile(0.975, degrees_of_freedom=0)


def test_an_interval_by_hand():
    interval = mean_with_interval(torch.tensor([1.0, 2.0, 3.0]))
    half_width = 4.302653 / math.sqrt(3)
    assert (interval.mean, interval.n) == (2, 3)
    assert (interval.low, interval.high) == (
        pytest.approx(2 - half_width, abs=1e-6),
        pytest.approx(2 + half_width, abs=1e-6),
    )
    assert mean_with_interval(torch.tensor([1.0, 2.0, 3.0]), confidence=0.9).high == pytest.approx(
        2 + 2.919986 / math.sqrt(3), abs=1e-6
    )


def test_a_mean_per_token_is_a_ratio_of_sums_and_its_interval_comes_from_the_residuals():
    interval = mean_with_interval(torch.tensor([1.0, 5.0]), torch.tensor([1, 3]))
    assert interval.mean == 1.5
    assert interval.high - interval.mean == pytest.approx(12.7062 * 0.25, abs=2e-5)
    steady = mean_with_interval(torch.tensor([2.0, 4.0, 6.0]), torch.tensor([1, 2, 3]))
    assert (steady.mean, steady.low, steady.high) == (2, 2, 2)


def test_the_mean_per_token_is_another_number_than_the_mean_per_sequence():
    values, lengths = torch.tensor([1.0, 5.0]), torch.tensor([10, 90])
    assert mean_with_interval(values).mean == 3
    assert mean_with_interval(values, lengths).mean == pytest.approx(0.06)


def test_an_empty_response_in_the_batch_counts_no_token():
    assert mean_with_interval(torch.tensor([2.0, 0.0, 4.0]), torch.tensor([2, 0, 4])).mean == 1


def test_one_sequence_has_a_mean_and_no_finite_interval():
    interval = mean_with_interval(torch.tensor([2.5]))
    assert (interval.mean, interval.low, interval.high, interval.n) == (2.5, -math.inf, math.inf, 1)


def test_values_still_attached_to_a_graph_are_measured_in_silence():
    values = torch.tensor([1.0, 3.0], requires_grad=True)
    assert mean_with_interval(values, torch.tensor([1.0, 1.0], requires_grad=True)).mean == 2


def test_nothing_to_average_is_refused():
    with pytest.raises(ShapeError, match="at least one sequence"):
        mean_with_interval(torch.zeros(0))
    with pytest.raises(ShapeError, match=r"values_per_sequence as \[batch\]"):
        mean_with_interval(torch.zeros(2, 3))
    with pytest.raises(ShapeError, match=r"lengths \[3\]"):
        mean_with_interval(torch.zeros(2), torch.ones(3))
    with pytest.raises(ValueRangeError, match="sum_of_lengths"):
        mean_with_interval(torch.zeros(2), torch.zeros(2))


@pytest.mark.parametrize("confidence", [0.0, 1.0, -0.5, 95, math.nan])
def test_a_confidence_that_is_no_probability_is_refused(confidence):
    with pytest.raises(ValueRangeError, match="confidence"):
        mean_with_interval(torch.zeros(2), confidence=confidence)


def share_of_intervals_that_hold(true_mean, batches):
    intervals = [mean_with_interval(*batch) for batch in batches]
    return sum(interval.low < true_mean < interval.high for interval in intervals) / len(intervals)


@pytest.mark.parametrize("n", [2, 20])
def test_nineteen_in_twenty_intervals_of_normal_data_hold_the_true_mean(n):
    batches = 3 + 2 * torch.randn(1000, n, dtype=torch.float64, generator=generator(n))
    assert share_of_intervals_that_hold(3, [(batch,) for batch in batches]) == pytest.approx(0.95, abs=0.015)


def sequences_of_correlated_tokens(batches, n):
    """KL sums of n sequences whose tokens share a level; 0.5 nats per token on average."""
    draw = generator(1)
    lengths = torch.randint(5, 30, (batches, n), generator=draw).double()
    level = 0.5 + 0.3 * torch.randn(batches, n, dtype=torch.float64, generator=draw)
    noise = lengths.sqrt() * torch.randn(batches, n, dtype=torch.float64, generator=draw)
    return lengths * level + noise, lengths


def test_nineteen_in_twenty_intervals_per_token_hold_though_tokens_of_one_response_are_alike():
    sums, lengths = sequences_of_correlated_tokens(600, 40)
    assert share_of_intervals_that_hold(0.5, zip(sums, lengths, strict=True)) == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize("n", [25, 400])
def test_the_average_of_the_one_token_estimate_errs_by_its_spread_over_the_root_of_n(n):
    world = World(vocab=4, length=3)
    ref = world.random_logits(0)
    policy = ref + world.random_logits(1, scale=0.5)
    k1 = world.token_logprobs(policy) - world.token_logprobs(ref)
    drawn = world.sample(policy, 500 * n, seed=0)
    errors = per_sequence(k1, world.response_mask)[drawn].reshape(500, n).mean(1) - world.sequence_kl(policy, ref)
    expected = (world.variance(policy, k1.sum(1)) / n).sqrt()
    assert float(errors.square().mean().sqrt()) == pytest.approx(float(expected), rel=0.1)


# --- intervals whose prompts are given


def by_hand(values: list[list[float]]) -> tuple[float, float, float]:
    """Mean, standard error and Satterthwaite's degrees of freedom of strata, written out."""
    strata, m = len(values), len(values[0])
    means = [sum(row) / m for row in values]
    variances = [sum((x - mean) ** 2 for x in row) / (m - 1) for row, mean in zip(values, means, strict=True)]
    parts = [variance / (strata**2 * m) for variance in variances]
    freedom = sum(parts) ** 2 / sum(part**2 / (m - 1) for part in parts)
    return sum(means) / strata, math.sqrt(sum(parts)), freedom


STRATA = [[1.0, 2.0, 4.0], [10.0, 10.5, 9.0], [5.0, 5.0, 5.3]]


def test_an_interval_over_strata_by_hand():
    mean, standard_error, freedom = by_hand(STRATA)
    assert 3 < freedom < 4
    interval = mean_with_interval(torch.tensor(STRATA).flatten(), strata=torch.tensor([7, 2, 5]).repeat_interleave(3))
    half_width = student_quantile(0.975, degrees_of_freedom=3) * standard_error
    assert (interval.mean, interval.n) == (pytest.approx(mean), 9)
    assert interval.high - interval.mean == pytest.approx(half_width, rel=1e-6)
    assert interval.mean - interval.low == pytest.approx(half_width, rel=1e-6)


def test_the_order_of_the_sequences_does_not_matter_where_their_strata_go_with_them():
    values, strata = torch.tensor(STRATA).double().flatten(), torch.arange(3).repeat_interleave(3)
    order = torch.randperm(9, generator=generator(0))
    plain, shuffled = mean_with_interval(values, strata=strata), mean_with_interval(values[order], strata=strata[order])
    assert (shuffled.low, shuffled.high) == (pytest.approx(plain.low), pytest.approx(plain.high))


@pytest.mark.parametrize("n", [4, 31, 32, 257])
def test_whatever_the_values_one_stratum_is_the_plain_interval(n):
    """Its degrees of freedom are n - 1 and not one less for want of the last bit."""
    for values in torch.randn(50, n, dtype=torch.float64, generator=generator(n)):
        found, plain = mean_with_interval(values, strata=torch.zeros(n).long()), mean_with_interval(values)
        assert found.high - found.low == pytest.approx(plain.high - plain.low, rel=1e-9)


def test_one_stratum_is_the_plain_interval_and_equal_strata_have_all_degrees_of_freedom():
    values = torch.tensor([1.0, 2.0, 4.0, 8.0])
    assert mean_with_interval(values, strata=torch.zeros(4).long()) == mean_with_interval(values)
    pairs = torch.tensor([0.0, 1.0, 10.0, 11.0, 20.0, 21.0])
    interval = mean_with_interval(pairs, strata=torch.arange(3).repeat_interleave(2))
    standard_error = math.sqrt(3 * 0.5 / (9 * 2))
    assert interval.high - interval.mean == pytest.approx(3.182446 * standard_error, rel=1e-6)


def test_what_differs_between_prompts_alone_has_no_width_once_the_prompts_are_given():
    values, strata = torch.tensor([1.0, 5.0, 1.0, 5.0]), torch.tensor([0, 1, 0, 1])
    interval = mean_with_interval(values, strata=strata)
    assert (interval.low, interval.mean, interval.high) == (3, 3, 3)
    plain = mean_with_interval(values)
    assert plain.high - plain.low > 7


def test_a_mean_per_token_over_strata_takes_its_spread_from_the_residuals_within_them():
    sums, lengths = torch.tensor([1.0, 5.0, 9.0, 3.0]), torch.tensor([1, 3, 2, 2])
    interval = mean_with_interval(sums, lengths, strata=torch.tensor([0, 0, 1, 1]))
    ratio = 18 / 8
    residuals = [[(x - ratio * n) / 2 for x, n in rows] for rows in ([(1, 1), (5, 3)], [(9, 2), (3, 2)])]
    _, standard_error, freedom = by_hand(residuals)
    assert interval.mean == ratio
    expected = student_quantile(0.975, degrees_of_freedom=max(1, int(freedom))) * standard_error
    assert interval.high - interval.mean == pytest.approx(expected, rel=1e-6)


def test_the_variance_that_strata_leave_is_the_enumerated_one():
    """Mean over repetitions of the squared standard error against the true variance of the mean, prompts given."""
    world = World(vocab=3, length=2, prompts=4)
    logits = world.random_logits(2)
    quantity = world.token_logprobs(logits).sum(1) * torch.tensor([1.0, 3.0, 0.2, 2.0])[world.prompt_of]
    each = [world.sequence_logprobs(logits).exp() * (world.prompt_of == number) for number in range(4)]
    variances = [float((p * (quantity - (p * quantity).sum()).square()).sum()) for p in each]
    repetitions, m, draw = 4000, 3, generator(3)
    drawn = torch.stack([quantity[torch.multinomial(p, repetitions * m, True, generator=draw)] for p in each])
    drawn = drawn.view(4, repetitions, m).transpose(0, 1).flatten(1)
    strata = torch.arange(4).repeat_interleave(m)
    intervals = [mean_with_interval(values, strata=strata) for values in drawn]
    true_variance = sum(variances) / (16 * m)
    found = torch.tensor([interval.mean for interval in intervals], dtype=torch.float64).var()
    assert float(found) == pytest.approx(true_variance, rel=0.07)
    squares = [float((values.view(4, m).var(1)).sum() / (16 * m)) for values in drawn]
    assert sum(squares) / repetitions == pytest.approx(true_variance, rel=0.03)


def test_nineteen_in_twenty_intervals_over_uneven_normal_strata_hold_the_true_mean():
    """Two responses to each prompt, and prompts of very different spread: what Satterthwaite's freedom is for."""
    spread = torch.tensor([5.0, 1.0, 1.0, 0.3, 2.0]).repeat_interleave(2)
    strata = torch.arange(5).repeat_interleave(2)
    values = torch.arange(5.0).repeat_interleave(2) + spread * torch.randn(2000, 10, generator=generator(6))
    intervals = [mean_with_interval(row, strata=strata) for row in values]
    share = sum(interval.low < 2 < interval.high for interval in intervals) / 2000
    assert share == pytest.approx(0.96, abs=0.02)


@pytest.mark.parametrize(
    ("strata", "found"), [([0, 0, 0, 1], "1 to 3"), ([0, 1, 2, 3], "1 to 1"), ([0, 0, 1, 2], "1 to 2")]
)
def test_uneven_or_single_strata_are_refused(strata, found):
    with pytest.raises(
        ShapeError, match=rf"strata of one size, at least 2 sequences each, found {found}; draw as many"
    ):
        mean_with_interval(torch.zeros(4), strata=torch.tensor(strata))


def test_strata_of_another_shape_are_refused():
    with pytest.raises(ShapeError, match=r"strata \[3\]"):
        mean_with_interval(torch.zeros(4), strata=torch.zeros(3).long())


@pytest.mark.parametrize("probability", [0.5, 0.75, 0.95, 0.975, 0.995, 0.99995])
@pytest.mark.parametrize("degrees_of_freedom", [1001, 1500, 10_001])
def test_beyond_a_thousand_degrees_the_expansion_is_the_closed_form(probability, degrees_of_freedom, monkeypatch):
    expanded = student_quantile(probability, degrees_of_freedom=degrees_of_freedom)
    monkeypatch.setattr(kleash.estimators, "CLOSED_FORM_UP_TO", math.inf)
    closed = student_quantile.__wrapped__(probability, degrees_of_freedom=degrees_of_freedom)
    assert expanded == pytest.approx(closed, abs=2e-11)
    assert probability == 0.5 or expanded > statistics.NormalDist().inv_cdf(probability)


def test_with_freedom_without_end_students_quantile_is_the_normal_one():
    assert student_quantile(0.975, degrees_of_freedom=10**12) == pytest.approx(1.9599639845, abs=1e-9)


# --- skewness


def test_skewness_by_hand_is_the_same_in_any_unit_and_turns_with_the_sign():
    values = torch.tensor([0.0, 0.0, 3.0])  # second k-statistic 6 / 2, third 6 * 3 / (2 * 1)
    assert skewness(values) == pytest.approx(9 / 3**1.5)
    assert skewness(100 + 7 * values) == pytest.approx(9 / 3**1.5)
    assert skewness(-values) == pytest.approx(-9 / 3**1.5)
    assert skewness(torch.tensor([1.0, 2.0, 3.0, 4.0])) == pytest.approx(0.0)


def test_between_strata_nothing_is_skewed():
    values, strata = torch.tensor([0.0, 50.0, 0.0, 50.0, 3.0, 53.0]), torch.tensor([4, 1, 4, 1, 4, 1])
    assert skewness(values, strata=strata) == pytest.approx(9 / 3**1.5)


@pytest.mark.parametrize("sequences", [5, 5000])
def test_of_exponential_strata_it_is_two(sequences):
    uniforms = torch.rand(20_000 // sequences * sequences, dtype=torch.float64, generator=generator(3))
    strata = torch.arange(20_000 // sequences).repeat_interleave(sequences)
    assert skewness(-uniforms.log() + strata, strata=strata) == pytest.approx(2.0, abs=0.15)


@pytest.mark.parametrize(
    ("values", "strata"),
    [([1.0, 5.0], None), ([0.3] * 7, None), ([0.3, 0.3, 0.3 + 1e-8], None), ([1.0, 5.0, 2.0, 4.0], [0, 0, 1, 1])],
)
def test_of_two_or_without_a_spread_beyond_rounding_there_is_no_skewness(values, strata):
    places = None if strata is None else torch.tensor(strata)
    assert skewness(torch.tensor(values, dtype=torch.float64), strata=places) is None
