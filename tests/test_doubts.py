"""What there is to doubt in a measurement: it is said where it holds, and sound measurements are left alone."""

import pytest
import torch
from exact import generator
from pairs import FOUR, EnumerablePair

from kleash.doubts import doubt_of_skewed_sums, doubt_of_the_sampler, doubt_of_the_writer, doubts_of


def test_sums_too_skewed_for_their_number_are_said_with_how_many_it_takes():
    assert doubt_of_skewed_sums(1.78, 32, sampled=True) is None
    assert doubt_of_skewed_sums(5.0, 250, sampled=True) is None
    assert doubt_of_skewed_sums(None, 32, sampled=True) is None
    assert doubt_of_skewed_sums(3.0, 15, sampled=True) is None
    assert doubt_of_skewed_sums(6.3, 40, sampled=True) == (
        "A few responses carry so much of the drift that the interval of the exact KL is too short for 40 of them: "
        "skewness 6.3, at most 2.0 would do; take about 400 responses (--samples)."
    )
    assert "take about 64 responses" in doubt_of_skewed_sums(1.8, 32, sampled=True)
    assert doubt_of_skewed_sums(-3.2, 32, sampled=False).endswith("; give about 110 responses.")
    assert "carry so little of the drift" in doubt_of_skewed_sums(-3.2, 32, sampled=False)
    assert doubt_of_skewed_sums(12.4, 648, sampled=True).endswith("; take about 1,600 responses (--samples).")


def test_sampler_and_scorer_may_be_as_far_apart_as_a_run_lets_them_be():
    assert doubt_of_the_sampler(None) is doubt_of_the_sampler(0.02) is None
    assert "at most 0.02 nats per token apart, found 0.03" in doubt_of_the_sampler(0.03)


def test_every_doubt_of_the_figures_is_found_in_its_order():
    assert doubts_of({"writer_doubt": "c", "interval_doubt": "a", "sampler_doubt": "b", "other": "d"}) == [
        "a",
        "b",
        "c",
    ]
    assert doubts_of({"interval_doubt": None}) == []


def test_k1_far_from_the_exact_figure_says_that_the_policy_did_not_write_them():
    exact = torch.linspace(28.0, 30.0, 64, dtype=torch.float64)
    noise = torch.randn(64, generator=generator(0), dtype=torch.float64)
    said = doubt_of_the_writer(exact, exact - 11.5 + noise, strata=None)
    assert said.startswith(
        "Expected k1 and the exact KL to agree but for chance on responses of the policy, found k1 1"
    )
    assert "nats below it: the policy did not write these, or not at this temperature" in said
    assert "nats above it" in doubt_of_the_writer(exact, exact + 11.5 + noise, strata=None)
    assert doubt_of_the_writer(exact[:15], exact[:15] - 11.5 + noise[:15], strata=None) is None
    assert doubt_of_the_writer(exact, exact + noise, strata=None) is None
    assert doubt_of_the_writer(exact, exact + 30 * noise, strata=None) is None
    assert doubt_of_the_writer(exact, exact - 0.7, strata=None) is None, (
        "a rare token that nobody drew makes up as much"
    )
    by_prompt = 20 * (torch.arange(64) % 2).double() - 10  # of two prompts, each far apart, together not
    strata = torch.arange(64) % 2
    assert doubt_of_the_writer(exact, exact + by_prompt - 1.5, strata=strata) is not None
    assert doubt_of_the_writer(exact, exact + by_prompt - 1.5, strata=None) is None


PAIRS = {
    "plain": EnumerablePair(drift=0.5, seed=1),
    "EOS, four prompts": EnumerablePair(eos=True, drift=0.5, prompts=FOUR, seed=2),
    "nearly deterministic": EnumerablePair(sharpness=6.0, drift=0.5, seed=1),
    "nearly deterministic, four prompts": EnumerablePair(sharpness=4.0, drift=0.5, length=3, prompts=FOUR, seed=3),
}


@pytest.mark.parametrize("n", [16, 64, 512])
@pytest.mark.parametrize("name", PAIRS)
def test_of_a_thousand_measurements_of_its_own_responses_none_doubts_the_writer(name, n):
    truth = PAIRS[name].truth
    rows = torch.multinomial(truth.probabilities, 1000 * n, replacement=True, generator=generator(n)).view(1000, n)
    assert all(doubt_of_the_writer(truth.exact[one], truth.k1[one], strata=None) is None for one in rows)


def test_the_references_responses_and_those_of_another_temperature_are_found_out():
    pair = EnumerablePair(drift=1.0, sharpness=3.0, seed=1)
    cold = EnumerablePair(drift=1.0, sharpness=3.0, temperature=0.3, seed=1)
    reference = (pair.truth.probabilities.log() - pair.truth.k1).exp()
    for others in (reference, cold.truth.probabilities):
        rows = torch.multinomial(others, 512, replacement=True, generator=generator(1))
        assert doubt_of_the_writer(pair.truth.exact[rows], pair.truth.k1[rows], strata=None) is not None
