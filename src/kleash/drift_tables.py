"""Where the policy drifts, as tables and bars of a page: by position, by class of token, by token."""

import math
from collections.abc import Sequence
from typing import Any

from kleash.alarms import KL, figure_of
from kleash.page import WHITESPACE, likelihood, visible
from kleash.verdict import Record, Run

MOST_BARS = 60  # over the positions of a response
TOKEN_CLASSES = {
    "first_token": ("First token", "of each response"),
    "eos": ("EOS", "where the policy chose to stop"),
    "special": ("Special", "other special and template tokens"),
    "other": ("Other", "all the rest"),
}


def objects(row: Record, key: str) -> list[Record]:
    """The objects of a list in a record; none where it holds no such list."""
    found = row.get(key)
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []


def kl_by_position(row: Record) -> list[float]:
    """Nats per sequence at each position that a response reached; they add up to the drift."""
    return [figure_of(entry, KL) or 0.0 for entry in objects(row, "by_position")]


def total_drift(row: Record) -> float:
    """KL(policy || reference) of the update of a drift map, nats per sequence."""
    return math.fsum(kl_by_position(row))


def drawn_positions(row: Record, width: int) -> dict[str, Any]:
    """The drift by position as bars of `width` positions each: first, last, their nats, how many responses got there.

    Nats per sequence, not per response that gets so far: so the bars add up to the drift, and those of the last
    positions, where few responses get, do not stand out by chance.
    """
    kl = kl_by_position(row)
    reached = [figure_of(entry, "sequences") for entry in objects(row, "by_position")]
    firsts = range(0, len(kl), width)
    return {
        "update": row["update"],
        "first": list(firsts),
        "last": [min(first + width, len(kl)) - 1 for first in firsts],
        "kl": [float(f"{math.fsum(kl[first : first + width]):.5g}") for first in firsts],
        "reached": [reached[first] for first in firsts],
    }


def bar_width(runs: Sequence[Run]) -> int:
    """Positions in a bar, the same for all runs."""
    return bar_width_for([row for run in runs for row in run.drift_maps])


def bar_width_for(rows: Sequence[Record]) -> int:
    """Positions in a bar, such that no drift map, or measurement, has more than MOST_BARS."""
    longest = max((len(objects(row, "by_position")) for row in rows), default=0)
    return max(1, math.ceil(longest / MOST_BARS))


def drift_summary(run: Run) -> dict[str, Any] | None:
    """The last drift map as the template reads it; None where the run recorded none, or never drifted."""
    return {"update": run.drift_maps[-1]["update"], **drift_rows(run.drift_maps[-1])} if run.drift_maps else None


def drift_rows(row: Record) -> dict[str, Any]:
    """A drift map, or a measurement, as the tables read it."""
    total = total_drift(row)
    return {
        "total": total,
        "lead": drift_lead(row),
        "classes": class_rows(row),
        "places": [place_row(entry) for entry in objects(row, "top_tokens")],
        "types": [type_row(entry, total) for entry in objects(row, "drifted_tokens")],
    }


def drift_lead(row: Record) -> str:
    """In which positions half of the drift lies.

    >>> rows = [{"kl_policy_ref_per_sequence": kl} for kl in (0.5, 0.7, 0.4, 0.4)]
    >>> drift_lead({"by_position": rows})
    'Half of the drift lies in the first 2 of 4 positions.'
    """
    kl = kl_by_position(row)
    count = positions_of_half(kl)
    where = "at the first" if count == 1 else f"in the first {count}"
    return f"Half of the drift lies {where} of {len(kl)} positions." if len(kl) > 1 else "All responses are one token."


def positions_of_half(kl: Sequence[float]) -> int:
    """In how many of the first positions half of the drift lies.

    >>> positions_of_half([0.5, 0.7, 0.4, 0.4])
    2
    """
    half, passed, count = math.fsum(kl) / 2, 0.0, 0
    while count < len(kl) and passed < half:
        passed, count = passed + kl[count], count + 1
    return count


def class_rows(row: Record) -> list[dict[str, Any]]:
    """Each class of tokens that was drawn: its share of the tokens beside its share of the drift."""
    by_class = row.get("by_class")
    found = {name: part for name, part in by_class.items() if isinstance(part, dict)} if by_class else {}
    counts = {name: figure_of(part, "tokens") or 0.0 for name, part in found.items()}
    kl = {name: figure_of(part, KL) or 0.0 for name, part in found.items()}
    tokens, total = math.fsum(counts.values()), math.fsum(kl.values())
    return [
        {
            "name": TOKEN_CLASSES.get(name, (name, ""))[0],
            "note": TOKEN_CLASSES.get(name, (name, ""))[1],
            "share_of_tokens": counts[name] / tokens,
            "share_of_kl": kl[name] / total if total > 0 else 0.0,
            "per_token": figure_of(part, "kl_policy_ref_per_token"),
        }
        for name, part in found.items()
        if counts[name]
    ]


def place_row(entry: Record) -> dict[str, Any]:
    """One place of large drift: what stood there, and how probable it was to policy and reference."""
    return {
        "token": visible(entry.get("token")),
        "context": str(entry.get("context") or "").replace("\n", WHITESPACE["\n"]),
        "position": entry.get("position"),
        "kl": figure_of(entry, "kl_policy_ref"),
        "policy": figure_of(entry, "policy_prob"),
        "ref": figure_of(entry, "ref_prob"),
        "likelihood": likelihood(figure_of(entry, "ratio")),
    }


def type_row(entry: Record, total: float) -> dict[str, Any]:
    """A token and the drift at all places where the policy drew it."""
    kl = figure_of(entry, KL) or 0.0
    return {
        "token": visible(entry.get("token")),
        "count": entry.get("count"),
        "kl": kl,
        "share": kl / total if total > 0 else 0.0,
        "likelihood": likelihood(figure_of(entry, "mean_ratio")),
    }
