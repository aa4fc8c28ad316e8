"""The files of a run: where they lie, how lines are added, and how a resumed run forgets what it will do again.

RUN/config.yaml        the resolved configuration
RUN/records.jsonl      one line per update, every figure of the glossary
RUN/drift.jsonl        where the policy drifts: by position, class and token, one line per update
RUN/timings.jsonl      seconds by phase, one line per update (apart, since no two runs agree on them)
RUN/samples.jsonl      some responses of every update
RUN/token_maps.jsonl   some responses of the first and of the newest mapped update, token by token
RUN/alarms.jsonl       every alarm that was raised
RUN/roll_backs.jsonl   one line per roll-back, with the records that were given up
RUN/checkpoints/N/     the state after N updates
RUN/report.html        the page
"""

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kleash.errors import RunDirectoryError

LINE_FILES = ("records.jsonl", "drift.jsonl", "timings.jsonl", "samples.jsonl", "token_maps.jsonl", "alarms.jsonl")


@dataclass(frozen=True, kw_only=True)
class RunDirectory:
    """A run's directory; nothing is created before `start`."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def records(self) -> Path:
        return self.path / "records.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def holds_a_run(self) -> bool:
        """Whether any file of a run lies here already."""
        return self.config.exists() or self.records.exists() or self.checkpoints.exists()

    def require_place(self) -> None:
        """Raise RunDirectoryError when a file is in the way, or nothing can be written there; nothing stays."""
        if self.path.exists() and not self.path.is_dir():
            raise RunDirectoryError(
                f"Expected a directory to write to, found the file {self.path}; choose another out."
            )
        refusing = _what_takes_no(self.config)
        if refusing is not None:
            raise RunDirectoryError(
                f"Expected to write to {self.path}, found that {refusing} takes none; choose another out."
            )

    def require_free(self) -> None:
        """Raise RunDirectoryError as `require_place` does, and when another run is in the way."""
        self.require_place()
        if self.holds_a_run():
            raise RunDirectoryError(
                f"Expected an empty directory for the run, found another run in {self.path}; "
                "choose another out, or go on with that run by --resume."
            )

    def start(self, config_yaml: str) -> None:
        """Create the directory and write the resolved configuration."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.config, config_yaml)
        except OSError as error:
            raise RunDirectoryError(
                f"Expected to write to {self.path}, found {error.strerror or error}; choose another out."
            ) from error

    def take_back(self) -> None:
        """Remove what a start wrote, of a run whose first update failed: nothing is lost, and another may start here.

        Files of somebody else's stay, and then the directory does.
        """
        self.config.unlink(missing_ok=True)
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        if not any(self.path.iterdir()):
            self.path.rmdir()

    def append(self, file: str, rows: Sequence[dict[str, Any]]) -> None:
        """Add rows to a line file, one JSON object each, flushed before returning."""
        with (self.path / file).open("a", encoding="utf-8") as lines:
            lines.writelines(map(line_of, rows))

    def renew(self, file: str, rows: Sequence[dict[str, Any]], *, kept: int) -> None:
        """Put rows in place of all those of a line file but the ones of an update that is kept."""
        old = [row for row in self.lines(file) if row["update"] == kept and row["update"] != rows[0]["update"]]
        write_atomically(self.path / file, "".join(map(line_of, [*old, *rows])))

    def lines(self, file: str) -> list[dict[str, Any]]:
        """The rows of a line file, none if it is not there."""
        path = self.path / file
        return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []

    def forget_after(self, update: int) -> None:
        """Drop every line of a later update, and a last line that was cut short."""
        for file in LINE_FILES:
            self._keep(file, "update", update)

    def forget_roll_backs_after(self, roll_back: int) -> None:
        """Drop every roll-back that came later, and so will come again."""
        self._keep("roll_backs.jsonl", "roll_back", roll_back)

    def _keep(self, file: str, key: str, last: int) -> None:
        """Keep the whole lines whose number is not beyond the last."""
        path = self.path / file
        if path.exists():
            lines = path.read_bytes().splitlines(keepends=True)
            kept = [line for line in lines if line.endswith(b"\n") and json.loads(line)[key] <= last]
            write_atomically(path, b"".join(kept).decode())


def line_of(row: dict[str, Any]) -> str:
    """A row as the line of a file."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def require_place_for(file: Path) -> None:
    """Raise RunDirectoryError unless a file, and the directories above it, can be made there; nothing stays."""
    if file.is_dir():
        raise RunDirectoryError(f"Expected a file to write, found the directory {file}; name a file in it.")
    refusing = _what_takes_no(file)
    if refusing is not None:
        raise RunDirectoryError(f"Expected to write to {file}, found that {refusing} takes none; choose another place.")


def _what_takes_no(file: Path) -> Path | None:
    """The nearest thing above a file that takes no file, or no directory where one is still to be made.

    It is tried, not asked for: what permissions say is not all, and says nothing to root.
    """
    above = next(directory for directory in file.absolute().parents if directory.exists())
    try:
        if above == file.absolute().parent:
            with tempfile.NamedTemporaryFile(dir=above, prefix=".kleash."):
                pass
        else:
            Path(tempfile.mkdtemp(dir=above, prefix=".kleash.")).rmdir()
    except OSError:
        return above
    return None


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader, or a crash, sees the old text or the new and never a part."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def remove_partial(directory: Path) -> None:
    """Remove what a killed process left half-written in a directory."""
    for leftover in directory.glob(".*.partial"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
