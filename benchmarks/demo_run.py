"""What benchmarks in the demo's world share: the worlds, the demo's run in them, `kleash train` on one thread."""

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kleash.config import LeashConfig, RunConfig, config_as_yaml
from kleash.demo.build import build_world
from kleash.ppo import PPOConfig
from kleash.rollout import RolloutConfig
from kleash.run_directory import RunDirectory


def build_worlds(out: Path, seeds: Iterable[int]) -> None:
    """The world of each seed in out/world_SEED, unless it is there already."""
    for seed in seeds:
        if not (out / f"world_{seed}" / "world.json").exists():
            build_world(out / f"world_{seed}", seed=seed, announce=print)


def records_of_run(out: Path, name: str, leash: LeashConfig, *, seed: int, updates: int) -> list[dict[str, Any]]:
    """The records of the demo's run in the seed's world on a leash; trained now, unless they are there already."""
    world, run = out / f"world_{seed}", RunDirectory(path=out / name)
    config = RunConfig(
        policy=str(world / "policy"),
        reward=str(world / "reward"),
        eval_reward="kleash.demo.gold:gold_judge",
        prompts=str(world / "prompts.jsonl"),
        out=str(run.path),
        leash=leash,
        rollout=RolloutConfig(prompts_per_update=64, max_new_tokens=40),
        ppo=PPOConfig(epochs=2, minibatches=4, learning_rate=3e-4),
        updates=updates,
        seed=seed,
    )
    if len(run.lines("records.jsonl")) < updates:
        yaml_file = out / f"{name}.yaml"
        yaml_file.write_text(config_as_yaml(config), encoding="utf-8")
        command = [sys.executable, "-m", "kleash.cli", "train", str(yaml_file), "--resume"]
        with (out / f"{name}.log").open("wb") as log:
            subprocess.run(command, check=True, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return run.lines("records.jsonl")
