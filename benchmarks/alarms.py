"""How often do the alarms ring for nothing, how often for a hacked reward, and how late?

    python benchmarks/alarms.py --out runs/alarms

Ten seeds of the demo's world, each trained with a good leash (beta 0.25) and with none. The alarms, at their defaults,
read the records. The delay counts from the update at which the gold judge, a mean of five updates, was highest; a
negative one means that the alarm came before. Runs that are there already are read, not repeated.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean, median
from typing import Any

import tyro
from demo_run import build_worlds, records_of_run

from kleash.alarms import AlarmContext, AlarmsConfig, AlarmWatch
from kleash.config import LeashConfig

UPDATES = 60
BETAS = {"healthy": 0.25, "hacked": 0.0}
SMOOTHED = 5
NEEDS_A_JUDGE = "score_against_judge"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Which runs."""

    out: Path = Path("runs/alarms")
    seeds: tuple[int, ...] = tuple(range(10))
    jobs: int = 2
    """Runs at the same time, one thread each."""


@dataclass(frozen=True, kw_only=True)
class Heard:
    """When each alarm rang first in a run (None = never), when gold was highest, and gold's fall from there."""

    kind: str
    seed: int
    first: dict[str, int | None]
    gold_highest_at: int
    gold_fall: float


def main() -> None:
    asked = tyro.cli(Asked, description=__doc__)
    build_worlds(asked.out, asked.seeds)
    with ThreadPoolExecutor(asked.jobs) as pool:
        heard = list(pool.map(lambda case: listened(asked.out, *case), product(BETAS, asked.seeds)))
    print(table(heard))


def listened(out: Path, kind: str, seed: int) -> Heard:
    """Train the run, unless it is there already, and let the alarms read its records."""
    leash = LeashConfig(beta=BETAS[kind])
    return heard_in(records_of_run(out, f"{kind}-seed_{seed}", leash, seed=seed, updates=UPDATES), kind, seed)


def heard_in(records: Sequence[dict[str, Any]], kind: str, seed: int) -> Heard:
    watch = AlarmWatch(AlarmsConfig(), AlarmContext())
    first: dict[str, int | None] = dict.fromkeys(AlarmsConfig().by_name)
    for record in records:
        for alarm in watch.see(record):
            first[alarm.name] = first[alarm.name] or alarm.update
    gold = [record["eval_score_mean"] for record in records]
    smooth = [mean(gold[i : i + SMOOTHED]) for i in range(len(gold) - SMOOTHED + 1)]
    highest = max(range(len(smooth)), key=lambda i: smooth[i])
    return Heard(
        kind=kind,
        seed=seed,
        first=first,
        gold_highest_at=highest + SMOOTHED // 2 + 1,
        gold_fall=smooth[highest] - smooth[-1],
    )


def table(heard: list[Heard]) -> str:
    healthy, hacked = ([one for one in heard if one.kind == kind] for kind in BETAS)
    names = list(AlarmsConfig().by_name)
    groups = {
        **{name: [name] for name in names},
        "any of them": names,
        "any that needs no judge": [name for name in names if name != NEEDS_A_JUDGE],
    }
    lines = [
        f"{len(healthy)} healthy runs (beta {BETAS['healthy']:g}): gold fell by "
        f"{_range([one.gold_fall for one in healthy], '.2f')} from its highest",
        f"{len(hacked)} hacked runs (beta 0): gold fell by {_range([one.gold_fall for one in hacked], '.2f')}; highest "
        f"at update {_range([one.gold_highest_at for one in hacked], '.0f')}",
        "",
        f"{'alarm':<26} {'healthy':>8} {'hacked':>8}   delay after gold's highest, updates: median (range)",
    ]
    for name, members in groups.items():
        delays = [at - one.gold_highest_at for one in hacked if (at := first_of(one, members)) is not None]
        lines.append(
            f"{name:<26} {_share(healthy, members):>8} {_share(hacked, members):>8}   "
            + (f"{_range(delays, '+.0f')}" if delays else "-")
        )
    return "\n".join(lines)


def first_of(one: Heard, names: list[str]) -> int | None:
    return min((at for name in names if (at := one.first[name]) is not None), default=None)


def _share(runs: list[Heard], names: list[str]) -> str:
    return f"{sum(first_of(one, names) is not None for one in runs)}/{len(runs)}"


def _range(values: Sequence[float], form: str) -> str:
    return f"{median(values):{form}} ({min(values):{form}} .. {max(values):{form}})"


if __name__ == "__main__":
    main()
