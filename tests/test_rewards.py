"""Where the score lands, what the KL takes away, and that padding gets nothing."""

import math

import pytest
import torch
from exact import World
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from kleash.errors import ShapeError, ValueRangeError
from kleash.rewards import adjusted_rewards, last_response_position, missing_eos_penalised

NAN, INF = math.nan, math.inf


@st.composite
def batches(draw: DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores, KL with rubbish off the mask, and right-padded responses of at least one token."""
    batch, time = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    lengths = torch.tensor([draw(st.integers(1, time)) for _ in range(batch)])
    mask = torch.arange(time) < lengths.unsqueeze(1)
    number = st.floats(-100, 100)
    kl = [[draw(number) if counted else draw(st.just(NAN) | st.just(INF)) for counted in row] for row in mask.tolist()]
    scores = [draw(number) for _ in range(batch)]
    return torch.tensor(scores, dtype=torch.float64), torch.tensor(kl, dtype=torch.float64), mask


def test_the_last_response_position_is_the_last_true_wherever_the_response_stands():
    mask = torch.tensor(
        [
            [True, True, False, False],
            [True, True, True, True],
            [False, True, True, False],
            [True, False, False, False],
            [False, False, False, False],
        ]
    )
    assert last_response_position(mask).tolist() == [1, 3, 2, 0, -1]
    with pytest.raises(ShapeError, match=r"torch\.bool"):
        last_response_position(mask.long())


def test_the_score_lands_on_the_eos_and_the_kl_on_every_token():
    kl = torch.tensor([[0.5, 1.0, 7.0], [0.25, -0.5, 2.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    rewards = adjusted_rewards(torch.tensor([2.0, -1.0]).double(), kl, mask, beta=0.1)
    expected = torch.tensor([[-0.05, 1.9, 0.0], [-0.025, 0.05, -1.2]], dtype=torch.float64)
    torch.testing.assert_close(rewards, expected)


@pytest.mark.parametrize("eos_position", [0, 1, 2, 3])
def test_an_eos_at_any_position_up_to_the_very_last_one_carries_the_score(eos_position):
    world = World(vocab=2, length=4, eos=0)
    row = next(i for i, mask in enumerate(world.response_mask) if mask.sum() == eos_position + 1)
    mask = world.response_mask[row : row + 1]
    rewards = adjusted_rewards(torch.tensor([3.0]), torch.zeros(1, 4), mask, beta=0.1)
    assert rewards.tolist() == [[3.0 * (t == eos_position) for t in range(4)]]


def test_a_response_cut_at_the_length_limit_carries_its_score_on_its_last_token():
    world = World(vocab=2, length=3, eos=0)
    cut = (world.responses != 0).all(1)
    rewards = adjusted_rewards(torch.tensor([3.0]), torch.zeros(1, 3), world.response_mask[cut], beta=0.1)
    assert rewards.tolist() == [[0, 0, 3]]


def test_a_response_of_one_token_carries_score_and_kl_together():
    mask = torch.tensor([[True, False]])
    rewards = adjusted_rewards(torch.tensor([1.0]), torch.tensor([[0.5, NAN]]), mask, beta=2.0)
    assert rewards.tolist() == [[0, 0]]
    rewards = adjusted_rewards(torch.tensor([1.0]), torch.tensor([[0.25, NAN]]), mask, beta=2.0)
    assert rewards.tolist() == [[0.5, 0]]


def test_with_beta_zero_only_the_score_is_left():
    kl, mask = torch.tensor([[5.0, 5.0]]), torch.tensor([[True, True]])
    assert adjusted_rewards(torch.tensor([1.5]), kl, mask, beta=0).tolist() == [[0, 1.5]]


def test_a_negative_one_token_estimate_is_paid_out_and_not_clamped():
    kl, mask = torch.tensor([[-2.0, 0.0]]), torch.tensor([[True, True]])
    assert adjusted_rewards(torch.tensor([0.0]), kl, mask, beta=0.5).tolist() == [[1, 0]]


def test_drift_that_is_not_finite_stays_visible_in_the_reward():
    mask = torch.tensor([[True, True]])
    rewards = adjusted_rewards(torch.tensor([0.0]), torch.tensor([[INF, NAN]]), mask, beta=0.5)
    assert rewards[0, 0] == -INF
    assert rewards[0, 1].isnan()


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_padding_reaches_no_gradient(poison):
    kl = torch.tensor([[0.5, poison]], requires_grad=True)
    adjusted_rewards(torch.tensor([1.0]), kl, torch.tensor([[True, False]]), beta=0.25).sum().backward()
    assert kl.grad.tolist() == [[-0.25, 0]]


@given(batches(), st.floats(0, 10))
def test_the_rewards_of_a_response_sum_to_the_score_less_beta_times_the_drift(batch, beta):
    scores, kl, mask = batch
    rewards = adjusted_rewards(scores, kl, mask, beta=beta)
    drift = torch.where(mask, kl, 0.0).sum(1)
    torch.testing.assert_close(rewards.sum(1), scores - beta * drift, atol=1e-9, rtol=1e-9)
    assert (rewards[~mask] == 0).all()


def test_a_response_without_a_token_has_nowhere_to_put_its_score_and_is_named():
    mask = torch.tensor([[True], [False], [False]])
    with pytest.raises(ShapeError, match=r"found none in rows \[1, 2\]; drop those rows"):
        adjusted_rewards(torch.ones(3), torch.zeros(3, 1), mask, beta=0.1)


def test_tensors_that_do_not_fit_and_betas_that_are_none_are_refused():
    scores, kl, mask = torch.ones(2), torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ShapeError, match=r"Expected scores \[2\], one per response, found \[2, 3\]"):
        adjusted_rewards(torch.ones(2, 3), kl, mask, beta=0.1)
    with pytest.raises(ShapeError, match=r"kl_policy_ref_per_token \[2, 2\]"):
        adjusted_rewards(scores, kl[:, :2], mask, beta=0.1)
    with pytest.raises(ShapeError, match=r"torch\.bool"):
        adjusted_rewards(scores, kl, mask.float(), beta=0.1)
    for beta in (-0.1, NAN, INF):
        with pytest.raises(ValueRangeError, match="beta"):
            adjusted_rewards(scores, kl, mask, beta=beta)


def test_scores_of_another_precision_are_taken_as_they_are():
    rewards = adjusted_rewards(
        torch.tensor([0.5], dtype=torch.bfloat16), torch.zeros(1, 1), torch.tensor([[True]]), beta=0.1
    )
    assert rewards.dtype == torch.float32
    assert rewards.tolist() == [[0.5]]


def test_only_a_response_without_eos_pays_the_penalty():
    scores, finished = torch.tensor([1.0, 2.0, -1.0]), torch.tensor([True, False, False])
    assert missing_eos_penalised(scores, finished, penalty=0.5).tolist() == [1.0, 1.5, -1.5]
    assert missing_eos_penalised(scores, finished, penalty=0.0).tolist() == [1.0, 2.0, -1.0]
    with pytest.raises(ShapeError, match=r"scores \[3\], finished \[2\]"):
        missing_eos_penalised(scores, finished[:2], penalty=0.5)
