"""Long measurements of enumerable pairs, to be cut into repetitions: how often an interval holds the truth."""

from dataclasses import dataclass

from pairs import EnumerablePair
from torch import Tensor

from kleash.estimators import Interval, mean_with_interval
from kleash.measurement import MeasureConfig, measure
from kleash.measuring import Measuring, sampled_batches
from kleash.pair import load_pair
from kleash.plan import Plan
from kleash.prompts import tokenized_prompts
from kleash.rollout import RolloutConfig
from kleash.tally import even_strata

Intervals = tuple[Interval, Interval, Interval]


@dataclass(frozen=True, kw_only=True)
class Stream:
    """One long measurement, a number for each response: exact KL, k1, tokens, and the prompt that it answers."""

    kl: Tensor
    k1: Tensor
    length: Tensor
    prompt: Tensor

    def intervals(self, start: int, stop: int) -> Intervals:
        """Of the exact KL per sequence and per token and of k1, from some of the responses."""
        rows = slice(start, stop)
        strata = even_strata(self.prompt[rows])
        return (
            mean_with_interval(self.kl[rows], strata=strata),
            mean_with_interval(self.kl[rows], self.length[rows], strata=strata),
            mean_with_interval(self.k1[rows], strata=strata),
        )


def stream_of(pair: EnumerablePair, prompts: list[str], responses: int, *, seed: int) -> Stream:
    """So many responses, sampled, scored and summed as `kleash measure` does it."""
    state = Measuring(
        pair=load_pair(pair.policy, pair.reference, tokenizer=pair.tokenizer),
        prompts=tokenized_prompts([{"prompt": text} for text in prompts], pair.tokenizer),
        plan=Plan(prompts=len(prompts), samples=responses, at_most=responses, width=responses, precision=None),
        temperature=pair.temperature,
        sampled=True,
        written_by_policy=True,
        mapped=0,
    )
    config = RolloutConfig(max_new_tokens=pair.length, temperature=pair.temperature)
    for numbers, rollout in sampled_batches(state, config, seed=seed):
        state.add(numbers, rollout)
    columns = {"kl": "kl_policy_ref", "k1": "kl_policy_ref_k1", "length": "length", "prompt": "prompt"}
    return Stream(**{name: state.tally.column(column) for name, column in columns.items()})


def require_what_measure_says(pair: EnumerablePair, stream: Stream, n: int, *, seed: int) -> None:
    """The first repetition is the measurement of so many responses with this seed, to float error."""
    config = MeasureConfig(samples=n, max_new_tokens=pair.length, temperature=pair.temperature, seed=seed)
    found = measure(pair.policy, pair.reference, prompts=list(pair.prompts), config=config, tokenizer=pair.tokenizer)
    expected = found.kl_policy_ref_per_sequence, found.kl_policy_ref_per_token, found.log_ratio_per_sequence
    for own, other in zip(stream.intervals(0, n), expected, strict=True):
        assert abs(own.low - other.low) + abs(own.high - other.high) < 1e-5 * max(1.0, abs(own.mean)), (own, other)


def covered(intervals: list[Interval], truth: float) -> float:
    """The share of the intervals that hold the truth."""
    return sum(interval.low <= truth <= interval.high for interval in intervals) / len(intervals)


def width(intervals: list[Interval]) -> float:
    """Mean width."""
    return sum(interval.high - interval.low for interval in intervals) / len(intervals)
