"""The first beta of a budget: from the spread of the reference's scores on one prompt, never from that over prompts."""

import math
from pathlib import Path

import pytest
import torch
from tiny import save_tiny_world, tiny_run
from torch import Tensor

from kleash.config import RunConfig, config_from
from kleash.errors import KleashWarning, RewardError, ValueRangeError
from kleash.first_beta import RESPONSES_PER_PROMPT, first_beta, score_std_within_prompts
from kleash.masking import one_process
from kleash.parts import Given, load_parts
from kleash.run import run_from
from kleash.scorers import FunctionScorer


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_tiny_world(tmp_path_factory.mktemp("world"))


def config_in(world: dict[str, str], out: Path, **changes: object) -> RunConfig:
    return config_from(tiny_run(world, out, **{"leash": {"target_kl_per_sequence": 2}, **changes}), "run.yaml")


def test_the_spread_is_that_around_each_prompts_own_mean() -> None:
    scores = torch.tensor([[1.0, 3.0], [101.0, 103.0], [-5.0, -7.0]])
    assert score_std_within_prompts(scores, reduce=one_process) == pytest.approx(math.sqrt(2))


def test_it_is_an_unbiased_variance() -> None:
    """Over every pair of draws from three equally likely scores the mean square is their variance, 2/3."""
    values = torch.tensor([0.0, 1.0, 2.0])
    pairs = torch.cartesian_prod(values, values)
    assert score_std_within_prompts(pairs, reduce=one_process) ** 2 == pytest.approx(2 / 3)


def test_two_processes_find_what_one_finds() -> None:
    scores = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    sums: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        sums.append(tensor)
        return tensor

    for part in scores.split(3):
        score_std_within_prompts(part, reduce=collect)
    together = score_std_within_prompts(scores[:3], reduce=lambda _: sums[0] + sums[1])
    assert together == pytest.approx(score_std_within_prompts(scores, reduce=one_process), rel=1e-12)


def test_the_run_starts_from_sigma_over_the_root_of_twice_the_budget(world: dict[str, str], tmp_path: Path) -> None:
    seen: list[list[float]] = []

    def letters(prompts: list[str], completions: list[str]) -> list[float]:
        seen.append([float(len(completion)) for completion in completions])
        return seen[-1]

    config = config_in(world, tmp_path / "run")
    parts = load_parts(config, Given(scorer=FunctionScorer(function=letters, name="letters")))
    beta = first_beta(parts, config, own=slice(0, 8), reduce=one_process)
    assert [len(scores) for scores in seen] == [8] * RESPONSES_PER_PROMPT
    sigma = torch.tensor(seen, dtype=torch.float64).var(0).mean().sqrt()
    assert beta == pytest.approx(float(sigma) / math.sqrt(2 * 2.0), rel=1e-12)
    again = first_beta(parts, config, own=slice(0, 8), reduce=one_process)
    assert again == beta


def test_a_run_with_a_budget_alone_has_that_beta_and_one_with_half_the_budget_a_root_2_larger(
    world: dict[str, str], tmp_path: Path
) -> None:
    first = run_from(config_in(world, tmp_path / "first"), Given(), resume=False).leash.beta
    second = run_from(
        config_in(world, tmp_path / "second", leash={"target_kl_per_sequence": 1}), Given(), resume=False
    ).leash.beta
    assert second == pytest.approx(first * math.sqrt(2))


def test_a_resumed_run_takes_the_beta_of_its_checkpoint(world: dict[str, str], tmp_path: Path) -> None:
    config = config_in(world, tmp_path / "run")
    beta = run_from(config, Given(), resume=False).leash.beta

    def silent(prompts: list[str], completions: list[str]) -> list[float]:
        return [0.0] * len(completions)

    given = Given(scorer=FunctionScorer(function=silent, name="silent"))  # nothing could follow from it
    with pytest.warns(KleashWarning, match="one score 0 for all"):
        assert run_from(config, given, resume=True).leash.beta == beta


def test_from_scores_that_are_all_alike_nothing_follows(world: dict[str, str], tmp_path: Path) -> None:
    def constant(prompts: list[str], completions: list[str]) -> list[float]:
        return [float(len(prompt)) for prompt in prompts]

    given = Given(scorer=FunctionScorer(function=constant, name="constant"))
    with pytest.raises(RewardError, match=r"found the same score for each of them; set leash\.beta to a number"):
        run_from(config_in(world, tmp_path / "run"), given, resume=False)
    assert not (tmp_path / "run").exists()


def test_a_beta_beyond_its_bounds_is_named_and_not_bent(world: dict[str, str], tmp_path: Path) -> None:
    leash = {"target_kl_per_sequence": 2, "beta_max": 1e-5}
    with pytest.raises(ValueRangeError, match="beta_max 1e-05"):
        run_from(config_in(world, tmp_path / "run", leash=leash), Given(), resume=False)
