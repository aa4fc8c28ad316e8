"""Plain token log-probs: precision, temperature, forbidden tokens."""

import math

import pytest
import torch
from exact import generator, gradient, one_token

from kleash.divergence import kl_divergence
from kleash.errors import ShapeError, ValueRangeError
from kleash.logprobs import full_log_probs, token_logprobs


def test_log_probs_by_hand():
    logits = torch.tensor([[0.0, math.log(3)], [1.0, 1.0]], dtype=torch.float64)
    expected = torch.tensor([[0.25, 0.75], [0.5, 0.5]], dtype=torch.float64).log()
    torch.testing.assert_close(full_log_probs(logits), expected)
    torch.testing.assert_close(token_logprobs(logits, torch.tensor([1, 0])), expected[[0, 1], [1, 0]])


def test_certainly_has_the_log_probs_of_the_worked_example():
    policy, ref = one_token([0.25, 0.75]), one_token([0.05, 0.95])
    tokens = torch.tensor(0)
    assert float(token_logprobs(policy, tokens)) == pytest.approx(-1.39, abs=5e-3)
    assert float(token_logprobs(ref, tokens)) == pytest.approx(-3.00, abs=5e-3)
    assert float(token_logprobs(policy, tokens) - token_logprobs(ref, tokens)) == pytest.approx(math.log(5))


def test_the_temperature_belongs_to_the_policy():
    logits = torch.tensor([0.0, math.log(4)], dtype=torch.float64)
    torch.testing.assert_close(full_log_probs(logits, temperature=2.0), one_token([1 / 3, 2 / 3]))
    torch.testing.assert_close(full_log_probs(logits, temperature=0.5), one_token([1 / 17, 16 / 17]))
    expected = one_token([1 / 3, 2 / 3])[1]
    torch.testing.assert_close(token_logprobs(logits, torch.tensor(1), temperature=2.0), expected)


def test_the_temperature_is_above_zero_and_finite():
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueRangeError, match="temperature"):
            full_log_probs(torch.zeros(2), temperature=temperature)
        with pytest.raises(ValueRangeError, match="temperature"):
            token_logprobs(torch.zeros(1, 2), torch.tensor([0]), temperature=temperature)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_log_probs_are_at_least_float32(given, found):
    logits = torch.zeros(2, 3, dtype=given)
    assert full_log_probs(logits).dtype == found
    assert token_logprobs(logits, torch.tensor([0, 1])).dtype == found


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logits_are_raised_before_the_softmax_and_not_after(temperature):
    logits = (4 * torch.randn(64, 1000, generator=generator(0))).bfloat16()
    truth = torch.log_softmax(logits.double() / temperature, -1)
    raised_after = torch.log_softmax(logits / temperature, -1)
    assert (full_log_probs(logits, temperature=temperature) - truth).abs().max() < 1e-5
    assert (raised_after - truth).abs().max() > 1.6e-2


def test_a_model_against_itself_has_a_kl_of_exactly_zero_even_from_bf16_logits():
    logits = (4 * torch.randn(64, 1000, generator=generator(0))).bfloat16()
    assert torch.equal(kl_divergence(full_log_probs(logits), full_log_probs(logits.clone())), torch.zeros(64))


def test_a_forbidden_token_has_log_prob_minus_infinity_and_the_others_share_the_rest():
    logits = torch.tensor([[0.0, -math.inf, math.log(3)]], dtype=torch.float64)
    torch.testing.assert_close(full_log_probs(logits), one_token([0.25, 0.0, 0.75]).unsqueeze(0))
    assert token_logprobs(logits, torch.tensor([1])) == -math.inf
    found = gradient(lambda z: token_logprobs(z, torch.tensor([2])).sum(), logits)
    torch.testing.assert_close(found, torch.tensor([[-0.25, 0.0, 0.25]], dtype=torch.float64))


def test_large_logits_do_not_overflow():
    logits = torch.tensor([3e38, 0.0, -3e38])
    assert full_log_probs(logits)[0] == 0
    assert token_logprobs(torch.tensor([1e4, 1e4]), torch.tensor(0)).item() == pytest.approx(-math.log(2))


def test_leading_dimensions_are_kept():
    logits = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=generator(1))
    tokens = torch.randint(5, (2, 3, 4), generator=generator(2))
    found = token_logprobs(logits, tokens)
    for index in ((0, 0, 0), (1, 2, 3), (0, 2, 1)):
        row = logits[index]
        torch.testing.assert_close(found[index], row[tokens[index]] - row.exp().sum().log())


def test_one_token_is_wanted_per_row_of_logits():
    with pytest.raises(ShapeError, match=r"Expected tokens \[2, 3\] to go with logits \[2, 3, 5\], found \[2, 4\]"):
        token_logprobs(torch.zeros(2, 3, 5), torch.zeros(2, 4, dtype=torch.int64))


def test_a_row_of_1024_tokens_over_a_vocabulary_of_151936_takes_593_mib_per_model():
    logits = torch.empty(1024, 151_936, dtype=torch.bfloat16, device="meta")
    log_probs = full_log_probs(logits)
    assert log_probs.numel() * log_probs.element_size() / 2**20 == 593.5
