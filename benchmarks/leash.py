"""Does the leash hold its budget? The budget's controller beside Ziegler's, in the demo's world.

    python benchmarks/leash.py --out runs/leash                  all 54 runs, about an hour on two cores
    python benchmarks/leash.py --budgets 6 --seeds 0

A run holds its budget when the mean exact KL(policy || reference) of its second half lies within 10 % of it. The
overshoot is the largest KL of any update over the budget. Ziegler's controller runs at its published horizon of
10 000 sequences. Runs that are finished are read, not repeated.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Literal

import tyro
from demo_run import build_worlds, records_of_run

from kleash.config import LeashConfig

UPDATES = 80
TOLERANCE = 0.1
Kind = Literal["budget", "ziegler"]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is compared."""

    out: Path = Path("runs/leash")
    kinds: tuple[Kind, ...] = ("budget", "ziegler")
    budgets: tuple[float, ...] = (2.0, 6.0, 12.0)
    betas: tuple[float | Literal["auto"], ...] = (0.001, "auto", 1.0)
    seeds: tuple[int, ...] = (0, 1, 2)
    jobs: int = 2
    """Runs at the same time, one thread each."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run."""

    kind: Kind
    budget: float
    beta: float | Literal["auto"]
    seed: int

    @property
    def name(self) -> str:
        return f"{self.kind}-budget_{self.budget:g}-beta_{self.beta}-seed_{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run's records say: KL in nats per sequence."""

    case: Case
    kl_second_half: float
    kl_largest: float
    beta_first: float
    beta_last: float

    @property
    def held(self) -> bool:
        return abs(self.kl_second_half / self.case.budget - 1) <= TOLERANCE


def main() -> None:
    asked = tyro.cli(Asked, description=__doc__)
    build_worlds(asked.out, asked.seeds)
    cases = [
        Case(kind=kind, budget=budget, beta=beta, seed=seed)
        for seed, budget, beta, kind in product(asked.seeds, asked.budgets, asked.betas, asked.kinds)
    ]
    with ThreadPoolExecutor(asked.jobs) as pool:
        outcomes = list(pool.map(lambda case: played(case, asked.out), cases))
    print(table(outcomes, asked.kinds))


def played(case: Case, out: Path) -> Outcome:
    """Run `kleash train`, unless the run is there already, and read its records."""
    leash = LeashConfig(kind=case.kind, beta=case.beta, target_kl_per_sequence=case.budget)
    records = records_of_run(out, case.name, leash, seed=case.seed, updates=UPDATES)
    drift = [record["kl_policy_ref_per_sequence"] for record in records]
    outcome = Outcome(
        case=case,
        kl_second_half=mean(drift[len(drift) // 2 :]),
        kl_largest=max(drift),
        beta_first=records[0]["beta"],
        beta_last=records[-1]["beta"],
    )
    print(row(outcome), flush=True)
    return outcome


def row(outcome: Outcome) -> str:
    case = outcome.case
    return (
        f"{case.kind:<8} {case.budget:>6g} {case.beta:>6} {case.seed:>4} {outcome.kl_second_half:>9.2f} "
        f"{100 * (outcome.kl_second_half / case.budget - 1):>+8.1f} % {outcome.kl_largest:>8.2f} "
        f"{outcome.kl_largest / case.budget:>8.2f}x {outcome.beta_first:>9.3g} {outcome.beta_last:>9.3g}  "
        f"{'held' if outcome.held else '-'}"
    )


def table(outcomes: list[Outcome], kinds: tuple[Kind, ...]) -> str:
    head = (
        f"{'leash':<8} {'budget':>6} {'beta':>6} {'seed':>4} {'KL 2nd half':>9} {'off by':>8} {'largest':>10} "
        f"{'overshoot':>9} {'beta first':>9} {'last':>8}"
    )
    lines = [head, *(row(outcome) for outcome in outcomes), ""]
    for kind in kinds:
        own = [outcome for outcome in outcomes if outcome.case.kind == kind]
        worst = max(own, key=lambda outcome: outcome.kl_largest / outcome.case.budget)
        lines.append(
            f"{kind}: {sum(outcome.held for outcome in own)} of {len(own)} runs within {TOLERANCE:.0%} of the budget; "
            f"largest overshoot {worst.kl_largest / worst.case.budget:.2f} times the budget ({worst.case.name})"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
