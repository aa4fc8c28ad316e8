"""The demo: a small world, one policy trained in it at three leashes, and what came of it.

world (prompts, fine-tuned policy, reward model) -> three runs -> held-out evaluation -> table, summary, page
"""

import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kleash.config import LeashConfig, RunConfig
from kleash.demo.build import DemoWorld, build_world
from kleash.demo.evaluation import Evaluation, evaluate
from kleash.demo.runs import final_policy, train_side_by_side
from kleash.errors import RunDirectoryError
from kleash.ppo import PPOConfig
from kleash.progress import silent_libraries
from kleash.report import write_report
from kleash.rollout import RolloutConfig
from kleash.run_directory import write_atomically

LEASHES = {"none": 0.0, "good": 0.25, "tight": 3.0}
LABELS = {"none": "no leash", "good": "good leash", "tight": "tight leash"}
UPDATES = 60
RESPONSE_LENGTH = 40


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One leash of the demo: the policy on held-out prompts before and after."""

    leash: str
    beta: float
    start: Evaluation
    end: Evaluation

    def summary(self) -> dict[str, str | float]:
        """The entry of summary.json."""
        kl = self.end.kl_policy_ref_per_sequence
        return {
            "leash": self.leash,
            "beta": self.beta,
            "score_start": self.start.score.mean,
            "score_end": self.end.score.mean,
            "gold_start": self.start.gold.mean,
            "gold_end": self.end.gold.mean,
            "kl_policy_ref_per_sequence_end": kl.mean,
            "kl_policy_ref_per_sequence_end_low": kl.low,
            "kl_policy_ref_per_sequence_end_high": kl.high,
        }


def play(out: Path, *, seed: int) -> list[Outcome]:
    """Play the whole demo into `out`.

    Raises:
      RunDirectoryError: `out` holds something already.
    """
    if out.exists() and any(out.iterdir()):
        raise RunDirectoryError(
            f"Expected an empty directory for the demo, found files in {out}; choose another --out."
        )
    screen = Console(stderr=True, highlight=False, soft_wrap=True)
    screen.print("[bold]The world[/bold]: questions about a household, answered by a small language model")
    world = build_world(out / "world", seed=seed, announce=lambda line: screen.print(f"  {line}"))
    screen.print(
        f"  the reward model orders {world.reward_model_accuracy:.0%} of held-out pairs as the labeller did; "
        f"the gold judge itself {world.labeller_accuracy:.0%}\n"
    )
    screen.print("[bold]The runs[/bold]: the same policy, prompts and seed at three leashes, side by side")
    configs = [_config(world, out / leash, beta=beta, seed=seed) for leash, beta in LEASHES.items()]
    train_side_by_side(configs, screen)
    outcomes = _outcomes(world, configs, seed)
    summary = json.dumps([outcome.summary() for outcome in outcomes], indent=2)
    write_atomically(out / "summary.json", summary + "\n")
    title, labels = "kleash demo: one policy, three leashes", list(LABELS.values())
    page = write_report([out / leash for leash in LEASHES], out / "report.html", labels=labels, title=title)
    _print_outcomes(outcomes, Console(highlight=False))
    print(f"\nsummary  {out / 'summary.json'}\nreport   {page}")
    return outcomes


def _config(world: DemoWorld, out: Path, *, beta: float, seed: int) -> RunConfig:
    """The run of one leash: what a user would write in run.yaml."""
    return RunConfig(
        policy=str(world.policy),
        reward=str(world.reward),
        eval_reward="kleash.demo.gold:gold_judge",
        prompts=str(world.prompts),
        out=str(out),
        leash=LeashConfig(beta=beta),
        rollout=RolloutConfig(prompts_per_update=64, max_new_tokens=RESPONSE_LENGTH),
        ppo=PPOConfig(epochs=2, minibatches=4, learning_rate=3e-4),
        updates=UPDATES,
        seed=seed,
    )


def _outcomes(world: DemoWorld, configs: list[RunConfig], seed: int) -> list[Outcome]:
    """Start and end of every run on the held-out prompts."""
    with silent_libraries():
        start = _evaluated(world, world.policy, seed)
        return [
            Outcome(leash=leash, beta=beta, start=start, end=_evaluated(world, final_policy(config), seed))
            for (leash, beta), config in zip(LEASHES.items(), configs, strict=True)
        ]


def _evaluated(world: DemoWorld, policy: Path, seed: int) -> Evaluation:
    return evaluate(
        policy,
        world.policy,
        reward=world.reward,
        prompts=world.heldout_prompts,
        length=RESPONSE_LENGTH,
        seed=seed,
    )


def _print_outcomes(outcomes: list[Outcome], screen: Console) -> None:
    table = Table(title="On held-out prompts, before and after", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in ("leash", "beta", "score", "gold (never trains)", "KL(policy || reference), nats/response"):
        table.add_column(name, justify="left" if name == "leash" else "right")
    for outcome in outcomes:
        kl = outcome.end.kl_policy_ref_per_sequence
        table.add_row(
            outcome.leash,
            f"{outcome.beta:g}",
            f"{outcome.start.score.mean:+.2f} -> {outcome.end.score.mean:+.2f}",
            f"{outcome.start.gold.mean:+.2f} -> {outcome.end.gold.mean:+.2f}",
            f"{kl.mean:.1f} ±{(kl.high - kl.low) / 2:.1f}",
        )
    screen.print(table)
