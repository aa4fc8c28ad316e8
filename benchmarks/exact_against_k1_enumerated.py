"""The exact KL against k1 as the leash, in a world where the true objective is a sum over every response.

    python benchmarks/exact_against_k1_enumerated.py

A small real model answers two prompts with up to `length` words. After every update J = E[score] - beta * KL and the
KL are summed up exactly, and held to the best that any policy can have. Printed for each beta and form, as means over
the seeds: the share of the way from the start to the optimum, J-wise, that is left after half of the updates and at
the end; the updates to 90 % of the way; and how much the true KL jumps from update to update in the second half.
"""

import statistics
import sys
import tempfile
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from exact import World, generator
from game import ALL_EOS, Game
from tiny import tiny_policy

from kleash.config import LeashConfig, RunConfig
from kleash.kl_form import KLName
from kleash.parts import Given
from kleash.ppo import PPOConfig
from kleash.rollout import RolloutConfig
from kleash.run import run_from
from kleash.scorers import FunctionScorer
from kleash.training import update


@dataclass(frozen=True)
class Comparison:
    """What is compared."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    betas: tuple[float, ...] = (0.1, 0.3, 1.0)
    forms: tuple[KLName, ...] = ("k1", "exact", "blend")
    updates: int = 60
    length: int = 4
    learning_rate: float = 0.003
    whiten: bool = True
    gae_lambda: float = 0.95


@dataclass(frozen=True)
class Outcome:
    """One run: the share of the way to the optimum that is left, and the true KL, after each update."""

    left: list[float]
    kl: list[float]

    def updates_to(self, left: float) -> int:
        """The first update with so little left; one more than there are, where none has."""
        return next((i + 1 for i, value in enumerate(self.left) if value <= left), len(self.left) + 1)

    @property
    def jump(self) -> float:
        """Standard deviation of the change of the KL, second half."""
        half = self.kl[len(self.kl) // 2 :]
        return statistics.pstdev([b - a for a, b in pairwise(half)])


def played(work: Comparison, seed: int, beta: float, form: KLName, out: Path) -> Outcome:
    """Train once and look at the truth after every update."""
    world = World(vocab=4, length=work.length, eos=0, prompts=2)
    scores = torch.randn(len(world.responses), dtype=torch.float64, generator=generator(seed))
    game = Game(world=world, prompts=["cat", "dog dog"], scores=scores)
    policy = tiny_policy(seed, vocab=4, initializer_range=0.3, scale=0.3, tie_word_embeddings=False, **ALL_EOS)
    start = game.sequence_logprobs(policy)
    best = float(game.optimum(start, beta).objective)

    def truth() -> tuple[float, float]:
        drift = game.kl(policy, start)
        return game.expected(policy, scores) - beta * drift, drift

    config = RunConfig(
        policy="a tiny one",
        reward="a book",
        prompts="two",
        out=str(out),
        kl=form,
        leash=LeashConfig(beta=beta),
        rollout=RolloutConfig(prompts_per_update=64, max_new_tokens=work.length),
        ppo=PPOConfig(
            epochs=2,
            minibatches=4,
            learning_rate=work.learning_rate,
            gae_lambda=work.gae_lambda,
            value_coefficient=0.5,
            value_clip_range=10.0,
            whiten_advantages=work.whiten,
        ),
        updates=work.updates,
        seed=seed,
    )
    scorer = FunctionScorer(function=game.reward, name="book")
    given = Given(
        policy=policy, tokenizer=game.tokenizer, scorer=scorer, rows=[{"prompt": text} for text in game.prompts]
    )
    run = run_from(config, given, resume=False)
    first, _ = truth()
    left, kl = [], []
    for number in range(1, work.updates + 1):
        update(run, number)
        now, drift = truth()
        left.append((best - now) / (best - first))
        kl.append(drift)
    return Outcome(left=left, kl=kl)


def main(work: Comparison) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    print("| beta | kl | left at half | left at the end | updates to 90 % | true KL at the end | jump of the true KL |")
    print("|---|---|---|---|---|---|---|")
    for beta, form in product(work.betas, work.forms):
        with tempfile.TemporaryDirectory() as directory:
            runs = [played(work, seed, beta, form, Path(directory) / str(seed)) for seed in work.seeds]
        last_tenth = max(1, work.updates // 10)
        columns = [
            [run.left[len(run.left) // 2] for run in runs],
            [statistics.fmean(run.left[-last_tenth:]) for run in runs],
            [run.updates_to(0.1) for run in runs],
            [run.kl[-1] for run in runs],
            [run.jump for run in runs],
        ]
        cells = [
            f"{statistics.fmean(column):.3f} ±{statistics.stdev(column) / len(column) ** 0.5:.3f}" for column in columns
        ]
        print(f"| {beta:g} | {form} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Comparison, description=__doc__))
