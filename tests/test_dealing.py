"""Which prompt each response answers: evenly, by the seed alone, whatever the batches are."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_prompts

from kleash.batch import Prompts
from kleash.dealing import dealt, is_even, next_stop, rounded_up


def prompts_of(count: int, lengths: list[int] | None = None) -> Prompts:
    """Prompts of the given lengths, or of one token each."""
    tokens = [[3] * length for length in lengths or [1] * count]
    return Prompts(texts=["x"] * count, tokens=tokens, columns={})


def all_dealt(prompts: Prompts, responses: int, **batches: int) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """So many responses, dealt one batch after the other: prompts, random numbers, sizes of the batches."""
    asked = {"tokens_at_once": 10_000, "max_new_tokens": 5, "seed": 3, "width": 64, **batches}
    deals, done = [], 0
    while done < responses:
        deals.append(dealt(prompts, done, most=responses - done, **asked))
        done += len(deals[-1].prompts)
    sizes = [len(deal.prompts) for deal in deals]
    return torch.cat([deal.prompts for deal in deals]), torch.cat([deal.uniforms for deal in deals]), sizes


@given(st.integers(1, 40), st.integers(1, 40))
def test_as_many_for_each_or_at_most_one_for_each_is_even_and_nothing_else(responses, prompts):
    counts = all_dealt(prompts_of(prompts), responses)[0].bincount(minlength=prompts)
    assert int(counts.max() - counts.min()) <= 1
    assert is_even(responses, prompts) == (int(counts.max()) == 1 or int(counts.max()) == int(counts.min()))


@given(st.integers(1, 400), st.integers(1, 60))
def test_rounded_up_is_the_smallest_even_number_that_is_not_smaller(responses, prompts):
    expected = next(number for number in range(responses, responses + prompts + 1) if is_even(number, prompts))
    assert rounded_up(responses, prompts) == expected


@given(st.integers(1, 200), st.integers(1, 80))
def test_stops_are_even_and_go_on_and_are_a_batch_apart_unless_a_pass_is_longer(prompts, width):
    done = 0
    for _ in range(6):
        stop = next_stop(done, prompts, width=width)
        assert stop > done
        assert is_even(stop, prompts)
        assert stop - done <= max(width, prompts)
        done = stop


def test_each_pass_goes_over_all_prompts_in_an_order_of_its_own():
    numbers = all_dealt(prompts_of(10), 30)[0].view(3, 10).tolist()
    assert all(sorted(order) == list(range(10)) for order in numbers)
    assert len({tuple(order) for order in numbers}) == 3
    assert numbers[0] != sorted(numbers[0])


@pytest.mark.parametrize("batches", [{"width": 1}, {"width": 7}, {"tokens_at_once": 24}, {"tokens_at_once": 1}])
def test_the_batches_change_neither_the_prompts_nor_the_random_numbers(batches):
    prompts = tiny_prompts()
    numbers, uniforms, sizes = all_dealt(prompts, 24)
    assert sizes == [24]
    found = all_dealt(prompts, 24, **batches)
    assert len(found[2]) > 3
    assert torch.equal(found[0], numbers)
    assert torch.equal(found[1], uniforms)


def test_another_seed_gives_other_prompts_and_other_random_numbers():
    (numbers, uniforms, _), (others, theirs, _) = (all_dealt(prompts_of(10), 10, seed=seed) for seed in (3, 4))
    assert not torch.equal(numbers, others)
    assert not torch.isin(uniforms, theirs).any()


def test_random_numbers_are_uniform_and_none_is_used_twice():
    uniforms = all_dealt(prompts_of(7), 2_000, max_new_tokens=10)[1]
    assert uniforms.dtype == torch.float64
    assert uniforms.shape == (2_000, 10)
    assert len(uniforms.unique()) == 20_000
    assert 0 <= float(uniforms.min()) < 1e-3
    assert 1 - 1e-3 < float(uniforms.max()) < 1
    shares = torch.histc(uniforms, 20, min=0, max=1) / 1_000
    assert (shares - 1).abs().max() < 0.12  # 4 standard errors


def test_a_padded_batch_has_no_more_tokens_than_allowed_unless_it_is_one_response():
    prompts = prompts_of(4, [1, 20, 3, 90])
    numbers, _, sizes = all_dealt(prompts, 40, tokens_at_once=60, max_new_tokens=5)
    start = 0
    for size in sizes:
        longest = max(len(prompts.tokens[number]) for number in numbers[start : start + size].tolist())
        assert size == 1 or size * (longest + 5) <= 60
        start += size
    assert max(sizes) > 1


def test_the_random_numbers_of_a_response_do_not_depend_on_how_many_prompts_there_are():
    """So a large file of prompts costs no memory beyond its tokens."""
    assert torch.equal(all_dealt(prompts_of(3), 3)[1], all_dealt(prompts_of(1_000), 3)[1])
