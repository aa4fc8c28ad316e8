"""Distinct n-grams, against a count by Python's own sets."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kleash.errors import ShapeError, ValueRangeError
from kleash.repetition import distinct_n_over_batch, distinct_n_per_sequence

RESPONSES = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=7), min_size=1, max_size=5)


def padded(responses: list[list[int]], *, padding: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and mask; what stands off the mask would count as a token if it were looked at."""
    time = max(map(len, responses)) + 2
    tokens = torch.full((len(responses), time), padding)
    mask = torch.zeros(len(responses), time, dtype=torch.bool)
    for row, response in enumerate(responses):
        tokens[row, : len(response)] = torch.tensor(response)
        mask[row, : len(response)] = True
    return tokens, mask


def n_grams(response: list[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(response[start : start + n]) for start in range(len(response) - n + 1)]


@given(RESPONSES, st.integers(1, 4), st.integers(0, 9))
def test_both_shares_equal_a_count_by_sets(responses, n, padding):
    tokens, mask = padded(responses, padding=padding)
    each = [n_grams(response, n) for response in responses]
    shares = [len(set(grams)) / len(grams) for grams in each if grams]
    every = [gram for grams in each for gram in grams]
    within, over = distinct_n_per_sequence(tokens, mask, n=n), distinct_n_over_batch(tokens, mask, n=n)
    assert within == (pytest.approx(sum(shares) / len(shares)) if shares else None)
    assert over == (pytest.approx(len(set(every)) / len(every)) if every else None)


def test_a_loop_within_a_response_and_a_batch_of_one_answer_are_told_apart():
    loop, same = padded([[5, 6] * 4, [7, 8] * 4]), padded([[5, 6, 7, 8]] * 4)
    assert distinct_n_per_sequence(*loop, n=2) == pytest.approx(2 / 7)
    assert distinct_n_per_sequence(*same, n=2) == 1
    assert distinct_n_over_batch(*same, n=2) == pytest.approx(1 / 4)


def test_tokens_of_a_great_vocabulary_do_not_collide():
    tokens = torch.tensor([[0, 2**40, 1, 0, 2**62, 2**62 - 1, 0]])
    assert distinct_n_over_batch(tokens, torch.ones_like(tokens, dtype=torch.bool), n=5) == 1


def test_token_ids_beyond_the_size_of_the_batch_do_not_collide():
    tokens = torch.tensor([[0, 6, 9, 1, 0, 9]])  # six tokens: 0 * 6 + 6 = 1 * 6 + 0
    assert distinct_n_over_batch(tokens, torch.ones_like(tokens, dtype=torch.bool), n=2) == 1


def test_an_n_gram_never_reaches_over_a_gap_in_the_mask():
    tokens, mask = torch.tensor([[1, 2, 1, 2]]), torch.tensor([[True, True, False, True]])
    assert distinct_n_over_batch(tokens, mask, n=2) == 1
    assert distinct_n_over_batch(tokens, mask, n=3) is None


def test_n_below_1_and_another_shape_are_refused():
    tokens, mask = padded([[1, 2]])
    for share in (distinct_n_per_sequence, distinct_n_over_batch):
        with pytest.raises(ValueRangeError, match=r"Expected n between 1 and inf, found 0"):
            share(tokens, mask, n=0)
        with pytest.raises(ShapeError, match=r"found tokens \[1, 4\], response_mask \[1, 3\]"):
            share(tokens, mask[:, :3], n=1)
