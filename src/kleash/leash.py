"""The leash: what sets beta from one update to the next. Floats only, no tensors.

Every leash has `beta`, `after(kl_policy_ref_per_sequence, sequences=n)`, which returns the leash of the next
update, and `state`, the floats that a checkpoint needs. Leashes are frozen: an update never changes one in place.
"""

import math
from dataclasses import dataclass, replace
from typing import Protocol, Self

from kleash.checks import require_beta
from kleash.errors import ValueRangeError


class Leash(Protocol):
    """What the training loop asks of a leash."""

    @property
    def beta(self) -> float:
        """KL coefficient for the coming update, score units per nat."""

    @property
    def state(self) -> dict[str, float]:
        """The numbers that change from update to update, for a checkpoint."""

    def after(self, kl_policy_ref_per_sequence: float, *, sequences: int) -> "Leash":
        """The leash for the next update, given the batch mean of the sequence KL in nats."""

    def restored(self, state: dict[str, float]) -> "Leash":
        """This leash with the state that a checkpoint kept."""


def _require_measurement(kl_policy_ref_per_sequence: float) -> None:
    if not math.isfinite(kl_policy_ref_per_sequence):
        raise ValueRangeError(
            f"Expected a finite mean KL(policy || reference) per sequence, found {kl_policy_ref_per_sequence}; "
            "look for -inf or NaN log-probs in the last update."
        )


@dataclass(frozen=True, kw_only=True)
class FixedLeash:
    """A constant beta.

    >>> FixedLeash(beta=0.05).after(12.0, sequences=64).beta
    0.05
    """

    beta: float

    def __post_init__(self) -> None:
        require_beta(self.beta)

    @property
    def state(self) -> dict[str, float]:
        return {"beta": self.beta}

    def after(self, kl_policy_ref_per_sequence: float, *, sequences: int) -> Self:
        """The same leash, whatever was measured; a measurement that is not finite is still an error."""
        _require_measurement(kl_policy_ref_per_sequence)
        return self

    def restored(self, state: dict[str, float]) -> Self:
        return replace(self, beta=state["beta"])


@dataclass(frozen=True, kw_only=True)
class ZieglerLeash:
    """Ziegler's controller: beta follows the relative error of the sequence KL, slowly.

    error = clip(KL / target - 1, -0.2, 0.2);  beta <- clip(beta * (1 + error * n / horizon), beta_min, beta_max)

    KL is the batch mean of KL(policy || reference) per *sequence*, in nats; n the number of sequences measured.
    Without a floor the factor turns negative for n > 5 * horizon; `beta_min` and `beta_max` bound it here, and at
    ordinary settings neither is ever reached. At n = 64 and horizon 10 000 doubling beta takes 542 updates.

    Source: Ziegler et al. 2019, section 2.2 (arXiv 1909.08593).

    >>> leash = ZieglerLeash(beta=0.15, target_kl_per_sequence=6.0, horizon=10_000)
    >>> for _ in range(3):
    ...     leash = leash.after(12.0, sequences=512)
    >>> round(leash.beta, 6)
    0.154655
    """

    beta: float
    target_kl_per_sequence: float
    horizon: float = 10_000.0
    beta_min: float = 1e-6
    beta_max: float = 1e3

    def __post_init__(self) -> None:
        require_beta(self.beta)
        for name in ("target_kl_per_sequence", "horizon", "beta_min", "beta_max"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueRangeError(f"Expected {name} finite and > 0, found {value:g}; choose a positive number.")
        if not self.beta_min <= self.beta <= self.beta_max:
            raise ValueRangeError(
                f"Expected beta between beta_min {self.beta_min:g} and beta_max {self.beta_max:g}, "
                f"found {self.beta:g}; a controller that multiplies beta cannot leave 0."
            )

    @property
    def state(self) -> dict[str, float]:
        return {"beta": self.beta}

    def after(self, kl_policy_ref_per_sequence: float, *, sequences: int) -> Self:
        """One step of the rule above.

        Raises:
          ValueRangeError: the measurement is not finite, or sequences is below 1.
        """
        _require_measurement(kl_policy_ref_per_sequence)
        if sequences < 1:
            raise ValueRangeError(f"Expected at least 1 sequence, found {sequences}; measure before adjusting.")
        error = min(max(kl_policy_ref_per_sequence / self.target_kl_per_sequence - 1, -0.2), 0.2)
        beta = self.beta * (1 + error * sequences / self.horizon)
        return replace(self, beta=min(max(beta, self.beta_min), self.beta_max))

    def restored(self, state: dict[str, float]) -> Self:
        return replace(self, beta=state["beta"])
