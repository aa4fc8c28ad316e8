"""A run's state: put together from its configuration, shared out over processes, saved and refused."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import save_tiny_world, tiny_policy, tiny_reward_model, tiny_run, tiny_tokenizer, tree

from kleash.checkpoint import checkpoints_in, read_checkpoint_state
from kleash.config import RunConfig, config_from
from kleash.errors import ConfigError, RunDirectoryError
from kleash.leash import FixedLeash
from kleash.models import ValueModel, fingerprint, load_causal_model
from kleash.parts import Given, load_parts
from kleash.run import Run, run_from, save
from kleash.scorers import FunctionScorer, ModelScorer, WeightedScorer


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_tiny_world(tmp_path_factory.mktemp("world"))


def config_in(world: dict[str, str], out: Path, **changes: object) -> RunConfig:
    return config_from(tiny_run(world, out, **changes), "run.yaml")


@pytest.fixture
def run(world: dict[str, str], tmp_path: Path) -> Run:
    return run_from(config_in(world, tmp_path / "run"), Given(), resume=False)


def test_a_new_run_is_written_down_before_its_first_update(run: Run, world: dict[str, str]) -> None:
    assert (run.completed, run.leash) == (0, FixedLeash(beta=0.1))
    assert sorted(path.name for path in run.directory.path.iterdir()) == ["checkpoints", "config.yaml"]
    state = read_checkpoint_state(run.directory.checkpoints / "000000")
    assert (state.update, state.leash, state.seed) == (0, {"beta": 0.1}, 0)
    assert state.reference_fingerprint == run.reference_fingerprint
    assert state.reference_fingerprint == fingerprint(load_causal_model(world["policy"], "policy"))


def test_the_reference_is_a_copy_that_neither_learns_nor_moves(run: Run) -> None:
    policy, reference = run.parts.policy, run.parts.reference
    assert fingerprint(policy) == fingerprint(reference)
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    assert not {id(p) for p in reference.parameters()} & {id(p) for p in policy.parameters()}
    assert not any(model.training for model in (policy, reference, run.parts.value))


def test_saving_twice_writes_once(run: Run) -> None:
    before = tree(run.directory.path)
    assert save(run) == run.directory.checkpoints / "000000"
    assert tree(run.directory.path) == before


def test_the_rows_of_all_processes_are_all_rows_once() -> None:
    rows = list(range(12))
    shares = []
    for index in range(3):
        process = SimpleNamespace(accelerator=SimpleNamespace(num_processes=3, process_index=index))
        shares.append(rows[Run.share(process, 12)])
    assert shares == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_prompts_must_divide_over_processes_and_minibatches() -> None:
    from kleash.run import _require_even_shares

    config = RunConfig(
        policy="p", reward="r", prompts="x", out="o", rollout={"prompts_per_update": 12}, ppo={"minibatches": 2}
    )
    _require_even_shares(config, 3)
    with pytest.raises(ConfigError, match=r"a multiple of 4 processes x 2 ppo\.minibatches, found 12"):
        _require_even_shares(config, 4)


def test_processes_that_cannot_hear_each_other_are_refused(
    world: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the launcher started two processes and accelerate set up one, both would write the same run."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    with pytest.raises(ConfigError, match="Expected 2 processes that work together"):
        run_from(config_in(world, tmp_path / "run"), Given(), resume=False)
    assert tree(tmp_path) == {}


def test_trackers_must_be_known_and_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    from kleash.run import _require_trackers

    monkeypatch.setattr("kleash.run.get_available_trackers", lambda: ["tensorboard"])
    _require_trackers(())
    _require_trackers(("tensorboard", "all"))
    with pytest.raises(ConfigError, match="Expected the tracker wandb to be installed"):
        _require_trackers(("tensorboard", "wandb"))
    with pytest.raises(ConfigError, match=r"Expected trackers among .*tensorboard, .*found tensorbored"):
        _require_trackers(("tensorbored",))


def test_a_resumed_run_may_lie_elsewhere_and_save_at_other_times_and_nothing_else(
    run: Run, world: dict[str, str], tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    run.directory.path.rename(moved)
    again = run_from(config_in(world, moved, checkpoint={"every": 7}, updates=9), Given(), resume=True)
    assert again.completed == 0
    assert [path.name for path in checkpoints_in(moved / "checkpoints")] == ["000000"]
    with pytest.raises(RunDirectoryError, match="found another leash, pad_token;"):
        run_from(config_in(world, moved, leash={"beta": 0.2}, pad_token="<eos>"), Given(), resume=True)
    with pytest.raises(RunDirectoryError, match="found another ppo, updates;"):
        run_from(
            config_in(world, moved, updates=11, ppo={"minibatches": 2, "learning_rate_schedule": "linear"}),
            Given(),
            resume=True,
        )


def test_a_reward_model_is_the_start_of_the_value_model(world: dict[str, str], tmp_path: Path) -> None:
    parts = load_parts(config_in(world, tmp_path), Given())
    assert isinstance(parts.scorer, ModelScorer)
    assert fingerprint(parts.value.head) == fingerprint(tiny_reward_model().score)
    assert fingerprint(parts.value.trunk) == fingerprint(tiny_reward_model().base_model)


def test_without_a_reward_model_the_value_model_starts_from_the_policy_at_0(
    world: dict[str, str], tmp_path: Path
) -> None:
    given = Given(scorer=FunctionScorer(function=lambda prompts, completions: [0.0] * len(prompts), name="nought"))
    value = load_parts(config_in(world, tmp_path), given).value
    assert isinstance(value, ValueModel)
    assert fingerprint(value.trunk) == fingerprint(tiny_policy().base_model)
    assert bool((value.head.weight == 0).all())


def test_a_weighted_list_becomes_a_weighted_sum(world: dict[str, str], tmp_path: Path) -> None:
    sources = [{"source": world["reward"], "weight": 0.5}, {"source": "test_run:nought", "weight": -1}]
    scorer = load_parts(config_in(world, tmp_path, reward=sources), Given()).scorer
    assert isinstance(scorer, WeightedScorer)
    assert scorer.weights == (0.5, -1.0)
    assert [type(part) for part in scorer.scorers] == [ModelScorer, FunctionScorer]


def nought(prompts: list[str], completions: list[str]) -> list[float]:
    return [0.0] * len(prompts)


def test_a_reference_of_ones_own_is_loaded_and_frozen(world: dict[str, str], tmp_path: Path) -> None:
    other = tiny_policy(7)
    other.save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    parts = load_parts(config_in(world, tmp_path / "run", reference=str(tmp_path / "other")), Given())
    assert fingerprint(parts.reference) == fingerprint(other) != fingerprint(parts.policy)
    assert not any(parameter.requires_grad for parameter in parts.reference.parameters())
