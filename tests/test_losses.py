"""PPO's clipped losses against hand values and the policy gradient."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kleash.errors import ShapeError, ValueRangeError
from kleash.losses import clipped_policy_loss_per_token, clipped_value_loss_per_token, policy_ratio

NAN, INF = math.nan, math.inf
number = st.floats(-5, 5)


def row(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64)


def test_the_ratio_is_the_quotient_of_the_probabilities_and_1_off_the_mask():
    mask = torch.tensor([[True, True, False, False]])
    new, old = row(math.log(0.6), -2.0, NAN, 3.0), row(math.log(0.4), -2.0, 0.0, -INF)
    ratio = policy_ratio(new, old, mask)
    assert ratio[0, 0].item() == pytest.approx(1.5, rel=1e-14)
    assert ratio[0, 1:].tolist() == [1.0, 1.0, 1.0]


def test_nothing_off_the_mask_reaches_the_gradient_of_the_ratio():
    new = row(-1.0, 900.0).requires_grad_()
    policy_ratio(new, row(-1.0, -900.0), torch.tensor([[True, False]])).sum().backward()
    assert new.grad.tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss"),
    [
        (1.0, 2.0, -2.0),
        (1.1, 2.0, -2.2),  # within the range: r A
        (1.5, 2.0, -2.4),  # too far the right way: nothing more to earn than 1.2 A
        (0.5, 2.0, -1.0),  # the wrong way: it pays in full
        (0.5, -2.0, 1.6),  # too far the right way for a bad token: 0.8 A
        (1.5, -2.0, 3.0),  # the wrong way: it pays in full
        (7.0, 0.0, 0.0),
    ],
)
def test_the_policy_loss_is_the_pessimistic_one_of_equation_7(ratio, advantage, loss):
    found = clipped_policy_loss_per_token(row(ratio), row(advantage), clip_range=0.2)
    assert found.item() == pytest.approx(loss, rel=1e-14)


@pytest.mark.parametrize(
    ("ratio", "advantage", "slope"),
    [(1.1, 2.0, -2.0), (1.5, 2.0, 0.0), (0.5, 2.0, -2.0), (0.5, -2.0, 0.0), (1.5, -2.0, 2.0)],
)
def test_beyond_the_range_only_the_way_back_has_a_gradient(ratio, advantage, slope):
    at = row(ratio).requires_grad_()
    clipped_policy_loss_per_token(at, row(advantage), clip_range=0.2).sum().backward()
    assert at.grad.item() == slope


@given(st.lists(number, min_size=2, max_size=5), number)
def test_at_ratio_1_the_gradient_is_the_policy_gradient(logits, advantage):
    """d loss / d logits = -A * grad log pi(y), for the softmax: -A (one_hot(y) - pi)."""
    z = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    logprobs = z.log_softmax(-1)[:1].unsqueeze(0)
    ratio = policy_ratio(logprobs, logprobs.detach(), torch.tensor([[True]]))
    assert ratio.item() == 1.0
    clipped_policy_loss_per_token(ratio, row(advantage), clip_range=0.2).sum().backward()
    one_hot = torch.eye(len(logits), dtype=torch.float64)[0]
    torch.testing.assert_close(z.grad, -advantage * (one_hot - z.detach().softmax(-1)), atol=1e-14, rtol=1e-12)


@given(st.floats(0.01, 5), number, st.floats(0.01, 0.9))
def test_clipping_never_makes_the_policy_loss_smaller(ratio, advantage, clip_range):
    found = clipped_policy_loss_per_token(row(ratio), row(advantage), clip_range=clip_range)
    assert found.item() >= -advantage * ratio - 1e-12
    if abs(ratio - 1) < clip_range:
        assert found.item() == pytest.approx(-advantage * ratio, abs=1e-12)


@pytest.mark.parametrize(
    ("value", "old", "target", "loss"),
    [
        (1.0, 0.0, 1.0, 0.32),  # there already, but moved too far: as if at 0.2, (0.2 - 1)^2 / 2
        (0.1, 0.0, 1.0, 0.405),  # within the range
        (-1.0, 0.0, 1.0, 2.0),  # the wrong way: it pays in full
        (0.0, 0.0, 0.0, 0.0),
    ],
)
def test_the_value_loss_is_the_larger_of_free_and_clipped_error(value, old, target, loss):
    found = clipped_value_loss_per_token(row(value), row(old), row(target), clip_range=0.2)
    assert found.item() == pytest.approx(loss, rel=1e-14)


@given(number, number, number)
def test_a_wide_clip_range_leaves_half_the_squared_error(value, old, target):
    found = clipped_value_loss_per_token(row(value), row(old), row(target), clip_range=100.0)
    assert found.item() == pytest.approx((value - target) ** 2 / 2, abs=1e-12)


def test_a_value_that_has_moved_too_far_the_right_way_is_not_pushed_further():
    value = row(0.5).requires_grad_()
    clipped_value_loss_per_token(value, row(0.0), row(1.0), clip_range=0.2).sum().backward()
    assert value.grad.item() == 0.0


@pytest.mark.parametrize("clip_range", [0.0, -0.2, NAN])
def test_a_clip_range_must_be_positive(clip_range):
    with pytest.raises(ValueRangeError, match="clip_range"):
        clipped_policy_loss_per_token(row(1.0), row(1.0), clip_range=clip_range)
    with pytest.raises(ValueRangeError, match="clip_range"):
        clipped_value_loss_per_token(row(1.0), row(1.0), row(1.0), clip_range=clip_range)


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(ShapeError, match=r"ratio \[1, 2\], advantages \[1, 1\]"):
        clipped_policy_loss_per_token(row(1.0, 1.0), row(1.0), clip_range=0.2)
    with pytest.raises(ShapeError, match="returns"):
        clipped_value_loss_per_token(row(1.0), row(1.0), row(1.0, 2.0), clip_range=0.2)
    with pytest.raises(ShapeError, match="old_logprobs"):
        policy_ratio(row(1.0, 1.0), row(1.0), torch.tensor([[True, True]]))
    with pytest.raises(ShapeError, match=r"torch\.bool"):
        policy_ratio(row(1.0), row(1.0), torch.tensor([[1]]))


def test_a_value_that_is_nan_shows_in_the_loss():
    assert clipped_policy_loss_per_token(row(NAN), row(1.0), clip_range=0.2).isnan().all()
    assert clipped_value_loss_per_token(row(NAN), row(0.0), row(0.0), clip_range=0.2).isnan().all()
