"""Variance of the policy gradient at fixed parameters: the exact KL against k1, on a run's checkpoint.

    python benchmarks/gradient_variance.py --run runs/demo/good --batches 200

Takes policy, value model, reward and prompts of a run (that must have a checkpoint), samples fresh batches from the
policy, and takes each batch's policy gradient under both forms, before any step. With g_i the gradient of batch i
(times what the advantages were divided by, so that all forms estimate the same vector):

    noise = trace of the covariance = mean |g_i|^2 - |mean g|^2, unbiased;   signal = |mean g|^2 less its own noise

`share of the score` leaves the KL out (beta = 0): the noise that no leash can take away. `leash alone` leaves the
score out. The value model is the run's own, trained with the form that the run used.
"""

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import tyro
from torch import Tensor

from kleash.batch import Rollout, micro_batch_of
from kleash.config import RunConfig, read_config
from kleash.kl_form import FORMS, KLName
from kleash.masking import one_process
from kleash.parts import Given
from kleash.ppo import PPOConfig, Targets, micro_batch_sums
from kleash.run import Run, run_from
from kleash.scoring import score_rollout
from kleash.targets import targets_of
from kleash.training import judged, sampled


@dataclass(frozen=True)
class Work:
    """What is measured."""

    run: Path
    batches: int = 200
    betas: tuple[float, ...] = (0.25, 3.0)
    forms: tuple[KLName, ...] = ("k1", "exact", "blend")
    first_update: int = 1_000_000
    """Number that the first batch's prompts and random numbers follow from."""


@dataclass
class Spread:
    """Running sums of gradients in float64."""

    count: int = 0
    squares: float = 0.0
    total: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64))

    def add(self, gradient: Tensor) -> None:
        self.count += 1
        self.squares += float(gradient.square().sum())
        self.total = self.total + gradient

    @property
    def noise(self) -> float:
        """Trace of the covariance of one batch's gradient."""
        mean_square = float((self.total / self.count).square().sum())
        return (self.squares / self.count - mean_square) * self.count / (self.count - 1)

    @property
    def signal(self) -> float:
        """Squared norm of the expected gradient."""
        return float((self.total / self.count).square().sum()) - self.noise / self.count


def gradients(run: Run, work: Work, number: int) -> Iterator[tuple[tuple[str, float, str], Tensor]]:
    """The policy's gradient on one fresh batch for every (form, beta, part of the objective)."""
    prompts, rollout = sampled(run, number)
    scores, _ = judged(run, prompts, rollout)
    rows = torch.arange(len(prompts))
    temperature = run.config.rollout.temperature
    scored = score_rollout(run.models, rollout, [rows], temperature=temperature, keep_ref_states=True)
    config = run.config.ppo.model_copy(update={"whiten_advantages": False})
    wholes = [(form, beta, "whole") for form in work.forms for beta in work.betas]
    alone = [(form, 1.0, "leash alone") for form in work.forms]
    for form, beta, part in [*wholes, *alone, ("k1", 0.0, "score alone")]:
        own = torch.zeros_like(scores) if part == "leash alone" else scores
        values = torch.zeros_like(scored.values) if part == "leash alone" else scored.values
        aim = targets_of(
            rollout, replace(scored, values=values), own, config, form=FORMS[form], beta=beta, reduce=one_process
        )
        yield (form, beta, part), _gradient(run, rows, rollout, aim.targets, config, temperature)


def _gradient(
    run: Run, rows: Tensor, rollout: Rollout, targets: Targets, config: PPOConfig, temperature: float
) -> Tensor:
    parameters = [p for p in run.parts.policy.parameters() if p.requires_grad]
    part = micro_batch_of(rollout, rows)
    sums = micro_batch_sums(run.models, part, targets, config, temperature=temperature)
    loss = (sums.policy_loss + sums.leash_loss) / sums.tokens
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]).double()


def loaded(work: Work, out: Path) -> Run:
    """The run at its last checkpoint, in a copy of its directory."""
    shutil.copytree(work.run, out, ignore=shutil.ignore_patterns("*.html"))
    config: RunConfig = read_config(out / "config.yaml").model_copy(update={"out": str(out)})
    return run_from(config, Given(), resume=True)


def main(work: Work) -> None:
    """Print the table."""
    spreads: dict[tuple[str, float, str], Spread] = {}
    with tempfile.TemporaryDirectory() as directory:
        run = loaded(work, Path(directory) / "run")
        for number in range(work.batches):
            for what, gradient in gradients(run, work, work.first_update + number):
                spreads.setdefault(what, Spread()).add(gradient)
    size = run.config.rollout.prompts_per_update
    print(f"{work.run.name} after {run.completed} updates, {work.batches} batches of {size}")
    print(
        f"{'objective':<14}{'beta':>6}  {'form':<7}{'noise':>11}{'signal':>11}{'noise / signal':>16}{'against k1':>12}"
    )
    for (form, beta, part), spread in spreads.items():
        k1 = spreads[("k1", beta, part)]
        print(
            f"{part:<14}{beta:>6g}  {form:<7}{spread.noise:>11.3e}{spread.signal:>11.3e}"
            f"{spread.noise / spread.signal:>16.2f}{spread.noise / k1.noise:>12.3f}"
        )


if __name__ == "__main__":
    main(tyro.cli(Work, description=__doc__))
