"""What makes the figures of a measurement say less than they seem to: a sentence each, beside the figures.

Every sentence has a key of its own, null where there is nothing to doubt.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from kleash.alarms import SamplerMismatch
from kleash.checks import require_same_shape
from kleash.estimators import mean_with_interval

DOUBTS = ("interval_doubt", "sampler_doubt", "writer_doubt")
MOST_SKEWED = 0.1  # skewness squared over the number of responses, beyond which less than 93 % hold the truth
FEWEST = 16  # responses that say enough of their own skewness, or of who wrote them
SURE = 0.9999  # that responses are not the policy's
MISSED = 50.0  # nats of all responses together that rare tokens, which chance may have left out, can make up


def doubts_of(figures: Mapping[str, Any]) -> list[str]:
    """What there is to doubt in the figures of a measurement.

    >>> doubts_of({"interval_doubt": None, "sampler_doubt": "Far apart.", "writer_doubt": None})
    ['Far apart.']
    """
    return [str(doubt) for name in DOUBTS if (doubt := figures.get(name)) is not None]


def doubt_of_skewed_sums(skewed: float | None, responses: int, *, sampled: bool) -> str | None:
    """What is to be said of the interval where the exact sums are too skewed for their number; else None.

    Args:
      skewed: their skewness; None where it is not known.
      responses: how many.
      sampled: whether more of them can be had for the asking.

    >>> doubt_of_skewed_sums(1.4, 32, sampled=True)
    """
    if skewed is None or responses < FEWEST or skewed**2 <= MOST_SKEWED * responses:
        return None
    needed = max(skewed**2 / MOST_SKEWED, 2 * responses)  # few responses rather understate it
    unit = 10 ** (len(f"{needed:.0f}") - 2)
    needed = math.ceil(needed / unit) * unit
    return (
        f"A few responses carry so {'much' if skewed > 0 else 'little'} of the drift that the interval of the exact KL "
        f"is too short for {responses} of them: skewness {abs(skewed):.1f}, at most "
        f"{math.sqrt(MOST_SKEWED * responses):.1f} would do; "
        + (f"take about {needed:,} responses (--samples)." if sampled else f"give about {needed:,} responses.")
    )


def doubt_of_the_sampler(mismatch: float | None) -> str | None:
    """What to say where sampler and scorer are farther apart than the alarm of a run lets them be; else None.

    Args:
      mismatch: their KL, k3, nats per token; None where there was no sampler.

    >>> doubt_of_the_sampler(1e-5)
    """
    tolerated = SamplerMismatch().threshold
    if mismatch is None or mismatch <= tolerated:
        return None
    return (
        f"Expected sampler and scorer at most {tolerated:g} nats per token apart, found {mismatch:.2g}: the responses "
        "are not quite the policy's, nor is their drift; measure in float32."
    )


def doubt_of_the_writer(exact: Tensor, k1: Tensor, *, strata: Tensor | None) -> str | None:
    """What to say of responses that the policy is said to have written, and has not; else None.

    The mean of k1 - exact is 0 over what the policy writes. Its interval, at 99.99 %, must not only leave out 0, but
    stay clear of what rare tokens can make up that are in no response by chance.

    Args:
      exact, k1: [responses] both sums of each response, nats.
      strata: as for mean_with_interval.

    Raises:
      ShapeError: the two differ in shape, or as mean_with_interval.
    """
    require_same_shape(exact=exact, k1=k1)
    if len(exact) < FEWEST:
        return None
    found = mean_with_interval(k1 - exact, confidence=SURE, strata=strata)
    if max(found.low, -found.high) * found.n <= MISSED:
        return None
    size, how = abs(found.mean), "above" if found.mean > 0 else "below"
    return (
        f"Expected k1 and the exact KL to agree but for chance on responses of the policy, found k1 {size:.2g} nats "
        f"{how} it: the policy did not write these, or not at this temperature; drop --written-by-policy, or give the "
        "--temperature that they were sampled at."
    )
