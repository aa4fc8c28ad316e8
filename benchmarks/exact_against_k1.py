"""The exact KL against k1 as the leash: the demo's world, equal updates, several seeds and betas.

    python benchmarks/exact_against_k1.py --out runs/exact_against_k1

Builds one world per seed, trains it once for each beta and form, and prints what came of it: score, gold score and
KL on held-out prompts at the end, how much the KL jumps from update to update, how many updates it takes to a KL,
the gold score of the training prompts at an equal KL, and the seconds of an update. Runs that are there already are
not repeated, so the table of a finished directory can be printed again.
"""

import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import tyro

from kleash.config import LeashConfig, RunConfig, config_as_yaml
from kleash.demo.build import build_world
from kleash.demo.evaluation import evaluate
from kleash.kl_form import KLName
from kleash.ppo import PPOConfig
from kleash.rollout import RolloutConfig

RESPONSE_LENGTH = 40


@dataclass(frozen=True)
class Comparison:
    """What is compared."""

    out: Path
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    betas: tuple[float, ...] = (0.1, 0.25, 3.0)
    forms: tuple[KLName, ...] = ("k1", "exact", "blend")
    updates: int = 40
    prompts_per_update: int = 64
    learning_rate: float = 3e-4
    jobs: int = 2
    kl_levels: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Nats per response at which gold scores and updates are compared."""


def run_directory(work: Comparison, seed: int, beta: float, form: KLName) -> Path:
    return work.out / f"seed{seed}-{form}-beta{beta:g}"


def beside(directory: Path, ending: str) -> Path:
    """The file of that name and ending next to a run's directory."""
    return directory.parent / f"{directory.name}.{ending}"


def train_and_judge(work: Comparison, seed: int, beta: float, form: KLName) -> None:
    """One run in a process of its own on one thread, and its held-out evaluation."""
    out, world = run_directory(work, seed, beta, form), work.out / f"world{seed}"
    judged = beside(out, "json")
    if judged.exists():
        return
    config = RunConfig(
        policy=str(world / "policy"),
        reward=str(world / "reward"),
        eval_reward="kleash.demo.gold:gold_judge",
        prompts=str(world / "prompts.jsonl"),
        out=str(out),
        kl=form,
        leash=LeashConfig(beta=beta),
        rollout=RolloutConfig(prompts_per_update=work.prompts_per_update, max_new_tokens=RESPONSE_LENGTH),
        ppo=PPOConfig(epochs=2, minibatches=4, learning_rate=work.learning_rate),
        updates=work.updates,
        seed=seed,
    )
    yaml_file = beside(out, "yaml")
    yaml_file.write_text(config_as_yaml(config), encoding="utf-8")
    command = [sys.executable, "-m", "kleash.cli", "train", str(yaml_file), "--resume"]
    with beside(out, "log").open("wb") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
    end = evaluate(
        out / "checkpoints" / f"{work.updates:06d}" / "policy",
        world / "policy",
        reward=world / "reward",
        prompts=world / "heldout_prompts.jsonl",
        length=RESPONSE_LENGTH,
        seed=seed,
    )
    figures = {"score": end.score.mean, "gold": end.gold.mean, "kl": end.kl_policy_ref_per_sequence.mean}
    judged.write_text(json.dumps(figures), encoding="utf-8")
    print(out.name, {name: round(value, 2) for name, value in figures.items()}, flush=True)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def smoothed(values: list[float], width: int = 5) -> list[float]:
    """Running means over the last `width` values."""
    return [statistics.fmean(values[max(0, i + 1 - width) : i + 1]) for i in range(len(values))]


def first_at(level: float, kl: list[float]) -> int | None:
    """The first update whose smoothed KL has reached the level."""
    return next((i for i, value in enumerate(smoothed(kl)) if value >= level), None)


def figures_of(work: Comparison, seed: int, beta: float, form: KLName) -> dict[str, float | None]:
    """What one run showed; None where it never reached a KL."""
    out = run_directory(work, seed, beta, form)
    records, timings = lines_of(out / "records.jsonl"), lines_of(out / "timings.jsonl")
    kl = [record["kl_policy_ref_per_sequence"] for record in records]
    gold = smoothed([record["eval_score_mean"] for record in records])
    half = kl[len(kl) // 2 :]
    jumps = [b - a for a, b in pairwise(half)]
    judged = json.loads(beside(out, "json").read_text(encoding="utf-8"))
    figures: dict[str, float | None] = {
        "score": judged["score"],
        "gold": judged["gold"],
        "KL": judged["kl"],
        "score - beta KL": judged["score"] - beta * judged["kl"],
        "KL, second half": statistics.fmean(half),
        "jump of KL": statistics.pstdev(jumps),
        "ms/update": 1000 * statistics.median(row["seconds_total"] for row in timings),
    }
    for level in work.kl_levels:
        at = first_at(level, kl)
        figures[f"updates to {level:g}"] = at
        figures[f"gold at {level:g}"] = None if at is None else gold[at]
    return figures


def row_of(work: Comparison, beta: float, form: KLName) -> dict[str, str]:
    """Means over the seeds, +- their standard error; how many seeds have a figure where not all do."""
    runs = [figures_of(work, seed, beta, form) for seed in work.seeds]
    row = {"beta": f"{beta:g}", "form": form}
    for name in runs[0]:
        values = [run[name] for run in runs if run[name] is not None]
        if not values:
            row[name] = "-"
            continue
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
        digits = 0 if name == "ms/update" else 1 if name.startswith("updates") else 2
        row[name] = f"{statistics.fmean(values):.{digits}f} ±{error:.{digits}f}"
        row[name] += "" if len(values) == len(runs) else f" ({len(values)})"
    return row


def main(work: Comparison) -> None:
    """Train what is missing, then print the table."""
    for seed in work.seeds:
        if not (work.out / f"world{seed}" / "world.json").exists():
            build_world(work.out / f"world{seed}", seed=seed)
    with ThreadPoolExecutor(work.jobs) as pool:
        jobs = [pool.submit(train_and_judge, work, *what) for what in product(work.seeds, work.betas, work.forms)]
        for job in jobs:
            job.result()
    rows = [row_of(work, beta, form) for beta, form in product(work.betas, work.forms)]
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(row.values()) + " |")


if __name__ == "__main__":
    main(tyro.cli(Comparison, description=__doc__))
