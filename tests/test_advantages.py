"""GAE against its own sum written out, and against what must not reach it."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from kleash.advantages import generalized_advantages
from kleash.errors import ShapeError, ValueRangeError


@st.composite
def batches(draw: DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rewards and values with rubbish off the mask, and right-padded responses; some may be empty."""
    batch, time = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    lengths = torch.tensor([draw(st.integers(0, time)) for _ in range(batch)])
    mask = torch.arange(time) < lengths.unsqueeze(1)

    def filled() -> torch.Tensor:
        row = st.lists(st.floats(-10, 10), min_size=time, max_size=time)
        values = torch.tensor([draw(row) for _ in range(batch)], dtype=torch.float64)
        return torch.where(mask, values, math.nan)

    return filled(), filled(), mask


def written_out(rewards, values, mask, gamma, gae_lambda):
    """A_t = sum_k (gamma lambda)^k delta_{t+k}, one response at a time, as the paper has it."""
    advantages = torch.zeros_like(rewards)
    for i, counted in enumerate(mask):
        r, v = rewards[i, counted].tolist(), [*values[i, counted].tolist(), 0.0]
        deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(len(r))]
        for t in range(len(r)):
            advantages[i, t] = sum((gamma * gae_lambda) ** (k - t) * deltas[k] for k in range(t, len(r)))
    return advantages


def test_advantages_by_hand():
    rewards = torch.tensor([[0.0, 1.0, 5.0]], dtype=torch.float64)
    values = torch.tensor([[0.5, 0.25, 5.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False]])
    advantages, returns = generalized_advantages(rewards, values, mask, gamma=0.9, gae_lambda=0.5)
    last = 1 - 0.25
    first = 0 + 0.9 * 0.25 - 0.5 + 0.9 * 0.5 * last
    assert advantages.tolist() == [[pytest.approx(first), last, 0]]
    assert returns.tolist() == [[pytest.approx(first + 0.5), 1, 0]]


@given(batches(), st.floats(0, 1), st.floats(0, 1))
def test_the_recursion_is_the_sum_of_the_paper(batch, gamma, gae_lambda):
    rewards, values, mask = batch
    advantages, returns = generalized_advantages(rewards, values, mask, gamma=gamma, gae_lambda=gae_lambda)
    expected = written_out(rewards, values, mask, gamma, gae_lambda)
    torch.testing.assert_close(advantages, expected, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(returns, expected + torch.where(mask, values, 0.0), atol=1e-10, rtol=1e-10)
    assert (advantages[~mask] == 0).all()
    assert (returns[~mask] == 0).all()


@given(batches())
def test_with_gamma_and_lambda_one_the_return_is_the_reward_to_go_whatever_the_values_say(batch):
    rewards, values, mask = batch
    _, returns = generalized_advantages(rewards, values, mask, gamma=1.0, gae_lambda=1.0)
    counted = torch.where(mask, rewards, 0.0)
    reward_to_go = torch.where(mask, counted.flip(1).cumsum(1).flip(1), 0.0)
    torch.testing.assert_close(returns, reward_to_go, atol=1e-12, rtol=0)


def test_with_lambda_zero_the_advantage_is_the_one_step_error():
    rewards, values = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, 4.0]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    advantages, _ = generalized_advantages(rewards, values, mask, gamma=1.0, gae_lambda=0.0)
    assert advantages.tolist() == [[4.5, -2.0]]


def test_a_perfect_value_model_leaves_no_advantage():
    rewards = torch.tensor([[0.5, -1.0, 2.0]], dtype=torch.float64)
    values = rewards.flip(1).cumsum(1).flip(1)
    mask = torch.ones(1, 3, dtype=torch.bool)
    for gae_lambda in (0.0, 0.95, 1.0):
        advantages, returns = generalized_advantages(rewards, values, mask, gamma=1.0, gae_lambda=gae_lambda)
        torch.testing.assert_close(advantages, torch.zeros(1, 3, dtype=torch.float64), atol=1e-15, rtol=0)
        torch.testing.assert_close(returns, values)


def test_nothing_is_bootstrapped_beyond_the_last_token_however_much_is_promised_there():
    rewards, values = torch.tensor([[1.0, 100.0]]), torch.tensor([[0.0, 100.0]])
    mask = torch.tensor([[True, False]])
    advantages, returns = generalized_advantages(rewards, values, mask, gamma=1.0, gae_lambda=0.95)
    assert advantages.tolist() == [[1, 0]]
    assert returns.tolist() == [[1, 0]]


def test_a_prompt_before_the_response_gets_nothing():
    rewards, values = torch.tensor([[9.0, 1.0]]), torch.tensor([[9.0, 0.25]])
    mask = torch.tensor([[False, True]])
    advantages, returns = generalized_advantages(rewards, values, mask, gamma=1.0, gae_lambda=1.0)
    assert advantages.tolist() == [[0, 0.75]]
    assert returns.tolist() == [[0, 1]]


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_padding_and_empty_responses_stay_exactly_zero(poison):
    rewards = values = torch.tensor([[1.0, poison], [poison, poison]])
    mask = torch.tensor([[True, False], [False, False]])
    advantages, returns = generalized_advantages(rewards, values, mask, gamma=0.9, gae_lambda=0.9)
    assert advantages.tolist() == [[0, 0], [0, 0]]
    assert returns.tolist() == [[1, 0], [0, 0]]


def test_a_nan_on_the_mask_is_not_hidden():
    rewards = torch.tensor([[0.0, math.nan]])
    advantages, _ = generalized_advantages(
        rewards, torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool), gamma=1.0, gae_lambda=1.0
    )
    assert advantages.isnan().all()


def test_neither_advantages_nor_returns_carry_a_gradient_and_the_inputs_are_left_alone():
    rewards = torch.tensor([[1.0, 2.0]], requires_grad=True)
    values = torch.tensor([[0.5, 4.0]], requires_grad=True)
    advantages, returns = generalized_advantages(
        rewards, values, torch.tensor([[True, False]]), gamma=1.0, gae_lambda=1.0
    )
    assert not advantages.requires_grad
    assert not returns.requires_grad
    assert (rewards.tolist(), values.tolist()) == ([[1, 2]], [[0.5, 4]])


def test_tensors_that_do_not_fit_and_discounts_outside_zero_to_one_are_refused():
    two, mask = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ShapeError, match=r"values \[1, 3\]"):
        generalized_advantages(two, torch.zeros(1, 3), mask, gamma=1.0, gae_lambda=1.0)
    with pytest.raises(ShapeError, match=r"torch\.bool"):
        generalized_advantages(two, two, mask.float(), gamma=1.0, gae_lambda=1.0)
    with pytest.raises(ValueRangeError, match="gamma"):
        generalized_advantages(two, two, mask, gamma=1.01, gae_lambda=1.0)
    with pytest.raises(ValueRangeError, match="gae_lambda"):
        generalized_advantages(two, two, mask, gamma=1.0, gae_lambda=-0.1)
