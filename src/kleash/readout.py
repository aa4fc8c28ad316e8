"""What a measurement says in a terminal."""

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kleash.doubts import doubts_of
from kleash.drift_tables import positions_of_half
from kleash.estimators import Interval
from kleash.measure_page import ABOUT_AS_MANY, round_count
from kleash.measured import MeasuredDrift
from kleash.page import likelihood, visible
from kleash.tally import KL
from kleash.token_class import TOKEN_CLASSES

TOKENS_SHOWN, PROMPTS_SHOWN = 8, 5
WIDEST_PROMPT = 48  # with the other columns of its table it fills 80


def readout(measured: MeasuredDrift) -> RenderableType:
    """The drift with its interval, and where it lies."""
    figures = measured.figures
    doubts = [Text(doubt, style="bold") for doubt in doubts_of(figures)]
    parts: list[RenderableType] = [_estimates(measured), "", *doubts, *_sentences(measured)]
    if any(entry["kl_policy_ref_per_sequence"] for entry in figures["by_position"]):
        parts += ["", _drifted_tokens(figures), "", _classes(figures), "", _prompts(figures)]
    return Group(*parts)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=Text(title, style="bold"), title_justify="left", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number == 0 else "right", header_style="dim", no_wrap=True)
    return table


def _estimates(measured: MeasuredDrift) -> Table:
    written = measured.figures["written_by_policy"]
    title = "KL(policy || reference), nats" if written else "Policy beside reference along the given responses, nats"
    table = _table(title, "", "mean", "95 % interval", "responses")
    rows = {
        "exact, per response": measured.kl_policy_ref_per_sequence,
        "k1, per response" if written else "log policy - log reference, per response": measured.log_ratio_per_sequence,
        "exact, per token": measured.kl_policy_ref_per_token,
    }
    for name, interval in rows.items():
        table.add_row(name, _number(interval.mean), _ends(interval), f"{interval.n}")
    return table


def _sentences(measured: MeasuredDrift) -> list[Text]:
    figures = measured.figures
    policy, ref = measured.policy_entropy_per_token.mean, measured.ref_entropy_per_token.mean
    length, finished = measured.response_length.mean, figures["finished_share"]
    sentences = [
        *_about_the_estimate(measured),
        f"Entropy per token: policy {_number(policy)}, reference {_number(ref)} nats. "
        f"Responses: {length:.1f} tokens, {finished:.0%} ended by themselves.",
    ]
    if measured.kl_policy_ref_per_sequence.mean > 0:
        sentences.append(_half_of_the_drift([entry[KL] or 0.0 for entry in figures["by_position"]]))
    return [Text(sentence) for sentence in sentences]


def _about_the_estimate(measured: MeasuredDrift) -> list[str]:
    figures = measured.figures
    if not figures["written_by_policy"]:
        return [
            "Somebody else wrote these responses: no figure here estimates KL(policy || reference). The exact one "
            "compares the two models' next-token distributions along these texts. If the policy sampled them, say "
            "--written-by-policy."
        ]
    if figures["responses_count"] == 1:
        return ["One response has no interval: what it says of the drift may be chance."]
    said = [f"The intervals cover chance in {figures['interval_covers']}."]
    needed = figures["k1_responses_for_same_interval"]
    if needed is not None:
        said[0] += f" k1 would take {_as_many(needed, figures['responses_count'])}."
    return said


def _as_many(needed: float, responses: int) -> str:
    """
    >>> _as_many(15600.0, 512), _as_many(28159500.0, 16)
    ('16,000 responses to be as sure, 30 times as many', '28,000,000 responses to be as sure, 1,800,000 times as many')
    >>> _as_many(64.2, 64), _as_many(40.0, 64)
    ('about as many responses to be as sure', 'only 40 responses to be as sure')
    """
    factor = needed / responses
    if ABOUT_AS_MANY[0] <= factor <= ABOUT_AS_MANY[1]:
        return "about as many responses to be as sure"
    if factor < 1:
        return f"only {round_count(needed)} responses to be as sure"
    times = f"{factor:.1f}" if factor < 10 else f"{factor:.0f}" if factor < 100 else round_count(factor)
    return f"{round_count(needed)} responses to be as sure, {times} times as many"


def _half_of_the_drift(kl: list[float]) -> str:
    """In which positions half of the drift lies."""
    count = positions_of_half(kl)
    where = "position" if count == 1 else f"{count} positions"
    return f"Half of the drift lies in the first {where} of {len(kl)}."


def _drifted_tokens(figures: dict[str, Any]) -> Table:
    table = _table(
        "Where the drift is: the tokens that were drawn there", "token", "drawn", "of the drift", "on average"
    )
    total = figures[KL]["mean"] or 0.0
    for entry in figures["drifted_tokens"][:TOKENS_SHOWN]:
        share = (entry[KL] or 0.0) / total if total else 0.0
        likely = likelihood(entry["mean_ratio"])
        than = " than the reference" if likely.endswith("likely") and not likely.startswith("about") else ""
        table.add_row(Text(visible(entry["token"])), f"{entry['count']}x", f"{share:.0%}", likely + than)
    return table


def _classes(figures: dict[str, Any]) -> Table:
    table = _table("By class of token", "class", "tokens", "of the drift", "nats per token")
    total = figures[KL]["mean"] or 0.0
    for name in TOKEN_CLASSES:
        entry = figures["by_class"][name]
        if entry["tokens"]:
            share = (entry[KL] or 0.0) / total if total else 0.0
            table.add_row(
                name.replace("_", " "), f"{entry['tokens']}", f"{share:.0%}", _number(entry["kl_policy_ref_per_token"])
            )
    return table


def _prompts(figures: dict[str, Any]) -> Table:
    ordered = sorted(figures["by_prompt"], key=lambda entry: -(entry[KL]["mean"] or 0.0))
    shown = ordered[:PROMPTS_SHOWN]
    title = f"By prompt: the {len(shown)} with the most drift of {len(ordered)}" if len(shown) > 1 else "By prompt"
    table = _table(title, "prompt", "responses", "nats per response")
    for entry in shown:
        kl = entry[KL]
        width = "" if kl["high"] is None else f" ±{_half_width((kl['high'] - kl['low']) / 2)}"
        table.add_row(Text(_one_line(entry["prompt"])), f"{entry['responses']}", f"{_number(kl['mean'])}{width}")
    return table


def _one_line(prompt: object) -> str:
    """The end of a prompt, the last message of a chat, on one line."""
    text = str(prompt[-1].get("content", "")) if isinstance(prompt, list) else str(prompt)
    words = " ".join(text.split())
    return words if len(words) <= WIDEST_PROMPT else words[: WIDEST_PROMPT - 3] + "..."


def _number(value: float | None) -> str:
    """
    >>> [_number(value) for value in (26.213, 0.0821, 0.1008, 0.0, 1234.5, None)]
    ['26.21', '0.082', '0.10', '0', '1234', '-']
    """
    if value is None:
        return "-"
    if value == 0 or abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:#.2g}"


def _half_width(value: float) -> str:
    """
    >>> [_half_width(value) for value in (180.81, 2.19, 0.0384, 0.0, 2.0)]
    ['180', '2.2', '0.038', '0', '2']
    """
    return f"{float(f'{value:.2g}'):g}"


def _ends(interval: Interval) -> str:
    return "not known from one" if interval.n == 1 else f"{_number(interval.low)} to {_number(interval.high)}"
