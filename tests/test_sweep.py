"""Sweeps: what is run, that each run is the one of `kleash train`, how it ends, and what it is held against."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from exact import World
from game import ALL_EOS, Game
from test_report import run_of
from tiny import save_tiny_world, tiny_policy, tree, write_run

from kleash.alarms import FIRST_KL, KL
from kleash.baseline import best_of_n_baseline, doubling
from kleash.best_of_n import best_of_n_kl
from kleash.cli import main
from kleash.config import read_config
from kleash.errors import ConfigError
from kleash.parts import Given
from kleash.scorers import FunctionScorer
from kleash.sweep import curve_points, name_of, settings_of, start_score

SMALL = {
    "rollout": {"prompts_per_update": 4, "max_new_tokens": 4},
    "ppo": {"epochs": 1, "minibatches": 2, "learning_rate": 1e-2},
    "updates": 2,
    "eval_reward": "test_sweep:length",
}


def length(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    return [float(len(completion)) for completion in completions]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_tiny_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def swept(world: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sweep over two betas, its run.yaml and its copy of sweep.json beside it."""
    out = tmp_path_factory.mktemp("swept") / "out"
    words = [write_run(world, out, **SMALL), "--leash.beta", 0, 0.5, "--best-of", 4, "--best-of-prompts", 3]
    assert main(["sweep", *map(str, words), "--json", str(out.with_suffix(".json"))]) == 0
    return out


def sweep_json(out: Path) -> dict[str, Any]:
    content = json.loads((out / "sweep.json").read_text(encoding="utf-8"))
    assert content.keys() == {"runs", "curve", "best_of_n"}
    return content


# --- what is swept ---------------------------------------------------------------------------------------


def names(path: Path, *words: str) -> list[str]:
    return [setting.name for setting in settings_of(path, words)]


@pytest.fixture
def path(world: dict[str, str], tmp_path: Path) -> Path:
    return write_run(world, tmp_path / "out", **SMALL)


def test_a_key_with_several_values_is_one_run_each(path: Path, tmp_path: Path) -> None:
    settings = settings_of(path, ["--leash.beta", "0", "0.02", "--seed", "3"])
    assert [setting.config.leash.beta for setting in settings] == [0, 0.02]
    assert {setting.config.seed for setting in settings} == {3}
    assert [setting.config.out for setting in settings] == [
        str(tmp_path / "out" / name) for name in ("leash.beta=0", "leash.beta=0.02")
    ]
    assert [setting.label for setting in settings] == ["beta 0", "beta 0.02"]


def test_several_such_keys_are_their_product(path: Path) -> None:
    found = names(path, "--seed", "0", "1", "--ppo.learning-rate", "1e-4", "1e-3", "--updates", "1")
    assert found == [f"seed={seed},ppo.learning_rate={rate}" for seed in (0, 1) for rate in ("1e-4", "1e-3")]


def test_a_key_that_takes_a_list_is_not_swept(path: Path) -> None:
    words = ["--ppo.adam-betas", "0.8", "0.9", "--seed", "0", "1"]
    assert names(path, *words) == ["seed=0", "seed=1"]
    assert settings_of(path, words)[1].config.ppo.adam_betas == (0.8, 0.9)
    with pytest.raises(ConfigError, match="Expected at least one key with several values"):
        settings_of(path, ["--ppo.adam-betas", "0.8", "0.9"])


def test_budgets_are_swept_over_a_file_that_names_a_beta(path: Path) -> None:
    settings = settings_of(path, ["--leash.target-kl-per-sequence", "2", "6"])
    assert [setting.name for setting in settings] == [f"leash.target_kl_per_sequence={nats}" for nats in (2, 6)]
    assert [setting.config.leash.target_kl_per_sequence for setting in settings] == [2, 6]
    assert {setting.config.leash.kind for setting in settings} == {"budget"}


def test_a_name_holds_nothing_that_a_path_should_not() -> None:
    assert name_of({"reward": "/models/a b:c", "seed": "1"}) == "reward=_models_a_b_c,seed=1"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "Expected at least one key with several values to sweep, found none"),
        (["--leash.beta", "0.1"], "Expected at least one key with several values to sweep, found none"),
        (["--leash.beta", "0.1", "0.10"], "found leash.beta=0.1 and leash.beta=0.10; leave one out"),
        (["--reward", "a/b", "a_b"], "found reward=a_b and reward=a_b; leave one out"),
        (["--out", "a", "b"], "Expected one out for all runs of a sweep, found 2"),
        (["--mixed-precision", "no", "bf16"], "Expected one mixed_precision for all runs of a sweep, found 2"),
        (["--leash.beta", "0", "-1"], "leash.beta .* greater than or equal to 0, found -1"),
        (["--leash.betta", "0", "1"], "found leash.betta; the keys there are beta"),
        (["--seeds.a", "0", "1"], "found seeds; the keys there are"),
        (["--leash.horizon", "10", "20"], "horizon belongs to kind ziegler"),
        (
            ["--leash.kind", "fixed", "--leash.target_kl_per_sequence", "2", "6"],
            "target_kl_per_sequence belongs to kind",
        ),
    ],
)
def test_what_cannot_be_swept_is_refused_before_any_run(path: Path, words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        settings_of(path, words)


# --- the runs --------------------------------------------------------------------------------------------


def test_every_run_of_a_sweep_is_the_run_of_kleash_train(swept: Path, world: dict[str, str], tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    assert main(["train", str(swept.with_suffix(".yaml")), "--leash.beta", "0.5", "--out", str(alone)]) == 0
    for file in ("records.jsonl", "samples.jsonl"):
        assert (swept / "leash.beta=0.5" / file).read_bytes() == (alone / file).read_bytes()


def test_sweep_json_tells_start_and_end_of_every_run(swept: Path) -> None:
    content = sweep_json(swept)
    assert [entry["name"] for entry in content["runs"]] == ["leash.beta=0", "leash.beta=0.5"]
    for entry, beta in zip(content["runs"], (0, 0.5), strict=True):
        first, last = map(json.loads, (swept / entry["name"] / "records.jsonl").read_text().splitlines())
        assert entry["values"] == {"leash.beta": str(beta)}
        assert (entry["status"], entry["error"], entry["updates"], entry["beta_end"]) == ("finished", None, 2, beta)
        for name in ("score", "eval_score"):
            assert (entry[f"{name}_start"], entry[f"{name}_end"]) == (first[f"{name}_mean"], last[f"{name}_mean"])
        for end in ("", "_low", "_high"):
            assert entry[f"{KL}_end{end}"] == pytest.approx(last[KL + end])
    assert content["curve"] is None  # one drift above 0 in each run
    assert json.loads(swept.with_suffix(".json").read_text()) == content


def test_the_best_of_n_of_a_sweep_is_that_of_its_reference(swept: Path) -> None:
    config = read_config(swept.with_suffix(".yaml"))
    best = best_of_n_baseline(config, Given(), best_of=4, prompts=3)
    entries = sweep_json(swept)["best_of_n"]
    assert [entry["n"] for entry in entries] == [1, 2, 4]
    for entry, own in zip(entries, best, strict=True):
        assert entry[f"{KL}_mean"] == own.kl_policy_ref_per_sequence.mean
        assert (entry["score_mean"], entry["score_low"]) == (own.score.mean, own.score.low)
        assert own.eval_score is not None
        assert entry["eval_score_mean"] == own.eval_score.mean
        assert entry["prompts"] == 3


def test_a_resumed_sweep_skips_what_is_finished_and_writes_the_same(
    swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(swept, out)
    relocate(out)
    shutil.rmtree(out / "leash.beta=0.5")
    before = tree(out / "leash.beta=0")
    words = [str(swept.with_suffix(".yaml")), "--leash.beta", "0", "0.5", "--out", str(out)]
    capsys.readouterr()
    assert main(["sweep", *words]) == 2
    assert "found another run in" in capsys.readouterr().err
    assert main(["sweep", *words, "--resume", "--best-of", "4", "--best-of-prompts", "3"]) == 0
    assert "kleash: leash.beta=0: finished before, skipped." in capsys.readouterr().err
    assert tree(out / "leash.beta=0") == before
    assert sweep_json(out) == sweep_json(swept)


def relocate(out: Path) -> None:
    """A copied sweep whose runs name the place that they lie in now."""
    for config in out.glob("*/config.yaml"):
        name = config.parent.name
        lines = config.read_text().splitlines(keepends=True)
        config.write_text("".join(f"out: {out / name}\n" if line.startswith("out:") else line for line in lines))


def test_a_taken_directory_is_found_before_the_first_run(path: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "seed=1").mkdir(parents=True)
    (tmp_path / "out" / "seed=1" / "records.jsonl").touch()
    before = tree(tmp_path)
    assert main(["sweep", str(path), "--seed", "0", "1"]) == 2
    assert tree(tmp_path) == before


# --- how it ends -----------------------------------------------------------------------------------------


def enormous(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    return [1e30] * len(prompts)


def test_a_run_that_stops_itself_is_told_and_the_others_go_on(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--reward", "test_sweep:enormous", "test_sweep:length", "--updates", "1", "--preflight", "false"]
    assert main(["sweep", str(path), *words]) == 1
    out, err = capsys.readouterr()
    name = "reward=test_sweep_enormous"
    assert f"kleash: {name} stopped itself: Expected a finite" in err
    assert err.splitlines()[-1] == (
        f"kleash: Expected every run to finish, found that {name} stopped by itself; see above why."
    )
    assert f"{name} (stopped itself)" in out
    assert "kleash: No best of n, and no curve over all runs: they differ in more than the leash" in err
    stopped, finished = sweep_json(tmp_path / "out")["runs"]
    assert (stopped["status"], finished["status"]) == ("stopped", "finished")
    assert stopped["error"].startswith("Expected a finite")
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "kleash sweep: 1 runs over reward" in page


def unlike(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    return [1e30 * len(completion) for completion in completions]


def test_a_run_that_fails_its_checks_is_told_and_the_others_go_on(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--reward", "test_sweep:unlike", "test_sweep:length", "--updates", "1"]
    assert main(["sweep", str(path), *words]) == 1
    out, err = capsys.readouterr()
    said = "Expected every check before the first update to pass, found that gradients arrive failed (the loss is not"
    assert f"kleash: reward=test_sweep_unlike stopped itself: {said}" in err
    stopped, finished = sweep_json(tmp_path / "out")["runs"]
    assert (stopped["status"], finished["status"]) == ("stopped", "finished")
    assert "reward=test_sweep_unlike (stopped itself)" in out


INTERRUPTS: dict[str, int] = {}


def interrupting(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """Asks the second run to stop after its first update."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        INTERRUPTS["calls"] = calls = INTERRUPTS.get("calls", 0) + 1
        if calls == 3:
            signal.raise_signal(signal.SIGINT)
    return length(prompts, completions)


def test_an_interrupt_ends_with_130_and_names_what_is_left(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    INTERRUPTS.clear()
    words = ["sweep", str(path), "--reward", "test_sweep:interrupting", "--seed", "0", "1", "2", "--best-of", "0"]
    assert main(words) == 130
    out, err = capsys.readouterr()
    again = " ".join(["kleash", *words, "--resume"])
    assert err.splitlines()[-1] == f"kleash: Interrupted; seed=1 and seed=2 left to finish; go on with: {again}"
    assert out == ""
    assert not (tmp_path / "out" / "sweep.json").exists()
    assert main([*words, "--resume"]) == 0
    content = sweep_json(tmp_path / "out")
    assert [entry["updates"] for entry in content["runs"]] == [2, 2, 2]
    assert content["best_of_n"] == []


def at_once(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    raise KeyboardInterrupt


def test_an_interrupt_at_once_says_the_same(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", str(path), "--reward", "test_sweep:at_once", "--seed", "0", "1"]) == 130
    assert "kleash: Interrupted; seed=0 and seed=1 left to finish; go on with: kleash sweep" in capsys.readouterr().err


# --- what it is held against -----------------------------------------------------------------------------


def test_without_a_baseline_the_start_is_update_1_where_the_policy_is_its_reference() -> None:
    first = {"update": 1, KL: 0.0, "eval_score_mean": -0.25}
    assert start_score([run_of([first]), run_of([{**first, "eval_score_mean": 0.75}])], []) == 0.25
    assert start_score([run_of([{**first, KL: 0.1}])], []) is None
    assert start_score([run_of([{"update": 1, KL: 0.0, "eval_score_mean": None}])], []) is None


def test_with_a_baseline_the_start_is_the_mean_of_its_responses(path: Path) -> None:
    best = best_of_n_baseline(read_config(path), Given(), best_of=2, prompts=2)
    assert best[0].eval_score is not None
    assert start_score([run_of([{"update": 1, KL: 0.0, "eval_score_mean": 9.0}])], best) == best[0].eval_score.mean


def test_under_a_reference_that_moves_the_drift_is_from_the_first_one() -> None:
    rows = [{"update": 1, KL: 0.5, FIRST_KL: 2.0, "eval_score_mean": 1.0}]
    assert curve_points(run_of(rows)) == [(2.0, 1.0)]


def test_the_points_of_a_run_are_means_of_successive_updates() -> None:
    rows = [{"update": u, FIRST_KL: float(u), "eval_score_mean": -float(u)} for u in range(1, 41)]
    assert curve_points(run_of(rows))[:2] == [(1.5, -1.5), (3.5, -3.5)]
    assert len(curve_points(run_of(rows))) == 20
    assert curve_points(run_of(rows[:3])) == [(1.0, -1.0), (2.0, -2.0), (3.0, -3.0)]
    assert curve_points(run_of([*rows[:1], {"update": 2, FIRST_KL: 1.0, "eval_score_mean": None}])) == [(1.0, -1.0)]


def test_best_of_n_doubles_up_to_the_largest() -> None:
    assert [doubling(n) for n in (1, 2, 3, 16, 20)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 8, 16], [1, 2, 4, 8, 16, 20]]


# --- the baseline by enumeration -------------------------------------------------------------------------


def test_the_baseline_of_an_enumerable_game_is_the_enumerated_one(tmp_path: Path) -> None:
    """Two prompts, every response written down: KL, score and held-out score of best of 4 from samples of a model."""
    world = World(vocab=4, length=2, eos=0, prompts=2)
    scores = torch.randn(len(world.responses), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    game = Game(world=world, prompts=["cat", "dog runs"], scores=scores)
    policy = tiny_policy(seed=3, scale=5.0, vocab=4, **ALL_EOS)
    logprobs = game.sequence_logprobs(policy)
    config = write_run({"policy": "-", "reward": "-", "prompts": "-"}, tmp_path / "out")
    config = read_config(config, ["--rollout.max-new-tokens", "2", "--rollout.temperature", "1"])
    given = Given(
        policy=policy,
        tokenizer=game.tokenizer,
        scorer=FunctionScorer(function=game.reward, name="the game"),
        eval_scorer=FunctionScorer(function=lambda **asked: [-s for s in game.reward(**asked)], name="its opposite"),
        rows=[{"prompt": prompt} for prompt in game.prompts],
    )
    found = best_of_n_baseline(config, given, best_of=2000, prompts=9)[2]
    kls, expected = [], []
    for prompt in range(2):
        rows = world.prompt_of == prompt
        kls.append(best_of_n_kl(logprobs[rows], scores[rows].float(), n=4))
        expected.append(best_score(logprobs[rows], scores[rows], n=4))
    assert found.n == 4
    assert found.score.n == 2  # no more prompts than there are
    assert found.kl_policy_ref_per_sequence.mean == pytest.approx(math.fsum(kls) / 2, abs=1e-3)
    assert found.score.mean == pytest.approx(math.fsum(expected) / 2, abs=0.05)
    assert found.eval_score is not None
    assert found.eval_score.mean == pytest.approx(-found.score.mean)


def best_score(logprobs: torch.Tensor, scores: torch.Tensor, n: int) -> float:
    """E[max of n scores] = sum over the sorted scores of s (F^n - F_-^n)."""
    order = scores.argsort()
    highest = logprobs[order].exp().cumsum(0)
    lowest = torch.cat([torch.zeros(1, dtype=highest.dtype), highest[:-1]])
    return float((scores[order] * (highest**n - lowest**n)).sum())


def test_the_baseline_follows_from_the_seed_and_not_from_how_it_is_split(path: Path) -> None:
    whole, split, other = (
        best_of_n_baseline(read_config(path, words), Given(), best_of=3, prompts=4)
        for words in ([], ["--rollout.batch", "5"], ["--seed", "1"])
    )
    assert [best.score.mean for best in split] == pytest.approx([best.score.mean for best in whole])
    assert [best.score.mean for best in other] != pytest.approx([best.score.mean for best in whole])


@pytest.mark.usefixtures("absent_accelerator")
def test_the_baseline_is_drawn_on_the_cpu_where_the_accelerator_is_absent(path: Path) -> None:
    assert best_of_n_baseline(read_config(path), Given(), best_of=1, prompts=1)[0].n == 1


def test_nothing_to_sample_is_refused(path: Path) -> None:
    with pytest.raises(ConfigError, match="at least one response to at least one prompt, found 4 and 0; raise them"):
        best_of_n_baseline(read_config(path), Given(), best_of=4, prompts=0)


# --- several processes -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_sweep_and_one_of_them_writes(world: dict[str, str], tmp_path: Path) -> None:
    path = write_run(world, tmp_path / "out", **SMALL)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = ["sweep", str(path), "--leash.beta", "0", "0.5", "--best-of", "2", "--best-of-prompts", "2"]
    ended = subprocess.run(
        [*launcher, "-m", "kleash.cli", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{Path(__file__).parent}"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("leash.beta=0.5") == 1
    assert ended.stderr.count("leash.beta=0.5: update 1,") == 1
    assert [entry["updates"] for entry in sweep_json(tmp_path / "out")["runs"]] == [2, 2]
