"""How often the intervals of `kleash measure` hold the truth, where the truth is a sum over every response.

    python benchmarks/coverage.py
    python benchmarks/coverage.py --cases "small drift" --responses 64 --repetitions 5000

Real models, and the very sampling, scoring, sums and intervals of `kleash measure`: one long measurement of each case
is cut into repetitions, and the first one is held to what `kleash.measure` itself says. Printed for each case and
number of responses: the true KL(policy || reference) per sequence; the share of the 95 % intervals that hold the
truth, of the exact estimate per sequence and per token and of k1 (the standard error of a share of 95 % of 1000 is
0.7 %); the mean width of k1's interval over that of the exact one; the mean error of both estimates, in its own
standard errors; and the skewness of the exact sum over responses, which is what small numbers of them suffer from.
Cases with `until` stop by themselves; their number of responses is a mean.
"""

import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from pairs import FOUR, MANY, EnumerablePair
from stream import Intervals, Stream, covered, require_what_measure_says, stream_of, width

from kleash.estimators import Interval
from kleash.measurement import FEWEST, MOST
from kleash.plan import Plan
from kleash.precision import precision_from
from kleash.seeds import derived_seed


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


UNTIL_ABOUT = 450  # responses of a repetition that stops by itself, on average and at most


@dataclass(frozen=True)
class Study:
    """What is repeated how often."""

    cases: tuple[str, ...] = tuple(CASES)
    responses: tuple[int, ...] = (32, 64, 256)
    repetitions: int = 1000
    seed: int = 0


def prompts_of(case: Case, responses: int, seed: int) -> list[str]:
    """The prompts of a long measurement."""
    return case.pair.drawn_prompts(responses, seed=seed) if case.population else list(case.pair.prompts)


def repetitions_of(stream: Stream, n: int, count: int) -> Iterator[Intervals]:
    """Intervals of one n responses after the other."""
    return (stream.intervals(start, start + n) for start in range(0, count * n, n))


def repetitions_until(case: Case, stream: Stream, until: str, count: int) -> Iterator[Intervals]:
    """Intervals of measurements that stop by themselves, one after the other."""
    prompts = len(case.pair.prompts)
    plan = Plan(prompts=prompts, samples=FEWEST, at_most=MOST, width=64, precision=precision_from(until))
    start = 0
    for _ in range(count):
        done, found = 0, None
        while (stop := plan.stop_after(done, found[0] if found else None)) > done:
            done, found = stop, stream.intervals(start, start + stop)
        assert found is not None
        yield found
        start += done


def error(intervals: list[Interval], truth: float) -> float:
    """Mean error in units of its standard error."""
    errors = [interval.mean - truth for interval in intervals]
    return statistics.fmean(errors) / (statistics.stdev(errors) / len(errors) ** 0.5)


def row(name: str, found: list[Intervals]) -> str:
    """A line of the table."""
    truth = CASES[name].pair.truth
    kl, per_token = truth.kl_policy_ref_per_sequence, truth.per_token(truth.k1)
    exact, exact_per_token, k1 = (list(column) for column in zip(*found, strict=True))
    cells = [
        name,
        f"{kl:.3g}",
        f"{truth.skewness(truth.exact):.1f}",
        f"{statistics.fmean(interval.n for interval in exact):.0f}",
        f"{covered(exact, kl):.1%}",
        f"{covered(exact_per_token, per_token):.1%}",
        f"{covered(k1, kl):.1%}",
        f"{width(k1) / width(exact):.1f}",
        f"{error(exact, kl):+.1f}, {error(k1, kl):+.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def main(study: Study) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    print(
        "| pair | true KL | skewness | responses | exact covers | per token | k1 covers | width k1 / exact | errors |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name in study.cases:
        case, seed = CASES[name], derived_seed(study.seed, name)
        if case.until is not None:
            stream = stream_of(case.pair, list(case.pair.prompts), UNTIL_ABOUT * study.repetitions, seed=seed)
            print(row(name, list(repetitions_until(case, stream, case.until, study.repetitions))), flush=True)
            continue
        for n in study.responses:
            stream = stream_of(
                case.pair, prompts_of(case, n * study.repetitions, seed), n * study.repetitions, seed=seed
            )
            if not case.population:
                require_what_measure_says(case.pair, stream, n, seed=seed)
            print(row(name, list(repetitions_of(stream, n, study.repetitions))), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Study, description=__doc__))
