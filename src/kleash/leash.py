"""The leash: what sets beta from one update to the next. Floats only, no tensors.

Every leash has `beta`, `after(measurement)`, which returns the leash of the next update, `tightened(factor)`, which
pulls harder from now on, and `state`, the floats that a checkpoint needs. Leashes are frozen: an update never changes
one in place. `beta_min` and `beta_max` bound what a controller may set; they are part of the leash, so that nothing
is bounded in silence.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal, Protocol, Self

from kleash.checks import require_beta
from kleash.errors import ValueRangeError

BETA_MIN, BETA_MAX = 1e-6, 1e3
CALM = 0.1  # change of the relative error per update up to which a budget's gains are whole
PACE_WEIGHT = 0.2
Shape = Literal["linear", "cosine", "exponential"]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What an update tells the leash.

    update:                     its number, from 1.
    kl_policy_ref_per_sequence: mean KL(policy || reference) of its responses, nats per *sequence*.
    sequences:                  how many responses that is the mean of.

    Raises:
      ValueRangeError: the KL is not finite, or there is no sequence.
    """

    update: int
    kl_policy_ref_per_sequence: float
    sequences: int

    def __post_init__(self) -> None:
        if not math.isfinite(self.kl_policy_ref_per_sequence):
            raise ValueRangeError(
                f"Expected a finite mean KL(policy || reference) per sequence, found "
                f"{self.kl_policy_ref_per_sequence}; look for -inf or NaN log-probs in the last update."
            )
        if self.sequences < 1:
            raise ValueRangeError(f"Expected at least 1 sequence, found {self.sequences}; measure before adjusting.")


class Leash(Protocol):
    """What the training loop asks of a leash."""

    @property
    def beta(self) -> float:
        """KL coefficient for the coming update, score units per nat."""

    @property
    def state(self) -> dict[str, float]:
        """The numbers that change from update to update, for a checkpoint."""

    def after(self, measurement: Measurement) -> "Leash":
        """The leash for the next update."""

    def tightened(self, factor: float) -> "Leash":
        """This leash with a beta larger by the factor, above 1, as far as its bounds allow."""

    def restored(self, state: dict[str, float]) -> "Leash":
        """This leash with the state that a checkpoint kept."""


def beta_for_budget(score_std: float, target_kl_per_sequence: float) -> float:
    """The beta at which the best policy drifts as far as the budget, if scores were Gaussian: sigma / sqrt(2 KL).

    pi* is proportional to rho exp(score / beta); Gaussian scores of standard deviation sigma under the reference
    have mean sigma^2 / beta more under pi*, at KL(pi* || rho) = sigma^2 / (2 beta^2).

    Args:
      score_std: standard deviation of the scores of the reference's responses to one prompt.
      target_kl_per_sequence: the budget, nats per sequence.

    Raises:
      ValueRangeError: one of them is not finite and > 0.

    >>> round(beta_for_budget(1.0, 6.0), 5)
    0.28868
    """
    _require_positive(score_std=score_std, target_kl_per_sequence=target_kl_per_sequence)
    return score_std / math.sqrt(2 * target_kl_per_sequence)


@dataclass(frozen=True, kw_only=True)
class FixedLeash:
    """A constant beta.

    >>> FixedLeash(beta=0.05).after(Measurement(update=1, kl_policy_ref_per_sequence=12.0, sequences=64)).beta
    0.05
    """

    beta: float
    beta_max: float = BETA_MAX

    def __post_init__(self) -> None:
        require_beta(self.beta)
        _require_bounds(self.beta, 0.0, self.beta_max)

    @property
    def state(self) -> dict[str, float]:
        return {"beta": self.beta}

    def after(self, measurement: Measurement) -> Self:
        """The same leash, whatever was measured."""
        return self

    def tightened(self, factor: float) -> Self:
        """beta <- min(factor * beta, beta_max); a beta of 0 cannot be tightened."""
        return replace(self, beta=_tightened(self.beta, factor, self.beta_max))

    def restored(self, state: dict[str, float]) -> Self:
        return replace(self, beta=state["beta"])


@dataclass(frozen=True, kw_only=True)
class ScheduledLeash:
    """A beta that follows the number of the update: up from 0 to `peak`, then down (or up) to `final`.

    Warm-up: beta = peak * update / warmup_updates. Then over `decay_updates`, with p from 0 to 1,
    linear: peak + p (final - peak); cosine: final + (peak - final) (1 + cos(pi p)) / 2; exponential:
    peak (final / peak)^p. Afterwards it stays at `final`; without decay_updates at `peak`.

    Args:
      peak: beta at the end of the warm-up.
      final: beta at the end.
      warmup_updates: updates over which beta rises from 0; 0 = none, and then the first update has `peak`.
      decay_updates: updates from `peak` to `final`; 0 = none.
      shape: of the decay; exponential needs both ends above 0.
      update: number of the coming update, from 1.
      tightening: what beta is multiplied by, 1 until the leash has been tightened.

    >>> leash = ScheduledLeash(peak=0.1, final=0.02, warmup_updates=2, decay_updates=4)
    >>> [round(replace(leash, update=n).beta, 3) for n in range(1, 8)]
    [0.05, 0.1, 0.08, 0.06, 0.04, 0.02, 0.02]
    """

    peak: float
    final: float
    warmup_updates: int = 0
    decay_updates: int = 0
    shape: Shape = "linear"
    update: int = 1
    tightening: float = 1.0
    beta_max: float = BETA_MAX

    def __post_init__(self) -> None:
        for beta in (self.peak, self.final):
            require_beta(beta)
            _require_bounds(beta, 0.0, self.beta_max)
        _require_positive(tightening=self.tightening)
        if min(self.warmup_updates, self.decay_updates, self.update - 1) < 0:
            raise ValueRangeError(
                f"Expected warmup_updates and decay_updates >= 0 and update >= 1, found {self.warmup_updates}, "
                f"{self.decay_updates} and {self.update}; count updates from 1."
            )
        if self.shape == "exponential" and not min(self.peak, self.final) > 0:
            raise ValueRangeError(
                f"Expected both ends of an exponential schedule > 0, found {self.peak:g} and {self.final:g}; "
                "take shape linear."
            )

    @property
    def beta(self) -> float:
        return min(self.tightening * self._scheduled(), self.beta_max)

    def _scheduled(self) -> float:
        if self.update < self.warmup_updates:
            return self.peak * self.update / self.warmup_updates
        done = self.update - max(self.warmup_updates, 1)
        progress = min(done / self.decay_updates, 1.0) if self.decay_updates else 0.0
        match self.shape:
            case "linear":
                return (1 - progress) * self.peak + progress * self.final
            case "cosine":
                return self.final + (self.peak - self.final) * (1 + math.cos(math.pi * progress)) / 2
            case "exponential":
                return math.exp((1 - progress) * math.log(self.peak) + progress * math.log(self.final))

    @property
    def state(self) -> dict[str, float]:
        return {"update": float(self.update), "tightening": self.tightening}

    def after(self, measurement: Measurement) -> Self:
        """The schedule one update on; what was measured changes nothing."""
        return replace(self, update=measurement.update + 1)

    def tightened(self, factor: float) -> Self:
        """The whole schedule times the factor, each beta bounded by beta_max."""
        return replace(self, tightening=_tightened(self.tightening, factor, self.beta_max / BETA_MIN))

    def restored(self, state: dict[str, float]) -> Self:
        return replace(self, update=int(state["update"]), tightening=state["tightening"])


@dataclass(frozen=True, kw_only=True)
class ZieglerLeash:
    """Ziegler's controller: beta follows the relative error of the sequence KL, slowly.

    error = clip(KL / target - 1, -0.2, 0.2);  beta <- clip(beta * (1 + error * n / horizon), beta_min, beta_max)

    KL is the batch mean of KL(policy || reference) per *sequence*, in nats; n the number of sequences measured.
    Without a floor the factor turns negative for n > 5 * horizon; `beta_min` and `beta_max` bound it here, and at
    ordinary settings neither is ever reached. At n = 64 and horizon 10 000 doubling beta takes 542 updates.

    Source: Ziegler et al. 2019, section 2.2 (arXiv 1909.08593).

    >>> leash = ZieglerLeash(beta=0.15, target_kl_per_sequence=6.0, horizon=10_000)
    >>> for update in range(1, 4):
    ...     leash = leash.after(Measurement(update=update, kl_policy_ref_per_sequence=12.0, sequences=512))
    >>> round(leash.beta, 6)
    0.154655
    """

    beta: float
    target_kl_per_sequence: float
    horizon: float = 10_000.0
    beta_min: float = BETA_MIN
    beta_max: float = BETA_MAX

    def __post_init__(self) -> None:
        _require_controller(self.beta, self.beta_min, self.beta_max)
        _require_positive(target_kl_per_sequence=self.target_kl_per_sequence, horizon=self.horizon)

    @property
    def state(self) -> dict[str, float]:
        return {"beta": self.beta}

    def after(self, measurement: Measurement) -> Self:
        """One step of the rule above."""
        error = _clip(measurement.kl_policy_ref_per_sequence / self.target_kl_per_sequence - 1, -0.2, 0.2)
        beta = self.beta * (1 + error * measurement.sequences / self.horizon)
        return replace(self, beta=_clip(beta, self.beta_min, self.beta_max))

    def tightened(self, factor: float) -> Self:
        """beta <- min(factor * beta, beta_max); the rule goes on from there."""
        return replace(self, beta=_tightened(self.beta, factor, self.beta_max))

    def restored(self, state: dict[str, float]) -> Self:
        return replace(self, beta=state["beta"])


@dataclass(frozen=True, kw_only=True)
class BudgetLeash:
    """A proportional-integral controller of log beta that holds the drift at a budget.

    error     = clip(KL / target - 1, -1, error_max);  change = error - last error
    pace      <- pace + 0.2 * (|change| - pace)
    log beta  <- log beta + min(1, CALM / pace) * (integral * error + proportional * change), within its bounds

    KL is the batch mean of KL(policy || reference) per *sequence*, in nats. The integral part moves beta until the
    error is 0. The proportional part answers to a change of the drift: it brakes a policy that is still on its way to
    the budget, by where its drift will be in proportional / integral updates if it goes on so. Both are damped where
    the drift changes by more than CALM of the budget from update to update, be it that the policy learns fast or that
    the batch is small: there full gains would swing beta from bound to bound. The rule is written in increments: beta
    is itself the sum of all errors so far, and never winds up beyond its bounds. Before the first update the policy is
    its reference, at an error of -1.

    Args:
      beta: the first one; see beta_for_budget.
      target_kl_per_sequence: the budget, nats per sequence.
      integral, proportional: gains, nats of log beta per unit of relative error.
      error_max: how much a drift beyond the budget may count.
      last_error: of the update before.
      pace: running mean of the size of the changes so far.
      beta_min, beta_max: bounds of beta, both > 0.

    >>> leash = BudgetLeash(beta=0.1, target_kl_per_sequence=6.0, integral=0.2, proportional=1.0, last_error=0.0)
    >>> round(leash.after(Measurement(update=9, kl_policy_ref_per_sequence=7.5, sequences=64)).beta, 5)
    0.13499
    """

    beta: float
    target_kl_per_sequence: float
    integral: float = 0.35
    proportional: float = 3.0
    error_max: float = 2.0
    last_error: float = -1.0
    pace: float = 0.0
    beta_min: float = BETA_MIN
    beta_max: float = BETA_MAX

    def __post_init__(self) -> None:
        _require_controller(self.beta, self.beta_min, self.beta_max)
        _require_positive(
            target_kl_per_sequence=self.target_kl_per_sequence, integral=self.integral, error_max=self.error_max
        )
        if not (math.isfinite(self.proportional) and self.proportional >= 0):
            raise ValueRangeError(
                f"Expected proportional finite and >= 0, found {self.proportional:g}; 0 leaves the integral part alone."
            )
        if not -1 <= self.last_error <= self.error_max:
            raise ValueRangeError(
                f"Expected last_error between -1 and error_max {self.error_max:g}, found {self.last_error:g}; "
                "start a new leash at -1."
            )
        if not (math.isfinite(self.pace) and self.pace >= 0):
            raise ValueRangeError(f"Expected pace finite and >= 0, found {self.pace:g}; start a new leash at 0.")

    @property
    def state(self) -> dict[str, float]:
        return {"beta": self.beta, "last_error": self.last_error, "pace": self.pace}

    def after(self, measurement: Measurement) -> Self:
        """One step of the rule above."""
        error = _clip(measurement.kl_policy_ref_per_sequence / self.target_kl_per_sequence - 1, -1.0, self.error_max)
        change = error - self.last_error
        pace = self.pace + PACE_WEIGHT * (abs(change) - self.pace)
        damping = CALM / max(pace, CALM)
        step = damping * (self.integral * error + self.proportional * change)
        within = _clip(step, math.log(self.beta_min / self.beta), math.log(self.beta_max / self.beta))
        beta = _clip(self.beta * math.exp(within), self.beta_min, self.beta_max)
        return replace(self, beta=beta, last_error=error, pace=pace)

    def tightened(self, factor: float) -> Self:
        """beta <- min(factor * beta, beta_max); the controller goes on from there."""
        return replace(self, beta=_tightened(self.beta, factor, self.beta_max))

    def restored(self, state: dict[str, float]) -> Self:
        return replace(self, beta=state["beta"], last_error=state["last_error"], pace=state["pace"])


def _clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def _tightened(value: float, factor: float, highest: float) -> float:
    if not (math.isfinite(factor) and factor > 1 and value > 0):
        raise ValueRangeError(
            f"Expected a factor above 1 and a beta above 0 to tighten, found {factor:g} and {value:g}; "
            "start the leash with a beta above 0."
        )
    return min(factor * value, highest)


def _require_positive(**numbers: float) -> None:
    for name, value in numbers.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueRangeError(f"Expected {name} finite and > 0, found {value:g}; choose a positive number.")


def _require_bounds(
    beta: float, beta_min: float, beta_max: float, *, remedy: str = "choose another beta or wider bounds"
) -> None:
    if not beta_min <= beta <= beta_max:
        raise ValueRangeError(
            f"Expected beta between beta_min {beta_min:g} and beta_max {beta_max:g}, found {beta:g}; {remedy}."
        )


def _require_controller(beta: float, beta_min: float, beta_max: float) -> None:
    """What a controller that multiplies beta needs: positive bounds, and a start between them."""
    require_beta(beta)
    _require_positive(beta_min=beta_min, beta_max=beta_max)
    _require_bounds(beta, beta_min, beta_max, remedy="a controller that multiplies beta cannot leave 0")
