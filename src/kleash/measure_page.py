"""The page of a measurement: how far the policy has drifted from its reference, where, and plus or minus how much.

One self-contained HTML file from the figures that `kleash measure` writes as JSON, and from the token maps of its
responses. Its first sentence is computed here and claims no more than the figures allow.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kleash.alarms import KL, figure_of
from kleash.best_of_n import best_of_n_kl_bound
from kleash.doubts import doubts_of
from kleash.drift_tables import bar_width_for, drift_rows, objects
from kleash.page import prompt_text, rendered, require_file_name, short, shown, write_page
from kleash.shading import MOST_TEXT, MapSet, cut, shaded
from kleash.verdict import Estimate, Record, interval, number

MOST_PROMPTS = 500  # rows of the table
PROMPTS_SHOWN = 8  # of them before the fold
MOST_N = 10**6  # best of n is said up to here
ABOUT_AS_MANY = (0.95, 1.05)  # between these, k1 takes about as many responses as were measured
LEAST_NATS = 0.02  # below, best of n is best of 1


def write_measure_page(measured: Record, token_maps: Sequence[Record], out: Path) -> Path:
    """Writes one self-contained HTML page about a measurement, and returns its path.

    Args:
      measured: the figures, as `kleash measure --json` writes them.
      token_maps: its responses token by token, see kleash.shading; none = a page without that part.
      out: the page; replaced in one step, so that a reader never sees half of it.

    Raises:
      InputError: `out` is a directory.
    """
    out = Path(out)
    require_file_name(out, "measure.html")
    return write_page(page(measured, token_maps), out)


def page(measured: Record, token_maps: Sequence[Record]) -> str:
    """The whole page as text."""
    maps = shaded([MapSet("", "", token_maps, among=measured["responses_count"])])
    width = bar_width_for([measured])
    words = {
        "title": f"{short(measured['policy'])} from {short(measured['reference'])}",
        "verdict": verdict_text(measured),
        "facts": facts(measured),
        "tiles": tiles(measured),
        "written": bool(measured["written_by_policy"]),
        "other": OTHER[bool(measured["written_by_policy"])],
        "drifts": drift_rows(measured),
        "prompts": prompt_rows(measured),
        "prompts_shown": PROMPTS_SHOWN,
        "settings": settings(measured),
        "alone": measured["responses_count"] == 1,
        "covers": str(measured["interval_covers"]),
        "doubts": doubts_of(measured),
        "bar_width": width,
        "maps": bool(maps),
    }
    data = {"judge": None, "maps": maps, "narrowing": narrowing(measured), "positions": position_bars(measured, width)}
    return rendered("measure.html.j2", data=data, words=words)


# --- in words --------------------------------------------------------------------------------------------

OTHER = {  # what stands beside the exact figure: its key, its name, what it is
    True: (f"{KL}_k1", "Drift, k1", "the one-token estimate, log policy \u2212 log reference"),
    False: (
        "log_ratio_per_sequence",
        "Log ratio of the texts",
        "log policy \u2212 log reference; no estimate of the KL",
    ),
}


def verdict_text(measured: Record) -> str:
    """How far the policy went, and what that means, in one sentence."""
    drift, per_token = estimate_of(measured, KL), estimate_of(measured, "kl_policy_ref_per_token")
    if drift is None:
        return "The drift is not finite: the policy may write what the reference holds impossible."
    if not measured["written_by_policy"] or measured.get("writer_doubt"):
        return (
            f"Along the given responses the policy parts from the reference by {interval(drift)} nats each, "
            f"{interval(per_token)} nats per token."
        )
    if drift.mean == 0:
        return "The policy has not moved: its drift from the reference is exactly 0."
    if drift.half_width is None:
        return f"The one response that was measured lies {interval(drift)} nats from the reference."
    low, high = drift.mean - drift.half_width, drift.mean + drift.half_width
    return f"The policy has drifted {interval(drift)} nats per response from the reference, {as_choice(low, high)}."


def as_choice(low: float, high: float) -> str:
    """An interval of the drift beside the best of n of the reference's responses, at most ln n - (n - 1) / n from it.

    >>> as_choice(1.2, 1.3), as_choice(-0.001, 0.003)
    ("as far as the best of 8 to 9 of the reference's responses could be", 'hardly at all')
    >>> as_choice(25.8, 26.2)
    "farther than the best of a million of the reference's responses could be"
    >>> as_choice(6.0, 36.0)
    "as far as the best of 1,100 of the reference's responses could be or farther"
    >>> as_choice(0.01, 1.2), as_choice(0.01, 36.0)
    ("at most as far as the best of 8 of the reference's responses could be", 'an interval too wide to say how far')
    """
    least, most = best_of(low), best_of(high)
    could_be = "of the reference's responses could be"
    if high < LEAST_NATS:
        return "hardly at all"
    if least is None:
        return f"farther than the best of a million {could_be}"
    if low < LEAST_NATS:
        return (
            "an interval too wide to say how far"
            if most is None
            else f"at most as far as the best of {most} {could_be}"
        )
    if most is None:
        return f"as far as the best of {least} {could_be} or farther"
    return f"as far as the best of {least if least == most else f'{least} to {most}'} {could_be}"


def best_of(kl: float) -> str | None:
    """The first n whose best of n could be so far; None beyond MOST_N.

    >>> best_of(1.2), best_of(26.0)
    ('8', None)
    """
    if kl > best_of_n_kl_bound(MOST_N):
        return None
    low, high = 1, MOST_N
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if best_of_n_kl_bound(middle) >= kl else (middle + 1, high)
    return round_count(low)


def estimate_of(row: Record, key: str) -> Estimate | None:
    """A figure with its interval; None where it is not finite."""
    entry = row.get(key)
    found = entry if isinstance(entry, Mapping) else {}
    mean, low, high = (figure_of(found, name) for name in ("mean", "low", "high"))
    half = (high - low) / 2 if low is not None and high is not None else None
    return None if mean is None else Estimate(mean, half)


def tiles(measured: Record) -> list[tuple[str, str, str]]:
    """The main figures: name, value, what it is."""
    key, name, note = OTHER[bool(measured["written_by_policy"])]
    need, count = figure_of(measured, "k1_responses_for_same_interval"), measured["responses_count"]
    if need is not None and measured["written_by_policy"]:
        note = f"the one-token estimate; {k1_needs(need, count)} for the exact one's interval"
    own, other = estimate_of(measured, "policy_entropy_per_token"), estimate_of(measured, "ref_entropy_per_token")
    finished = figure_of(measured, "finished_share")
    ends = f"tokens; {finished:.0%} end by themselves" if finished is not None else "tokens"
    exact = "nats per response, KL(policy \u2016 reference)"
    if not measured["written_by_policy"]:
        exact = "nats per response: the exact KL of the next-token distributions, summed along the texts"
    return [
        ("Drift, exact", interval(estimate_of(measured, KL)), exact),
        (name, interval(estimate_of(measured, key)), note),
        ("Drift per token", interval(estimate_of(measured, "kl_policy_ref_per_token")), "nats, mean over all tokens"),
        ("Entropy", interval(own), f"nats per token; the reference there {interval(other)}"),
        ("Response length", interval(estimate_of(measured, "response_length")), ends),
    ]


def k1_needs(need: float, count: int) -> str:
    """
    >>> k1_needs(3417.2, 20), k1_needs(65.0, 64), k1_needs(40.0, 64)
    ('needs 3,400 responses, not 20,', 'needs about as many responses', 'needs only 40 responses, not 64,')
    """
    if ABOUT_AS_MANY[0] <= need / count <= ABOUT_AS_MANY[1]:
        return "needs about as many responses"
    return f"needs {'only ' if need < count else ''}{round_count(need)} responses, not {count:,},"


def round_count(count: float) -> str:
    """
    >>> round_count(3417.2), round_count(96), round_count(1234567)
    ('3,400', '96', '1,200,000')
    """
    return f"{math.ceil(count):,}" if count < 100 else f"{float(f'{count:.2g}'):,.0f}"


# --- tables ----------------------------------------------------------------------------------------------


def facts(measured: Record) -> list[tuple[str, str]]:
    """What was measured, as names and values."""
    responses, prompts = measured["responses_count"], measured["prompts_count"]
    source = measured["responses"] if measured["responses"] is not None else measured["prompts"]
    return [
        ("Policy", short(measured["policy"])),
        ("Reference", short(measured["reference"])),
        ("Responses", f"{responses:,} to {prompts:,} prompt{'s' if prompts != 1 else ''}"),
        ("From", short(source)),
    ]


def prompt_rows(measured: Record) -> list[dict[str, Any]]:
    """The prompts by their drift, the largest first, at most MOST_PROMPTS of them."""
    key = OTHER[bool(measured["written_by_policy"])][0]
    drifts = [(estimate_of(entry, KL), entry) for entry in objects(measured, "by_prompt")]
    ranked = sorted(drifts, key=lambda pair: -math.inf if pair[0] is None else -pair[0].mean)
    largest = max((drift.mean for drift, _ in drifts if drift), default=0.0)
    return [
        {
            "prompt": shown(cut(prompt_text(entry.get("prompt")), MOST_TEXT // 10)).strip(),
            "responses": entry.get("responses"),
            "kl": drift,
            "reach": round(drift.mean / largest, 4) if drift and largest > 0 else float(drift is None),
            "other": number(figure_of(entry, key)),
            "length": number(figure_of(entry, "response_length")),
        }
        for drift, entry in ranked[:MOST_PROMPTS]
    ]


SETTINGS = (
    ("Policy", "policy"),
    ("Reference", "reference"),
    ("Prompts", "prompts"),
    ("Responses", "responses"),
    ("Temperature", "temperature"),
    ("Longest response, tokens", "max_new_tokens"),
    ("Seed", "seed"),
    ("Numbers", "dtype"),
    ("Device", "device"),
    ("kleash", "version"),
)


def settings(measured: Record) -> list[tuple[str, str]]:
    """How it was measured."""
    written = "written by the policy" if measured["written_by_policy"] else "-"
    named = {key: written if measured.get(key) is None else str(measured[key]) for _, key in SETTINGS}
    return [(name, shown(named[key])) for name, key in SETTINGS]


# --- plots -----------------------------------------------------------------------------------------------


def narrowing(measured: Record) -> dict[str, list[float | None]]:
    """Columns over the number of responses: the exact drift and the other figure, each with its interval."""
    rows, other = objects(measured, "convergence"), OTHER[bool(measured["written_by_policy"])][0]
    columns: dict[str, list[float | None]] = {"n": [figure_of(row, "n") for row in rows]}
    parts = {name: [row.get(key) or {} for row in rows] for name, key in (("exact", KL), ("other", other))}
    for name, part in parts.items():
        for bound in ("mean", "low", "high"):
            columns[f"{name}_{bound}"] = [figure_of(entry, bound) for entry in part]
    return columns


def position_bars(measured: Record, width: int) -> dict[str, list[Any]]:
    """The drift by position as bars of `width` positions each, in nats per response: they add up to the drift.

    So the last positions, where few responses get, do not stand out by chance. `per_token` is the mean KL there over
    those who get there. low and high are its interval times the share of the responses that get there, for bars of
    one position.
    """
    rows, count = objects(measured, "by_position"), measured["responses_count"]
    parts = [rows[first : first + width] for first in range(0, len(rows), width)]
    return {
        "first": [part[0]["position"] for part in parts],
        "last": [part[-1]["position"] for part in parts],
        "kl": [math.fsum(figure_of(row, KL) or 0.0 for row in part) for part in parts],
        "per_token": [weighted_mean(part) for part in parts],
        "reached": [figure_of(part[0], "sequences") for part in parts],
        **{name: [bound(part[0], name, count) if width == 1 else None for part in parts] for name in ("low", "high")},
    }


def bound(row: Record, name: str, count: int) -> float | None:
    """A bound of the mean KL at a position, times the share of the responses that get there."""
    value, reached = figure_of(row, name), figure_of(row, "sequences")
    return None if value is None or reached is None else value * reached / count


def weighted_mean(rows: Sequence[Record]) -> float | None:
    """Mean KL per token over some positions, each with the weight of the responses that reach it."""
    known = [
        (count, kl)
        for row in rows
        if (count := figure_of(row, "sequences")) and (kl := figure_of(row, "kl_policy_ref_per_token")) is not None
    ]
    return math.fsum(count * kl for count, kl in known) / math.fsum(count for count, _ in known) if known else None
