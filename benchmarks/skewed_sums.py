"""From which skewness on the intervals of `kleash measure` hold the truth too seldom, and how often it says so.

    python benchmarks/skewed_sums.py
    python benchmarks/skewed_sums.py --each --repetitions 4000

The pairs of coverage.py, with responses drawn from their enumeration rather than sampled token by token. Student's
interval loses coverage about in proportion to skewness^2 / n, so that orders the rows: for each range of it, how many
pairs and numbers of responses fall there, the share of 95 % intervals of the exact KL that hold the truth, and the
share of measurements whose own skewness makes `interval_doubt` speak.
"""

import statistics
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import tyro
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from coverage import CASES, Case
from exact import generator

from kleash.doubts import doubt_of_skewed_sums
from kleash.estimators import mean_with_interval, skewness

ENDS = (0.0, 0.01, 0.02, 0.04, 0.06, 0.1, 0.2, 0.5, 1.0, float("inf"))


@dataclass(frozen=True)
class Study:
    """What is repeated how often."""

    responses: tuple[int, ...] = (16, 32, 64, 128, 256, 512)
    repetitions: int = 2000
    each: bool = False
    """Also a row for each pair and number of responses."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Row:
    """A pair at a number of responses, its skewness^2 / n, and whether each interval holds and is doubted.

    held, doubt: [repetitions] bool.
    """

    name: str
    n: int
    skewed: float
    held: Tensor
    doubt: Tensor

    @property
    def holds(self) -> float:
        """Share of the intervals that hold the truth."""
        return float(self.held.double().mean())

    @property
    def doubted(self) -> float:
        """Share of the measurements that are doubted."""
        return float(self.doubt.double().mean())

    def cells(self) -> str:
        """A line of the long table."""
        parts = (self.held[self.doubt], self.held[~self.doubt])
        shares = [f"{float(part.double().mean()):.0%}" if len(part) else "-" for part in parts]
        return " | ".join(
            [f"{self.skewed:.3f}", self.name, f"{self.n}", f"{self.holds:.1%}", f"{self.doubted:.0%}", *shares]
        )


def strata_of(case: Case) -> Tensor | None:
    """[N] the prompt of each enumerated response where prompts are given and not drawn; else None."""
    return None if case.population or len(case.pair.prompts) == 1 else case.pair.world.prompt_of


def draws(case: Case, n: int, count: int, seed: int) -> Tensor:
    """[count, n] places in the enumeration: n responses, as many to each prompt where prompts are given."""
    probabilities, strata, source = case.pair.truth.probabilities, strata_of(case), generator(seed)
    if strata is None:
        return torch.multinomial(probabilities, count * n, replacement=True, generator=source).view(count, n)
    parts = []
    for prompt in torch.unique(strata).tolist():
        own = torch.where(strata == prompt, probabilities, 0.0)
        each = n // len(case.pair.prompts)
        parts.append(torch.multinomial(own, count * each, replacement=True, generator=source).view(count, each))
    return torch.cat(parts, 1)


def true_skewness(case: Case) -> float:
    """Of the exact sum over responses, about the mean of its prompt where prompts are given."""
    truth, strata = case.pair.truth, strata_of(case)
    residuals = truth.exact.clone()
    for prompt in [] if strata is None else torch.unique(strata).tolist():
        own = strata == prompt
        residuals[own] -= (truth.probabilities * truth.exact)[own].sum() / truth.probabilities[own].sum()
    return truth.skewness(residuals)


def row(name: str, case: Case, n: int, study: Study) -> Row:
    """Repetitions of a measurement."""
    truth, strata = case.pair.truth, strata_of(case)
    kl = truth.kl_policy_ref_per_sequence
    held, doubt = [], []
    for places in draws(case, n, study.repetitions, study.seed):
        values, prompts = truth.exact[places], None if strata is None else strata[places]
        interval = mean_with_interval(values, strata=prompts)
        held.append(interval.low <= kl <= interval.high)
        doubt.append(doubt_of_skewed_sums(skewness(values, strata=prompts), n, sampled=True) is not None)
    skewed = true_skewness(case) ** 2 / n
    return Row(name=name, n=n, skewed=skewed, held=torch.tensor(held), doubt=torch.tensor(doubt))


def main(study: Study) -> None:
    """Print the tables."""
    torch.set_num_threads(1)
    cases = {name: case for name, case in CASES.items() if case.until is None}
    rows = [row(name, case, n, study) for name, case in cases.items() for n in study.responses]
    rows.sort(key=lambda one: one.skewed)
    if study.each:
        print("| skewness² / n | pair | responses | hold the truth | doubted | of those hold it | of the others |")
        print("|---|---|---|---|---|---|---|")
        for one in rows:
            print(f"| {one.cells()} |")
        print()
    print("| skewness² / n | rows | hold the truth: lowest | mean | highest | doubted |\n|---|---|---|---|---|---|")
    for low, high in pairwise(ENDS):
        found = [one for one in rows if low <= one.skewed < high]
        if found:
            shares = [one.holds for one in found]
            doubted = statistics.fmean(one.doubted for one in found)
            ends = f"{min(shares):.1%} | {statistics.fmean(shares):.1%} | {max(shares):.1%}"
            print(f"| {low:g} to {high:g} | {len(found)} | {ends} | {doubted:.0%} |")


if __name__ == "__main__":
    main(tyro.cli(Study, description=__doc__))
