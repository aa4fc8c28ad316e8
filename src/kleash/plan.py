"""How many responses a measurement takes: so many, or until its interval is narrow enough."""

import math
from dataclasses import dataclass

from kleash.dealing import is_even, next_stop, rounded_up
from kleash.estimators import Interval
from kleash.precision import Precision


@dataclass(frozen=True, kw_only=True)
class Plan:
    """When to stop.

    prompts:   how many there are.
    samples:   responses; with a precision, where its check begins, or at at_most if that is less.
    at_most:   where it ends though the precision is not reached.
    width:     most responses in a batch.
    precision: how narrow the interval shall be; None = as it comes.
    """

    prompts: int
    samples: int
    at_most: int
    width: int
    precision: Precision | None

    @property
    def last(self) -> int:
        """Where it ends in any case: the number of samples, or the largest even number that is not above at_most."""
        if self.precision is None:
            return rounded_up(self.samples, self.prompts)
        if is_even(self.at_most, self.prompts):
            return self.at_most
        return self.at_most // self.prompts * self.prompts

    def stop_after(self, responses: int, interval: Interval | None) -> int:
        """The number of responses to go on to; `responses` itself where there are enough.

        Args:
          responses: how many there are, an even number.
          interval: of their mean; None where there are none.
        """
        if responses >= self.last or self._suffices(responses, interval):
            return responses
        first = rounded_up(self.samples, self.prompts)
        limit = min(first, self.last) if responses < first else self.last
        return min(next_stop(responses, self.prompts, width=self.width), limit)

    def is_met(self, interval: Interval) -> bool:
        """Whether the interval is as narrow as asked; True where nothing was asked."""
        return self.precision is None or self.precision.is_met(interval)

    def _suffices(self, responses: int, interval: Interval | None) -> bool:
        if self.precision is None or interval is None or responses < self.samples:
            return False
        return self.precision.is_met(interval)

    def expected(self, interval: Interval | None) -> int:
        """About how many responses it will have taken."""
        if self.precision is None or interval is None:
            return self.last if self.precision is None else min(self.samples, self.last)
        needed = min(max(self.precision.responses_needed(interval), self.samples), self.last)
        return min(rounded_up(math.ceil(needed), self.prompts), self.last)
