"""The over-optimisation curve: how a held-out score rises and falls as the policy drifts.

With d = sqrt(KL(policy || reference)), in square roots of nats per sequence, and R(0) the score of the start:

    R(d) = R(0) + d (alpha_rl - beta_rl ln d)

It rises first if the reward model is any good, and falls once the policy exploits what the reward model got wrong.
The form was found on other models and other data, and nothing proves it for yours: a fit describes the range of
drift that it was made from, no more. beta_rl is no KL coefficient.

Source: Gao, Schulman and Hilton 2022, arXiv 2210.10760, section 3.1.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kleash.checks import require_between, require_rank, require_same_shape
from kleash.errors import ValueRangeError

BEYOND = 1.5  # a peak up to this many times the largest d is named as an extrapolation, a farther one is not

Place = Literal["inside", "beyond", "none"]


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The top of the curve: its d = sqrt(KL), the KL there in nats per sequence, and the score above the start."""

    sqrt_kl: float
    kl_policy_ref_per_sequence: float
    score_above_start: float


@dataclass(frozen=True, kw_only=True)
class OveroptimisationCurve:
    """R(d) = start_score + d (alpha_rl - beta_rl ln d), fitted to `points` points with d from sqrt_kl_min to _max.

    residual_std is the points' root-mean-square distance from the curve, in score units, with points - 2 degrees of
    freedom. r_squared is 1 - (residual sum of squares) / (sum of squares about the points' mean); below 0 the curve
    describes the points worse than a constant does; None where the points do not vary.
    """

    alpha_rl: float
    beta_rl: float
    start_score: float
    points: int
    sqrt_kl_min: float
    sqrt_kl_max: float
    residual_std: float
    r_squared: float | None

    def score_at(self, sqrt_kl: float) -> float:
        """R(d), in score units."""
        require_between(0, math.inf, sqrt_kl=sqrt_kl)
        return self.start_score + (sqrt_kl * (self.alpha_rl - self.beta_rl * math.log(sqrt_kl)) if sqrt_kl else 0.0)

    @property
    def peak(self) -> Peak | None:
        """d* = exp(alpha_rl / beta_rl - 1) and R* - R(0) = beta_rl d*; None unless beta_rl > 0 and d* is a number.

        It may lie anywhere: ask peak_place before naming it.
        """
        if self.beta_rl <= 0 or self.alpha_rl / self.beta_rl > math.log(1e150):
            return None
        top = math.exp(self.alpha_rl / self.beta_rl - 1)
        return Peak(sqrt_kl=top, kl_policy_ref_per_sequence=top**2, score_above_start=self.beta_rl * top)

    @property
    def peak_place(self) -> Place:
        """inside: the peak lies within the data; beyond: up to BEYOND times its end; none: no peak to be named."""
        top = self.peak
        if top is None or not self.sqrt_kl_min <= top.sqrt_kl <= BEYOND * self.sqrt_kl_max:
            return "none"
        return "inside" if top.sqrt_kl <= self.sqrt_kl_max else "beyond"


def overoptimisation_curve(
    kl_policy_ref_per_sequence: Tensor, scores: Tensor, *, start_score: float
) -> OveroptimisationCurve:
    """Least squares of scores - start_score on (d, -d ln d), d = sqrt(KL): linear, so without starting values.

    Every point counts alike. Points with a KL of 0 lie on every such curve and say nothing; they are left out.

    Args:
      kl_policy_ref_per_sequence: [points] nats per sequence, >= 0.
      scores: [points] held-out scores at that drift.
      start_score: R(0), the held-out score of the reference.

    Raises:
      ShapeError: the shapes differ or are not [points].
      ValueRangeError: a negative KL, a number that is not finite, or fewer than three different drifts above 0.

    Source: Gao, Schulman and Hilton 2022, arXiv 2210.10760.

    >>> d = torch.tensor([1.0, 4.0, 9.0, 16.0], dtype=torch.float64)
    >>> curve = overoptimisation_curve(d**2, d * (1 - 0.3 * d.log()), start_score=0.0)
    >>> f"{curve.alpha_rl:.3f}, {curve.beta_rl:.3f}, {curve.peak.sqrt_kl:.4f}, {curve.peak.score_above_start:.4f}"
    '1.000, 0.300, 10.3123, 3.0937'
    """
    require_rank(1, "[points]", scores=scores)
    require_same_shape(kl_policy_ref_per_sequence=kl_policy_ref_per_sequence, scores=scores)
    kl, gains = kl_policy_ref_per_sequence.double(), scores.double() - start_score
    _require_usable(kl, gains)
    moved = kl > 0
    d, gains = kl[moved].sqrt(), gains[moved]
    different = len(set(d.tolist()))
    if different < 3:
        raise ValueRangeError(
            f"Expected at least 3 different drifts above 0 to fit a curve to, found {different}; "
            "train longer, or at more strengths of the leash."
        )
    regressors = torch.stack([d, -d * d.log()], 1)
    alpha_rl, beta_rl = torch.linalg.lstsq(regressors, gains.unsqueeze(1)).solution.flatten().tolist()
    residuals = gains - regressors @ torch.tensor([alpha_rl, beta_rl], dtype=torch.float64)
    unexplained, spread = float(residuals.square().sum()), float((gains - gains.mean()).square().sum())
    return OveroptimisationCurve(
        alpha_rl=alpha_rl,
        beta_rl=beta_rl,
        start_score=start_score,
        points=len(d),
        sqrt_kl_min=float(d.min()),
        sqrt_kl_max=float(d.max()),
        residual_std=math.sqrt(unexplained / (len(d) - 2)),
        r_squared=1 - unexplained / spread if spread else None,
    )


def _require_usable(kl: Tensor, gains: Tensor) -> None:
    if not (bool(gains.isfinite().all()) and bool(kl.isfinite().all()) and bool((kl >= 0).all())):
        raise ValueRangeError(
            "Expected finite scores at finite drifts of 0 nats or more, found others; leave out updates without them."
        )
