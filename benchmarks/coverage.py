"""How often the intervals of `kleash measure` hold the truth, where the truth is a sum over every response.

    python benchmarks/coverage.py
    python benchmarks/coverage.py --cases "small drift" --responses 64 --repetitions 5000

Each repetition is a whole measurement with a seed of its own: real models, sampling, scoring, intervals. Printed for
each case and number of responses: the true KL(policy || reference) per sequence; the share of the 95 % intervals that
hold the truth, of the exact estimate per sequence and per token and of k1 (the standard error of a share of 95 % of
1000 is 0.7 %); the mean width of k1's interval over that of the exact one; and the mean error of both estimates, in
its own standard errors. Cases with `until` stop by themselves; their number of responses is a mean.
"""

import statistics
import sys
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from exact import generator
from pairs import LETTERS, EnumerablePair

from kleash.estimators import Interval
from kleash.measure import MeasureConfig, measure
from kleash.measured import MeasuredDrift
from kleash.seeds import derived_seed

FOUR = ("b", "c", "b c", "d c b")
MANY = tuple(" ".join(word) for length in (1, 2, 3) for word in product(LETTERS[1:5], repeat=length))


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is measured. `population`: each response answers a prompt of its own, drawn from all of the pair's."""

    pair: EnumerablePair
    population: bool = False
    until: str | None = None


WITH_EOS = EnumerablePair(eos=True, seed=1)
CASES = {
    "small drift": Case(pair=EnumerablePair(drift=0.05, seed=1)),
    "some drift": Case(pair=EnumerablePair(seed=1)),
    "large drift": Case(pair=EnumerablePair(drift=1.0, seed=1)),
    "six tokens": Case(pair=EnumerablePair(vocab=6, length=3, seed=1)),
    "hot": Case(pair=EnumerablePair(temperature=2.0, seed=1)),
    "cold": Case(pair=EnumerablePair(temperature=0.7, seed=1)),
    "EOS, small drift": Case(pair=replace(WITH_EOS, drift=0.05)),
    "EOS, some drift": Case(pair=WITH_EOS),
    "EOS, large drift": Case(pair=replace(WITH_EOS, drift=0.5)),
    "EOS, llama": Case(pair=EnumerablePair(architecture="llama", eos=True, seed=2)),
    "four prompts": Case(pair=EnumerablePair(prompts=FOUR, seed=1)),
    "EOS, four prompts": Case(pair=replace(WITH_EOS, prompts=FOUR)),
    "EOS, 84 prompts, one response each": Case(pair=replace(WITH_EOS, prompts=MANY), population=True),
    "small drift, 84 prompts, one response each": Case(
        pair=EnumerablePair(drift=0.05, prompts=MANY, seed=1), population=True
    ),
    "nearly deterministic": Case(pair=EnumerablePair(sharpness=3.0, seed=0)),
    "deterministic but for rare events": Case(pair=EnumerablePair(sharpness=3.0, seed=2)),
    "EOS, some drift, until 10%": Case(pair=WITH_EOS, until="10%"),
    "EOS, four prompts, until 10%": Case(pair=replace(WITH_EOS, prompts=FOUR), until="10%"),
    "EOS, large drift, until 5%": Case(pair=replace(WITH_EOS, drift=0.5), until="5%"),
}


@dataclass(frozen=True)
class Study:
    """What is repeated how often."""

    cases: tuple[str, ...] = tuple(CASES)
    responses: tuple[int, ...] = (32, 64, 256)
    repetitions: int = 1000


def measured_once(case: Case, n: int, seed: int) -> MeasuredDrift:
    """One repetition."""
    pair = case.pair
    prompts = list(pair.prompts)
    if case.population:
        drawn = torch.randint(len(prompts), (n,), generator=generator(seed))
        prompts = [prompts[number] for number in drawn.tolist()]
    config = MeasureConfig(
        samples=None if case.until else n,
        until=case.until,
        max_new_tokens=pair.length,
        temperature=pair.temperature,
        seed=seed,
    )
    return measure(pair.policy, pair.reference, prompts=prompts, config=config, tokenizer=pair.tokenizer)


def covered(intervals: list[Interval], truth: float) -> float:
    """The share of the intervals that hold the truth."""
    return statistics.fmean(interval.low <= truth <= interval.high for interval in intervals)


def error(intervals: list[Interval], truth: float) -> float:
    """Mean error in units of its standard error."""
    errors = [interval.mean - truth for interval in intervals]
    return statistics.fmean(errors) / (statistics.stdev(errors) / len(errors) ** 0.5)


def width(intervals: list[Interval]) -> float:
    """Mean width."""
    return statistics.fmean(interval.high - interval.low for interval in intervals)


def row(name: str, n: int, repetitions: int) -> str:
    """A line of the table."""
    case, truth = CASES[name], CASES[name].pair.truth
    seeds = [derived_seed(repetition, name, n) for repetition in range(repetitions)]
    found = [measured_once(case, n, seed) for seed in seeds]
    kl, per_token = truth.kl_policy_ref_per_sequence, truth.per_token(truth.k1)
    exact, k1 = [one.kl_policy_ref_per_sequence for one in found], [one.log_ratio_per_sequence for one in found]
    cells = [
        name,
        f"{kl:.4g}",
        f"{statistics.fmean(interval.n for interval in exact):.0f}",
        f"{covered(exact, kl):.1%}",
        f"{covered([one.kl_policy_ref_per_token for one in found], per_token):.1%}",
        f"{covered(k1, kl):.1%}",
        f"{width(k1) / width(exact):.1f}",
        f"{error(exact, kl):+.1f}, {error(k1, kl):+.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def main(study: Study) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    print("| pair | true KL | responses | exact covers | per token | k1 covers | width k1 / exact | bias: exact, k1 |")
    print("|---|---|---|---|---|---|---|---|")
    for name in study.cases:
        for n in study.responses if CASES[name].until is None else (0,):
            print(row(name, n, study.repetitions), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Study, description=__doc__))
