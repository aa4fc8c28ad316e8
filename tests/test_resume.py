"""A run that was stopped and taken up again writes the bytes of one that never stopped."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny import save_tiny_world, tiny_run, tree, write_run

from kleash.checkpoint import checkpoints_in, read_checkpoint_state
from kleash.config import RunConfig, config_as_yaml, config_from
from kleash.errors import CheckpointError, RewardError
from kleash.models import fingerprint, load_causal_model
from kleash.parts import Given
from kleash.run_directory import RunDirectory
from kleash.scorers import FunctionScorer
from kleash.training import RunResult, train_run

UPDATES = 6
SAME_BYTES = ("records.jsonl", "drift.jsonl", "samples.jsonl")
CHANGES = {
    "leash": {"kind": "budget", "beta": 0.3, "target_kl_per_sequence": 0.01},
    "rollout": {"prompts_per_update": 4, "max_new_tokens": 4},
    "ppo": {"epochs": 2, "minibatches": 2, "learning_rate": 3e-3, "learning_rate_schedule": "cosine"},
    "updates": UPDATES,
}


@dataclass(kw_only=True)
class Reward:
    """Counts words; calls `at[n]` first in the n-th call of this process, of which calls up to 0 are the checks'."""

    at: dict[int, Callable[[], None]]
    calls: int = -6

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        self.calls += 1
        self.at.get(self.calls, int)()
        return [len(completion.split()) / 4 for completion in completions]


def scorer(at: dict[int, Callable[[], None]] | None = None) -> FunctionScorer:
    return FunctionScorer(function=Reward(at=at or {}), name="words")


def go_on(config: RunConfig, *, at: dict[int, Callable[[], None]] | None = None, resume: bool = True) -> RunResult:
    return train_run(config, Given(scorer=scorer(at)), resume=resume, quiet=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_tiny_world(tmp_path_factory.mktemp("world"))


def config_in(world: dict[str, str], out: Path) -> RunConfig:
    return config_from(tiny_run(world, out, **CHANGES), "run.yaml")


@pytest.fixture(scope="module")
def straight(world: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that never stopped."""
    out = tmp_path_factory.mktemp("straight") / "run"
    assert not go_on(config_in(world, out), resume=False).interrupted
    return out


@pytest.fixture
def config(world: dict[str, str], tmp_path: Path) -> RunConfig:
    return config_in(world, tmp_path / "run")


def assert_same_run(out: Path, straight: Path) -> None:
    """The same lines, and the same last checkpoint: policy, value model, optimizer, leash, schedule, fingerprints."""
    for file in SAME_BYTES:
        assert (out / file).read_bytes() == (straight / file).read_bytes(), file
    last = checkpoints_in(straight / "checkpoints")[-1]
    found = checkpoints_in(out / "checkpoints")[-1]
    assert found.name == last.name
    for file in sorted(file.relative_to(last) for file in last.rglob("*") if file.is_file()):
        assert (found / file).read_bytes() == (last / file).read_bytes(), file
    assert len((out / "timings.jsonl").read_text().splitlines()) == len(
        (out / "records.jsonl").read_text().splitlines()
    )


def lines(out: Path) -> int:
    return len((out / "records.jsonl").read_text().splitlines())


def newest(out: Path) -> str:
    return checkpoints_in(out / "checkpoints")[-1].name


def signals(*numbers: int) -> Callable[[], None]:
    def raise_them() -> None:
        for number in numbers:
            signal.raise_signal(number)

    return raise_them


def raises(error: BaseException) -> Callable[[], None]:
    def raise_it() -> None:
        raise error

    return raise_it


def test_the_straight_run_moves_what_a_checkpoint_must_hold(straight: Path) -> None:
    """Without movement in beta, learning rate and weights, the tests below would prove nothing."""
    records = [json.loads(line) for line in (straight / "records.jsonl").read_text().splitlines()]
    assert len({record["beta"] for record in records}) == UPDATES
    assert len({record["learning_rate"] for record in records}) == UPDATES
    assert len({record["gradient_norm"] for record in records}) == UPDATES
    assert records[0]["kl_policy_ref_per_sequence"] == 0 < records[-1]["kl_policy_ref_per_sequence"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_update_finish_and_the_run_goes_on_to_the_same_bytes(
    config: RunConfig, straight: Path, number: int
) -> None:
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    result = go_on(config, at={3: signals(number)}, resume=False)
    assert (result.interrupted, result.completed_updates, result.checkpoint.name) == (True, 3, "000003")
    assert (lines(result.out), (result.out / "report.html").is_file()) == (3, True)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert not go_on(config).interrupted
    assert_same_run(result.out, straight)


@pytest.mark.parametrize("stop", [signals(signal.SIGINT, signal.SIGINT), raises(KeyboardInterrupt())])
def test_an_interrupt_at_once_saves_the_updates_before_it(
    config: RunConfig, straight: Path, stop: Callable[[], None]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        go_on(config, at={4: stop}, resume=False)
    assert (lines(Path(config.out)), newest(Path(config.out))) == (3, "000003")
    go_on(config)
    assert_same_run(Path(config.out), straight)


def test_an_interrupt_between_the_steps_of_an_update_saves_no_half_stepped_weights(
    config: RunConfig, straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import kleash.ppo

    one_step, taken = kleash.ppo._gradients_of_step, []

    def interrupted_step(*arguments: object, **named: object) -> object:
        taken.append(1)
        if len(taken) == 4 * 3 + 3:  # four steps an update: in the middle of the fourth
            raise KeyboardInterrupt
        return one_step(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(kleash.ppo, "_gradients_of_step", interrupted_step)
        with pytest.raises(KeyboardInterrupt):
            go_on(config, resume=False)
    assert (lines(Path(config.out)), newest(Path(config.out))) == (3, "000002")
    go_on(config)
    assert_same_run(Path(config.out), straight)


def test_an_interrupt_between_the_lines_of_an_update_loses_none(
    config: RunConfig, straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = RunDirectory.append

    def interrupted_append(directory: RunDirectory, file: str, rows: list[dict[str, object]]) -> None:
        if file == "samples.jsonl" and rows[0]["update"] == 3:
            raise KeyboardInterrupt
        append(directory, file, rows)

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "append", interrupted_append)
        with pytest.raises(KeyboardInterrupt):
            go_on(config, resume=False)
    assert newest(Path(config.out)) == "000002"
    go_on(config)
    assert_same_run(Path(config.out), straight)


def test_what_a_kill_leaves_behind_is_forgotten(config: RunConfig, straight: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        go_on(config, at={4: raises(KeyboardInterrupt())}, resume=False)
    out = Path(config.out)
    shutil.rmtree(out / "checkpoints" / "000003")
    (out / "checkpoints" / ".000004.partial" / "policy").mkdir(parents=True)
    (out / "checkpoints" / ".000004.partial" / "value.safetensors").write_bytes(b"half")
    for file in ("records.jsonl", "drift.jsonl", "samples.jsonl", "timings.jsonl"):
        with (out / file).open("a") as rows:
            rows.write('{"update": 4, "sco')
    go_on(config)
    assert_same_run(out, straight)
    assert not list((out / "checkpoints").glob(".*"))


def test_a_run_killed_before_its_first_checkpoint_begins_again(config: RunConfig, straight: Path) -> None:
    RunDirectory(path=Path(config.out)).start((straight / "config.yaml").read_text().replace(str(straight), config.out))
    go_on(config)
    assert_same_run(Path(config.out), straight)


def test_resume_where_nothing_was_begun_begins(config: RunConfig, straight: Path) -> None:
    go_on(config)
    assert_same_run(Path(config.out), straight)


def test_resuming_a_finished_run_changes_nothing_but_its_page(config: RunConfig, straight: Path) -> None:
    shutil.copytree(straight, config.out)
    result = go_on(config)
    assert (result.interrupted, result.completed_updates) == (False, UPDATES)
    assert_same_run(result.out, straight)


def test_a_reward_that_fails_at_one_update_keeps_the_updates_before_it(config: RunConfig, straight: Path) -> None:
    with pytest.raises(
        RewardError, match=r"found ZeroDivisionError: division by zero, for a batch that begins with the prompt '"
    ):
        go_on(config, at={3: lambda: 1 / 0}, resume=False)
    assert (lines(Path(config.out)), newest(Path(config.out))) == (2, "000002")
    go_on(config)
    assert_same_run(Path(config.out), straight)


def test_a_reward_that_fails_at_the_first_update_leaves_the_place_free(config: RunConfig, straight: Path) -> None:
    out = Path(config.out)
    for own in ([], ["notes.txt"]):
        for name in own:
            out.mkdir()
            (out / name).write_text("mine")
        with pytest.raises(RewardError, match="division by zero"):
            go_on(config, at={1: lambda: 1 / 0}, resume=False)
        assert out.exists() == bool(own)
        assert [path.name for path in out.glob("*")] == own
    go_on(config, resume=False)
    assert_same_run(out, straight)


def test_an_interrupt_in_the_first_update_and_a_failure_after_a_resume_take_nothing_back(
    config: RunConfig, straight: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        go_on(config, at={1: raises(KeyboardInterrupt())}, resume=False)
    before = tree(Path(config.out))
    assert newest(Path(config.out)) == "000000"
    with pytest.raises(RewardError, match="division by zero"):
        go_on(config, at={1: lambda: 1 / 0})
    assert tree(Path(config.out)) == before
    go_on(config)
    assert_same_run(Path(config.out), straight)


def test_checkpoints_at_other_times_change_no_byte(config: RunConfig, straight: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        go_on(config, at={6: raises(KeyboardInterrupt())}, resume=False)
    changed = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"every": 1, "keep": 1})})
    go_on(changed)
    assert_same_run(Path(config.out), straight)
    assert len(checkpoints_in(Path(config.out) / "checkpoints")) == 1


def test_the_checkpoint_is_anchored_to_the_policy_that_the_run_started_from(
    straight: Path, world: dict[str, str]
) -> None:
    last = checkpoints_in(straight / "checkpoints")[-1]
    start = fingerprint(load_causal_model(world["policy"], "policy"))
    assert read_checkpoint_state(last).reference_fingerprint == start
    assert fingerprint(load_causal_model(last / "policy", "policy")) != start


def test_the_kept_beta_is_the_one_of_the_next_update_to_the_last_bit(straight: Path) -> None:
    records = [json.loads(line) for line in (straight / "records.jsonl").read_text().splitlines()]
    kept = read_checkpoint_state(straight / "checkpoints" / "000004").leash["beta"]
    assert kept.hex() == records[4]["beta"].hex() != records[3]["beta"].hex()


MOVING = [{"kind": "moving_average", "decay": 0.5}, {"kind": "periodic", "every": 2}]


@pytest.mark.parametrize("reference", MOVING, ids=lambda reference: reference["kind"])
def test_a_run_whose_reference_moves_goes_on_to_the_same_bytes(
    world: dict[str, str], tmp_path: Path, reference: dict[str, object]
) -> None:
    """Stopped after the third update, where neither the newest checkpoint nor the start holds the reference's place."""
    straight, stopped = (
        config_from(tiny_run(world, tmp_path / name, **CHANGES, reference=reference), "run.yaml")
        for name in ("straight", "stopped")
    )
    go_on(straight, resume=False)
    with pytest.raises(KeyboardInterrupt):
        go_on(stopped, at={4: raises(KeyboardInterrupt())}, resume=False)
    assert newest(Path(stopped.out)) == "000003"
    go_on(stopped)
    assert_same_run(Path(stopped.out), Path(straight.out))
    kept = {(path / "reference.safetensors").read_bytes() for path in (tmp_path / "stopped").glob("checkpoints/*")}
    assert len(kept) > 1


def test_the_anchor_of_a_moving_reference_is_where_it_began(world: dict[str, str], tmp_path: Path) -> None:
    """Otherwise every resumption would hand out a fresh budget of drift."""
    config = config_from(tiny_run(world, tmp_path / "run", **CHANGES, reference=MOVING[0]), "run.yaml")
    result = go_on(config, resume=False)
    start = fingerprint(load_causal_model(world["policy"], "policy"))
    assert read_checkpoint_state(result.checkpoint).reference_fingerprint == start
    moved = load_causal_model(world["policy"], "reference")
    moved.load_state_dict(load_file(result.checkpoint / "reference.safetensors"), strict=False)
    assert fingerprint(moved) != start
    other = shutil.copytree(world["policy"], tmp_path / "other")
    moved.save_pretrained(other)
    again = {**CHANGES, "updates": UPDATES, "policy": str(other), "reference": MOVING[0]}
    changed = config_from(tiny_run(world, tmp_path / "run", **again), "run.yaml")
    (tmp_path / "run" / "config.yaml").write_text(config_as_yaml(changed))
    said = f"the reference that the run started with .SHA-256 {start}., found another .{fingerprint(moved)}."
    with pytest.raises(CheckpointError, match=said):
        go_on(changed)


KILLS = 10

CHILD = """
    import os, sys, time, json, signal, random
    from pathlib import Path
    import transformers.models.gpt2.modeling_gpt2
    from kleash.cli import main

    yaml, out, straight, kills, seed = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
    draw = random.Random(seed)

    def start(*words):
        child = os.fork()
        if child == 0:
            code = 99
            try:
                sys.stdout = sys.stderr = open(os.devnull, "w")
                code = main(["train", yaml, *words])
            finally:
                os._exit(code)
        return child

    def last_update():
        try:
            whole = (out / "records.jsonl").read_bytes().split(b"\\n")[:-1]
            return json.loads(whole[-1])["update"] if whole else 0
        except OSError:
            return 0

    def at_kill(life):
        if life == 0:
            return (out / "config.yaml").exists()
        if last_update() < life:
            return False
        return life % 2 == 0 or any((out / "checkpoints").glob(".*.partial"))

    def end_of(child):
        _, status = os.waitpid(child, 0)
        return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)

    ends = [end_of(start("--out", straight))]
    for life in range(kills):
        every = 1 if life % 2 else draw.choice([1, 2])
        child = start("--resume", "--checkpoint.every", str(every))
        patience = time.monotonic() + 60
        while not at_kill(life) and time.monotonic() < patience:
            time.sleep(0.0005)
        time.sleep(draw.random() * (0.004 if life % 2 else 0.2))
        os.kill(child, signal.SIGKILL)
        ends.append(end_of(child))
        print("killed after update", last_update(), file=sys.stderr)
    ends.append(end_of(start("--resume")))
    print(json.dumps(ends))
"""


@pytest.mark.slow
@pytest.mark.parametrize("reference", [None, MOVING[0]], ids=["unmoved", "moving"])
def test_ten_kills_at_random_moments_leave_the_bytes_of_a_run_that_was_never_killed(
    world: dict[str, str], tmp_path: Path, reference: dict[str, object] | None
) -> None:
    """Each life of the run is a process of its own, ended by SIGKILL while it loads, trains or writes a checkpoint."""
    path = write_run(world, tmp_path / "run", **{**CHANGES, "updates": KILLS + 4, "reference": reference})
    script = tmp_path / "child.py"
    script.write_text(textwrap.dedent(CHILD))
    seed = random.randrange(10**6)
    words = [path, tmp_path / "run", tmp_path / "straight", KILLS, seed]
    ran = subprocess.run(
        [sys.executable, script, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == [0, *[-signal.SIGKILL] * KILLS, 0], f"seed {seed}: {ran.stderr}"
    assert_same_run(tmp_path / "run", tmp_path / "straight")
    assert lines(tmp_path / "run") == KILLS + 4
