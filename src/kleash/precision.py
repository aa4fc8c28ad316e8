"""How narrow an interval shall be: a half-width in nats, or a share of the mean."""

import math
import re
from dataclasses import dataclass

from kleash.errors import ConfigError
from kleash.estimators import Interval

NUMBER = re.compile(r"(?:±|\+-|\+/-)?\s*(\d*\.?\d+(?:e-?\d+)?)\s*(%?)")


@dataclass(frozen=True, kw_only=True)
class Precision:
    """The half-width asked for: `nats`, or `share` of the mean; one of them."""

    nats: float | None = None
    share: float | None = None

    def half_width(self, mean: float) -> float:
        """The half-width that is allowed around a mean, nats."""
        return self.nats if self.nats is not None else (self.share or 0.0) * abs(mean)

    def is_met(self, interval: Interval) -> bool:
        """Whether the interval is as narrow as asked."""
        return (interval.high - interval.low) / 2 <= self.half_width(interval.mean)

    def responses_needed(self, interval: Interval) -> float:
        """About how many responses it takes, since the width falls with the square root of their number."""
        allowed, found = self.half_width(interval.mean), (interval.high - interval.low) / 2
        return interval.n if found <= allowed else math.inf if allowed == 0 else interval.n * (found / allowed) ** 2


def precision_from(text: str | float) -> Precision:
    """What `±0.05`, `0.05` (nats per sequence) or `5%` (of the KL) asks for.

    Raises:
      ConfigError: something else, or 0.

    >>> precision_from("±0.05"), precision_from("5%")
    (Precision(nats=0.05, share=None), Precision(nats=None, share=0.05))
    """
    found = NUMBER.fullmatch(str(text).strip())
    size = float(found.group(1)) if found else 0.0
    if found is None or not (0 < size < math.inf):
        raise ConfigError(f"Expected a half-width such as ±0.05 (nats per sequence) or 5%, found {text!r}; change it.")
    return Precision(share=size / 100) if found.group(2) else Precision(nats=size)
