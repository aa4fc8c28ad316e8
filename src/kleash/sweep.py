"""A sweep: one run per value of a key, one after the other, and the frontier of reward against drift that they trace.

OUT/leash.beta=0.02/   a run like any other, named by what distinguishes it
OUT/sweep.json         start and end of every run, the over-optimisation curve, best of n
OUT/report.html        all of it on one page
"""

import gc
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_origin

import torch
from pydantic import BaseModel
from rich.markup import escape
from rich.table import Table

from kleash.alarms import FIRST_KL, KL, figure_of
from kleash.baseline import best_of_n_baseline
from kleash.best_of_n import BestOfN
from kleash.checkpoint import checkpoints_in
from kleash.config import RunConfig, as_words, config_as_yaml, flags_of, read_config
from kleash.errors import ConfigError, RunStopped, ValueRangeError
from kleash.frontier import Frontier, frontier_as_json
from kleash.overoptimisation import OveroptimisationCurve, overoptimisation_curve
from kleash.parts import Given
from kleash.report import read_run, write_sweep_report
from kleash.run_directory import RunDirectory, write_atomically
from kleash.training import train_run
from kleash.verdict import Change, Run, drift, interval, judge_change, score_change

WINDOWS = 20  # points of the curve that a run gives, each the mean of as many updates
COMPARABLE = {
    "policy",
    "reference",
    "reward",
    "eval_reward",
    "prompts",
    "rollout.temperature",
    "rollout.max_new_tokens",
}
PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._+-=")

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One run of a sweep: the words of its swept keys, and its configuration, whose `out` ends in its name."""

    values: dict[str, str]
    config: RunConfig

    @property
    def name(self) -> str:
        return name_of(self.values)

    @property
    def label(self) -> str:
        """For a page: the values under the last parts of their keys."""
        return ", ".join(f"{key.rsplit('.', 1)[-1]} {value}" for key, value in self.values.items())

    @property
    def directory(self) -> RunDirectory:
        return RunDirectory(path=Path(self.config.out))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run of the sweep ended; `error` says why it stopped itself."""

    setting: Setting
    status: Literal["finished", "stopped", "interrupted", "waiting"]
    error: str | None = None

    def run(self) -> Run | None:
        """Its records; None before the first update."""
        records = self.setting.directory.records
        if not records.is_file() or not records.stat().st_size:
            return None
        return read_run(self.setting.directory.path, self.setting.label)


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """What a sweep left behind; report and json are None while runs are waiting."""

    outcomes: list[Outcome]
    frontier: Frontier | None
    report: Path | None
    json: Path | None

    def names(self, *statuses: str) -> list[str]:
        """The runs that ended so."""
        return [outcome.setting.name for outcome in self.outcomes if outcome.status in statuses]


# --- what is swept ---------------------------------------------------------------------------------------


def settings_of(path: str | Path, words: Sequence[str]) -> list[Setting]:
    """The runs that a YAML file and the words of the command line ask for, every configuration validated.

    A key with several values is swept, several such keys give their product; a key that takes a list is not.

    Raises:
      ConfigError: nothing is swept, two runs would be the same, or a configuration is wrong; see read_config.
    """
    flags = list(flags_of(words))
    swept = {key: texts for key, texts in flags if len(texts) > 1 and not takes_a_list(key)}
    if not swept:
        raise ConfigError(
            "Expected at least one key with several values to sweep, found none; for example --leash.beta 0 0.02 0.1."
        )
    if "out" in swept or "mixed_precision" in swept:
        key = "out" if "out" in swept else "mixed_precision"
        raise ConfigError(f"Expected one {key} for all runs of a sweep, found {len(swept[key])}; give one.")
    fixed = [(key, texts) for key, texts in flags if key not in swept]
    found = []
    for texts in product(*swept.values()):
        values = dict(zip(swept, texts, strict=True))
        config = read_config(path, as_words([*fixed, *((key, [text]) for key, text in values.items())]))
        out = Path(config.out) / name_of(values)
        found.append(Setting(values=values, config=config.model_copy(update={"out": str(out)})))
    _require_different(found)
    return found


def takes_a_list(key: str) -> bool:
    """Whether a dotted key of the configuration takes several values at once, as trackers do."""
    fields = RunConfig.model_fields
    *groups, last = key.split(".")
    for group in groups:
        kind = fields[group].annotation if group in fields else None
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            return False
        fields = kind.model_fields
    return last in fields and get_origin(fields[last].annotation) is tuple


def name_of(values: dict[str, str]) -> str:
    """A directory's name; what no path should hold becomes an underscore.

    >>> name_of({"leash.beta": "0.02", "reward": "models/a"})
    'leash.beta=0.02,reward=models_a'
    """
    parts = (f"{key}={value}" for key, value in values.items())
    return ",".join("".join(mark if mark in PLAIN else "_" for mark in part) for part in parts)


def _require_different(settings: Sequence[Setting]) -> None:
    seen: dict[str, str] = {}
    for setting in settings:
        whole = config_as_yaml(setting.config.model_copy(update={"out": "-"}))
        twin = seen.get(whole) or (setting.name if setting.name in seen.values() else None)
        if twin:
            raise ConfigError(f"Expected different runs in a sweep, found {twin} and {setting.name}; leave one out.")
        seen[whole] = setting.name


# --- the runs --------------------------------------------------------------------------------------------


def sweep(settings: Sequence[Setting], *, resume: bool, best_of: int, prompts: int, say: Say) -> SweepResult:
    """Train every setting in its turn, then sample the baseline, fit the curve, and write page and sweep.json.

    A run that stops itself is told and left behind; an interrupt ends the sweep, with the rest waiting.

    Args:
      settings: what to run, from settings_of.
      resume: skip the finished runs and go on with an interrupted one.
      best_of: the largest n of the baseline; 0 = no baseline.
      prompts: prompts of the baseline.
      say: told one sentence at a time what a person should know.

    Raises:
      InputError: something that a run was given cannot be used.
    """
    if not resume:
        for setting in settings:
            setting.directory.require_free()
    outcomes = list(_trained(settings, resume=resume, say=say))
    waiting = [Outcome(setting=setting, status="waiting") for setting in settings[len(outcomes) :]]
    if waiting or outcomes[-1].status == "interrupted" or not is_main_process():
        return SweepResult(outcomes=[*outcomes, *waiting], frontier=None, report=None, json=None)
    best = _baseline(settings, best_of=best_of, prompts=prompts, say=say)
    runs = [run for outcome in outcomes if (run := outcome.run())]
    frontier = Frontier(curve=_curve(runs, settings, best, say), best_of_n=tuple(best))
    out = settings[0].directory.path.parent
    write_atomically(out / "sweep.json", json_of(outcomes, frontier))
    page = write_sweep_report(out) if runs else None
    return SweepResult(outcomes=outcomes, frontier=frontier, report=page, json=out / "sweep.json")


def _trained(settings: Sequence[Setting], *, resume: bool, say: Say) -> Iterator[Outcome]:
    """The outcome of each run, until one is interrupted."""
    for setting in settings:
        if resume and is_finished(setting):
            say(f"{setting.name}: finished before, skipped.")
            yield Outcome(setting=setting, status="finished")
            continue
        gc.collect()  # the models of the last run
        try:
            result = train_run(setting.config, Given(), resume=resume)
        except RunStopped as error:
            say(f"{setting.name} stopped itself: {error}")
            yield Outcome(setting=setting, status="stopped", error=str(error))
            continue
        except KeyboardInterrupt:
            yield Outcome(setting=setting, status="interrupted")
            return
        if result.interrupted:
            yield Outcome(setting=setting, status="interrupted")
            return
        yield Outcome(setting=setting, status="finished")
        if result.stop_requested:
            return


def is_main_process() -> bool:
    """Whether this process prints and writes: the only one, or the first of those that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def is_finished(setting: Setting) -> bool:
    """Whether the very run that is asked for has its last checkpoint already."""
    directory = setting.directory
    if not directory.config.is_file() or directory.config.read_text("utf-8") != config_as_yaml(setting.config):
        return False
    found = checkpoints_in(directory.checkpoints)
    return bool(found) and int(found[-1].name) == setting.config.updates


# --- what they are held against --------------------------------------------------------------------------


def comparable(settings: Sequence[Setting]) -> bool:
    """Whether all runs have one start, one task and one judge, so that their points belong on one curve."""
    return all(part not in COMPARABLE for key in settings[0].values for part in (key, key.split(".")[0]))


def _baseline(settings: Sequence[Setting], *, best_of: int, prompts: int, say: Say) -> list[BestOfN]:
    if best_of == 0:
        return []
    if not comparable(settings):
        say("No best of n, and no curve over all runs: they differ in more than the leash or how they train.")
        return []
    say(f"best of {best_of}: sampling {best_of} responses of the reference to each of {prompts} prompts")
    return best_of_n_baseline(settings[0].config, Given(), best_of=best_of, prompts=prompts)


def _curve(
    runs: Sequence[Run], settings: Sequence[Setting], best: Sequence[BestOfN], say: Say
) -> OveroptimisationCurve | None:
    """The curve over all runs; None without a judge, a start or enough drift, or where the runs are no one family."""
    start = start_score(runs, best)
    if not comparable(settings) or start is None:
        return None
    points = torch.tensor([point for run in runs for point in curve_points(run)], dtype=torch.float64).reshape(-1, 2)
    try:
        return overoptimisation_curve(points[:, 0], points[:, 1], start_score=start)
    except ValueRangeError as error:
        say(f"No over-optimisation curve: {error}")
        return None


def start_score(runs: Sequence[Run], best: Sequence[BestOfN]) -> float | None:
    """R(0), the held-out score of the reference: that of best of 1, which is the mean of many responses.

    Without a baseline it is that of update 1, before any step, in the runs whose policy begins as its reference.
    """
    if best and best[0].eval_score:
        return best[0].eval_score.mean
    firsts = [run.records[0] for run in runs if run.records[0]["update"] == 1 and figure_of(run.records[0], KL) == 0]
    scores = [score for first in firsts if (score := figure_of(first, "eval_score_mean")) is not None]
    return _mean(scores) if scores else None


def curve_points(run: Run) -> list[tuple[float, float]]:
    """(KL in nats per sequence, held-out score), means over about WINDOWS windows of successive updates.

    The KL is to the first reference: one that moves would hide drift from the start, where the curve begins.
    """
    pairs = [(figure_of(row, FIRST_KL), figure_of(row, "eval_score_mean")) for row in run.records]
    known = [(kl, score) for kl, score in pairs if kl is not None and score is not None]
    size = max(1, len(known) // WINDOWS)
    windows = [known[start : start + size] for start in range(0, len(known), size)]
    return [(_mean([kl for kl, _ in window]), _mean([score for _, score in window])) for window in windows]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


# --- what is written -------------------------------------------------------------------------------------


def json_of(outcomes: Sequence[Outcome], frontier: Frontier) -> str:
    """The text of sweep.json: `runs` with one entry each, `curve`, `best_of_n`; None where nothing is known."""
    content = {
        "runs": [entry_of(outcome) for outcome in outcomes],
        **frontier_as_json(frontier),
    }
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def entry_of(outcome: Outcome) -> dict[str, Any]:
    """A run: its values, start and end as on the page, the KL with its 95 % interval, and how it ended."""
    setting, run = outcome.setting, outcome.run()
    score, judged = (find(run) if run else None for find in (score_change, judge_change))
    kl = drift(run) if run else None
    half = kl.half_width if kl else None
    return {
        "name": setting.name,
        "label": setting.label,
        "values": setting.values,
        "status": outcome.status,
        "error": outcome.error,
        "updates": run.records[-1]["update"] if run else 0,
        **_ends("score", score),
        **_ends("eval_score", judged),
        f"{KL}_end": kl.mean if kl else None,
        f"{KL}_end_low": kl.mean - half if kl and half is not None else None,
        f"{KL}_end_high": kl.mean + half if kl and half is not None else None,
        "beta_end": figure_of(run.records[-1], "beta") if run else None,
    }


def _ends(name: str, moved: Change | None) -> dict[str, float | None]:
    return {f"{name}_start": moved.start.mean if moved else None, f"{name}_end": moved.end.mean if moved else None}


def table_of(result: SweepResult) -> Table:
    """Score and held-out score from start to end; at the end KL(policy || reference), ± its 95 % interval, and beta."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("run", "score", "held-out", "KL/seq (nats)", "beta at the end"):
        table.add_column(name, justify="left" if name == "run" else "right", no_wrap=True)
    for outcome in result.outcomes:
        run = outcome.run()
        cells = [_moved(find(run)) if run else "-" for find in (score_change, judge_change)]
        kl, beta = (drift(run), figure_of(run.records[-1], "beta")) if run else (None, None)
        stopped = " (stopped itself)" if outcome.status == "stopped" else ""
        table.add_row(
            escape(outcome.setting.name) + stopped, *cells, interval(kl), "-" if beta is None else f"{beta:.4g}"
        )
    return table


def _moved(change: Change | None) -> str:
    return f"{change.start.mean:+.3f} -> {change.end.mean:+.3f}" if change else "-"
