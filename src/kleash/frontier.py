"""What the runs of a sweep are held against: the over-optimisation curve, and best of n; also as JSON, both ways."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from kleash.best_of_n import BestOfN
from kleash.estimators import Interval
from kleash.overoptimisation import OveroptimisationCurve

KL = "kl_policy_ref_per_sequence"
OF_THE_PEAK = ("peak", "peak_place")


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """Plain numbers, in nats per sequence and score units.

    curve is fitted to the held-out scores, None where it could not be; best_of_n are policies without training, n
    ascending, empty where none were sampled.
    """

    curve: OveroptimisationCurve | None
    best_of_n: tuple[BestOfN, ...]


def frontier_as_json(frontier: Frontier) -> dict[str, Any]:
    """`curve`: its numbers, its peak wherever that lies, and whether it may be named; `best_of_n`: one entry per n.

    A bound of an interval that is infinite becomes None, as JSON knows no infinity.
    """
    curve = frontier.curve
    peak = None if curve is None or curve.peak is None else asdict(curve.peak)
    return {
        "curve": None if curve is None else {**asdict(curve), "peak": peak, "peak_place": curve.peak_place},
        "best_of_n": [_best_as_json(best) for best in frontier.best_of_n],
    }


def _best_as_json(best: BestOfN) -> dict[str, Any]:
    intervals = {KL: best.kl_policy_ref_per_sequence, "score": best.score, "eval_score": best.eval_score}
    entry: dict[str, Any] = {"n": best.n, "prompts": best.score.n, "kl_bound": best.kl_bound}
    for name, found in intervals.items():
        for end in ("mean", "low", "high"):
            value = getattr(found, end) if found else math.inf
            entry[f"{name}_{end}"] = value if math.isfinite(value) else None
    return entry


def frontier_from_json(content: Mapping[str, Any]) -> Frontier:
    """What frontier_as_json wrote.

    Raises:
      KeyError, TypeError, ValueError: the content is something else.
    """
    curve = content["curve"]
    numbers = {} if curve is None else {name: value for name, value in curve.items() if name not in OF_THE_PEAK}
    return Frontier(
        curve=None if curve is None else OveroptimisationCurve(**numbers),
        best_of_n=tuple(_best_from_json(entry) for entry in content["best_of_n"]),
    )


def _best_from_json(entry: Mapping[str, Any]) -> BestOfN:
    def found(name: str) -> Interval:
        low, high = entry[f"{name}_low"], entry[f"{name}_high"]
        return Interval(
            mean=float(entry[f"{name}_mean"]),
            low=-math.inf if low is None else float(low),
            high=math.inf if high is None else float(high),
            n=int(entry["prompts"]),
        )

    return BestOfN(
        n=int(entry["n"]),
        kl_bound=float(entry["kl_bound"]),
        kl_policy_ref_per_sequence=found(KL),
        score=found("score"),
        eval_score=None if entry["eval_score_mean"] is None else found("eval_score"),
    )
