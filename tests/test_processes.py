"""Several processes without a GPU: the figures of one process, files written once, nobody left waiting."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import save_tiny_world, write_run

from kleash.checkpoint import checkpoints_in
from kleash.cli import main

pytestmark = pytest.mark.slow

CHANGES = {
    "rollout": {"prompts_per_update": 8, "max_new_tokens": 6},
    "ppo": {"epochs": 1, "minibatches": 1, "micro_batch": 2, "learning_rate": 1e-3},
    "updates": 3,
}

REWARDS = """
import os, time

calls = 0

def fails_on_the_second_process(prompts, completions):
    global calls
    calls += 1
    if calls == 9 and os.environ["RANK"] == "1":  # six calls of the checks, two updates, and then
        raise LookupError("no such grade")
    return [len(completion) / 8 for completion in completions]

def slow(prompts, completions):
    time.sleep(0.2)
    return [len(completion) / 8 for completion in completions]
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_tiny_world(tmp_path_factory.mktemp("world"))


def launched(path: Path) -> subprocess.Popen[str]:
    """`kleash train` in two processes that torchrun starts, in the directory of its configuration."""
    (path.parent / "rewards.py").write_text(REWARDS)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*launcher, "-m", "kleash.cli", "train", path.name],
        cwd=path.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(path.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def rows_of(out: Path, file: str = "records.jsonl") -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / file).read_text().splitlines()]


def assert_same_drift(one: Path, two: Path) -> None:
    """The same maps but for rounding, which may change the order of a list's last entries."""
    for expected, found in zip(rows_of(one, "drift.jsonl"), rows_of(two, "drift.jsonl"), strict=True):
        assert found["update"] == expected["update"]
        for position, row in zip(expected["by_position"], found["by_position"], strict=True):
            assert row == pytest.approx(position, rel=1e-4, abs=1e-5)
        for name, of_class in expected["by_class"].items():
            assert found["by_class"][name] == pytest.approx(of_class, rel=1e-4, abs=1e-5)
        assert [token["kl_policy_ref"] for token in found["top_tokens"]] == pytest.approx(
            [token["kl_policy_ref"] for token in expected["top_tokens"]], rel=1e-3, abs=1e-5
        )


def test_two_processes_find_the_figures_of_one_and_write_each_file_once(world: dict[str, str], tmp_path: Path) -> None:
    assert main(["train", str(write_run(world, tmp_path / "one", **CHANGES))]) == 0
    process = launched(write_run(world, tmp_path / "two", **CHANGES))
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out == f"policy  {tmp_path}/two/checkpoints/000003/policy\nreport  {tmp_path}/two/report.html\n"
    assert err.count("two: update 1,") == 1
    one, two = rows_of(tmp_path / "one"), rows_of(tmp_path / "two")
    assert [row["update"] for row in two] == [1, 2, 3]
    assert two[0]["advantage_std"] != two[1]["advantage_std"]
    for expected, found in zip(one, two, strict=True):
        assert list(found) == list(expected)
        for name, value in expected.items():
            close = value if value is None else pytest.approx(value, rel=1e-4, abs=1e-5)
            assert found[name] == close, name
    assert_same_drift(tmp_path / "one", tmp_path / "two")
    assert [(row["update"], row["index"]) for row in rows_of(tmp_path / "two", "samples.jsonl")] == [
        (update, index) for update in (1, 2, 3) for index in range(4)
    ]
    assert len(rows_of(tmp_path / "two", "timings.jsonl")) == 3
    assert [path.name for path in checkpoints_in(tmp_path / "two" / "checkpoints")] == ["000002", "000003"]


def test_a_reward_that_fails_on_one_process_stops_all_of_them_with_a_checkpoint(
    world: dict[str, str], tmp_path: Path
) -> None:
    reward = "rewards:fails_on_the_second_process"
    process = launched(write_run(world, tmp_path / "run", **{**CHANGES, "updates": 50, "reward": reward}))
    _, err = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "Expected scores from rewards:fails_on_the_second_process, found LookupError: no such grade" in err
    assert "Expected scores on every process, found that another one failed; see its error." in err
    assert len(rows_of(tmp_path / "run")) == 2
    assert checkpoints_in(tmp_path / "run" / "checkpoints")[-1].name == "000002"


def test_a_signal_to_the_launcher_lets_all_processes_finish_the_update_and_save(
    world: dict[str, str], tmp_path: Path
) -> None:
    changes = {**CHANGES, "updates": 500, "reward": "rewards:slow"}
    process = launched(write_run(world, tmp_path / "run", **changes))
    patience = time.monotonic() + 240
    while not (tmp_path / "run" / "records.jsonl").exists() and time.monotonic() < patience:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    done = len(rows_of(tmp_path / "run"))
    assert 1 <= done < 500
    assert f"kleash: Interrupted after {done} of 500 updates; go on with: kleash train run.yaml --resume\n" in err
    assert checkpoints_in(tmp_path / "run" / "checkpoints")[-1].name == f"{done:06d}"


def test_two_processes_roll_back_together_and_find_the_figures_of_one(world: dict[str, str], tmp_path: Path) -> None:
    fast = {"epochs": 2, "minibatches": 2, "learning_rate": 1e-2}
    leash = {"beta": 0.01, "max_kl_per_sequence": 0.3, "tighten_factor": 10}
    changes = {**CHANGES, "ppo": fast, "leash": leash, "updates": 5}
    process = launched(write_run(world, tmp_path / "two", **changes))
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    backs = rows_of(tmp_path / "two", "roll_backs.jsonl")
    assert backs
    assert [back["roll_back"] for back in backs] == list(range(1, len(backs) + 1))
    assert err.count("Roll-back 1 of 3: KL(policy || first reference) is") == 1
    records = rows_of(tmp_path / "two")
    assert [record["update"] for record in records] == [1, 2, 3, 4, 5]
    assert max(record["kl_policy_ref_per_sequence"] for record in records) <= 0.3
