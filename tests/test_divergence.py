"""Exact divergences against hand calculations, closed-form gradients and enumerated sequences."""

import math

import pytest
import torch
from exact import World, generator, gradient, one_token
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from kleash.divergence import entropy, js_divergence, kl_divergence, kl_policy_ref_per_token
from kleash.errors import ShapeError

A, B = one_token([0.7, 0.3]), one_token([0.5, 0.5])
POISON = [math.nan, math.inf, -math.inf]


@st.composite
def two_distributions(draw: DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of two distributions over one vocabulary; either may forbid tokens."""
    vocab = draw(st.integers(2, 6))
    logit = st.one_of(st.floats(-30, 30), st.just(-math.inf))
    rows = [[draw(st.floats(-30, 30)), *draw(st.lists(logit, min_size=vocab - 1, max_size=vocab - 1))] for _ in "pq"]
    return tuple(torch.log_softmax(torch.tensor(row, dtype=torch.float64), -1) for row in rows)


# --- values


def test_two_coins_differ_by_other_amounts_in_the_two_directions():
    assert float(kl_divergence(A, B)) == pytest.approx(0.7 * math.log(1.4) + 0.3 * math.log(0.6), abs=1e-15)
    assert float(kl_divergence(A, B)) == pytest.approx(0.0822828785, abs=5e-11)
    assert float(kl_divergence(B, A)) == pytest.approx(0.0871766936, abs=5e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_distribution_is_exactly_zero_away_from_itself(dtype):
    log_p = torch.log_softmax(5 * torch.randn(50, 300, generator=generator(0)), -1).to(dtype)
    assert torch.equal(kl_divergence(log_p, log_p), torch.zeros(50, dtype=dtype))


def test_a_token_that_p_forbids_contributes_nothing_and_one_that_only_q_forbids_is_infinite():
    certain, even = one_token([1.0, 0.0]), one_token([0.5, 0.5])
    assert float(kl_divergence(certain, even)) == pytest.approx(math.log(2), abs=1e-15)
    assert kl_divergence(even, certain) == math.inf
    assert kl_divergence(certain, certain) == 0


def test_a_forbidden_token_is_infinite_even_where_its_probability_underflows():
    assert kl_divergence(torch.tensor([0.0, -1000.0]), torch.tensor([0.0, -math.inf])) == math.inf


def test_a_nan_log_prob_of_either_model_shows():
    broken = torch.tensor([math.nan, math.nan], dtype=torch.float64)
    for divergence in (kl_divergence(broken, A), kl_divergence(A, broken), js_divergence(A, broken), entropy(broken)):
        assert divergence.isnan()


def test_tokens_forbidden_in_both_models_change_nothing():
    padded = [torch.cat([log_p, torch.full((3,), -math.inf, dtype=torch.float64)]) for log_p in (A, B)]
    assert kl_divergence(*padded) == kl_divergence(A, B)
    assert js_divergence(*padded) == js_divergence(A, B)
    assert entropy(padded[0]) == entropy(A)


def test_log_probs_that_are_not_normalised_are_neither_repaired_nor_clamped():
    assert float(kl_divergence(one_token([0.4, 0.4]), B)) == pytest.approx(0.8 * math.log(0.8), abs=1e-15)


def test_entropy_of_certainty_is_zero_and_of_an_even_choice_the_log_of_the_choices():
    assert entropy(one_token([1.0, 0.0, 0.0])) == 0
    assert float(entropy(one_token([0.25] * 4))) == pytest.approx(math.log(4), abs=1e-15)
    assert float(entropy(A)) == pytest.approx(-0.7 * math.log(0.7) - 0.3 * math.log(0.3), abs=1e-15)


def test_js_by_hand_and_at_its_upper_bound():
    by_hand = (0.7 * math.log(0.7 / 0.6) + 0.3 * math.log(0.3 / 0.4)) / 2
    by_hand += (0.5 * math.log(0.5 / 0.6) + 0.5 * math.log(0.5 / 0.4)) / 2
    assert float(js_divergence(A, B)) == pytest.approx(by_hand, abs=1e-15)
    assert float(js_divergence(one_token([1.0, 0.0]), one_token([0.0, 1.0]))) == pytest.approx(math.log(2), abs=1e-15)


def test_leading_dimensions_are_kept():
    log_p = torch.stack([torch.stack([A, B]), torch.stack([B, B])])
    log_q = torch.stack([torch.stack([B, A]), torch.stack([B, A])])
    a_b, b_a = kl_divergence(A, B), kl_divergence(B, A)
    torch.testing.assert_close(kl_divergence(log_p, log_q), torch.stack([a_b, b_a, 0 * a_b, b_a]).reshape(2, 2))


@pytest.mark.parametrize("divergence", [kl_divergence, js_divergence])
def test_vocabularies_of_two_sizes_are_refused(divergence):
    with pytest.raises(ShapeError, match=r"log_p \[2\], log_q \[3\]"):
        divergence(A, one_token([0.2, 0.3, 0.5]))


@given(two_distributions())
def test_kl_is_never_negative_and_js_lies_between_zero_and_log_two(pair):
    log_p, log_q = pair
    assert kl_divergence(log_p, log_q) >= -1e-14
    assert kl_divergence(log_q, log_p) >= -1e-14
    assert -1e-14 <= js_divergence(log_p, log_q) <= math.log(2) + 1e-14
    assert float(js_divergence(log_p, log_q)) == pytest.approx(float(js_divergence(log_q, log_p)), abs=1e-14)
    assert -1e-14 <= entropy(log_p) <= math.log(len(log_p)) + 1e-14


@given(two_distributions())
def test_kl_to_the_even_distribution_is_the_missing_entropy(pair):
    log_p, _ = pair
    even = one_token([1 / len(log_p)] * len(log_p))
    assert float(kl_divergence(log_p, even)) == pytest.approx(math.log(len(log_p)) - float(entropy(log_p)), abs=1e-12)


# --- gradients


def test_the_gradient_in_the_logits_is_the_closed_form_in_both_arguments():
    z = torch.randn(7, dtype=torch.float64, generator=generator(1))
    w = torch.randn(7, dtype=torch.float64, generator=generator(2))
    log_pi, log_rho = torch.log_softmax(z, -1), torch.log_softmax(w, -1)
    kl = kl_divergence(log_pi, log_rho)
    in_policy = gradient(lambda logits: kl_divergence(torch.log_softmax(logits, -1), log_rho), z)
    in_reference = gradient(lambda logits: kl_divergence(log_pi, torch.log_softmax(logits, -1)), w)
    torch.testing.assert_close(in_policy, log_pi.exp() * (log_pi - log_rho - kl))
    torch.testing.assert_close(in_reference, log_rho.exp() - log_pi.exp())


def test_the_gradient_of_the_entropy_is_the_closed_form():
    z = torch.randn(7, dtype=torch.float64, generator=generator(1))
    log_pi = torch.log_softmax(z, -1)
    found = gradient(lambda logits: entropy(torch.log_softmax(logits, -1)), z)
    torch.testing.assert_close(found, -log_pi.exp() * (log_pi + entropy(log_pi)))


@pytest.mark.parametrize("divergence", [kl_divergence, js_divergence])
def test_a_token_forbidden_in_both_models_has_gradient_zero_and_spoils_no_other(divergence):
    logits = torch.tensor([0.3, -1.0, 0.5], dtype=torch.float64)
    ref_logits = torch.tensor([-0.2, 0.4, 0.1], dtype=torch.float64)
    bare = gradient(lambda z: divergence(torch.log_softmax(z, -1), torch.log_softmax(ref_logits, -1)), logits)
    forbidden = torch.tensor([-math.inf], dtype=torch.float64)
    padded, ref_padded = torch.cat([logits, forbidden]), torch.cat([ref_logits, forbidden])
    found = gradient(lambda z: divergence(torch.log_softmax(z, -1), torch.log_softmax(ref_padded, -1)), padded)
    torch.testing.assert_close(found[:3], bare)
    assert found[3] == 0


def test_js_has_a_finite_gradient_where_each_model_forbids_what_the_other_allows():
    log_p = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64).log()
    log_q = torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64).log()
    # d JS / d log p = p (log p - log m) / 2, where m is half of p on the token that q forbids
    expected = torch.tensor([0.0, 0.25 * math.log(2), 0.0], dtype=torch.float64)
    torch.testing.assert_close(gradient(lambda x: js_divergence(x, log_q), log_p), expected)


# --- per token, under a mask


def test_kl_policy_ref_weighs_by_the_policy_and_is_zero_off_the_mask():
    policy, ref = torch.stack([A, B, A]).unsqueeze(0), torch.stack([B, A, B]).unsqueeze(0)
    kl = kl_policy_ref_per_token(policy, ref, torch.tensor([[True, True, False]]))
    expected = torch.tensor([[0.0822828785, 0.0871766936, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(kl, expected, atol=5e-11, rtol=0)
    assert kl[0, 2] == 0


@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("where", ["policy", "ref", "both"])
def test_padding_reaches_neither_the_kl_nor_its_gradient(poison, where):
    policy, ref = torch.stack([A, A]).unsqueeze(0), torch.stack([B, B]).unsqueeze(0)
    if where in ("policy", "both"):
        policy[0, 1, 0] = poison
    if where in ("ref", "both"):
        ref[0, 1, 0] = poison
    policy.requires_grad_()
    kl = kl_policy_ref_per_token(policy, ref, torch.tensor([[True, False]]))
    kl.sum().backward()
    assert kl[0, 0].item() == pytest.approx(0.0822828785, abs=5e-11)
    assert kl[0, 1] == 0
    torch.testing.assert_close(policy.grad[0, 0], A.exp() * (A - B + 1))
    assert torch.equal(policy.grad[0, 1], torch.zeros(2, dtype=torch.float64))


def test_a_response_without_a_token_has_no_kl():
    policy, ref = A.expand(2, 3, 2), B.expand(2, 3, 2)
    assert torch.equal(
        kl_policy_ref_per_token(policy, ref, torch.zeros(2, 3, dtype=torch.bool)), torch.zeros(2, 3).double()
    )


def test_log_probs_that_do_not_fit_the_mask_or_each_other_are_refused():
    log_probs, mask = torch.zeros(2, 3, 5), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ShapeError, match=r"\[batch, time, vocab\]"):
        kl_policy_ref_per_token(torch.zeros(2, 3), torch.zeros(2, 3), mask)
    with pytest.raises(ShapeError, match=r"response_mask \[2, 3\] like the log-probs, found \[2, 4\]"):
        kl_policy_ref_per_token(log_probs, log_probs, torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ShapeError, match=r"ref_log_probs \[1, 3, 5\]"):
        kl_policy_ref_per_token(log_probs, log_probs[:1], mask)
    with pytest.raises(ShapeError, match=r"torch\.bool"):
        kl_policy_ref_per_token(log_probs, log_probs, mask.float())


# --- over sequences


@pytest.mark.parametrize(
    "world",
    [
        World(vocab=4, length=3),
        World(vocab=3, length=4, eos=0),
        World(vocab=3, length=3, eos=2, prompts=3),
        World(vocab=4, length=1),
    ],
    ids=["cut at the limit", "ends with EOS", "several prompts", "one token"],
)
def test_summed_over_sampled_responses_it_is_the_sequence_kl_without_bias(world):
    policy, ref = world.random_logits(0), world.random_logits(1)
    per_token = kl_policy_ref_per_token(world.log_probs(policy), world.log_probs(ref), world.response_mask)
    expected = world.expectation(policy, per_token.sum(1))
    torch.testing.assert_close(expected, world.sequence_kl(policy, ref), atol=1e-13, rtol=0)


def test_on_responses_of_another_model_it_is_not_the_sequence_kl():
    world = World(vocab=4, length=3)
    policy, ref = world.random_logits(0, scale=2), world.random_logits(1, scale=2)
    per_token = kl_policy_ref_per_token(world.log_probs(policy), world.log_probs(ref), world.response_mask)
    on_text_of_the_reference = float(world.expectation(ref, per_token.sum(1)))
    assert abs(on_text_of_the_reference - float(world.sequence_kl(policy, ref))) > 0.1
