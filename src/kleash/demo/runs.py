"""The demo's runs: `kleash train` on each configuration, as a user would start it, all at the same time.

A model this small keeps one core busy and no more, so the runs share the machine instead of taking turns.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from kleash.checkpoint import checkpoints_in
from kleash.config import RunConfig, config_as_yaml
from kleash.errors import RunStopped
from kleash.run_directory import RunDirectory

POLL_SECONDS = 0.5
LINES_EVERY = 10


def train_side_by_side(configs: Sequence[RunConfig], screen: Console) -> None:
    """Train every configuration in a process of its own, and show how far each is.

    Raises:
      RunStopped: a run ended with another exit code than 0; its last words are in the message.
    """
    children = {config.out: _started(config) for config in configs}
    columns = (
        TextColumn("  {task.description:<6}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
    )
    progress = Progress(*columns, console=screen, disable=not screen.is_terminal)
    try:
        with nullcontext() if progress.disable else progress:  # rich before 14.3 ends a disabled one with an empty line
            tasks = {c.out: progress.add_task(Path(c.out).name, total=c.updates, figures="starting") for c in configs}
            while any(child.poll() is None for child in children.values()):
                time.sleep(POLL_SECONDS)
                for config in configs:
                    _show(config, progress, tasks[config.out], screen)
    finally:
        for child in children.values():
            child.wait()
    for out, child in children.items():
        if child.returncode:
            log = Path(out).with_suffix(".log").read_text(encoding="utf-8").strip().splitlines() or ["no output"]
            raise RunStopped(f"Expected the run in {out} to finish, found exit code {child.returncode}: {log[-1]}")


def _started(config: RunConfig) -> "subprocess.Popen[bytes]":
    """`kleash train OUT.yaml` on one thread, its output in OUT.log."""
    out = Path(config.out)
    yaml_file = out.with_suffix(".yaml")
    yaml_file.write_text(config_as_yaml(config), encoding="utf-8")
    command = [sys.executable, "-m", "kleash.cli", "train", str(yaml_file)]
    with out.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})


def _show(config: RunConfig, progress: Progress, task: TaskID, screen: Console) -> None:
    records = _records(config)
    shown = int(progress.tasks[task].completed)
    if len(records) == shown:
        return
    last = records[-1]
    figures = (
        f"score {last['score_mean']:+.2f}  gold {last['eval_score_mean']:+.2f}  "
        f"KL {last['kl_policy_ref_per_sequence']:5.1f} nats/response"
    )
    progress.update(task, completed=len(records), figures=figures)
    if not screen.is_terminal and len(records) // LINES_EVERY > shown // LINES_EVERY:
        screen.print(f"  {Path(config.out).name:<6} update {len(records):>3} of {config.updates}: {figures}")


def _records(config: RunConfig) -> list[dict[str, Any]]:
    """The whole lines of a run's records so far."""
    path = RunDirectory(path=Path(config.out)).records
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def final_policy(config: RunConfig) -> Path:
    """The policy in the last checkpoint of a finished run."""
    return checkpoints_in(RunDirectory(path=Path(config.out)).checkpoints)[-1] / "policy"
