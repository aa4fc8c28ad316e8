"""Masked statistics: padding never counts, in value or in gradient, and two processes are one."""

import math
from threading import Barrier, Thread

import pytest
import torch
from exact import generator
from hypothesis import given
from hypothesis import strategies as st

from kleash.errors import ShapeError
from kleash.masking import masked, masked_mean, masked_moments, position_ids, unpacked, whiten

POISON = [math.nan, math.inf, -math.inf]


def in_two_processes(function, first, second):
    """Run function(*inputs, reduce) at once on two halves of a batch, and add up what they reduce."""
    barrier, sent, results = Barrier(2, timeout=10), [None, None], [None, None]

    def process(rank, inputs):
        def reduce(tensor):
            sent[rank] = tensor
            barrier.wait()
            total = sent[0] + sent[1]
            barrier.wait()
            return total

        results[rank] = function(*inputs, reduce)

    threads = [Thread(target=process, args=(rank, inputs)) for rank, inputs in enumerate((first, second))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    return results


@pytest.fixture
def halves():
    """Values and masks of two processes, with different lengths and shares of padding."""
    draw = generator(0)
    first = torch.randn(3, 5, dtype=torch.float64, generator=draw) + 4
    second = 3 * torch.randn(2, 7, dtype=torch.float64, generator=draw)
    first_mask, second_mask = torch.rand(3, 5, generator=draw) < 0.8, torch.rand(2, 7, generator=draw) < 0.4
    return (first, first_mask), (second, second_mask)


@pytest.mark.parametrize("poison", POISON)
def test_whatever_stands_off_the_mask_becomes_exactly_zero(poison):
    values = torch.tensor([[1.5, poison], [poison, -2.0]])
    mask = torch.tensor([[True, False], [False, True]])
    assert torch.equal(masked(values, mask), torch.tensor([[1.5, 0.0], [0.0, -2.0]]))


@pytest.mark.parametrize("poison", POISON)
def test_whatever_stands_off_the_mask_gets_gradient_zero_and_spoils_no_other(poison):
    values = torch.tensor([[1.5, -0.5, poison]], requires_grad=True)
    mask = torch.tensor([[True, True, False]])
    masked(values, mask).square().exp().sum().backward()
    x = values.detach()[0, :2]
    torch.testing.assert_close(values.grad[0, :2], 2 * x * (x**2).exp())
    assert values.grad[0, 2] == 0


def test_a_nan_on_the_mask_is_not_hidden():
    values, mask = torch.tensor([[math.nan, 1.0]]), torch.tensor([[True, True]])
    assert masked(values, mask)[0, 0].isnan()
    assert masked_mean(values, mask).isnan()
    assert whiten(values, mask)[0].isnan().all()


def test_a_mask_of_another_shape_or_dtype_is_refused():
    with pytest.raises(ShapeError, match=r"values \[2, 3\], mask \[2, 2\]"):
        masked(torch.zeros(2, 3), torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(ShapeError, match=r"torch\.bool"):
        whiten(torch.zeros(2, 3), torch.ones(2, 3))


def test_moments_by_hand():
    values = torch.tensor([[1.0, 3.0, math.nan], [8.0, math.inf, math.nan]], dtype=torch.float64)
    moments = masked_moments(values, torch.tensor([[True, True, False], [True, False, False]]))
    assert moments.count == 3
    assert moments.mean == 4
    assert float(moments.variance) == pytest.approx((9 + 1 + 16) / 3, abs=1e-15)


def test_a_large_mean_costs_the_variance_no_digits():
    values = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64) + 1e9
    assert float(masked_moments(values, torch.ones(1, 3, dtype=torch.bool)).variance) == pytest.approx(2 / 3, abs=1e-12)


def test_an_empty_mask_has_mean_and_variance_zero_and_whitens_to_zero():
    values, mask = torch.full((2, 3), math.nan), torch.zeros(2, 3, dtype=torch.bool)
    moments = masked_moments(values, mask)
    assert (moments.count, moments.mean, moments.variance) == (0, 0, 0)
    whitened, scale = whiten(values, mask)
    assert torch.equal(whitened, torch.zeros(2, 3))
    assert float(scale) == pytest.approx(1e-4)


def test_entropy_averaged_over_the_mask_does_not_lose_a_nat_per_pad():
    entropies = torch.tensor([[0.5, 1.5, 0.0, 0.0, 0.0]])
    assert masked_mean(entropies, entropies > 0) == 1.0
    assert masked_mean(entropies - 1, entropies > 0) == 0.0


WHITENED = [[0.0508, 0.4381, 0.8254], [1.2127, 1.6000, 1.9873], [2.3746, 2.7619, 3.1492]]


def test_whitening_with_the_mean_kept_gives_the_published_figures():
    values = torch.tensor([[1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0]], dtype=torch.float64)
    whitened, scale = whiten(values, torch.ones(3, 3, dtype=torch.bool), keep_mean=True)
    torch.testing.assert_close(whitened, torch.tensor(WHITENED, dtype=torch.float64), atol=5e-5, rtol=0)
    assert float(scale) == pytest.approx(math.sqrt(0.6 / 9 + 1e-8), abs=1e-15)


def test_whitening_takes_the_mean_away_unless_told_to_keep_it():
    values = torch.tensor([[1.0, 2.0, 6.0, 99.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True, False]])
    scale = math.sqrt(14 / 3)
    without, divided_by = whiten(values, mask, epsilon=0.0)
    kept, _ = whiten(values, mask, epsilon=0.0, keep_mean=True)
    torch.testing.assert_close(without, torch.tensor([[-2, -1, 3, 0]], dtype=torch.float64) / scale)
    torch.testing.assert_close(kept[:, :3], without[:, :3] + 3)
    assert kept[0, 3] == 0
    assert float(divided_by) == pytest.approx(scale)


@pytest.mark.parametrize("poison", [*POISON, 1e6])
def test_padding_changes_no_whitened_value_and_no_scale(poison):
    values = torch.tensor([[0.3, -1.2, 2.0]], dtype=torch.float64)
    bare, bare_scale = whiten(values, torch.ones(1, 3, dtype=torch.bool))
    padded = torch.cat([values, torch.full((1, 4), poison, dtype=torch.float64)], 1)
    mask = torch.tensor([[True] * 3 + [False] * 4])
    whitened, scale = whiten(padded, mask)
    assert torch.equal(whitened[:, :3], bare)
    assert torch.equal(whitened[:, 3:], torch.zeros(1, 4, dtype=torch.float64))
    assert scale == bare_scale


@pytest.mark.parametrize("poison", POISON)
def test_padding_reaches_no_gradient_of_the_whitened_values(poison):
    weights = torch.tensor([[1.0, -2.0, 0.5, 7.0]], dtype=torch.float64)

    def grad(padding, mask):
        values = torch.tensor([[0.3, -1.2, 2.0, padding]], dtype=torch.float64, requires_grad=True)
        whitened, scale = whiten(values, mask, keep_mean=True)
        ((weights * whitened).sum() * scale).backward()
        return values.grad

    mask = torch.tensor([[True, True, True, False]])
    assert torch.equal(grad(poison, mask), grad(0.0, mask))
    assert grad(poison, mask)[0, 3] == 0


def test_a_single_token_whitens_to_zero_and_not_to_nan():
    whitened, scale = whiten(torch.tensor([[3.0, math.nan]]), torch.tensor([[True, False]]))
    assert torch.equal(whitened, torch.zeros(1, 2))
    assert float(scale) == pytest.approx(1e-4)


def test_two_processes_have_the_moments_of_one(halves):
    together = torch.cat([values[mask] for values, mask in halves])
    for moments in in_two_processes(lambda v, m, reduce: masked_moments(v, m, reduce=reduce), *halves):
        assert moments.count == len(together)
        torch.testing.assert_close(moments.mean, together.mean())
        torch.testing.assert_close(moments.variance, together.var(correction=0))


def test_two_processes_whiten_like_one_and_not_each_for_itself(halves):
    together = torch.cat([values[mask] for values, mask in halves]).unsqueeze(0)
    whole, whole_scale = whiten(together, torch.ones_like(together, dtype=torch.bool))
    results = in_two_processes(lambda v, m, reduce: whiten(v, m, reduce=reduce), *halves)
    whitened = torch.cat([part[mask] for (part, _), (_, mask) in zip(results, halves, strict=True)])
    torch.testing.assert_close(whitened, whole[0])
    assert all(float(scale) == pytest.approx(float(whole_scale)) for _, scale in results)
    alone, _ = whiten(*halves[0])
    assert not torch.allclose(alone, results[0][0], atol=0.1)


def test_a_process_without_a_token_takes_part_and_changes_nothing(halves):
    values, mask = halves[0]
    (mean, empty_mean) = in_two_processes(
        lambda v, m, reduce: masked_mean(v, m, reduce=reduce),
        (values, mask),
        (torch.full((1, 2), math.nan, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.bool)),
    )
    assert mean == empty_mean
    torch.testing.assert_close(mean, values[mask].mean())


@given(
    st.lists(st.tuples(st.floats(-1e3, 1e3), st.booleans()), min_size=1, max_size=20),
    st.floats(0.1, 10),
    st.floats(-100, 100),
)
def test_whitened_values_do_not_depend_on_the_unit_or_the_zero_of_the_scores(pairs, unit, zero):
    values = torch.tensor([[value for value, _ in pairs]], dtype=torch.float64)
    mask = torch.tensor([[counted for _, counted in pairs]])
    if masked_moments(values, mask).variance < 1e-6:
        return
    once, scale = whiten(values, mask, epsilon=0.0)
    again, new_scale = whiten(unit * values + zero, mask, epsilon=0.0)
    torch.testing.assert_close(again, once, atol=1e-8, rtol=1e-8)
    assert float(new_scale) == pytest.approx(unit * float(scale), rel=1e-8)
    assert float(masked_moments(once, mask).variance) == pytest.approx(1)


def test_positions_count_from_the_first_real_token_of_each_row():
    attention_mask = torch.tensor([[False, False, True, True], [True, True, True, True], [True, True, False, False]])
    assert position_ids(attention_mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3], [0, 1, 1, 1]]
    with pytest.raises(ShapeError, match=r"torch\.bool"):
        position_ids(attention_mask.long())


@pytest.mark.parametrize("shape", [(), (3,)])
def test_what_was_taken_at_a_mask_goes_back_to_its_places_and_gradients_with_it(shape):
    mask = torch.tensor([[True, False, True], [False, False, True]])
    values = torch.randn(2, 3, *shape, dtype=torch.float64)
    taken = values[mask].requires_grad_()
    found = unpacked(taken, mask)
    assert torch.equal(found[mask], values[mask])
    assert (found[~mask] == 0).all()
    weights = torch.randn_like(found)
    (found * weights).sum().backward()
    assert torch.equal(taken.grad, weights[mask])
