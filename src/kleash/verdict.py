"""What a run's records say, in words: did it get better, how far did it drift, where to look.

Small pure functions over records; a sentence claims no more than the 95% intervals in the records allow.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kleash.alarms import FIRST_KL, KL, figure_of
from kleash.best_of_n import BestOfN
from kleash.estimators import Interval
from kleash.frontier import Frontier
from kleash.overoptimisation import OveroptimisationCurve

Record = Mapping[str, Any]

HELD_WITHIN = 0.1  # of a budget
LEAST_FALL = 2.0  # from its peak, in half-widths, before a judge's fall is pointed out
MINUS, ARROW, PLUS_MINUS = "\u2212", "\u2192", "\u00a0\u00b1\u00a0"


@dataclass(frozen=True)
class Run:
    """One run directory, read.

    drift_maps: of the update halfway, where it drifted, and of the last update that did.
    token_maps: responses of the first and of the newest mapped update, token by token.
    """

    label: str
    config: Record
    records: Sequence[Record]
    timings: Sequence[Record]
    samples: Sequence[Record]
    alarms: Sequence[Record] = ()
    roll_backs: Sequence[Record] = ()
    drift_maps: Sequence[Record] = ()
    token_maps: Sequence[Record] = ()


@dataclass(frozen=True)
class Estimate:
    """A mean over a few updates and the half-width of its 95% interval, None where none was recorded."""

    mean: float
    half_width: float | None


@dataclass(frozen=True)
class Change:
    """A quantity at the start and at the end of a run."""

    start: Estimate
    end: Estimate

    @property
    def direction(self) -> str:
        """'rose' or 'fell' when beyond the interval of the difference, else 'held'; 'went' without intervals."""
        if self.start.half_width is None or self.end.half_width is None:
            return "went"
        noise = math.hypot(self.start.half_width, self.end.half_width)
        difference = self.end.mean - self.start.mean
        return "held" if abs(difference) <= noise else "rose" if difference > 0 else "fell"


@dataclass(frozen=True)
class Held:
    """What the second half of a run made of its budget, both in nats per sequence."""

    budget: float
    mean: float

    @property
    def held(self) -> bool:
        return abs(self.mean - self.budget) <= HELD_WITHIN * self.budget

    @property
    def off(self) -> str:
        """How far the mean is from the budget.

        >>> Held(6, 6.3).off, Held(6, 4.5).off, Held(6, 18).off, Held(6, 6.01).off
        ('5% above it', '25% below it', '3.0 times it', 'within 1% of it')
        """
        ratio = self.mean / self.budget
        if ratio >= 2:
            return f"{ratio:.1f} times it"
        share = f"{abs(ratio - 1):.0%}"
        return "within 1% of it" if share == "0%" else f"{share} {'above' if ratio > 1 else 'below'} it"


@dataclass(frozen=True)
class NotedAlarm:
    """All rows of one alarm.

    begins:    the first update of each stretch over which it stood.
    last:      the update of its newest row.
    sentence:  that row's.
    """

    name: str
    begins: Sequence[int]
    last: int
    sentence: str

    @property
    def text(self) -> str:
        """Since when, then the sentence."""
        earlier = f" (earlier from {' and '.join(map(str, self.begins[:-1]))})" if len(self.begins) > 1 else ""
        if self.last == self.begins[-1]:
            return f"At update {self.last}{earlier}: {self.sentence}"
        return f"From update {self.begins[-1]}{earlier}, last noted at update {self.last}: {self.sentence}"


@dataclass(frozen=True)
class Verdict:
    """What happened, in plain words; tone is good, bad, caution or neutral."""

    text: str
    tone: str


# --- numbers ---------------------------------------------------------------------------------------------


def series(rows: Iterable[Record], key: str) -> list[float | None]:
    """A key's number in each row, rounded to what a plot can show."""
    values = (figure_of(row, key) for row in rows)
    return [None if value is None else float(f"{value:.5g}") for value in values]


def windows(updates: int) -> tuple[int, int]:
    """How many updates make the start and the end of a run; the start is short, as the policy soon moves.

    >>> [windows(updates) for updates in (1, 4, 30, 120, 5000)]
    [(1, 1), (1, 1), (1, 3), (3, 10), (3, 10)]
    """
    last = max(1, min(10, updates // 10))
    return max(1, last // 3), last


def estimate(records: Sequence[Record], mean_key: str, stem: str) -> Estimate | None:
    """Mean over updates of a recorded mean, and its interval as of independent updates."""
    means = [value for row in records if (value := figure_of(row, mean_key)) is not None]
    if not means:
        return None
    bounds = [(figure_of(row, stem + "_low"), figure_of(row, stem + "_high")) for row in records]
    halves = [(high - low) / 2 for low, high in bounds if low is not None and high is not None]
    known = len(halves) == len(means)
    return Estimate(math.fsum(means) / len(means), math.hypot(*halves) / len(halves) if known else None)


def change(records: Sequence[Record], mean_key: str, stem: str) -> Change | None:
    """A quantity over the first and over the last few updates; None where it was not recorded."""
    first, last = windows(len(records))
    start = estimate(records[:first], mean_key, stem)
    end = estimate(records[-last:], mean_key, stem)
    return Change(start, end) if start and end else None


def score_change(run: Run) -> Change | None:
    return change(run.records, "score_mean", "score")


def judge_change(run: Run) -> Change | None:
    return change(run.records, "eval_score_mean", "eval_score")


def drift(run: Run) -> Estimate | None:
    moved = change(run.records, KL, KL)
    return moved.end if moved else None


def leash_figure(run: Run, key: str) -> float | None:
    """A number among the leash's settings; None where it is not set."""
    leash = run.config.get("leash")
    return figure_of(leash, key) if isinstance(leash, dict) else None


def budget_held(run: Run) -> Held | None:
    """The mean KL of the second half of the updates beside the budget; None without one, or before two updates."""
    budget = leash_figure(run, "target_kl_per_sequence")
    found = estimate(run.records[len(run.records) // 2 :], KL, KL)
    return Held(budget, found.mean) if budget and found and len(run.records) > 1 else None


def reference_moves(run: Run) -> bool:
    """Whether the drift from the first reference ever differs from the drift from the reference."""
    pairs = ((figure_of(row, KL), figure_of(row, FIRST_KL)) for row in run.records)
    known = [(kl, first) for kl, first in pairs if kl is not None and first is not None]
    return any(not math.isclose(kl, first, rel_tol=1e-6, abs_tol=1e-9) for kl, first in known)


def number(value: float | None, decimals: int | None = None) -> str:
    """A number for reading: about three digits, a true minus sign, a dash for nothing.

    >>> [number(value) for value in (0.0, 0.0512, 1.978, 12.34, 250.2, 2.5e-05, None)]
    ['0', '0.051', '1.98', '12.3', '250', '2.5e-05', '-']
    """
    if value is None:
        return "-"
    sign, size = MINUS if value < 0 else "", abs(value)
    if decimals is not None:
        return f"{sign}{size:.{decimals}f}"
    if size and not 1e-3 <= size < 1e6:
        return f"{sign}{size:.2g}"
    fitting = (digits for digits, least in enumerate((100, 10, 0.1, 0)) if size >= least)
    return f"{sign}{size:.{next(fitting) if size else 0}f}"


def interval(value: Estimate | None) -> str:
    """Mean and half-width, to two digits of the half-width.

    >>> interval(Estimate(3.712, 0.41)).isascii(), interval(Estimate(3.712, None))
    (False, '3.71')
    """
    if value is None or not value.half_width:
        return number(value.mean if value else None)
    decimals = min(4, max(0, 1 - math.floor(math.log10(value.half_width))))
    return f"{number(value.mean, decimals)}{PLUS_MINUS}{number(value.half_width, decimals)}"


# --- the verdict -----------------------------------------------------------------------------------------

# (score, held-out judge): tone and sentence. Nothing is called hacking unless the judge fell clearly.
SENTENCES = {
    ("rose", "rose"): ("good", "Score rose {score}, and {judge} rose too, {judged}."),
    ("rose", "held"): (
        "caution",
        "Score rose {score}, but {judge} did not clearly move, {judged}: the gain may be the reward model's alone.",
    ),
    ("rose", "fell"): ("bad", "Score rose {score} while {judge} fell {judged}: the policy is hacking the reward."),
    ("held", "rose"): ("good", "Score did not clearly move, {score}, while {judge} rose {judged}."),
    ("held", "held"): ("neutral", "Neither score, {score}, nor {judge}, {judged}, clearly moved."),
    ("held", "fell"): ("bad", "Score did not clearly move, {score}, while {judge} fell {judged}."),
    ("fell", "rose"): ("caution", "Score fell {score} while {judge} rose {judged}: the two disagree."),
    ("fell", "held"): ("bad", "Score fell {score}, and {judge} did not clearly move, {judged}."),
    ("fell", "fell"): ("bad", "Score fell {score}, and {judge} fell too, {judged}."),
}
UNJUDGED = {
    "rose": ("neutral", "Score rose {score}."),
    "held": ("neutral", "Score did not clearly move, {score}."),
    "fell": ("bad", "Score fell {score}."),
}
NO_JUDGE = "Without a held-out judge this page cannot tell better responses from a fooled reward model."


def path_of(moved: Change) -> str:
    return f"from {number(moved.start.mean)} to {number(moved.end.mean)}"


def judge_name(runs: Sequence[Run]) -> str:
    """What the page calls the held-out judge: the demo's is gold."""
    gold = all(str(run.config.get("eval_reward")).endswith("gold_judge") for run in runs)
    return "gold" if gold else "the held-out judge"


def run_verdict(run: Run) -> Verdict:
    """One run in one or two sentences: did it get better, how far did it drift."""
    score, judged, drifted = score_change(run), judge_change(run), drift_text(run)
    if score is None:
        return Verdict(f"The records hold no scores.{drifted}", "neutral")
    if len(run.records) == 1:
        return Verdict(f"One update so far, nothing to compare yet: score {interval(score.end)}.{drifted}", "neutral")
    words = {"score": path_of(score), "judge": judge_name([run]), "judged": path_of(judged) if judged else ""}
    if "went" in (score.direction, judged.direction if judged else ""):
        also = ", and {judge} {judged}" if judged else ""
        text = "Score went {score}" + also + ". Without intervals in the records this may be noise."
        return Verdict(text.format_map(words) + drifted, "neutral")
    tone, text = SENTENCES[score.direction, judged.direction] if judged else UNJUDGED[score.direction]
    budget = budget_held(run)
    if budget and not budget.held and budget.mean > budget.budget and tone in ("good", "neutral"):
        tone = "caution"
    return Verdict(text.format_map(words) + drifted + ("" if judged else f" {NO_JUDGE}"), tone)


def drift_text(run: Run) -> str:
    """How far the policy went, and whether it held its budget; empty where no KL was recorded."""
    moved, budget = drift(run), budget_held(run)
    text = f" Drift: {interval(moved)} nats per sequence" if moved else ""
    if moved and reference_moves(run):
        first = change(run.records, FIRST_KL, FIRST_KL)
        text += f" from its moving reference, {interval(first.end)} from the first one" if first else ""
    text += "." if text else ""
    if budget:
        found = "held" if budget.held else "missed"
        text += (
            f" The second half of the run {found} the budget of {budget.budget:g} nats: mean {number(budget.mean)}, "
            f"{budget.off}."
        )
    return text


def budgets_text(runs: Sequence[Run]) -> str:
    """How many of the budgets were held, and which were not; empty without budgets."""
    found = [(run, budget) for run in runs if (budget := budget_held(run))]
    if not found:
        return ""
    missed = [run for run, budget in found if not budget.held]
    if len(missed) == len(found):
        return " In the second half no budget was held."
    if not missed:
        return f" In the second half {'both budgets were' if len(found) == 2 else 'every budget was'} held."
    held = len(found) - len(missed)
    return f" In the second half {held} of {len(found)} budgets were held, not that of {quoted(missed)}."


def comparison_verdict(runs: Sequence[Run]) -> Verdict:
    """Several runs in two sentences: which did best by the held-out judge, and which hacked the reward."""
    judged = [(run, moved) for run in runs if (moved := judge_change(run))]
    scored = [(run, moved) for run in runs if (moved := score_change(run))]
    if not scored:
        return Verdict("The records hold no scores.", "neutral")
    if len(judged) < len(runs):
        best, moved = max(scored, key=lambda pair: pair[1].end.mean)
        ended = f"Score ended highest with {quoted([best])}, {path_of(moved)}{at_drift(best)}."
        return Verdict(f"{ended}{budgets_text(runs)} {NO_JUDGE}", "neutral")
    best, moved = max(judged, key=lambda pair: pair[1].end.mean)
    judge = judge_name(runs)
    text, tone = f"No run clearly raised {judge}.", "neutral"
    if moved.direction == "rose":
        text, tone = f"{quoted([best])} did best: {judge} rose {path_of(moved)}{at_drift(best)}.", "good"
        equals = [run for run, other in judged if run is not best and Change(other.end, moved.end).direction == "held"]
        text += f" {quoted(equals)} ended within its interval." if equals else ""
    hackers = [run for run, other in judged if other.direction == "fell" and direction_of(run) == "rose"]
    if hackers:
        text += f" With {quoted(hackers)} score rose while {judge} fell: the reward is being hacked."
    return Verdict(text + budgets_text(runs), tone if tone == "good" or not hackers else "bad")


def direction_of(run: Run) -> str:
    moved = score_change(run)
    return moved.direction if moved else "went"


def quoted(runs: Sequence[Run]) -> str:
    """The runs' labels as a phrase, at most three of them by name."""
    names = [f"\u201c{run.label}\u201d" for run in runs]
    if len(names) > 3:
        names[2:] = [f"{len(names) - 2} more"]
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def at_drift(run: Run) -> str:
    moved = drift(run)
    return f" at {interval(moved)} nats per sequence" if moved else ""


# --- the frontier ----------------------------------------------------------------------------------------


def frontier_sentences(frontier: Frontier, runs: Sequence[Run]) -> list[str]:
    """What the fitted curve and best of n say about the runs, no more than a fit to a finite range allows."""
    judge = judge_name(runs)
    curve = [curve_sentence(frontier.curve, judge)] if frontier.curve else []
    return curve + ([best_of_n_sentence(frontier.best_of_n[-1], judge)] if frontier.best_of_n else [])


def curve_sentence(curve: OveroptimisationCurve, judge: str) -> str:
    """Where the fitted curve peaks, if its peak lies in the range of the data or not far beyond."""
    end = f"{number(curve.sqrt_kl_max**2)} nats per sequence"
    top, place = curve.peak, curve.peak_place
    if top is None or place == "none":
        rises = curve.score_at(curve.sqrt_kl_max) > curve.start_score
        went = "it is still above the start" if rises else "it is below the start"
        return f"The curve fitted to {judge} has no peak within the drift that was reached: at {end} {went}."
    where = f"at {number(top.kl_policy_ref_per_sequence)} nats per sequence"
    gain = number(top.score_above_start)
    height = f"{number(curve.start_score + top.score_above_start)}, which is {gain} above the start"
    if place == "beyond":
        return (
            f"The curve fitted to {judge} would peak {where} with {height}: an extrapolation, since the runs went no "
            f"farther than {end}."
        )
    return f"The curve fitted to {judge} peaks {where} with {height}; beyond, more drift costs more than it brings."


def best_of_n_sentence(best: BestOfN, judge: str) -> str:
    """What the largest n bought without training."""
    judged = best.eval_score or best.score
    name = judge if best.eval_score else "the score"
    kl = number(best.kl_policy_ref_per_sequence.mean)
    return (
        f"Without training, best of {best.n} responses of the reference brings {name} to "
        f"{interval(as_estimate(judged))} at {kl} nats per sequence."
    )


def as_estimate(found: Interval) -> Estimate:
    """An interval as mean and half-width, None where one observation gave none."""
    half = (found.high - found.low) / 2
    return Estimate(found.mean, half if math.isfinite(half) else None)


# --- where to look ---------------------------------------------------------------------------------------

# key, when the start and end are remarkable, what to say of the end, the part of the page to look at
CHECKS: tuple[tuple[str, Callable[[float, float], bool], str, str], ...] = (
    (
        "eos_share",
        lambda start, end: end < 0.5 and end < start - 0.1,
        "Only {end:.0%} of the responses end by themselves (at the start {start:.0%}); the others are cut.",
        "finished",
    ),
    (
        "entropy_per_token",
        lambda start, end: end < start / 3,
        "Entropy fell from {start:.2f} to {end:.2f} nats per token: the responses are becoming alike.",
        "entropy",
    ),
    (
        "clip_share",
        lambda start, end: end > 0.3,
        "{end:.0%} of the ratios are clipped: the steps are large; try a lower learning rate or fewer epochs.",
        "clip",
    ),
    (
        "explained_variance",
        lambda start, end: end < 0,
        "The value model predicts worse than a constant would (explained variance below 0): advantages are noisy.",
        "variance",
    ),
    (
        "kl_rollout_policy_per_token_k3",
        lambda start, end: end > 1e-3,
        "Sampler and scorer disagree by {end:.1g} nats per token: the samples are not quite the policy's.",
        "mismatch",
    ),
)


PLACES = {  # the part of the page that shows what an alarm says
    "score_against_judge": "score",
    "repetition_collapse": "repetition",
    "length_collapse": "length",
    "entropy_collapse": "entropy",
    "heavy_reward_tail": "tail",
    "sampler_mismatch": "mismatch",
    "saturated_beta": "beta",
}
SAID_BY = {  # of what is looked at here, the alarm that means the same and says it with its beginning and a remedy
    "eval_score_mean": "score_against_judge",
    "eos_share": "length_collapse",
    "entropy_per_token": "entropy_collapse",
    "kl_rollout_policy_per_token_k3": "sampler_mismatch",
}


def noted_alarms(run: Run) -> list[NotedAlarm]:
    """One entry per alarm that was raised, in the order of their beginnings."""
    rows_of: dict[str, list[Record]] = {}
    for row in run.alarms:
        rows_of.setdefault(str(row.get("name")), []).append(row)
    return sorted((noted(name, rows) for name, rows in rows_of.items()), key=lambda alarm: alarm.begins[0])


def noted(name: str, rows: Sequence[Record]) -> NotedAlarm:
    begins = {int(figure_of(row, "since") or row["update"]) for row in rows}
    last = max(rows, key=lambda row: int(row["update"]))
    return NotedAlarm(name, tuple(sorted(begins)), last["update"], str(last.get("sentence") or name))


def pointers(run: Run) -> list[tuple[str, str]]:
    """Sentences on what deserves a look, each with the page part that shows it; nothing is said twice."""
    alarms = noted_alarms(run)
    found = [(str(row.get("why") or f"Roll-back {row['roll_back']}."), "kl") for row in run.roll_backs]
    found += [(alarm.text, PLACES.get(alarm.name, "kl")) for alarm in alarms]
    names = {alarm.name for alarm in alarms}
    said = {key for key, name in SAID_BY.items() if name in names}
    if "eval_score_mean" not in said:
        found += [(text, "score") for text in [fall_from_peak(run)] if text]
    for key, remarkable, sentence, place in CHECKS:
        moved = change(run.records, key, key)
        if moved and key not in said and len(run.records) > 1 and remarkable(moved.start.mean, moved.end.mean):
            found.append((sentence.format(start=moved.start.mean, end=moved.end.mean), place))
    return found


def fall_from_peak(run: Run) -> str:
    """Says when the held-out judge was highest, if it has clearly fallen since."""
    _, length = windows(len(run.records))
    parts = [run.records[start : start + length] for start in range(len(run.records) - length + 1)]
    known = [(found, rows) for rows in parts if (found := estimate(rows, "eval_score_mean", "eval_score"))]
    if not known:
        return ""
    (peak, rows), (last, _) = max(known, key=lambda pair: pair[0].mean), known[-1]
    if peak.half_width is None or last.half_width is None:
        return ""
    if peak.mean - last.mean <= LEAST_FALL * math.hypot(peak.half_width, last.half_width):
        return ""
    judge, update = judge_name([run]), rows[len(rows) // 2]["update"]
    return (
        f"{judge[0].upper()}{judge[1:]} was highest around update {update}, at {number(peak.mean)}, and ended at "
        f"{number(last.mean)}: compare the samples, stop earlier, or tighten the leash."
    )
