"""How heavy the upper tail of the scores is.

A KL leash bounds what a policy can gain only where the reward's error has a light tail: under a heavy one the
score can grow without bound at a KL near 0 (Kwa, Thomas, Garriga-Alonso 2024, Catastrophic Goodhart).
Both figures look at the excess over the median and divide by a scale, so they are the same for
a * score + b with a > 0. The gap tells a heavy tail from a light one in few scores; the index says how heavy it is.
"""

import math

import torch
from torch import Tensor

from kleash.checks import require_rank

HIGH, MIDDLE = 0.99, 0.75  # the percentiles of the gap


def tail_index(scores: Tensor) -> float | None:
    """Hill's estimate of the tail index alpha, where P(excess over the median > x) falls like x^-alpha.

    With x_1 >= x_2 >= ... the excesses of the n scores over their median and k = ceil(sqrt(n)):

        alpha = (k - 1) / sum_{i <= k} log(x_i / x_{k+1})

    Large is light. Hill's own estimate has k in place of k - 1; with k - 1 its mean over samples is alpha exactly
    where the excesses beyond x_{k+1} follow a Pareto law, while with k it is too large by k / (k - 1). Hill's
    index depends on where the score's zero lies; the excess over the median does not.

    Mean +- standard deviation over samples of 64 scores (k = 8): uniform 5.9 +- 2.7, Gaussian 2.7 +- 1.0,
    exponential 1.9 +- 0.7, Pareto(2) 1.2 +- 0.4. For a law without a Pareto tail it grows with n, so compare equal n.

    Args:
      scores: [batch], finite.

    Returns:
      The estimate; None where it has no value: fewer than k + 1 scores above the median, or the k + 1 largest equal.

    Raises:
      ShapeError: scores are not [batch].

    Source: Hill 1975, A simple general approach to inference about the tail of a distribution; Araujo Santos,
    Fraga Alves, Gomes 2006, Peaks over random threshold methodology (the excess over a sample quantile).

    >>> scores = torch.tensor([-8.0, -4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0, 8.0])
    >>> round(tail_index(scores), 4)  # k = 3: 2 / log(8 * 4 * 2)
    0.4809
    """
    require_rank(1, "[batch]", scores=scores)
    k = math.ceil(math.sqrt(len(scores)))
    if len(scores) <= k:
        return None
    largest = scores.double().sort(descending=True).values[: k + 1]
    excess = largest - scores.double().quantile(0.5)
    if not float(excess[k]) > 0:
        return None
    spread = float((excess[:k] / excess[k]).log().sum())
    return (k - 1) / spread if spread > 0 else None


def tail_gap(scores: Tensor) -> float | None:
    """How far the 99th percentile stands above the median, in steps from the median to the 75th percentile.

        (q_99 - q_50) / (q_75 - q_50),  percentiles by linear interpolation between the sorted scores

    Large is heavy: 1.96 for a uniform law, 3.45 for a Gaussian, 5.64 for an exponential, 14.7 for a Pareto(2).
    With 64 scores, 95 % of Gaussian samples stay below 4.8 and half of the Pareto(2) samples exceed 11.

    Args:
      scores: [batch], finite.

    Returns:
      The gap; None without scores or where a quarter of them ties with the median, so that the step is 0.

    Raises:
      ShapeError: scores are not [batch].

    >>> tail_gap(torch.arange(101.0))
    1.96
    """
    require_rank(1, "[batch]", scores=scores)
    if len(scores) == 0:
        return None
    levels = torch.tensor([0.5, MIDDLE, HIGH], dtype=torch.float64, device=scores.device)
    median, middle, high = scores.double().quantile(levels).tolist()
    return (high - median) / (middle - median) if middle > median else None
