"""The alarms of a run: rules on its records, each with a threshold, a window of updates and what to do about it.

An alarm says what has happened over the last updates. None claims to see it coming: the KL alone gives no reliable
early warning. What an alarm reads is in the records and nowhere else, so a run that is resumed raises the same ones.
A figure that is missing (None, or no such key) never raises an alarm: a rule needs at least half of its window.
"""

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Record = Mapping[str, float | int | None]
Action = Literal["off", "log", "tighten", "roll_back", "stop"]

KL = "kl_policy_ref_per_sequence"
FIRST_KL = "kl_policy_first_ref_per_sequence"  # what a reference that moves cannot hide
KL_THAT_HARMS = 5.0  # nats per sequence; below it nothing runs away, unless a budget says otherwise


@dataclass(frozen=True, kw_only=True)
class AlarmContext:
    """What the alarms know of the leash: its budget in nats per sequence, its bounds; None where it has none."""

    target_kl_per_sequence: float | None = None
    beta_min: float | None = None
    beta_max: float | None = None


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """A rule that is broken at an update.

    since:     the first update of the unbroken stretch in which it is; equal to `update` when the alarm is new.
    value:     what was compared with the threshold, in the threshold's unit.
    sentence:  figures and remedy in one line.
    """

    name: str
    update: int
    since: int
    value: float
    threshold: float
    action: Action
    sentence: str


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Why a rule is broken: the value, the threshold that it passed, and both in words."""

    value: float
    threshold: float
    words: str


# --- windows of records ----------------------------------------------------------------------------------


class History:
    """The records so far, as the rules read them: the first, the last and the best window of updates."""

    def __init__(self) -> None:
        self._records: list[Record] = []
        self._best: dict[tuple[str, int], _Best] = {}

    def __len__(self) -> int:
        return len(self._records)

    def add(self, record: Record) -> None:
        """The next update's record."""
        self._records.append(record)

    def last(self, window: int) -> Sequence[Record]:
        """The last updates; none before there are so many."""
        return self._records[-window:] if len(self) >= window else []

    def start(self, window: int) -> Sequence[Record]:
        """The first updates; none while they overlap the last ones."""
        return self._records[:window] if len(self) >= 2 * window else []

    def best(self, window: int, key: str) -> Sequence[Record]:
        """The window with the highest mean of a figure among those that do not overlap the last one.

        What was found is kept, so a call looks at new updates only.
        """
        best = self._best.setdefault((key, window), _Best())
        for first in range(best.looked_at, len(self) - 2 * window + 1):
            mean = mean_over(self._records[first : first + window], key)
            if mean is not None and mean > best.mean:
                best.first, best.mean = first, mean
            best.looked_at = first + 1
        return [] if best.first is None else self._records[best.first : best.first + window]


@dataclass
class _Best:
    """Where the best window starts, its mean, and how many windows were looked at."""

    first: int | None = None
    mean: float = -math.inf
    looked_at: int = 0


@dataclass(frozen=True, kw_only=True)
class Pooled:
    """A mean over updates and the half-width of its 95 % interval, as of independent updates."""

    mean: float
    half_width: float

    @property
    def low(self) -> float:
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        return self.mean + self.half_width


def figure_of(record: Record, key: str) -> float | None:
    """The finite number under a key, None for everything else.

    >>> [figure_of({"beta": value}, "beta") for value in (1, 0.5, None, math.nan)], figure_of({}, "beta")
    ([1.0, 0.5, None, None], None)
    """
    value = record.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return float(value) if abs(value) <= sys.float_info.max else None


def figures(records: Sequence[Record], key: str) -> list[float]:
    """The known figures of a window, none if fewer than half are known."""
    known = [value for record in records if (value := figure_of(record, key)) is not None]
    return known if 2 * len(known) >= len(records) else []


def mean_over(records: Sequence[Record], key: str) -> float | None:
    """Mean of a figure over a window."""
    known = figures(records, key)
    return sum(known) / len(known) if known else None


def median_over(records: Sequence[Record], key: str) -> float | None:
    """Median of a figure over a window: for figures that a single response can move."""
    known = figures(records, key)
    return median(known) if known else None


def pooled(records: Sequence[Record], key: str, stem: str) -> Pooled | None:
    """Mean over a window of a recorded mean, and sqrt(sum of half-widths^2) / updates around it.

    >>> row = {"score_mean": 2.0, "score_low": 1.0, "score_high": 3.0}
    >>> pooled([row] * 4, "score_mean", "score")
    Pooled(mean=2.0, half_width=0.5)
    """
    rows = [[figure_of(record, name) for name in (key, f"{stem}_low", f"{stem}_high")] for record in records]
    known = [row for row in rows if None not in row]
    if not known or 2 * len(known) < len(rows):
        return None
    half_widths = [(high - low) / 2 for _, low, high in known if low is not None and high is not None]
    means = [mean for mean, _, _ in known if mean is not None]
    return Pooled(mean=sum(means) / len(means), half_width=math.hypot(*half_widths) / len(half_widths))


# --- the rules -------------------------------------------------------------------------------------------


class AlarmConfig(BaseModel, ABC):
    """An alarm: when it is raised and what happens then."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rule: ClassVar[str]
    remedy: ClassVar[str]
    reads: ClassVar[tuple[str, ...]]

    action: Action = "log"
    """off: not looked at; log: said in the log and the report; tighten, roll_back, stop: the training loop does it."""
    threshold: float
    """What the rule compares with."""
    window: int
    """Updates that the rule looks at."""

    @field_validator("action", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: object) -> object:
        return "off" if value is False else value  # YAML reads a bare `off` as false

    @model_validator(mode="before")
    @classmethod
    def _an_action_alone(cls, content: object) -> object:
        """`entropy_collapse: stop` means {action: stop}; YAML reads a bare `off` as false."""
        if content is False:
            return {"action": "off"}
        return {"action": content} if isinstance(content, str) else content

    @abstractmethod
    def finding(self, history: History, context: AlarmContext) -> Finding | None:
        """Why the rule is broken at the last record; None where it is not, or where figures are missing."""


class DriftBeyondBudget(AlarmConfig):
    """The leash does not hold its budget.

    There is no exception for a controller that still settles: the KL starts at 0, below every budget, and the lower
    end of the interval over a whole window passes the threshold by a lasting overshoot only.
    """

    rule: ClassVar = f"lower end of the interval of `{KL}` over `window` > `threshold` * `target_kl_per_sequence`"
    remedy: ClassVar = "start from a larger beta, let the controller move faster, or lower the learning rate"
    reads: ClassVar = (KL, f"{KL}_low", f"{KL}_high")

    threshold: float = Field(1.5, ge=1)
    """Multiple of the budget that the lower end of the KL's interval may reach."""
    window: int = Field(10, ge=1)
    """Updates pooled."""

    def finding(self, history: History, context: AlarmContext) -> Finding | None:
        kl, budget = pooled(history.last(self.window), KL, KL), context.target_kl_per_sequence
        if kl is None or not budget or not kl.low / budget > self.threshold:
            return None
        words = (
            f"KL(policy || reference) is {kl.mean:.3g} nats per sequence, at least {kl.low / budget:.3g} times its "
            f"budget of {budget:.3g} (alarm above {self.threshold:.3g}): the leash does not hold"
        )
        return Finding(value=kl.low / budget, threshold=self.threshold, words=words)


class DriftRunaway(AlarmConfig):
    """The KL grows at least exponentially.

    Every run's KL rises from 0, at first about as update^2: over equal stretches its factor of growth falls, and
    faster once the leash pulls. What runs away keeps its factor or raises it. With the medians of three updates at
    the start and at the end of a window, and the highest KL of its earlier half between them:

        factor = end / highest,    factor before = highest / start

    Against the highest, an ordinary wobble is no growth. Below the budget (5 nats where there is none) nothing runs
    away; above large_kl_per_sequence a factor beyond the threshold is enough, even if it falls.
    """

    rule: ClassVar = (
        f"`{FIRST_KL}` grew over the later half of `window` by a factor > `threshold`, and either by no less than over "
        "the earlier half or to more than `large_kl_per_sequence`; and it is above its budget (5 nats without one)"
    )
    remedy: ClassVar = "go back to a checkpoint before it, then lower the learning rate or tighten the leash"
    reads: ClassVar = (FIRST_KL,)

    threshold: float = Field(3.0, gt=1)
    """Factor by which the KL may grow in half a window."""
    window: int = Field(20, ge=6)
    """Updates, of which the later half is compared with the earlier."""
    large_kl_per_sequence: float = Field(20.0, gt=0)
    """Nats per sequence above which growth beyond the threshold is an alarm even if it slows."""

    def finding(self, history: History, context: AlarmContext) -> Finding | None:
        last = history.last(self.window)
        start, end = median_over(last[:3], FIRST_KL), median_over(last[-3:], FIRST_KL)
        highest = max(figures(last[: self.window // 2], FIRST_KL), default=None)
        if start is None or end is None or highest is None or not highest > 0:
            return None
        factor, before = end / highest, highest / start if start > 0 else math.inf
        runs = factor >= before or end > self.large_kl_per_sequence
        if not (factor > self.threshold and runs and end > (context.target_kl_per_sequence or KL_THAT_HARMS)):
            return None
        words = (
            f"KL(policy || first reference) grew {before:.3g}-fold and then {factor:.3g}-fold in {self.window} "
            f"updates, to {end:.3g} nats per sequence (alarm above {self.threshold:.3g}-fold, if it does not slow or "
            f"is above {self.large_kl_per_sequence:.3g} nats): it runs away"
        )
        return Finding(value=factor, threshold=self.threshold, words=words)


class ScoreAgainstJudge(AlarmConfig):
    """Since the held-out judge's best window the score has risen, and the judge has fallen.

    The best of many windows is the best by chance too, so the threshold is above 1.
    """

    rule: ClassVar = (
        "from the window with the highest `eval_score_mean` to the last one `score_mean` rose and `eval_score_mean` "
        "fell, each by > `threshold` half-widths of the 95 % interval of its difference"
    )
    remedy: ClassVar = "compare the samples, go back to the judge's best updates, and tighten the leash"
    reads: ClassVar = (
        *("score_mean", "score_low", "score_high"),
        *("eval_score_mean", "eval_score_low", "eval_score_high"),
    )

    threshold: float = Field(2.5, ge=1)
    """Half-widths of the interval of the difference by which score and judge must part."""
    window: int = Field(5, ge=1)
    """Updates pooled on each side."""

    def finding(self, history: History, context: AlarmContext) -> Finding | None:
        best, last = history.best(self.window, "eval_score_mean"), history.last(self.window)
        judged, judged_now = (pooled(rows, "eval_score_mean", "eval_score") for rows in (best, last))
        score, score_now = (pooled(rows, "score_mean", "score") for rows in (best, last))
        if judged is None or judged_now is None or score is None or score_now is None:
            return None
        apart = min(_half_widths(judged_now, judged), _half_widths(score, score_now))
        if not apart > self.threshold:
            return None
        words = (
            f"The score rose from {score.mean:.3g} to {score_now.mean:.3g} while the held-out judge fell from "
            f"{judged.mean:.3g} to {judged_now.mean:.3g}, each by at least {apart:.3g} half-widths of its interval "
            f"(alarm above {self.threshold:.3g}): the policy learns what the reward gets wrong"
        )
        return Finding(value=apart, threshold=self.threshold, words=words)


class RepetitionCollapse(AlarmConfig):
    """Responses repeat themselves, or each other."""

    rule: ClassVar = (
        "mean of `distinct_2_per_sequence` or of `distinct_2_over_batch` over the last `window` < `threshold` * its "
        "mean over the first"
    )
    remedy: ClassVar = "read the samples, tighten the leash, or mend the reward that pays for it"
    reads: ClassVar = ("distinct_2_per_sequence", "distinct_2_over_batch")

    threshold: float = Field(0.5, gt=0, lt=1)
    """Share of the start below which the distinct pairs of tokens may not fall."""
    window: int = Field(5, ge=1)
    """Updates in the first and in the last mean."""

    def finding(self, history: History, context: AlarmContext) -> Finding | None:
        within = {"distinct_2_per_sequence": "within a response", "distinct_2_over_batch": "over all responses"}
        for key, where in within.items():
            fall = _fall_below(history, key, self.threshold, self.window)
            if fall is not None:
                words = (
                    f"Distinct pairs of tokens {where} fell to {fall.now:.0%}, {fall.value:.0%} of their start "
                    f"(alarm below {self.threshold:.0%}): the responses repeat themselves"
                )
                return Finding(value=fall.value, threshold=self.threshold, words=words)
        return None


class LengthCollapse(AlarmConfig):
    """Responses became much shorter or longer, or run into the length limit."""

    rule: ClassVar = (
        "mean of `response_length_mean` over the last `window` > `threshold` * or < 1 / `threshold` * its mean over "
        "the first, or that of `truncated_share` is higher than over the first by > `truncated_rise`"
    )
    remedy: ClassVar = "see whether the reward pays for length, and mend it or set missing_eos_penalty"
    reads: ClassVar = ("response_length_mean", "truncated_share")

    threshold: float = Field(2.0, gt=1)
    """Factor by which the mean length may grow or shrink."""
    window: int = Field(5, ge=1)
    """Updates in the first and in the last mean."""
    truncated_rise: float = Field(0.3, gt=0, le=1)
    """Rise of the share of responses cut by the length limit, 0.3 = 30 of 100 responses more."""

    def finding(self, history: History, context: AlarmContext) -> Finding | None:
        start, last = history.start(self.window), history.last(self.window)
        length, length_now = (mean_over(rows, "response_length_mean") for rows in (start, last))
        if length and length_now is not None and not 1 / self.threshold <= length_now / length <= self.threshold:
            ratio = length_now / length
            limit = self.threshold if ratio > 1 else 1 / self.threshold
            words = (
                f"Responses went from {length:.3g} to {length_now:.3g} tokens, {ratio:.3g} times their start (alarm "
                f"{'above' if ratio > 1 else 'below'} {limit:.3g}): length drifts"
            )
            return Finding(value=ratio, threshold=limit, words=words)
        cut, cut_now = (mean_over(rows, "truncated_share") for rows in (start, last))
        if cut is None or cut_now is None or not cut_now - cut > self.truncated_rise:
            return None
        words = (
            f"The length limit cuts {cut_now:.0%} of the responses, {cut:.0%} at the start (alarm at "
            f"{self.truncated_rise:.0%} more): they no longer end by themselves"
        )
        return Finding(value=cut_now - cut, threshold=self.truncated_rise, words=words)


class EntropyCollapse(AlarmConfig):
    """The policy's entropy falls far below its start."""

    rule: ClassVar = "mean of `entropy_per_token` over the last `window` < `threshold` * its mean over the first"
    remedy: ClassVar = "tighten the leash or lower the learning rate"
    reads: ClassVar = ("entropy_per_token",)

    threshold: float = Field(0.33, gt=0, lt=1)
    """Share of the start below which the entropy may not fall."""
    window: int = Field(5, ge=1)
    """Updates in the first and in the last mean."""

    def finding(self, history: History, context: AlarmContext) -> Finding | None:
        fall = _fall_below(history, "entropy_per_token", self.threshold, self.window)
        if fall is None:
            return None
        words = (
            f"Entropy fell to {fall.now:.3g} nats per token, {fall.value:.0%} of its start (alarm below "
            f"{self.threshold:.0%}): the responses are becoming alike"
        )
        return Finding(value=fall.value, threshold=self.threshold, words=words)


class HeavyRewardTail(AlarmConfig):
    """A few responses score far above the rest: such a reward can be bought at almost no KL.

    One update's tail is that of its few best scores, so the median over a window counts. With the default, 10 updates
    of 16, 64 or 256 Gaussian, exponential or Laplace scores never raised it in 300 trials each, and 10 updates of 64
    scores with a Pareto(2) tail did in 99 of 100. The tail index of a Gaussian is 1.1 in 16 scores, 2.6 in 64 and 4.0
    in 256, so no threshold suits all of them: by default the index is not looked at.

    Source: Kwa, Thomas, Garriga-Alonso 2024, Catastrophic Goodhart (arXiv 2407.14503).
    """

    rule: ClassVar = (
        "median of `score_tail_gap` over `window` > `threshold` (a Gaussian has 3.45), or median of "
        "`score_tail_index` < `least_tail_index`"
    )
    remedy: ClassVar = "read the samples with the highest scores, and bound the reward or standardise it"
    reads: ClassVar = ("score_tail_gap", "score_tail_index")

    threshold: float = Field(7.0, gt=0)
    """Gap of the scores' upper tail: a Gaussian has 3.45, an exponential 5.64, a Pareto(2) 14.7."""
    window: int = Field(10, ge=1)
    """Updates in the median."""
    least_tail_index: float = Field(0.0, ge=0)
    """Tail index below which the tail is heavy, 1.5 for 64 scores per update; 0 = not looked at."""

    def finding(self, history: History, context: AlarmContext) -> Finding | None:
        last = history.last(self.window)
        gap, index = median_over(last, "score_tail_gap"), median_over(last, "score_tail_index")
        if gap is not None and gap > self.threshold:
            tail = f"has a gap of {gap:.3g} (alarm above {self.threshold:.3g}, a Gaussian has 3.45)"
            value, threshold = gap, self.threshold
        elif index is not None and index < self.least_tail_index:
            tail = f"has the index {index:.3g} (alarm below {self.least_tail_index:.3g})"
            value, threshold = index, self.least_tail_index
        else:
            return None
        words = f"The upper tail of the scores {tail}: a few responses score far above the rest"
        return Finding(value=value, threshold=threshold, words=words)


class SamplerMismatch(AlarmConfig):
    """The log-probs at sampling are not those at scoring.

    The default is for bfloat16, whose rounding makes up to 1e-2. float32 stays below 1e-6, where 1e-4 is a sharper
    threshold; another temperature, or top-p below 1, is far beyond either.
    """

    rule: ClassVar = "median of `kl_rollout_policy_per_token_k3` over `window` > `threshold`"
    remedy: ClassVar = "give sampler and scorer one temperature, one precision and no top-k or top-p"
    reads: ClassVar = ("kl_rollout_policy_per_token_k3",)

    threshold: float = Field(0.02, gt=0)
    """Nats per token; bfloat16 stays below 0.01, float32 below 1e-6."""
    window: int = Field(3, ge=1)
    """Updates in the median."""

    def finding(self, history: History, context: AlarmContext) -> Finding | None:
        mismatch = median_over(history.last(self.window), "kl_rollout_policy_per_token_k3")
        if mismatch is None or not mismatch > self.threshold:
            return None
        words = (
            f"Sampler and scorer are {mismatch:.2g} nats per token apart (alarm above {self.threshold:.2g}): the "
            "responses are not quite the policy's"
        )
        return Finding(value=mismatch, threshold=self.threshold, words=words)


class NegativeK1(AlarmConfig):
    """The one-token estimate of the KL is below 0 beyond chance, where the exact KL is clearly above.

    The mean of k1 over the policy's own tokens is a KL, which is never negative. It is for other tokens than the
    policy's: those left by top-k or top-p, or those of another distribution than the one that scores them.
    """

    rule: ClassVar = (
        f"upper end of the interval of `{KL}_k1` over `window` < 0, while the lower end of that of `{KL}` > `threshold`"
    )
    remedy: ClassVar = "sample without top-k and top-p at the scorer's temperature, and train on the exact KL"
    reads: ClassVar = (KL, f"{KL}_low", f"{KL}_high", f"{KL}_k1", f"{KL}_k1_low", f"{KL}_k1_high")

    threshold: float = Field(0.1, ge=0)
    """Nats per sequence that the exact KL must have: near 0 the sign of k1 is chance."""
    window: int = Field(10, ge=1)
    """Updates pooled."""

    def finding(self, history: History, context: AlarmContext) -> Finding | None:
        last = history.last(self.window)
        exact, k1 = pooled(last, KL, KL), pooled(last, f"{KL}_k1", f"{KL}_k1")
        if exact is None or k1 is None or not (k1.high < 0 and exact.low > self.threshold):
            return None
        words = (
            f"The k1 estimate of KL(policy || reference) is {k1.mean:.3g} nats per sequence (interval up to "
            f"{k1.high:.2g}) while the exact KL is {exact.mean:.3g}, above {self.threshold:.3g}: the tokens are not "
            "samples of the policy"
        )
        return Finding(value=exact.low, threshold=self.threshold, words=words)


class SaturatedBeta(AlarmConfig):
    """The controller stands at a bound of beta and can do no more."""

    rule: ClassVar = "`beta` >= `beta_max` / `threshold` or <= `beta_min` * `threshold` in each update of `window`"
    remedy: ClassVar = "at beta_max lower the learning rate, at beta_min lower the budget, or widen the bounds"
    reads: ClassVar = ("beta",)

    threshold: float = Field(1.01, ge=1)
    """Factor from a bound within which beta counts as at it."""
    window: int = Field(10, ge=1)
    """Updates in a row."""

    def finding(self, history: History, context: AlarmContext) -> Finding | None:
        last = history.last(self.window)
        betas = [beta for record in last if (beta := figure_of(record, "beta")) is not None]
        if not betas or len(betas) < len(last):
            return None
        low, high = context.beta_min, context.beta_max
        if high and min(betas) > 0 and high / min(betas) <= self.threshold:
            bound, factor = f"beta_max {high:.3g}", high / min(betas)
        elif low and max(betas) / low <= self.threshold:
            bound, factor = f"beta_min {low:.3g}", max(betas) / low
        else:
            return None
        words = (
            f"Beta has stood at {bound} for {len(betas)} updates, within a factor of {factor:.4g} (alarm up to "
            f"{self.threshold:.4g}): the controller has no room left"
        )
        return Finding(value=factor, threshold=self.threshold, words=words)


@dataclass(frozen=True, kw_only=True)
class _Fall:
    """A mean over the last window, and as a share of that over the first."""

    now: float
    value: float


def _fall_below(history: History, key: str, threshold: float, window: int) -> _Fall | None:
    """The fall of a figure below a share of its start; None if it did not fall so far."""
    start, now = mean_over(history.start(window), key), mean_over(history.last(window), key)
    if start is None or now is None or not start > 0 or not now / start < threshold:
        return None
    return _Fall(now=now, value=now / start)


def _half_widths(lower: Pooled, higher: Pooled) -> float:
    """How far `higher` is above `lower`, in half-widths of the interval of their difference."""
    noise = math.hypot(lower.half_width, higher.half_width)
    difference = higher.mean - lower.mean
    return difference / noise if noise else math.copysign(math.inf, difference) if difference else 0.0


# --- all of them -----------------------------------------------------------------------------------------


class AlarmsConfig(BaseModel):
    """What raises an alarm, and what happens then; see docs/alarms.md for the rules."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    drift_beyond_budget: DriftBeyondBudget = DriftBeyondBudget()
    """The KL stays above its budget."""
    drift_runaway: DriftRunaway = DriftRunaway()
    """The KL grows at least exponentially."""
    score_against_judge: ScoreAgainstJudge = ScoreAgainstJudge()
    """The score rises while the held-out judge falls."""
    repetition_collapse: RepetitionCollapse = RepetitionCollapse()
    """Responses repeat themselves, or each other."""
    length_collapse: LengthCollapse = LengthCollapse()
    """Responses became much shorter or longer, or run into the length limit."""
    entropy_collapse: EntropyCollapse = EntropyCollapse()
    """The policy's entropy falls far below its start."""
    heavy_reward_tail: HeavyRewardTail = HeavyRewardTail()
    """A few responses score far above the rest."""
    sampler_mismatch: SamplerMismatch = SamplerMismatch()
    """The log-probs at sampling are not those at scoring."""
    negative_k1: NegativeK1 = NegativeK1()
    """The one-token estimate of the KL is below 0 beyond chance."""
    saturated_beta: SaturatedBeta = SaturatedBeta()
    """The controller stands at a bound of beta."""

    @property
    def by_name(self) -> dict[str, AlarmConfig]:
        """Every alarm under its name, in the order of their definition."""
        return {name: getattr(self, name) for name in type(self).model_fields}


KEYS = tuple(sorted({"update", *(key for alarm in AlarmsConfig().by_name.values() for key in alarm.reads)}))


class AlarmWatch:
    """Reads a run's records one by one and says which rules are broken: each record costs the windows, not the run.

    A resumed run shows its watch the records so far. After going back to a checkpoint, start a new watch and show it
    the records up to there.

    >>> watch = AlarmWatch(AlarmsConfig(), AlarmContext())
    >>> records = [{"update": update, "kl_rollout_policy_per_token_k3": 0.05} for update in (1, 2, 3, 4)]
    >>> [(alarm.name, alarm.since) for alarm in [watch.see(record) for record in records][-1]]
    [('sampler_mismatch', 3)]
    """

    def __init__(self, config: AlarmsConfig, context: AlarmContext) -> None:
        self._alarms = {name: alarm for name, alarm in config.by_name.items() if alarm.action != "off"}
        self._context = context
        self._history = History()
        self._since: dict[str, int] = {}

    def see(self, record: Record) -> list[Alarm]:
        """Which rules are broken at this record, the next of the run."""
        self._history.add(record)
        number = figure_of(record, "update")
        update = len(self._history) if number is None else int(number)
        found = {name: alarm.finding(self._history, self._context) for name, alarm in self._alarms.items()}
        self._since = {name: self._since.get(name, update) for name, finding in found.items() if finding}
        return [self._alarm(name, update, finding) for name, finding in found.items() if finding]

    def _alarm(self, name: str, update: int, finding: Finding) -> Alarm:
        rule = self._alarms[name]
        return Alarm(
            name=name,
            update=update,
            since=self._since[name],
            value=finding.value,
            threshold=finding.threshold,
            action=rule.action,
            sentence=f"{finding.words}; {rule.remedy}.",
        )


def alarms_at(records: Iterable[Record], config: AlarmsConfig, context: AlarmContext) -> list[Alarm]:
    """Which rules are broken at the last of a run's records: what an AlarmWatch says that has seen them all."""
    watch, alarms = AlarmWatch(config, context), list[Alarm]()
    for record in records:
        alarms = watch.see(record)
    return alarms
