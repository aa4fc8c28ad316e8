"""The drift record of another trainer's run: one line per measurement, and the reference that they are measured to.

OUTPUT_DIR/drift.jsonl                  the figures of `kleash measure --json`, `step`, and the reference's fingerprint
OUTPUT_DIR/drift_reference.safetensors  the start of what learns, where the reference is a copy of the policy's start
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from kleash.errors import CheckpointError, RunDirectoryError, first_line
from kleash.run_directory import line_of, require_place_for, write_atomically

ADVICE = "pass the model that the run started from as the callback's reference."


@dataclass(frozen=True, kw_only=True)
class DriftRecord:
    """The files in a trainer's output directory; nothing is created before the first line or the first `keep`."""

    directory: Path

    @property
    def lines_file(self) -> Path:
        return self.directory / "drift.jsonl"

    @property
    def reference_file(self) -> Path:
        return self.directory / "drift_reference.safetensors"

    def require_none(self) -> None:
        """Raise RunDirectoryError where another run's record lies, or where none can be written."""
        require_place_for(self.lines_file)
        if self.lines_file.exists():
            raise RunDirectoryError(
                f"Expected an output_dir without a drift record, found {self.lines_file} of another run; choose "
                "another output_dir, move the file away, or go on with that run by resume_from_checkpoint."
            )

    def lines(self) -> list[dict[str, Any]]:
        """Every measurement, the first one first; a last line that was cut short is left out."""
        if not self.lines_file.exists():
            return []
        found = self.lines_file.read_bytes().splitlines(keepends=True)
        return [json.loads(line) for line in found if line.endswith(b"\n")]

    def append(self, line: dict[str, Any]) -> None:
        """Add a measurement, flushed before returning."""
        with self.lines_file.open("a", encoding="utf-8") as file:
            file.write(line_of(line))

    def forget_after(self, step: int) -> None:
        """Drop every line of a later step, which comes again, and a last line that was cut short."""
        if self.lines_file.exists():
            kept = [line for line in self.lines() if line["step"] <= step]
            write_atomically(self.lines_file, "".join(map(line_of, kept)))

    def keep(self, start: dict[str, Tensor]) -> None:
        """Save what learns as it is at the start, from which a resumed run makes its reference again."""
        partial = self.reference_file.with_name(f".{self.reference_file.name}.partial")
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in start.items()}, partial)
        os.replace(partial, self.reference_file)

    def kept(self) -> dict[str, Tensor]:
        """What `keep` saved.

        Raises:
          CheckpointError: it is not there, or damaged.
        """
        if not self.reference_file.exists():
            raise CheckpointError(f"Expected the run's start in {self.reference_file}, found no such file; {ADVICE}")
        try:
            return load_file(self.reference_file)
        except Exception as error:  # safetensors has an error class of its own
            cause = first_line(error)
            raise CheckpointError(
                f"Expected the run's start in {self.reference_file}, found a damaged file ({cause}); {ADVICE}"
            ) from error
