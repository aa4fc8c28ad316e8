"""The command line: what it takes, what it says, its exit codes, and that bad input leaves everything as it was."""

import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from pydantic import BaseModel
from tiny import (
    WORDS,
    save_tiny_world,
    tiny_policy,
    tiny_reward_model,
    tiny_run,
    tiny_tokenizer,
    tree,
    write_run,
)

from kleash.checkpoint import checkpoints_in
from kleash.cli import main
from kleash.config import RunConfig
from kleash.version import VERSION


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str


@pytest.fixture
def kleash(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    def run(*words: object) -> Ended:
        capsys.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return Ended(code=code, out=out, err=err)

    return run


Command = Callable[..., Ended]
World = dict[str, str]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return save_tiny_world(tmp_path_factory.mktemp("world"))


SMALL = {
    "rollout": {"prompts_per_update": 4, "max_new_tokens": 4},
    "ppo": {"epochs": 1, "minibatches": 2, "learning_rate": 1e-3},
    "updates": 2,
}


@pytest.fixture(scope="module")
def finished(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two updates, its run.yaml beside it."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert main(["train", str(write_run(world, out, **SMALL))]) == 0
    return out


# what it says


def test_without_a_command_it_says_what_there_is(kleash: Command) -> None:
    ended = kleash()
    assert ended.code == 2
    assert ended.out == kleash("--help").out
    for command in ("kleash demo", "kleash check", "kleash train", "kleash sweep", "kleash report"):
        assert command in ended.out


@pytest.mark.parametrize("word", ["-h", "--help", "help"])
def test_help_is_no_mistake(kleash: Command, word: str) -> None:
    ended = kleash(word)
    assert (ended.code, ended.err) == (0, "")
    assert "Exit codes: 0 done; 1 the run stopped itself or a check failed; 2 bad usage or input" in ended.out
    assert max(map(len, ended.out.splitlines())) <= 120


def test_the_version_is_the_packages(kleash: Command) -> None:
    ended = kleash("--version")
    assert (ended.code, ended.out, ended.err) == (0, VERSION + "\n", "")


def test_an_unknown_command_is_answered_with_the_known_ones(kleash: Command) -> None:
    ended = kleash("trian", "x")
    assert (ended.code, ended.out) == (2, "")
    known = "demo, check, train, measure, sweep, report"
    assert ended.err == f"kleash: Expected a command ({known}), found 'trian'; see kleash --help.\n"


def test_the_help_of_train_names_every_key(kleash: Command) -> None:
    ended = kleash("train", "--help")
    assert ended.code == 0
    for key in keys_of(RunConfig):
        assert f"--{key.replace('_', '-')} " in ended.out, key
    assert "--resume" in ended.out
    assert "--debug" in ended.out
    assert kleash("train").code == 2
    assert kleash("train").out == ended.out


OTHER_HELP = [
    ("demo", ["--out", "--seed"]),
    ("check", ["RUN.yaml", "--KEY VALUE", "--json FILE"]),
    ("report", ["--out", "Directories"]),
    (
        "measure",
        [
            *(
                "POLICY",
                "REFERENCE",
                "--prompts",
                "--responses",
                "--out",
                "--json",
                "--samples",
                "--until",
                "--at-most",
            ),
            *(
                "--max-new-tokens",
                "--temperature",
                "--written-by-policy",
                "--batch",
                "--dtype",
                "--seed",
                "--pad-token",
            ),
            *("KL(policy || reference)", "Exit codes"),
        ],
    ),
    ("sweep", ["--leash.beta 0 0.02 0.1 1", "--resume", "--best-of N", "--best-of-prompts N", "--json FILE"]),
]


def keys_of(config: type[BaseModel]) -> Iterator[str]:
    """Every dotted key of a configuration, groups within groups opened."""
    for name, field in config.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from (f"{name}.{key}" for key in keys_of(field.annotation))
        else:
            yield name


@pytest.mark.parametrize(("command", "words"), OTHER_HELP)
def test_the_help_of_the_other_commands_names_what_they_take(kleash: Command, command: str, words: list[str]) -> None:
    ended = kleash(command, "--help")
    assert ended.code == 0
    assert all(word in ended.out for word in words)


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"]])
def test_a_reader_who_leaves_early_ends_it_quietly(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        monkeypatch.setattr("sys.stdout", pipe)
        assert main(words) == 1
        pipe.write("what is still flushed at exit")


# what it does


def test_train_says_where_the_policy_and_the_page_are(kleash: Command, world: World, tmp_path: Path) -> None:
    out = tmp_path / "[run]"
    ended = kleash("train", write_run(world, out, **SMALL), "--updates", "1", "--seed=3")
    assert ended.code == 0
    assert ended.out == f"policy  {out}/checkpoints/000001/policy\nreport  {out}/report.html\n"
    assert re.fullmatch(r"\[run\]: update 1, score .*, KL/seq \(nats\) 0\.00 ±0\.00, beta 0\.1000, .*\n", ended.err)
    resolved = (out / "config.yaml").read_text()
    assert "updates: 1\n" in resolved
    assert "seed: 3\n" in resolved


def test_report_rebuilds_the_page_of_a_run(kleash: Command, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    page = (run / "report.html").read_bytes()
    (run / "report.html").unlink()
    ended = kleash("report", run)
    assert (ended.code, ended.out, ended.err) == (0, f"{run}/report.html\n", "")
    assert (run / "report.html").read_bytes() == page


def test_report_puts_several_runs_on_one_page(kleash: Command, finished: Path, tmp_path: Path) -> None:
    second = tmp_path / "second"
    shutil.copytree(finished, second)
    ended = kleash("report", finished, second, "--out", tmp_path / "both.html")
    assert ended.code == 0
    text = (tmp_path / "both.html").read_text(encoding="utf-8")
    assert "second" in text
    assert finished.name in text


@pytest.mark.parametrize("words", [[], ["nowhere"], ["nowhere", "--out"], ["--bogus"]])
def test_report_without_a_run_is_bad_usage(kleash: Command, words: list[str]) -> None:
    ended = kleash("report", *words)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err


def test_a_signal_ends_with_130_and_says_how_to_go_on(kleash: Command, world: World, tmp_path: Path) -> None:
    path = write_run(world, tmp_path / "run", **SMALL, reward="test_cli:interrupting")
    ended = kleash("train", path, "--leash.beta", "0.2", "--updates=3")
    assert ended.code == 130
    *_, last = ended.err.splitlines()
    again = f"kleash train {path} --leash.beta 0.2 --updates=3 --resume"
    assert last == f"kleash: Interrupted after 1 of 3 updates; go on with: {again}"
    assert "Finishing this update, then saving a checkpoint; once more stops at once." in ended.err
    assert kleash(*again.split()[1:]).code == 130
    assert kleash(*again.split()[1:]).code == 0  # interrupted in the last update, which is finished all the same
    assert lines(tmp_path / "run") == 3


def interrupting(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """Asks to stop once training has begun, which the handler for signals shows."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        signal.raise_signal(signal.SIGINT)
    return [len(completion) / 8 for completion in completions]


def test_an_interrupt_at_once_ends_with_130_too(kleash: Command, world: World, tmp_path: Path) -> None:
    path = write_run(world, tmp_path / "run", **SMALL, reward="test_cli:interrupting_at_once")
    ended = kleash("train", path)
    assert ended.code == 130
    assert ended.err == "kleash: Interrupted; go on from the last checkpoint, if there is one, with --resume.\n"
    assert tree(tmp_path).keys() == {"run.yaml"}


@pytest.mark.parametrize(
    ("words", "inner", "said"),
    [
        (["measure", "p", "r", "--prompts", "x"], "kleash.measurement.measure", "nothing was written"),
        (["check", "RUN"], "kleash.run.check_run", "nothing was written"),
        (["report", "somewhere"], "kleash.report.write_report", "the page is as it was"),
        (["demo"], "kleash.demo.play.play", "start again with another --out, or delete what it left"),
        (
            ["sweep", "RUN", "--seed", "0", "1"],
            "kleash.sweep.sweep",
            "go on from the last checkpoint, if there is one, with --resume",
        ),
    ],
)
def test_an_interrupt_says_what_is_left_of_each_command(
    kleash: Command,
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    inner: str,
    said: str,
) -> None:
    monkeypatch.setattr(inner, interrupting_at_once)
    run = str(write_run(world, tmp_path / "run", **SMALL))
    ended = kleash(*[run if word == "RUN" else word for word in words])
    assert (ended.code, ended.out) == (130, "")
    assert ended.err == f"kleash: Interrupted; {said}.\n"


def interrupting_at_once(*given: object, **named: object) -> list[float]:
    raise KeyboardInterrupt


def test_a_run_that_stops_itself_ends_with_1_and_one_sentence(kleash: Command, world: World, tmp_path: Path) -> None:
    path = write_run(world, tmp_path / "run", **SMALL, reward="test_cli:enormous", preflight=False)
    ended = kleash("train", path)
    assert ended.code == 1
    assert re.fullmatch(r"kleash: Expected a finite .*\n", ended.err)


def enormous(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    return [1e30] * len(prompts)


def lines(out: Path) -> int:
    return len((out / "records.jsonl").read_text().splitlines())


# a sweep; what it runs and writes is in test_sweep.py


@pytest.fixture(scope="module")
def swept(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sweep of two short runs without a baseline, its run.yaml beside it."""
    out = tmp_path_factory.mktemp("swept") / "out"
    words = [str(write_run(world, out, **SMALL)), "--updates", "1", "--leash.beta", "0", "0.5", "--best-of=0"]
    assert main(["sweep", *words]) == 0
    return out


def test_sweep_prints_a_table_and_where_things_are(kleash: Command, swept: Path, tmp_path: Path) -> None:
    words = [swept.with_suffix(".yaml"), "--updates", 1, "--leash.beta", 0, 0.5, "--best-of", 0, "--resume"]
    ended = kleash("sweep", *words, "--json", tmp_path / "new" / "a.json")
    assert ended.code == 0
    head, first, second, empty, *places = ended.out.splitlines()
    assert re.split(r"\s{2,}", head.strip()) == ["run", "score", "held-out", "KL/seq (nats)", "beta at the end"]
    assert re.fullmatch(r"leash\.beta=0   +[+-]\S+ -> [+-]\S+ +- +0\S* +0 *", first)
    assert second.startswith("leash.beta=0.5")
    assert empty == ""
    assert places == [f"sweep   {tmp_path}/new/a.json", f"report  {swept}/report.html"]
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == json.loads((swept / "sweep.json").read_text())


def test_report_of_a_sweep_is_the_page_of_the_sweep(kleash: Command, swept: Path, tmp_path: Path) -> None:
    ended = kleash("report", swept, "--out", tmp_path / "page.html")
    assert (ended.code, ended.out) == (0, f"{tmp_path}/page.html\n")
    assert (tmp_path / "page.html").read_bytes() == (swept / "report.html").read_bytes()


def test_a_place_that_takes_no_json_is_found_before_anything_is_worked_out(
    kleash: Command, world: World, tmp_path: Path
) -> None:
    path = write_run(world, tmp_path / "out", **SMALL)
    for command in ("check", "sweep"):
        before = tree(tmp_path)
        ended = kleash(command, path, "--json", path / "new.json")
        assert (ended.code, ended.out) == (2, "")
        said = f"kleash: Expected to write to {path}/new.json, found that {path} takes none; choose another place.\n"
        assert ended.err == said
        assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--leash.beta", "0", "1"],
            "Expected the run's YAML file first, found --leash.beta; see kleash sweep --help.",
        ),
        (["--resume"], "Expected the run's YAML file first, found --resume; see kleash sweep --help."),
        (["run.yaml", "--best-of", "-1"], "Expected one whole number for --best-of, found -1; change it."),
        (["run.yaml", "--best-of-prompts", "1", "2"], "Expected one whole number for --best-of-prompts, found 1 2;"),
        (["run.yaml", "--json", "a", "b"], "Expected one file for --json, found a b; change it."),
        (["nowhere.yaml", "--seed", "0", "1"], "Expected a YAML file at nowhere.yaml, found none that can be read;"),
        (["run.yaml", "--seed"], "Expected `--key value`, found '--seed' alone;"),
    ],
)
def test_wrong_words_to_sweep_are_one_sentence(kleash: Command, words: list[str], said: str) -> None:
    ended = kleash("sweep", *words)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith(f"kleash: {said}")
    assert kleash("sweep").code == 2


# bad input


def no_pad_token(world: World, directory: Path) -> dict[str, object]:
    return {"policy": policy_with(tiny_tokenizer(pad_token=None), directory / "policy")}


def policy_with(tokenizer: object, path: Path, **config: object) -> str:
    tiny_policy(**config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def prompts_of(directory: Path, name: str, content: str) -> dict[str, object]:
    (directory / name).write_text(content)
    return {"prompts": str(directory / name)}


def another_vocabulary(world: World, directory: Path) -> dict[str, object]:
    return {"reference": policy_with(tiny_tokenizer(), directory / "reference", vocab=8)}


def another_tokenizer(world: World, directory: Path) -> dict[str, object]:
    words = [*WORDS[:6], "dog", "cat", *WORDS[8:]]
    return {"reference": policy_with(tiny_tokenizer(words=words), directory / "reference")}


def two_labels(world: World, directory: Path) -> dict[str, object]:
    tiny_reward_model(labels=2).save_pretrained(directory / "reward")
    tiny_tokenizer().save_pretrained(directory / "reward")
    return {"reward": str(directory / "reward")}


def raising(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    raise LookupError("no such grade\nand a second line")


def one_too_few(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    return [0.0] * (len(prompts) - 1)


def not_finite(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    return [0.0] * (len(prompts) - 1) + [float("nan")]


NOT_A_FUNCTION = 5

BAD_INPUT: dict[str, tuple[Callable[[World, Path], dict[str, object]], list[str], str]] = {
    "missing prompts": (lambda w, d: {"prompts": str(d / "nowhere.jsonl")}, [], "nowhere.jsonl, found no such file"),
    "empty prompts": (lambda w, d: prompts_of(d, "p.jsonl", ""), [], "found an empty file; give at least one row"),
    "prompts without rows": (lambda w, d: prompts_of(d, "p.csv", "prompt\n"), [], "Expected at least one prompt in"),
    "no prompt column": (lambda w, d: prompts_of(d, "p.jsonl", '{"text": "a"}\n'), [], "column `prompt` .* found text"),
    "a prompt that is no text": (lambda w, d: prompts_of(d, "p.jsonl", '{"prompt": 3}\n'), [], "row 1 .* found 3"),
    "prompts that are no rows": (lambda w, d: prompts_of(d, "p.jsonl", "{]"), [], "found an unreadable file"),
    "prompts too long": (
        lambda w, d: {"rollout": {"prompts_per_update": 8, "max_new_tokens": 61}},
        [],
        r"at most 3 tokens \(context 64 less max_new_tokens 61\), found 4 longer ones, the longest in row 8 with 4",
    ),
    "unknown key": (lambda w, d: {"polcy": 1}, [], "Expected a known key in .*, found polcy"),
    "unknown nested key": (lambda w, d: {"leash": {"betta": 1}}, [], "found leash.betta; the keys there are beta"),
    "negative beta": (lambda w, d: {"leash": {"beta": -0.1}}, [], "leash.beta .* greater than or equal to 0"),
    "negative beta by flag": (lambda w, d: {}, ["--leash.beta", "-0.1"], "leash.beta .* greater than or equal to 0"),
    "NaN beta": (lambda w, d: {"leash": {"beta": float("nan")}}, [], "leash.beta .* a finite number, found nan"),
    "NaN beta by flag": (lambda w, d: {}, ["--leash.beta=.nan"], "leash.beta .* a finite number, found nan"),
    "a flag without a value": (lambda w, d: {}, ["--seed"], "Expected `--key value`, found '--seed' alone"),
    "missing policy": (
        lambda w, d: {"policy": str(d / "nowhere")},
        [],
        "nowhere, found no such directory; check the path",
    ),
    "another vocabulary": (another_vocabulary, [], "for each of the 12 tokens, found 12 in the policy and 8 at"),
    "another tokenizer": (another_tokenizer, [], "token 6 is 'dog' there and 'cat' in the policy"),
    "no pad token": (no_pad_token, [], "with a pad token, found none; name one in the config, .* pad_token: '<eos>'"),
    "a pad token that is none": (no_pad_token, ["--pad-token", "[PAD]"], r"pad_token in .*, found '\[PAD\]'"),
    "missing reward": (
        lambda w, d: {"reward": str(d / "nowhere")},
        [],
        "Expected a reward model .* at .*nowhere, found no such directory",
    ),
    "two labels": (two_labels, [], "Expected a reward model with one label at .*, found 2"),
    "missing module": (lambda w, d: {"reward": "nowhere:score"}, [], "No module named 'nowhere'"),
    "missing function": (lambda w, d: {"reward": "test_cli:nothing"}, [], "has no attribute 'nothing'"),
    "no function": (lambda w, d: {"reward": "test_cli:NOT_A_FUNCTION"}, [], "Expected a function at .*, found int"),
    "raising reward": (
        lambda w, d: {"reward": "test_cli:raising"},
        [],
        "found LookupError: no such grade, for a batch that begins with the prompt",
    ),
    "raising judge": (lambda w, d: {"eval_reward": "test_cli:raising"}, [], "found LookupError: no such grade"),
    "wrong count": (lambda w, d: {"reward": "test_cli:one_too_few"}, [], "Expected 8 scores from .*, found 7"),
    "NaN reward": (lambda w, d: {"reward": "test_cli:not_finite"}, [], "found nan for the prompt '"),
    "uneven minibatches": (lambda w, d: {"rollout": {"prompts_per_update": 7}}, [], "7 must be a multiple of ppo.mini"),
    "unknown tracker": (lambda w, d: {"trackers": ["bogus"]}, [], "Expected trackers among .*tensorboard.*found bogus"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_sentence_and_touches_nothing(
    kleash: Command, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("kleash.ppo._gradients_of_step", lambda *a, **k: pytest.fail("a model was trained"))
    prepare, flags, said = BAD_INPUT[name]
    changes = prepare(world, tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(tiny_run(world, tmp_path / "run", **changes)).replace("NaN", ".nan"))
    places = tmp_path, Path(world["policy"]).parent
    before = [tree(place) for place in places]
    ended = kleash("train", path, *flags)
    assert (ended.code, ended.out) == (2, "")
    assert re.fullmatch(r"kleash: Expected [^\n]*\n", ended.err), ended.err
    assert re.search(said, ended.err), ended.err
    assert [tree(place) for place in places] == before


def test_a_file_in_the_way_is_named(kleash: Command, world: World, tmp_path: Path) -> None:
    ended = kleash("train", write_run(world, tmp_path / "run", **SMALL), "--out", world["prompts"])
    assert ended.code == 2
    assert f"found the file {world['prompts']}; choose another out." in ended.err


def test_a_tracker_that_is_not_installed_is_named(
    kleash: Command, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kleash.run.get_available_trackers", list)
    ended = kleash("train", write_run(world, tmp_path / "run", **SMALL), "--trackers", "wandb")
    assert ended.code == 2
    assert ended.err == "kleash: Expected the tracker wandb to be installed, found it is not; install it with pip.\n"


def test_a_tracker_that_is_installed_gets_the_figures(kleash: Command, world: World, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    path = write_run(world, tmp_path / "run", **SMALL)
    assert kleash("train", path, "--trackers", "tensorboard", "--updates", "1").code == 0
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))


@pytest.mark.parametrize("words", [["--resume"], ["--leash.beta", "0.1", "run.yaml"], ["--resume", "--seed", "1"]])
def test_flags_before_the_file_are_put_right(kleash: Command, words: list[str]) -> None:
    ended = kleash("train", *words)
    assert ended.code == 2
    assert re.fullmatch(
        r"kleash: Expected the run's YAML file first, found --\S+; see kleash train --help\.\n", ended.err
    )


def test_resume_may_stand_before_the_file(kleash: Command, world: World, tmp_path: Path) -> None:
    path = write_run(world, tmp_path / "run", **SMALL)
    assert kleash("train", "--resume", path, "--updates", "1").code == 0
    assert lines(tmp_path / "run") == 1


def test_debug_adds_the_traceback_and_keeps_the_exit_code(kleash: Command, tmp_path: Path) -> None:
    plain, debug = kleash("train", tmp_path / "x.yaml"), kleash("train", tmp_path / "x.yaml", "--debug")
    assert (plain.code, debug.code) == (2, 2)
    assert "Traceback" not in plain.err
    assert debug.err.startswith("Traceback (most recent call last):")
    assert debug.err.endswith(plain.err)


@pytest.mark.filterwarnings("default::kleash.errors.KleashWarning")
def test_a_tokenizer_without_pad_token_trains_with_the_remedy_it_was_told(
    kleash: Command, world: World, tmp_path: Path
) -> None:
    path = write_run(world, tmp_path / "run", **SMALL, **no_pad_token(world, tmp_path))
    assert kleash("train", path).code == 2
    ended = kleash("train", path, "--pad-token", "<eos>", "--updates", "1")
    assert ended.code == 0
    assert "kleash: Before the first update, pad and EOS: pad '<eos>' (1), EOS '<eos>' (1): one token" in ended.err
    assert lines(tmp_path / "run") == 1


@pytest.mark.filterwarnings("default::kleash.errors.KleashWarning")
def test_a_pad_token_equal_to_eos_is_handled(kleash: Command, world: World, tmp_path: Path) -> None:
    policy = policy_with(tiny_tokenizer(pad_token="<eos>"), tmp_path / "policy")
    path = write_run(world, tmp_path / "run", **SMALL, policy=policy)
    ended = kleash("train", path, "--updates", "1")
    assert ended.code == 0
    assert "one token for both; kleash masks the padding" in ended.err


# bad input to a run that is there


@pytest.fixture
def taken(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, with a run.yaml that names it."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    content = json.loads(finished.with_suffix(".yaml").read_text())
    out.with_suffix(".yaml").write_text(json.dumps({**content, "out": str(out)}))
    return out


def refused(kleash: Command, out: Path, *flags: str) -> str:
    before = tree(out)
    ended = kleash("train", out.with_suffix(".yaml"), *flags)
    assert (ended.code, ended.out) == (2, "")
    assert re.fullmatch(r"kleash: Expected [^\n]*\n", ended.err), ended.err
    assert tree(out) == before
    return ended.err


def test_a_directory_with_a_run_is_not_written_to(kleash: Command, taken: Path) -> None:
    said = refused(kleash, taken)
    assert "found another run in" in said
    assert "--resume" in said


def test_every_file_of_a_checkpoint_cut_short_is_found_before_anything_is_written(kleash: Command, taken: Path) -> None:
    newest = checkpoints_in(taken / "checkpoints")[-1]
    for file in sorted(path for path in newest.rglob("*") if path.is_file()):
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        said = refused(kleash, taken, "--resume", "--updates", "3")
        assert ("cut short" in said and str(file) in said) or "found no manifest in" in said
        assert f"remove {newest} to resume from the one before it" in said
        file.write_bytes(whole)
    shutil.rmtree(newest)
    assert kleash("train", taken.with_suffix(".yaml"), "--resume").code == 0
    assert lines(taken) == 2


@pytest.mark.parametrize(
    ("flags", "key"),
    [
        (["--leash.beta", "0.2"], "leash"),
        (["--seed", "1"], "seed"),
        (["--ppo.learning-rate", "1e-5", "--rollout.temperature", "0.5"], "ppo, rollout"),
        (["--updates", "3", "--ppo.learning-rate-schedule", "linear"], "ppo, updates"),
    ],
)
def test_a_changed_key_is_no_resumption(kleash: Command, taken: Path, flags: list[str], key: str) -> None:
    said = refused(kleash, taken, "--resume", *flags)
    assert f"found another {key}; resume with the same values, or start a new run." in said


def test_more_updates_are_a_resumption(kleash: Command, taken: Path) -> None:
    assert kleash("train", taken.with_suffix(".yaml"), "--resume", "--updates", "3").code == 0
    assert lines(taken) == 3


def test_another_reference_is_refused_with_both_fingerprints(
    kleash: Command, taken: Path, world: World, tmp_path: Path
) -> None:
    """The policy's own directory is written over, as if the trained policy had been saved where it came from."""
    policy = tmp_path / "policy"
    shutil.copytree(world["policy"], policy)
    path = write_run(world, tmp_path / "second", **SMALL, policy=str(policy))
    assert kleash("train", path).code == 0
    shutil.copytree(tmp_path / "second" / "checkpoints" / "000002" / "policy", policy, dirs_exist_ok=True)
    said = refused(kleash, tmp_path / "second", "--resume", "--updates", "3")
    found = re.search(r"the reference that the run started with \(SHA-256 (\w{64})\), found another \((\w{64})\)", said)
    assert found
    assert found[1] != found[2]


def test_other_prompts_are_refused_with_both_fingerprints(kleash: Command, world: World, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    shutil.copy(world["prompts"], prompts)
    assert kleash("train", write_run(world, tmp_path / "run", **SMALL, prompts=str(prompts))).code == 0
    prompts.write_text("".join(reversed(prompts.read_text().splitlines(keepends=True))))
    said = refused(kleash, tmp_path / "run", "--resume", "--updates", "3")
    assert re.search(r"the prompts that the run started with \(SHA-256 \w{64}\), found another \(\w{64}\)", said)


def test_a_run_without_its_configuration_cannot_be_resumed(kleash: Command, taken: Path) -> None:
    (taken / "config.yaml").unlink()
    assert "config.yaml of the run to resume, found none; start a new run" in refused(kleash, taken, "--resume")


# a reward that fails on the way

ON_THE_WAY: dict[str, object] = {}


def fails_at_the_third_update(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    ON_THE_WAY["calls"] = calls = int(ON_THE_WAY["calls"]) + 1
    if calls == 9 and ON_THE_WAY["how"] == "raises":  # after six calls of the checks and two updates
        raise LookupError("no such grade")
    scores = [len(completion) / 8 for completion in completions]
    if calls == 9 and ON_THE_WAY["how"] == "is not finite":
        scores[2], ON_THE_WAY["prompt"] = float("nan"), prompts[2]
    return scores


@pytest.mark.parametrize("how", ["raises", "is not finite"])
def test_a_reward_that_fails_at_update_3_keeps_two_updates_and_goes_on_once_mended(
    kleash: Command, world: World, tmp_path: Path, how: str
) -> None:
    changes = {**SMALL, "updates": 4, "reward": "test_cli:fails_at_the_third_update"}
    path, out = write_run(world, tmp_path / "run", **changes), tmp_path / "run"
    ON_THE_WAY.update(calls=0, how=how)
    ended = kleash("train", path)
    sentence = ended.err.splitlines()[-1]
    assert ended.code == 2
    assert sentence.startswith("kleash: Expected ")
    assert "LookupError: no such grade" in sentence or f"found nan for the prompt {ON_THE_WAY['prompt']!r}" in sentence
    assert lines(out) == 2
    assert checkpoints_in(out / "checkpoints")[-1].name == "000002"
    ON_THE_WAY.update(calls=0, how="is mended")
    assert kleash("train", path, "--resume").code == 0
    ON_THE_WAY.update(calls=0)
    assert kleash("train", path, "--out", tmp_path / "straight").code == 0
    assert (out / "records.jsonl").read_bytes() == (tmp_path / "straight" / "records.jsonl").read_bytes()


# measure


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model beside the world's policy."""
    directory = tmp_path_factory.mktemp("reference")
    tiny_policy(7).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def test_measure_prints_the_drift_and_writes_every_figure(
    kleash: Command, world: World, reference: Path, tmp_path: Path
) -> None:
    file = tmp_path / "new" / "figures.json"
    words = ["measure", world["policy"], reference, "--prompts", world["prompts"]]
    ended = kleash(*words, "--samples", 16, "--max-new-tokens", 4, "--seed", 3, "--json", file)
    assert ended.code == 0
    assert ended.out.startswith("KL(policy || reference), nats")
    assert ended.out.endswith(f"\nfigures  {file}\n")
    assert "measuring: 16 of 16 responses, KL " in ended.err
    figures = json.loads(file.read_text())
    assert (figures["policy"], figures["reference"]) == (world["policy"], str(reference))
    assert (figures["prompts"], figures["seed"], figures["max_new_tokens"]) == (world["prompts"], 3, 4)
    kl = figures["kl_policy_ref_per_sequence"]
    assert kl["n"] == 16
    assert 0 < kl["low"] < kl["mean"] < kl["high"]
    for name in ("kl_policy_ref_per_sequence_k1", "kl_policy_ref_per_token", "by_position", "top_tokens", "version"):
        assert name in figures


def test_measure_of_a_model_against_itself_is_0(kleash: Command, world: World) -> None:
    ended = kleash("measure", world["policy"], world["policy"], "--prompts", world["prompts"], "--samples", 8)
    assert ended.code == 0
    assert re.search(r"exact, per response +0 +0 to 0 +8", ended.out)


@pytest.mark.parametrize("until", ["0.000001", "+-0.000001", "0.0001%"])
def test_measure_that_does_not_get_so_narrow_ends_with_1_and_says_what_it_found(
    kleash: Command, world: World, reference: Path, tmp_path: Path, until: str
) -> None:
    words = ["measure", world["policy"], reference, "--prompts", world["prompts"], "--max-new-tokens", 3]
    ended = kleash(*words, "--until", until, "--at-most", 30, "--json", tmp_path / "figures.json")
    assert ended.code == 1
    assert ended.out.startswith("KL(policy || reference), nats")
    figures = json.loads((tmp_path / "figures.json").read_text())
    kl = figures["kl_policy_ref_per_sequence"]
    share = until.endswith("%")
    allowed = kl["mean"] * float(until[:-1]) / 100 if share else float(until.removeprefix("+-"))
    needed = 24 * ((kl["high"] - kl["low"]) / 2 / allowed) ** 2
    said = re.fullmatch(
        rf".*kleash: Expected an interval of {re.escape(until)}, found a wider one after 24 responses; "
        r"raise --at-most to about ([\d,]+), or ask for less.\n",
        ended.err,
        flags=re.DOTALL,
    )
    assert said, ended.err
    assert float(said[1].replace(",", "")) == pytest.approx(needed, rel=0.06)
    assert figures["until_reached"] is False


def test_measure_that_gets_so_narrow_ends_with_0(kleash: Command, world: World, reference: Path) -> None:
    words = ["measure", world["policy"], reference, "--prompts", world["prompts"], "--max-new-tokens", 3]
    assert kleash(*words, "--until", "100").code == 0


def test_measure_scores_given_responses(kleash: Command, world: World, reference: Path, tmp_path: Path) -> None:
    file = tmp_path / "given.jsonl"
    file.write_text(json.dumps({"prompt": "a cat", "response": "it runs"}) + "\n")
    ended = kleash("measure", world["policy"], reference, "--responses", file)
    assert ended.code == 0
    assert "no figure here estimates" in " ".join(ended.out.split())
    own = kleash("measure", world["policy"], reference, "--responses", file, "--written-by-policy")
    assert own.code == 0
    assert "k1, per response" in own.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--prompts", "PROMPTS", "--samples", "0"], "Expected for --samples: greater than or equal to 1, found 0"),
        (["--prompts", "PROMPTS", "--temperature", "0"], "Expected for --temperature: greater than or equal to 0.001"),
        (["--prompts", "PROMPTS", "--until", "narrow"], "Expected a half-width such as \u00b10.05"),
        (["--prompts", "PROMPTS", "--at-most", "9"], "Expected at_most with until, found it alone"),
        (["--prompts", "nowhere.jsonl"], "Expected prompts in nowhere.jsonl, found no such file"),
        (["--responses", "PROMPTS"], "Expected a column `response` or `completion` in"),
        (["--responses", "PROMPTS", "--prompts", "PROMPTS"], "Expected prompts to answer or responses to score, found"),
        ([], "found neither; give one of them"),
        (["--prompts", "PROMPTS", "--max-new-tokens", "61"], "found 4 longer ones"),
        (["--prompts", "PROMPTS", "--max-new-tokens", "64"], "below the context of 64 tokens, found 64; lower it: at"),
        (["--prompts", "PROMPTS", "--pad-token", "bird"], "Expected pad_token in the vocabulary"),
    ],
)
def test_measure_of_bad_usage_is_one_sentence_and_ends_with_2(
    kleash: Command, world: World, tmp_path: Path, words: list[str], said: str
) -> None:
    before = tree(tmp_path)
    words = [world["prompts"] if word == "PROMPTS" else word for word in words]
    ended = kleash("measure", world["policy"], world["policy"], *words, "--json", tmp_path / "figures.json")
    assert (ended.code, ended.out) == (2, "")
    assert said in ended.err
    assert ended.err.startswith("kleash: Expected ")
    assert ended.err.count("\n") == 1
    assert tree(tmp_path) == before


def test_measure_of_swapped_arguments_names_the_one_that_is_wrong(kleash: Command, world: World) -> None:
    model, prompts = world["policy"], world["prompts"]
    swapped = {
        (prompts, model, model): f"data set, found the model {model}; give the prompts that the policy shall answer",
        (prompts, model, prompts): f"the policy's tokenizer at {prompts}, found a file; give a model's directory or",
        (model, prompts, prompts): f"at {prompts} for the reference, found a file; give a model's directory or name",
    }
    for (policy, reference, asked), said in swapped.items():
        ended = kleash("measure", policy, reference, "--prompts", asked)
        assert ended.code == 2
        assert said in ended.err
        assert ended.err.count("\n") == 1


def test_measure_names_the_model_that_is_not_there(kleash: Command, world: World, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    for models in ((nowhere, world["policy"]), (world["policy"], nowhere)):
        ended = kleash("measure", *models, "--prompts", world["prompts"])
        assert ended.code == 2
        assert re.match(r"kleash: Expected .* at .*nowhere.*, found no such directory; check the path\.\n$", ended.err)


@pytest.mark.parametrize("words", [[], ["only-a-policy"], ["p", "r", "--prompt", "x"], ["p", "r", "--dtype", "int8"]])
def test_measure_without_its_two_models_or_with_words_it_does_not_know_is_bad_usage(
    kleash: Command, words: list[str]
) -> None:
    ended = kleash("measure", *words)
    assert ended.code == 2
    assert ended.out == ""


def test_measure_says_first_that_its_file_cannot_be_written(kleash: Command, world: World, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    words = ["measure", world["policy"], world["policy"], "--prompts", world["prompts"]]
    for place in (tmp_path, tmp_path / "file" / "figures.json"):
        ended = kleash(*words, "--json", place)
        assert ended.code == 2
        assert ended.err.startswith("kleash: Expected ")
        assert ended.err.count("\n") == 1


def test_measure_never_writes_over_what_it_reads_nor_two_files_into_one(
    kleash: Command, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("given.jsonl").write_text(json.dumps({"prompt": "a cat", "response": "it runs"}) + "\n")
    Path("linked.jsonl").symlink_to("given.jsonl")
    before = tree(tmp_path)
    given = tmp_path / "given.jsonl"
    for words, both in (
        (["--prompts", given, "--out", "given.jsonl"], "--out than for --prompts, found given.jsonl"),
        (["--responses", "given.jsonl", "--json", given], f"--json than for --responses, found {given}"),
        (["--prompts", "linked.jsonl", "--json", "given.jsonl"], "--json than for --prompts, found given.jsonl"),
        (["--prompts", given, "--out", "new", "--json", "./new"], "--json than for --out, found new"),
    ):
        ended = kleash("measure", "nowhere", "nowhere", *words)
        assert (ended.code, ended.out) == (2, "")
        assert ended.err == f"kleash: Expected another file for {both} for both; choose another place.\n"
        assert tree(tmp_path) == before


@pytest.mark.filterwarnings("default::kleash.errors.KleashWarning")
def test_measure_says_once_below_its_table_what_there_is_to_doubt(
    kleash: Command, world: World, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kleash.measured.doubt_of_skewed_sums", lambda *given, **named: "Too short for 8 of them.")
    words = ["measure", world["policy"], reference, "--prompts", world["prompts"]]
    ended = kleash(*words, "--samples", 8, "--max-new-tokens", 4)
    assert ended.code == 0
    assert ended.out.count("Too short for 8 of them.") == 1
    assert "Too short" not in ended.err
