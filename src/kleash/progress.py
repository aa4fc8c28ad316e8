"""What a person sees while a run goes on: one line per update with the figures one steers by."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers.utils import logging as transformers_logging

from kleash.estimators import Interval

Figures = Mapping[str, float | int | None]
ROWS_ON_SCREEN = 12


@contextmanager
def silent_libraries() -> Iterator[None]:
    """Within, transformers draws no progress bars of its own across ours; afterwards it is as it was."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


@dataclass
class RunProgress:
    """A live table in a terminal, plain lines elsewhere; on stderr, so that stdout stays free."""

    title: str
    updates: int
    completed: int = 0
    quiet: bool = False
    console: Console = field(default_factory=lambda: Console(stderr=True))

    def __post_init__(self) -> None:
        self.rows: list[list[str]] = []
        self.bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("updates"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.task = self.bar.add_task(escape(self.title), total=self.updates, completed=self.completed)
        self.live = Live(console=self.console, refresh_per_second=4, transient=False)

    def __enter__(self) -> "RunProgress":
        if not self.quiet and self.console.is_terminal:
            self.live.update(self._screen())
            self.live.start()
        return self

    def __exit__(self, *details: object) -> None:
        self.live.stop()

    def show(self, record: Figures, timings: Figures) -> None:
        """Add an update's line."""
        if self.quiet:
            return
        cells = figures_of(record, timings)
        if not self.console.is_terminal:
            words = [f"{name} {cell}" for name, cell in cells.items()]
            self.console.print(f"{self.title}: " + ", ".join(words), markup=False, highlight=False, soft_wrap=True)
            return
        self.rows.append(list(cells.values()))
        self.bar.update(self.task, completed=int(record["update"] or 0))
        self.live.update(self._screen(list(cells)))

    def say(self, sentence: str) -> None:
        """A sentence that stays on the screen."""
        if not self.quiet:
            self.console.print(sentence, markup=False, highlight=False, soft_wrap=True)

    def _screen(self, names: list[str] | None = None) -> RenderableType:
        if not names:
            return self.bar
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        for name in names:
            table.add_column(name, justify="right", no_wrap=True)
        for row in self.rows[-ROWS_ON_SCREEN:]:
            table.add_row(*row)
        return Group(table, self.bar)


@dataclass
class MeasureProgress:
    """How far a measurement is, and what it says so far; on stderr, so that stdout stays free."""

    quiet: bool = False
    console: Console = field(default_factory=lambda: Console(stderr=True))

    def __post_init__(self) -> None:
        self.bar = Progress(
            TextColumn("[bold]measuring"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("responses, {task.description}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=self.quiet or not self.console.is_terminal,
        )
        self.task = self.bar.add_task("loading the models", total=None)
        self.started = time.monotonic()
        self.said = 0.0
        self.words = "measuring"

    def __enter__(self) -> "MeasureProgress":
        self.bar.start()
        return self

    def __exit__(self, *details: object) -> None:
        if not self.bar.disable:  # rich before 14.3 ends even a bar that it never drew with an empty line
            self.bar.stop()

    def show(self, done: int, interval: Interval | None, *, expected: int) -> None:
        """Say what the responses so far say, and how many are expected; elsewhere than in a terminal every tenth.

        Args:
          done: responses so far.
          interval: exact KL(policy || reference), nats per sequence; None = as it was last said.
          expected: responses in all, as far as is known.
        """
        total = max(expected, done)
        if interval is not None:
            self.words = f"KL {interval.mean:.3g} ±{(interval.high - interval.low) / 2:.2g} nats each"
        self.bar.update(self.task, completed=done, total=total, description=self.words)
        share = done / total
        if self.quiet or self.console.is_terminal or share < min(1.0, self.said + 0.1):
            return
        self.said = share
        left = (time.monotonic() - self.started) * (1 / share - 1)
        line = f"measuring: {done} of {total} responses, {self.words}, {left:.0f} s left"
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def figures_of(record: Figures, timings: Figures) -> dict[str, str]:
    """The figures one steers by, as text under their names; KL is KL(policy || reference) in nats per sequence."""
    figures = {
        "update": f"{record['update']}",
        "score": _number(record["score_mean"], 3),
        "held-out": _number(record["eval_score_mean"], 3),
        "KL/seq (nats)": f"{_number(record['kl_policy_ref_per_sequence'], 2)} ±{_half_width(record)}",
        "to the first reference": _number(record["kl_policy_first_ref_per_sequence"], 2),
        "beta": _number(record["beta"], 4),
        "entropy/token": _number(record["entropy_per_token"], 2),
        "length": _number(record["response_length_mean"], 1),
        "sample+reward+score+optimise (s)": "+".join(
            _number(timings[f"seconds_{phase}"], 1) for phase in ("sampling", "rewarding", "scoring", "optimising")
        ),
    }
    first, kl = record["kl_policy_first_ref_per_sequence"], record["kl_policy_ref_per_sequence"]
    if first == kl:
        del figures["to the first reference"]
    if record["eval_score_mean"] is None:
        del figures["held-out"]
    return figures


def _half_width(record: Figures) -> str:
    low, high = record["kl_policy_ref_per_sequence_low"], record["kl_policy_ref_per_sequence_high"]
    return "?" if low is None or high is None else f"{(high - low) / 2:.2f}"


def _number(value: float | int | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
