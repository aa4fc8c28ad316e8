"""The command line: `kleash demo`, `kleash check`, `kleash train`, `kleash sweep`, `kleash report`.

Exit codes: 0 done; 1 the run stopped itself or a check failed; 2 bad usage or input; 130 interrupted, checkpoint saved.
Results go to stdout, progress and errors to stderr.
"""

import gc
import json
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from kleash.errors import ConfigError, DoubtWarning, InputError, KleashError, KleashWarning
from kleash.version import VERSION

USAGE = f"""\
kleash {VERSION}: post-train a language model against a reward model, on a KL leash.

  kleash demo                   build a small world, train it at three leashes, write the report
  kleash check  RUN.yaml        try a run out in seconds: PASS, WARN or FAIL, with a remedy each
  kleash train  RUN.yaml        train a policy; any key can be overridden: --leash.beta 0.05
  kleash measure POLICY REFERENCE --prompts FILE     how far a policy has drifted, where, and give or take how much
  kleash sweep  RUN.yaml        train once per value of a key, --leash.beta 0 0.02 0.1 1, and compare
  kleash report RUN [RUN ..]    rebuild the HTML page from a run's or a sweep's records; several runs side by side

  kleash COMMAND --help         what a command takes
  kleash --version

KL is KL(policy || reference), in nats, exact over the whole vocabulary, unless a name says otherwise.
Exit codes: 0 done; 1 the run stopped itself or a check failed; 2 bad usage or input; 130 interrupted, checkpoint saved.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    try:
        try:
            return _main(arguments)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output has left, as in `kleash --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _main(arguments: Sequence[str] | None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0 if words else 2
    if words[0] == "--version":
        print(VERSION)
        return 0
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return _command(words[0])(words[1:])
    except KleashError as error:
        if debug:
            traceback.print_exc()
        print(f"kleash: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt:
        print(f"kleash: Interrupted; {AFTER_AN_INTERRUPT[words[0]]}.", file=sys.stderr)
        return 130


AFTER_AN_INTERRUPT = {
    "demo": "start again with another --out, or delete what it left",
    "check": "nothing was written",
    "train": "go on from the last checkpoint, if there is one, with --resume",
    "measure": "nothing was written",
    "sweep": "go on from the last checkpoint, if there is one, with --resume",
    "report": "the page is as it was",
}


_show_other_warning = warnings.showwarning


def _show_warning(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
    """Our own warnings as the one sentence that they are; others as ever."""
    if issubclass(category, KleashWarning):
        print(f"kleash: {message}", file=sys.stderr)
    else:
        _show_other_warning(message, category, *place, **more)


def _command(name: str) -> Callable[[list[str]], int]:
    commands = {
        "demo": _demo,
        "check": _check,
        "train": _train,
        "measure": _measure,
        "sweep": _sweep,
        "report": _report,
    }
    if name not in commands:
        raise ConfigError(f"Expected a command ({', '.join(commands)}), found {name!r}; see kleash --help.")
    return commands[name]


def _parsed(kind: Any, words: list[str], *, command: str, description: str) -> Any:
    settings = (tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands)
    return tyro.cli(kind, args=words, prog=f"kleash {command}", description=description, config=settings)


@dataclass(frozen=True, kw_only=True)
class ReportArguments:
    """Arguments of `kleash report`."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Directories of runs, or of one sweep; several runs are compared on one page."""
    out: Path | None = None
    """The page; null = report.html in the first directory."""


def _report(words: list[str]) -> int:
    from kleash.report import write_report, write_sweep_report

    asked: ReportArguments = _parsed(
        ReportArguments, words, command="report", description="Rebuild the HTML page from a run's records."
    )
    if not asked.runs:
        raise ConfigError("Expected at least one run's directory, found none; name one: kleash report runs/first.")
    first, *others = asked.runs
    if not others and (first / "sweep.json").is_file():
        print(write_sweep_report(first, asked.out))
    else:
        print(write_report(asked.runs, asked.out or first / "report.html"))
    return 0


@dataclass(frozen=True, kw_only=True)
class DemoArguments:
    """Arguments of `kleash demo`."""

    out: Path = Path("runs/demo")
    """Where the world, the runs, summary.json and report.html go; must not hold another demo."""
    seed: int = 0
    """Every random number follows from it."""


def _demo(words: list[str]) -> int:
    asked: DemoArguments = _parsed(
        DemoArguments,
        words,
        command="demo",
        description="Build a small world, train a policy in it at three leashes, write the table and the page.",
    )
    from kleash.demo.play import play

    play(asked.out, seed=asked.seed)
    return 0


CHECK_HELP = """\
usage: kleash check RUN.yaml [--KEY VALUE ..] [--json FILE]

Try a run out before it starts: load everything, let the policy answer a few prompts, and look whether what training
relies on holds. Each check says PASS, WARN or FAIL, what it found, and what to do. Nothing is trained and nothing is
written into `out`. kleash train does the same first, and stops on a FAIL, unless preflight: false.

  kleash check run.yaml
  kleash check run.yaml --rollout.temperature 0.7 --json check.json

A key overrides the file, as in kleash train (see kleash train --help for the keys).

options:
  --json FILE             write there: version, passed, warnings, failed, checks (name, status, found, remedy)
  --debug                 the traceback of an error

Exit codes: 0 no FAIL; 1 a FAIL; 2 bad usage, or a RUN.yaml that cannot be read.
"""


def _check(words: list[str]) -> int:
    if {"-h", "--help"} & set(words) or not words:
        print(CHECK_HELP, end="")
        return 0 if words else 2
    from accelerate import PartialState

    from kleash.config import as_words, flags_of, read_config
    from kleash.parts import Given
    from kleash.progress import silent_libraries
    from kleash.run import check_run

    path, *rest = words
    if path.startswith("-"):
        raise ConfigError(f"Expected the run's YAML file first, found {path}; see kleash check --help.")
    flags = list(flags_of(rest))
    files = [texts for key, texts in flags if key == "json"]
    if any(len(texts) > 1 for texts in files):
        raise ConfigError(f"Expected one file for --json, found {' '.join(files[0])}; change it.")
    config = read_config(path, as_words([(key, texts) for key, texts in flags if key != "json"]))
    _require_places(Path(texts[0]) for texts in files)
    with silent_libraries():
        checks = check_run(config, Given())
    _part_processes()
    if PartialState().is_main_process:
        _print_checks(checks, Path(files[-1][0]) if files else None)
    return int(any(check.status == "FAIL" for check in checks))


def _print_checks(checks: Any, json_file: Path | None) -> None:
    from rich.console import Console

    from kleash.preflight.table import as_json, table_of

    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDEST)
    with console.capture() as capture:
        console.print(table_of(checks))
    sys.stdout.write("".join(f"{line.rstrip()}\n" for line in capture.get().splitlines()))
    if json_file is not None:
        _write(json_file, json.dumps(as_json(checks), indent=2) + "\n")


def _train(words: list[str]) -> int:
    from kleash.config import RunConfig, read_config

    if {"-h", "--help"} & set(words) or not words:
        _print_train_help(RunConfig)
        return 0 if words else 2
    path, *overrides = [word for word in words if word != "--resume"] or [""]
    if not path or path.startswith("-"):
        raise ConfigError(f"Expected the run's YAML file first, found {path or '--resume'}; see kleash train --help.")
    return _run(read_config(path, overrides), resume="--resume" in words, words=[path, *overrides])


def _print_train_help(keys: type) -> None:
    @dataclass(frozen=True, kw_only=True)
    class TrainArguments:
        """The file, and every key of it as a flag."""

        run_yaml: tyro.conf.Positional[Path]
        """The run's configuration; every flag below overrides one of its keys."""
        config: Annotated[keys, tyro.conf.arg(name="")]  # type: ignore[valid-type]

    description = (
        "Train a policy against a reward on a KL leash.\n\n"
        "--resume goes on from the newest checkpoint in `out`, with the same configuration.\n\n"
        "--debug shows the traceback of an error.\n\n"
        "A key marked (required) may stand in the file or among the flags."
    )
    with suppress(SystemExit):
        _parsed(TrainArguments, ["--help"], command="train", description=description)


def _part_processes() -> None:
    """Leave the group of processes that a launcher started, once the work is done.

    The group's threads end with the last that holds it, such as a wrapped model; those that are left when Python ends
    may abort it.
    """
    import torch

    if torch.distributed.is_initialized():
        gc.collect()
        torch.distributed.destroy_process_group()


def _run(config: Any, *, resume: bool, words: list[str]) -> int:
    from accelerate import PartialState

    from kleash.parts import Given
    from kleash.training import train_run

    result = train_run(config, Given(), resume=resume)
    _part_processes()
    if PartialState().is_main_process:
        print(f"policy  {result.checkpoint / 'policy'}")
        print(f"report  {result.out / 'report.html'}")
    if not result.interrupted:
        return 0
    done = f"{result.completed_updates} of {config.updates} updates"
    again = shlex.join(["kleash", "train", *words, "--resume"])
    if PartialState().is_main_process:
        print(f"kleash: Interrupted after {done}; go on with: {again}", file=sys.stderr)
    return 130


def _measure_arguments(words: list[str], keys: type) -> Any:
    @dataclass(frozen=True, kw_only=True)
    class MeasureArguments:
        """Arguments of `kleash measure`."""

        policy: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="POLICY")]
        """The model in question: a checkpoint or an adapter, by its directory or hub name."""
        reference: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="REFERENCE")]
        """What its drift is measured to, mostly the model that it started from; the same forms."""
        prompts: str | None = None
        """What the policy answers: a jsonl, json, parquet or csv file, or a data set's name, with a column `prompt`."""
        responses: str | None = None
        """In place of prompts: such a file with columns `prompt` and `response` (or `completion`), to be scored."""
        out: Path | None = None
        """The HTML page to write: estimates, drift by position, class, token and prompt, and the drift map."""
        json: Path | None = None
        """The JSON file to write, with all figures."""
        config: Annotated[keys, tyro.conf.arg(name="")] = field(default_factory=keys)  # type: ignore[valid-type]
        pad_token: str | None = None
        """Token to pad with, for a tokenizer that has none; padding is masked, so EOS will do."""

    description = (
        "How far a policy has drifted from its reference: exact KL(policy || reference) over the whole vocabulary with "
        "a 95 % interval, in nats; and where it lies.\n\n"
        "kleash measure runs/first/checkpoints/000100/policy path-or-name --prompts prompts.jsonl --out drift.html\n\n"
        "Exit codes: 0 done; 1 `until` was not reached; 2 bad usage or input."
    )
    settings = (tyro.conf.AvoidSubcommands,)
    with _one_sentence_for_bad_values():
        return tyro.cli(MeasureArguments, args=words, prog="kleash measure", description=description, config=settings)


@contextmanager
def _one_sentence_for_bad_values() -> Iterator[None]:
    """A value that a configuration refuses becomes a ConfigError."""
    from pydantic import ValidationError

    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        key = "--" + ".".join(str(part) for part in first["loc"]).replace("_", "-")
        expected = first["msg"].removeprefix("Input should be ")
        raise ConfigError(f"Expected for {key}: {expected}, found {first['input']!r}; change it.") from error


def _measure(words: list[str]) -> int:
    from kleash.measurement import MeasureConfig, measure, require_one_process

    require_one_process()
    asked = _measure_arguments(words, MeasureConfig)
    from rich.console import Console

    from kleash.measure_page import round_count, write_measure_page
    from kleash.precision import precision_from
    from kleash.readout import readout

    _require_files_of_their_own(asked)
    _require_places(filter(None, (asked.out, asked.json)))
    warnings.simplefilter("ignore", DoubtWarning)  # the readout has the sentence, below its table
    measured = measure(
        asked.policy,
        asked.reference,
        prompts=asked.prompts,
        responses=asked.responses,
        config=asked.config,
        pad_token=asked.pad_token,
        mapped=0 if asked.out is None else RESPONSES_ON_THE_PAGE,
        quiet=False,
    )
    if asked.out is not None:
        write_measure_page(measured.figures, measured.token_maps, asked.out)
    if asked.json is not None:
        _write(asked.json, json.dumps(measured.figures, ensure_ascii=False, indent=1) + "\n")
    Console(highlight=False).print(readout(measured))
    for name, file in (("figures", asked.json), ("page", asked.out)):
        if file is not None:
            print(f"\n{name:<7}  {file}")
    if not measured.narrow_enough:
        needed = precision_from(asked.config.until).responses_needed(measured.kl_policy_ref_per_sequence)
        print(
            f"kleash: Expected an interval of {asked.config.until}, found a wider one after "
            f"{measured.figures['responses_count']:,} responses; raise --at-most to about {round_count(needed)}, "
            "or ask for less.",
            file=sys.stderr,
        )
    return 0 if measured.narrow_enough else 1


def _require_files_of_their_own(asked: Any) -> None:
    """Raise ConfigError where a file to write is one that is read, or both are one file."""
    places = {name: Path(file).resolve() for name in ("prompts", "responses") if (file := getattr(asked, name))}
    for name in ("out", "json"):
        file = getattr(asked, name)
        if file is None:
            continue
        taken = next((other for other, place in places.items() if place == file.resolve()), None)
        if taken is not None:
            raise ConfigError(
                f"Expected another file for --{name} than for --{taken}, found {file} for both; choose another place."
            )
        places[name] = file.resolve()


RESPONSES_ON_THE_PAGE = 500
WIDEST = 1000  # of a table's line; a terminal wraps it, a file keeps it whole
SWEEP_HELP = """\
usage: kleash sweep RUN.yaml --KEY VALUE VALUE .. [--KEY VALUE ..] [options]

Train once per value of a key, one run after the other, and show what drift bought: score and held-out score against
sqrt(KL), the over-optimisation curve fitted to the held-out scores, best of n from the reference beside it.

  kleash sweep run.yaml --leash.beta 0 0.02 0.1 1
  kleash sweep run.yaml --leash.target_kl_per_sequence 2 6 12
  kleash sweep run.yaml --leash.beta 0 0.1 --seed 0 1      four runs, the product

A key with several values is swept; with one value it overrides the file, as in kleash train (see kleash train --help
for the keys). Every run is a directory of its own in `out`, for example out/leash.beta=0.02; beside them lie
report.html and sweep.json.

options:
  --resume                go on: finished runs are skipped, an interrupted one continues from its last checkpoint
  --best-of N             largest n of the baseline, and responses drawn per prompt; 0 = no baseline (default: 16)
  --best-of-prompts N     prompts of the baseline (default: 64)
  --json FILE             write sweep.json there too: runs (one entry each), curve, best_of_n
  --debug                 the traceback of an error

Exit codes: 0 done; 1 a run stopped itself, the others are done; 2 bad usage or input; 130 interrupted.
"""


@dataclass(frozen=True, kw_only=True)
class SweepArguments:
    """Arguments of `kleash sweep`."""

    path: str
    settings: list[str]
    resume: bool
    best_of: int
    best_of_prompts: int
    json: Path | None


def _sweep_arguments(words: list[str]) -> SweepArguments:
    from kleash.config import as_words, flags_of

    path, *rest = [word for word in words if word != "--resume"] or [""]
    if not path or path.startswith("-"):
        raise ConfigError(f"Expected the run's YAML file first, found {path or '--resume'}; see kleash sweep --help.")
    flags = list(flags_of(rest))
    own = {key: texts for key, texts in flags if key in ("best_of", "best_of_prompts", "json")}
    for key, texts in own.items():
        if len(texts) > 1 or (key != "json" and not texts[0].isdecimal()):
            expected = "one file" if key == "json" else "one whole number"
            raise ConfigError(f"Expected {expected} for --{key.replace('_', '-')}, found {' '.join(texts)}; change it.")
    return SweepArguments(
        path=path,
        settings=as_words([(key, texts) for key, texts in flags if key not in own]),
        resume="--resume" in words,
        best_of=int(own.get("best_of", ["16"])[0]),
        best_of_prompts=int(own.get("best_of_prompts", ["64"])[0]),
        json=Path(own["json"][0]) if "json" in own else None,
    )


def _sweep(words: list[str]) -> int:
    if {"-h", "--help"} & set(words) or not words:
        print(SWEEP_HELP, end="")
        return 0 if words else 2
    asked = _sweep_arguments(words)
    _require_places(filter(None, (asked.json,)))
    from kleash.sweep import settings_of, sweep

    result = sweep(
        settings_of(asked.path, asked.settings),
        resume=asked.resume,
        best_of=asked.best_of,
        prompts=asked.best_of_prompts,
        say=lambda sentence: _say(f"kleash: {sentence}"),
    )
    _part_processes()
    waiting, stopped = result.names("interrupted", "waiting"), result.names("stopped")
    if waiting:
        again = shlex.join(["kleash", "sweep", *(word for word in words if word != "--resume"), "--resume"])
        _say(f"kleash: Interrupted; {_listed(waiting)} left to finish; go on with: {again}")
        return 130
    if result.json is not None:
        _print_sweep(result, asked.json)
    if stopped:
        _say(f"kleash: Expected every run to finish, found that {_listed(stopped)} stopped by itself; see above why.")
    return 1 if stopped else 0


def _listed(names: Sequence[str]) -> str:
    """
    >>> _listed(["a"]), _listed(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _require_places(files: Iterable[Path]) -> None:
    """Raise RunDirectoryError, before anything is worked out, unless all of these files can be written."""
    from kleash.run_directory import require_place_for

    for file in files:
        require_place_for(file)


def _write(file: Path, text: str) -> None:
    """A file where the caller wants it; directories above it are made."""
    from kleash.run_directory import write_atomically

    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, text)


def _say(sentence: str) -> None:
    """A sentence on stderr, by the main process alone."""
    from kleash.sweep import is_main_process

    if is_main_process():
        print(sentence, file=sys.stderr)


def _print_sweep(result: Any, json_file: Path | None) -> None:
    """The table and the places of what was written; the same JSON also where the caller wants it."""
    from rich.console import Console

    from kleash.sweep import table_of

    Console(highlight=False, width=WIDEST).print(table_of(result))
    if json_file is not None:
        _write(json_file, result.json.read_text(encoding="utf-8"))
    print(f"\nsweep   {json_file or result.json}" + (f"\nreport  {result.report}" if result.report else ""))


if __name__ == "__main__":
    sys.exit(main())
