"""Preference pairs: two answers to one prompt, and which of them a labeller liked better."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from kleash.demo.gold import gold_judge

LABEL_TEMPERATURE = 0.5
"""Gold points by which one answer must be better to be preferred at odds of e to 1."""

LENGTH_BIAS = 0.03
"""Gold points that each further word is worth to a labeller: people take a longer answer for a better one."""


@dataclass(frozen=True)
class Pair:
    """One labelled comparison."""

    prompt: str
    chosen: str
    rejected: str


def preference(gold_gap: float, word_gap: int) -> float:
    """Probability that a labeller prefers the first of two answers (Bradley-Terry).

    sigmoid((gold_gap + LENGTH_BIAS * word_gap) / LABEL_TEMPERATURE), the gaps being first minus second.

    >>> preference(0.0, 0), round(preference(1.0, 0), 3), round(preference(0.0, 10), 3)
    (0.5, 0.881, 0.646)
    """
    return 1.0 / (1.0 + math.exp(-(gold_gap + LENGTH_BIAS * word_gap) / LABEL_TEMPERATURE))


def label_pairs(prompts: Sequence[str], first: Sequence[str], second: Sequence[str], *, seed: int) -> list[Pair]:
    """Compare `first` with `second` on each prompt, as a labeller would.

    The labeller sees what the gold judge sees, but noisily and with a liking for length (see `preference`).
    Pairs of equal answers say nothing and are left out.
    """
    draw = random.Random(seed)
    pairs = []
    golds = zip(gold_judge(prompts, first), gold_judge(prompts, second), strict=True)
    for prompt, one, other, (gold_one, gold_other) in zip(prompts, first, second, golds, strict=True):
        liked = draw.random() < preference(gold_one - gold_other, len(one.split()) - len(other.split()))
        if one != other:
            pairs.append(Pair(prompt, one, other) if liked else Pair(prompt, other, one))
    return pairs
