"""What a run does about its drift: an alarm that acts, a ceiling that holds, and the way back, also through a crash."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from test_resume import assert_same_run
from tiny import save_tiny_world, tiny_run, write_run

import kleash.guard
from kleash.checkpoint import checkpoints_in, read_checkpoint_state
from kleash.config import RunConfig, config_from
from kleash.errors import NonFiniteError, RewardError, RunStopped
from kleash.parts import Given
from kleash.training import judged, train_run

KL = "kl_policy_ref_per_sequence"
CEILING = 0.3
FAST = {"epochs": 2, "minibatches": 2, "learning_rate": 1e-2}
LOOSE = {"beta": 0.01, "max_kl_per_sequence": CEILING, "tighten_factor": 10}
ALWAYS = {"threshold": 1e-300}  # of sampler_mismatch: every rounding error is above it, from the third update on


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_tiny_world(tmp_path_factory.mktemp("world"))


def config_in(world: dict[str, str], out: Path, **changes: object) -> RunConfig:
    return config_from(tiny_run(world, out, **{"updates": 8, "ppo": FAST, **changes}), "run.yaml")


def go(config: RunConfig, *, resume: bool = False) -> Path:
    return train_run(config, Given(), resume=resume, quiet=True).out


def rows(out: Path, file: str = "records.jsonl") -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / file).read_text().splitlines()]


@pytest.fixture(scope="module")
def straight(world: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that rolls back and was never killed."""
    return go(config_in(world, tmp_path_factory.mktemp("straight") / "run", leash=LOOSE))


# --- the ceiling ---


def test_without_a_ceiling_the_run_would_have_gone_far_beyond_it(world: dict[str, str], tmp_path: Path) -> None:
    records = rows(go(config_in(world, tmp_path / "run", leash={"beta": 0.01})))
    assert records[-1][KL] > 2 * CEILING


def test_a_run_beyond_its_ceiling_goes_back_with_a_tighter_leash_and_stays_below(straight: Path) -> None:
    records, backs = rows(straight), rows(straight, "roll_backs.jsonl")
    assert [record["update"] for record in records] == list(range(1, 9))
    assert max(record[KL] for record in records) <= CEILING
    assert [(back["roll_back"], back["from"], back["to"]) for back in backs] == [(1, 4, 2), (2, 4, 2)]
    assert [round(back["beta"], 9) for back in backs] == [0.1, 1.0]  # the second one from the same checkpoint
    assert [record["update"] for record in backs[0]["records"]] == [3, 4]
    assert backs[0]["records"][-1][KL] > CEILING
    assert "above its ceiling of 0.3; back from update 4 to the checkpoint after update 2" in backs[0]["why"]
    state = read_checkpoint_state(checkpoints_in(straight / "checkpoints")[-1])
    assert (state.update, state.roll_backs, round(state.leash["beta"], 9)) == (8, 2, 1.0)


def test_what_was_done_is_said(
    world: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], straight: Path
) -> None:
    train_run(config_in(world, tmp_path / "run", leash=LOOSE), Given())
    said = capsys.readouterr().err
    assert all(back["why"] in said for back in rows(straight, "roll_backs.jsonl"))


def test_a_run_that_has_used_up_its_roll_backs_stops_with_a_checkpoint_and_a_page(
    world: dict[str, str], tmp_path: Path
) -> None:
    config = config_in(world, tmp_path / "run", leash={**LOOSE, "tighten_factor": 1.5, "max_roll_backs": 1})
    with pytest.raises(RunStopped, match=r"after update 4 and 1 of 1 roll-backs: .* above its ceiling of 0\.3"):
        go(config)
    out = Path(config.out)
    assert checkpoints_in(out / "checkpoints")[-1].name == "000004"
    assert len(rows(out)) == 4
    assert (out / "report.html").is_file()


def test_the_command_then_ends_with_exit_code_1(world: dict[str, str], tmp_path: Path) -> None:
    leash = {"beta": 0, "max_kl_per_sequence": CEILING, "max_roll_backs": 0}
    path = write_run(world, tmp_path / "run", ppo=FAST, updates=8, leash=leash)
    command = [sys.executable, "-m", "kleash.cli", "train", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 1
    assert "kleash: Stopped after update 4 and 0 of 0 roll-backs: KL(policy || first reference)" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_leash_at_its_bound_cannot_be_tightened_so_the_run_stops(world: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(RunStopped, match=r"beta 0\.01 of the checkpoint after update 2 is at its bound"):
        go(config_in(world, tmp_path / "run", leash={**LOOSE, "beta_max": 0.01}))


def test_a_failure_after_a_roll_back_to_the_start_takes_nothing_back(
    world: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"

    def fails_once_it_has_rolled_back(*arguments: Any) -> Any:
        if (out / "roll_backs.jsonl").exists():
            raise RewardError("no such grade")
        return judged(*arguments)

    monkeypatch.setattr("kleash.training.judged", fails_once_it_has_rolled_back)
    with pytest.raises(RewardError, match="no such grade"):
        go(config_in(world, out, leash=LOOSE, checkpoint={"every": 8}))
    assert [back["to"] for back in rows(out, "roll_backs.jsonl")] == [0]
    assert checkpoints_in(out / "checkpoints")[-1].name == "000000"


# --- an update that breaks down ---


def broken_at(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """One optimizer step, counted over the whole run, finds a loss that is not finite: four steps an update."""
    import kleash.ppo

    original, calls = kleash.ppo._gradients_of_step, []

    def broken(*arguments: object, **named: object) -> object:
        calls.append(1)
        if len(calls) == call:
            raise NonFiniteError("Expected a finite loss, found nan.")
        return original(*arguments, **named)

    monkeypatch.setattr(kleash.ppo, "_gradients_of_step", broken)


def test_an_update_that_breaks_down_on_a_nan_is_rolled_back_from_too(
    world: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_at(monkeypatch, 4 * 3 + 2)  # in the middle of the fourth update
    out = go(config_in(world, tmp_path / "run", leash={"beta": 1.0, "max_kl_per_sequence": 5}))
    (back,) = rows(out, "roll_backs.jsonl")
    assert (back["from"], back["to"], back["beta"]) == (3, 2, 2.0)
    assert "update 4 broke down (Expected a finite loss, found nan.)" in back["why"]
    assert [record["update"] for record in rows(out)] == list(range(1, 9))


def test_without_a_ceiling_it_stays_the_error_that_it_is(
    world: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_at(monkeypatch, 4 * 3 + 2)
    with pytest.raises(NonFiniteError, match="Expected a finite loss, found nan"):
        go(config_in(world, tmp_path / "run", leash={"beta": 1.0}))


# --- alarms that act ---


def test_an_alarm_is_written_down_when_it_begins_and_every_ten_updates(world: dict[str, str], tmp_path: Path) -> None:
    out = go(config_in(world, tmp_path / "run", updates=14, alarms={"sampler_mismatch": ALWAYS}))
    alarms = [row for row in rows(out, "alarms.jsonl") if row["name"] == "sampler_mismatch"]
    assert [(row["update"], row["since"], row["action"]) for row in alarms] == [(3, 3, "log"), (13, 3, "log")]
    assert len({record["beta"] for record in rows(out)}) == 1


def test_an_alarm_set_to_tighten_raises_beta_from_the_next_update(world: dict[str, str], tmp_path: Path) -> None:
    alarms = {"sampler_mismatch": {**ALWAYS, "action": "tighten"}}
    betas = [record["beta"] for record in rows(go(config_in(world, tmp_path / "run", updates=5, alarms=alarms)))]
    assert betas == [0.1, 0.1, 0.1, 0.2, 0.2]


def test_an_alarm_set_to_stop_stops(world: dict[str, str], tmp_path: Path) -> None:
    config = config_in(world, tmp_path / "run", alarms={"sampler_mismatch": {**ALWAYS, "action": "stop"}})
    with pytest.raises(RunStopped, match="Stopped by the alarm sampler_mismatch after update 3: Sampler and scorer"):
        go(config)
    assert len(rows(Path(config.out))) == 3


def test_an_alarm_set_to_roll_back_goes_back_to_before_it_began(world: dict[str, str], tmp_path: Path) -> None:
    """It stands since update 3: the checkpoint after update 2 is too late, that after update 1 was measured at 2."""
    alarms = {"sampler_mismatch": {**ALWAYS, "action": "roll_back"}}
    leash, checkpoint = {"beta": 0.1, "max_roll_backs": 1}, {"every": 1, "keep": 4}
    config = config_in(world, tmp_path / "run", alarms=alarms, checkpoint=checkpoint, leash=leash)
    with pytest.raises(RunStopped, match="1 of 1 roll-backs: the alarm sampler_mismatch stands since update 3"):
        go(config)
    (back,) = rows(Path(config.out), "roll_backs.jsonl")
    assert (back["from"], back["to"], back["beta"]) == (3, 1, 0.2)


def test_where_no_checkpoint_from_before_is_kept_the_run_stops_and_says_so(
    world: dict[str, str], tmp_path: Path
) -> None:
    alarms = {"sampler_mismatch": {**ALWAYS, "window": 1, "action": "roll_back"}}  # it stands since update 1
    config = config_in(world, tmp_path / "run", alarms=alarms, checkpoint={"every": 1, "keep": 2})
    with pytest.raises(RunStopped, match=r"no checkpoint from before is kept; raise checkpoint\.keep"):
        go(config)


# --- through a crash ---


@pytest.mark.parametrize(
    "moment",
    ["remove_checkpoint", "write_checkpoint", "_write_down", "restore", "alarm_watch"],
)
@pytest.mark.parametrize("after", [False, True])
def test_a_roll_back_cut_short_at_any_moment_is_done_again_to_the_same_bytes(
    world: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, after: bool
) -> None:
    config = config_in(world, tmp_path / "run", leash=LOOSE, checkpoint={"every": 1, "keep": 3})
    whole = config_in(world, tmp_path / "whole", leash=LOOSE, checkpoint={"every": 1, "keep": 3})
    go(whole)
    original = getattr(kleash.guard, moment)

    def cut_short(*arguments: object, **named: object) -> object:
        if after:
            original(*arguments, **named)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(kleash.guard, moment, cut_short)
        with pytest.raises(KeyboardInterrupt):
            go(config)
    go(config, resume=True)
    assert_same_run(Path(config.out), Path(whole.out))
    assert rows(Path(config.out), "roll_backs.jsonl") == rows(Path(whole.out), "roll_backs.jsonl")


def test_a_roll_back_puts_a_moving_reference_back_too(
    world: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the run that rolls back it is restored in memory, in the other one it is loaded: the same bytes."""
    changes = {
        "leash": LOOSE,
        "checkpoint": {"every": 1, "keep": 3},
        "reference": {"kind": "moving_average", "decay": 0.7},
    }
    whole = go(config_in(world, tmp_path / "whole", **changes))
    assert rows(whole, "roll_backs.jsonl")
    config = config_in(world, tmp_path / "run", **changes)

    def cut_short(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(kleash.guard, "_write_down", cut_short)
        with pytest.raises(KeyboardInterrupt):
            go(config)
    assert_same_run(go(config, resume=True), whole)
    records = rows(whole)
    assert all(record["kl_policy_first_ref_per_sequence"] > record[KL] for record in records[2:])


def test_a_checkpoint_that_was_about_to_be_replaced_comes_back(
    world: dict[str, str], straight: Path, tmp_path: Path
) -> None:
    """A kill between the two renames leaves no checkpoint under its name."""
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    (out / "config.yaml").write_text((straight / "config.yaml").read_text().replace(str(straight), str(out)))
    last = out / "checkpoints" / "000008"
    os.replace(last, out / "checkpoints" / ".000008.replaced")
    go(config_in(world, out, leash=LOOSE), resume=True)
    assert_same_run(out, straight)
    assert not list((out / "checkpoints").glob(".*"))


KILLED = """
    import os, signal, sys
    import kleash.guard, kleash.training
    from kleash.config import read_config
    from kleash.parts import Given

    moment, number = sys.argv[2], int(sys.argv[3])
    original, calls = getattr(kleash.guard, moment), []

    def killed(*arguments, **named):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **named)

    setattr(kleash.guard, moment, killed)
    kleash.training.guarded = kleash.guard.guarded
    kleash.training.train_run(read_config(sys.argv[1]), Given(), resume=True, quiet=True)
"""


@pytest.mark.slow
def test_a_budget_leash_with_roll_backs_killed_again_and_again_ends_with_the_same_bytes(
    world: dict[str, str], tmp_path: Path
) -> None:
    """SIGKILL while a roll-back writes its checkpoint, and between updates: beta and its integrator bit-equal."""
    leash = {"target_kl_per_sequence": 0.1, "beta": 0.003, "max_kl_per_sequence": CEILING, "max_roll_backs": 9}
    whole = go(config_in(world, tmp_path / "whole", leash=leash))
    assert rows(whole, "roll_backs.jsonl")
    path = write_run(world, tmp_path / "run", ppo=FAST, updates=8, leash=leash)
    script = tmp_path / "killed.py"
    script.write_text(textwrap.dedent(KILLED))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for moment, number in (("write_checkpoint", 1), ("restore", 2), ("drift_from_start", 5), ("none", 0)):
        named = moment if moment != "none" else "restore"
        command = [sys.executable, str(script), str(path), named, str(number)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
    assert done.returncode == 0
    assert_same_run(tmp_path / "run", whole)
    assert rows(tmp_path / "run", "roll_backs.jsonl") == rows(whole, "roll_backs.jsonl")


# --- the early end of an update, in a run ---


def test_an_update_that_ended_early_says_how_many_steps_it_took(world: dict[str, str], tmp_path: Path) -> None:
    steps = {}
    for name, limit in (("all", None), ("few", 1e-4)):
        out = go(config_in(world, tmp_path / name, ppo={**FAST, "max_kl_old_policy_per_token": limit}))
        steps[name] = [record["optimizer_steps"] for record in rows(out)]
    assert steps["all"] == [4] * 8
    assert min(steps["few"]) < 4
    assert min(steps["few"]) >= 1
