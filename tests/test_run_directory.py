"""A run's files: written whole, read back whole, and never over those of another run."""

import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import tree

from kleash.errors import RunDirectoryError
from kleash.run_directory import RunDirectory, remove_partial, require_place_for, write_atomically


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(path=tmp_path / "runs" / "first")
    directory.start("seed: 0\n")
    return directory


def test_nothing_exists_before_start(tmp_path: Path) -> None:
    RunDirectory(path=tmp_path / "run").require_free()
    assert tree(tmp_path) == {}


def test_start_makes_the_directory_and_its_configuration_only(run: RunDirectory) -> None:
    assert tree(run.path) == {"config.yaml": b"seed: 0\n"}


@pytest.mark.parametrize("trace", ["config.yaml", "records.jsonl", "checkpoints"])
def test_a_directory_with_any_trace_of_a_run_is_taken(tmp_path: Path, trace: str) -> None:
    (tmp_path / trace).mkdir()
    with pytest.raises(RunDirectoryError, match=r"found another run in .*; choose another out, or go on .* --resume"):
        RunDirectory(path=tmp_path).require_free()


def test_a_directory_with_other_files_is_free(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    RunDirectory(path=tmp_path).require_free()


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(RunDirectoryError, match=r"Expected a directory to write to, found the file .*run"):
        RunDirectory(path=tmp_path / "run").require_free()


def test_a_place_that_cannot_be_written_to_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunDirectoryError, match=r"Expected to write to .*file/run, found Not a directory; choose"):
        RunDirectory(path=tmp_path / "file" / "run").start("")


def test_lines_are_json_one_each_whatever_the_text_holds(run: RunDirectory) -> None:
    texts = ["a\nb", "\u2028 and \r\n", "größe", "<script>", '"']
    run.append("samples.jsonl", [{"update": n, "response": text} for n, text in enumerate(texts)])
    run.append("samples.jsonl", [{"update": 9, "response": ""}])
    lines = (run.path / "samples.jsonl").read_bytes().split(b"\n")
    assert [json.loads(line)["response"] for line in lines[:-1]] == [*texts, ""]
    assert lines[-1] == b""
    assert "größe".encode() in lines[2]


def test_a_line_never_holds_what_json_does_not_know(run: RunDirectory) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        run.append("records.jsonl", [{"update": 1, "score_mean": float("nan")}])


def test_forgetting_drops_later_updates_and_the_line_that_was_cut_short(run: RunDirectory) -> None:
    kept = '{"update": 1, "response": "ä"}\n{"update": 2, "response": "b"}\n{"update": 2, "response": "\u2028"}\n'
    for file in ("records.jsonl", "drift.jsonl", "samples.jsonl", "timings.jsonl"):
        (run.path / file).write_text(kept + '{"update": 3, "response": "c"}\n{"update": 2, "resp', encoding="utf-8")
    run.forget_after(2)
    for file in ("records.jsonl", "drift.jsonl", "samples.jsonl", "timings.jsonl"):
        assert (run.path / file).read_bytes() == kept.encode()
    run.forget_after(0)
    assert run.records.read_bytes() == b""
    assert not list(run.path.glob(".*"))


def test_forgetting_makes_no_file(run: RunDirectory) -> None:
    run.forget_after(0)
    assert tree(run.path) == {"config.yaml": b"seed: 0\n"}


def test_a_crash_while_writing_leaves_the_old_text(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*paths: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(run.config, "seed: 1\n")
    assert run.config.read_text() == "seed: 0\n"


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".000002.partial" / "policy").mkdir(parents=True)
    (tmp_path / ".config.yaml.partial").write_text("half")
    (tmp_path / "000001").mkdir()
    (tmp_path / ".hidden").write_text("mine")
    remove_partial(tmp_path)
    assert tree(tmp_path) == {".hidden": b"mine", "000001": None}


def refusing(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that takes neither files nor directories, whoever asks and whatever its permissions say."""
    directory.mkdir()

    def tried(make: Callable[..., object]) -> Callable[..., object]:
        def refuse(path: object, *arguments: object, **more: object) -> object:
            if Path(str(path)).parent == directory:
                raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))  # what /proc says
            return make(path, *arguments, **more)

        return refuse

    for name in ("open", "mkdir"):
        monkeypatch.setattr(os, name, tried(getattr(os, name)))
    return directory


@pytest.mark.parametrize("below", ["x.json", "new/x.json"])
def test_a_place_that_takes_nothing_is_found_by_trying(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, below: str
) -> None:
    directory = refusing(tmp_path / "full", monkeypatch)
    said = f"Expected to write to {directory / below}, found that {directory} takes none; choose another place."
    with pytest.raises(RunDirectoryError, match=re.escape(said)):
        require_place_for(directory / below)
    said = f"Expected to write to {directory / below}, found that {directory} takes none; choose another out."
    with pytest.raises(RunDirectoryError, match=re.escape(said)):
        RunDirectory(path=directory / below).require_free()


def test_a_place_that_was_tried_is_left_as_it_was(tmp_path: Path) -> None:
    for name in ("x.json", "new/deep/x.json"):
        require_place_for(tmp_path / name)
        RunDirectory(path=tmp_path / name).require_place()
    assert tree(tmp_path) == {}
    with pytest.raises(RunDirectoryError, match="found the directory"):
        require_place_for(tmp_path)
