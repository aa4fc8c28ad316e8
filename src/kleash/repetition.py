"""How much of what the policy writes is new: distinct n-grams over all n-grams, which falls where it repeats itself.

    distinct_n = number of different n-grams / number of n-grams

Within one response it falls where the response repeats itself; over a batch, where the responses repeat each
other. It falls with the length of the text too, so compare like with like.

Source: Li, Galley, Brockett, Gao, Dolan 2016, A Diversity-Promoting Objective Function for Neural Conversation Models.
"""

import torch
from torch import Tensor

from kleash.checks import require_between, require_mask, require_same_shape


def distinct_n_per_sequence(tokens: Tensor, response_mask: Tensor, *, n: int) -> float | None:
    """distinct_n of each response, mean over the responses that have an n-gram; None when none has.

    Args:
      tokens: [batch, time] int64 token ids.
      response_mask: [batch, time] bool; an n-gram is n True positions in a row.
      n: tokens of an n-gram, at least 1.

    Raises:
      ShapeError: the shapes differ, or response_mask is not bool.
      ValueRangeError: n below 1.

    >>> tokens = torch.tensor([[5, 6, 5, 6, 5], [7, 8, 9, 0, 0]])
    >>> mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    >>> distinct_n_per_sequence(tokens, mask, n=2)  # 2 of 4 bigrams, 2 of 2
    0.75
    """
    grams, rows = _n_grams(tokens, response_mask, n)
    rows_of_different = torch.unique(rows * tokens.numel() + grams) // tokens.numel()  # no gram is as large as numel
    batch = len(tokens)
    total, different = torch.bincount(rows, minlength=batch), torch.bincount(rows_of_different, minlength=batch)
    long_enough = total > 0
    if not bool(long_enough.any()):
        return None
    return float((different[long_enough].double() / total[long_enough]).mean())


def distinct_n_over_batch(tokens: Tensor, response_mask: Tensor, *, n: int) -> float | None:
    """distinct_n of all responses together; None without any n-gram. No n-gram spans two responses.

    Args and errors are those of distinct_n_per_sequence.

    >>> distinct_n_over_batch(torch.tensor([[5, 6], [5, 6]]), torch.ones(2, 2, dtype=torch.bool), n=2)
    0.5
    """
    grams, _ = _n_grams(tokens, response_mask, n)
    return len(torch.unique(grams)) / len(grams) if len(grams) else None


def _n_grams(tokens: Tensor, response_mask: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """A number for every n-gram, the same for the same tokens, and the row where it stands; each [n-grams]."""
    require_mask(response_mask)
    require_same_shape(tokens=tokens, response_mask=response_mask)
    require_between(1, float("inf"), n=n)
    places = max(tokens.shape[1] - n + 1, 0)
    whole = torch.ones_like(response_mask[:, :places])
    grams = torch.zeros_like(tokens[:, :places])
    for offset in range(n):
        whole &= response_mask[:, offset : offset + places]
        _, next_tokens = torch.unique(tokens[:, offset : offset + places], return_inverse=True)
        _, grams = torch.unique(grams * tokens.numel() + next_tokens, return_inverse=True)
    rows, _ = whole.nonzero(as_tuple=True)
    return grams[whole], rows
