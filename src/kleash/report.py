"""The report: one self-contained HTML page about one run, or comparing several.

The page answers four questions in this order: what was trained, did it get better, how far did it drift,
where to look. Its first sentence is computed here, by small pure functions, and claims no more than the 95%
intervals in the records allow. Everything that a model or a user wrote is escaped, and the page's
content-security policy forbids every network request and every script but its own two.
"""

import hashlib
import html
import importlib.resources
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from kleash.errors import InputError, RunDirectoryError
from kleash.version import VERSION

Record = Mapping[str, Any]

KL = "kl_policy_ref_per_sequence"
DRAWN = (
    *("update", "score_mean", "score_low", "score_high", "eval_score_mean", "eval_score_low", "eval_score_high"),
    *(KL, KL + "_low", KL + "_high", KL + "_k1", "beta", "entropy_per_token", "response_length_mean", "eos_share"),
    *("clip_share", "explained_variance", "ratio_max", "ratio_mean", "gradient_norm"),
    *("kl_old_policy_per_token_k3", "kl_rollout_policy_per_token_k3"),
)
PHASES = ("sampling", "rewarding", "scoring", "optimising")
MOST_POINTS = 1000  # drawn per line
LEAST_FALL = 2.0  # from its peak, in half-widths, before a judge's fall is pointed out
SAMPLES_SHOWN = 3  # per update and run
MINUS, ARROW, PLUS_MINUS = "\u2212", "\u2192", "\u00a0\u00b1\u00a0"
CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}


@dataclass(frozen=True)
class Run:
    """One run directory, read."""

    label: str
    config: Record
    records: Sequence[Record]
    timings: Sequence[Record]
    samples: Sequence[Record]


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
class Verdict:
    """What happened, in plain words; tone is good, bad, caution or neutral."""

    text: str
    tone: str


# --- reading ---------------------------------------------------------------------------------------------


def read_run(path: Path, label: str) -> Run:
    """Reads a run directory; RunDirectoryError when it holds no run or a file in it cannot be read."""
    missing = [name for name in ("config.yaml", "records.jsonl") if not (path / name).is_file()]
    if missing:
        raise RunDirectoryError(
            f"{path} holds no run: expected config.yaml and records.jsonl, found no {' and no '.join(missing)}; "
            "give a directory that `kleash train` has written."
        )
    try:
        config = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RunDirectoryError(f"{path / 'config.yaml'} cannot be read as YAML; restore it.") from error
    if not isinstance(config, dict):
        raise RunDirectoryError(f"{path / 'config.yaml'} should hold a mapping of settings; restore it.")
    records = sorted(read_lines(path / "records.jsonl"), key=lambda record: int(record["update"]))
    if not records:
        raise RunDirectoryError(f"{path / 'records.jsonl'} is empty: the run has not finished an update yet.")
    return Run(label, config, records, read_lines(path / "timings.jsonl"), read_lines(path / "samples.jsonl"))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a jsonl file, each with a whole number under 'update'; empty when there is no file."""
    rows: list[dict[str, Any]] = []
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    for count, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or type(row.get("update")) is not int:
            raise RunDirectoryError(
                f"{path} line {count} should be a JSON object with a whole number under 'update', and is not: "
                "the file was cut short or edited; resume the run, or remove the line."
            )
        rows.append(row)
    return rows


def read_runs(paths: Sequence[Path], labels: Sequence[str] | None) -> list[Run]:
    """All runs, labelled by the caller or by directory name (with the parent's where names repeat)."""
    if not paths:
        raise InputError("A report needs at least one run directory, and got none.")
    if labels is not None and len(labels) != len(paths):
        raise InputError(f"A report needs one label per run: got {len(paths)} runs and {len(labels)} labels.")
    full = [path.resolve() for path in paths]
    names = [path.name for path in full]
    own = [
        name if names.count(name) == 1 else f"{path.parent.name}/{name}" for path, name in zip(full, names, strict=True)
    ]
    return [read_run(path, label) for path, label in zip(paths, labels or own, strict=True)]


# --- numbers ---------------------------------------------------------------------------------------------


def figure_of(row: Record, key: str) -> float | None:
    """The finite number under a key, None for everything else."""
    value = row.get(key)
    real = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(row[key]) if real else None


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
    score, judged, moved = score_change(run), judge_change(run), drift(run)
    drifted = f" Drift: {interval(moved)} nats per sequence." if moved else ""
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
    return Verdict(text.format_map(words) + drifted + ("" if judged else f" {NO_JUDGE}"), tone)


def comparison_verdict(runs: Sequence[Run]) -> Verdict:
    """Several runs in two sentences: which did best by the held-out judge, and which hacked the reward."""
    judged = [(run, moved) for run in runs if (moved := judge_change(run))]
    scored = [(run, moved) for run in runs if (moved := score_change(run))]
    if not scored:
        return Verdict("The records hold no scores.", "neutral")
    if len(judged) < len(runs):
        best, moved = max(scored, key=lambda pair: pair[1].end.mean)
        ended = f"Score ended highest with {quoted([best])}, {path_of(moved)}{at_drift(best)}."
        return Verdict(f"{ended} {NO_JUDGE}", "neutral")
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
    return Verdict(text, tone if tone == "good" or not hackers else "bad")


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
        "health",
    ),
    (
        "explained_variance",
        lambda start, end: end < 0,
        "The value model predicts worse than a constant would (explained variance below 0): advantages are noisy.",
        "health",
    ),
    (
        "kl_rollout_policy_per_token_k3",
        lambda start, end: end > 1e-3,
        "Sampler and scorer disagree by {end:.1g} nats per token: the samples are not quite the policy's.",
        "health",
    ),
)


def pointers(run: Run) -> list[tuple[str, str]]:
    """Sentences on what deserves a look, each with the page part that shows it."""
    found = [(text, "score") for text in [fall_from_peak(run)] if text]
    for key, remarkable, sentence, place in CHECKS:
        moved = change(run.records, key, key)
        if moved and len(run.records) > 1 and remarkable(moved.start.mean, moved.end.mean):
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


# --- the page --------------------------------------------------------------------------------------------


def prompt_text(prompt: object) -> str:
    """A prompt as text: itself, or 'role: content' for each chat message."""
    if not isinstance(prompt, list):
        return str(prompt)
    messages = (turn if isinstance(turn, dict) else {"content": turn} for turn in prompt)
    return "\n".join(f"{turn.get('role', 'message')}: {turn.get('content', '')}" for turn in messages)


def sample_sections(runs: Sequence[Run]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Samples of each run's first and last sampled update, by prompt: headings, each with its groups.

    A prompt that was sampled at both ends stands once, with all its responses side by side.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for stage in ("start", "end"):
        for index, run in enumerate(runs):
            for row in samples_at(run, stage):
                add_card(groups.setdefault(prompt_text(row.get("prompt")), []), row, stage, index)
    stages = {prompt: {card["stage"] for card in cards} for prompt, cards in groups.items()}
    ends = [("At the start", {"start"}), ("At the end", {"end"})]
    order = [("Start and end", {"start", "end"}), *(ends if len(runs) == 1 else ends[::-1])]
    sections = [
        (heading, [{"prompt": prompt, "cards": cards} for prompt, cards in groups.items() if stages[prompt] == wanted])
        for heading, wanted in order
    ]
    return [section for section in sections if section[1]]


def samples_at(run: Run, stage: str) -> list[Record]:
    """The first few samples of a run's first or last sampled update; no end where there was only one update."""
    updates = sorted({row["update"] for row in run.samples})
    if not updates or (stage == "end" and len(updates) == 1):
        return []
    update = updates[0] if stage == "start" else updates[-1]
    return [row for row in run.samples if row["update"] == update][:SAMPLES_SHOWN]


def add_card(cards: list[dict[str, Any]], row: Record, stage: str, index: int) -> None:
    """Adds a response to its prompt's cards, or a run to the card that holds the same response."""
    response = str(row.get("response") or "")
    for card in cards:
        if (card["stage"], card["response"]) == (stage, response) and index not in card["runs"]:
            card["runs"].append(index)
            return
    keys = {"score": "score", "judge": "eval_score", "kl": KL, "length": "response_length"}
    numbers = {name: figure_of(row, key) for name, key in keys.items()}
    cut = row.get("finished") is False
    cards.append({"stage": stage, "runs": [index], "response": response, "at": row["update"], "cut": cut, **numbers})


def flat(config: Record, prefix: str = "") -> dict[str, str]:
    """A nested config with dotted keys and printable values."""
    rows: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            rows |= flat(value, f"{prefix}{key}.")
        else:
            rows[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, default=str)
    return rows


def config_rows(runs: Sequence[Run]) -> list[tuple[str, list[str], bool]]:
    """Key, value in each run, and whether the runs differ in it; those that differ come first."""
    configs = [flat(run.config) for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config)
    rows = [(key, [config.get(key, "") for config in configs]) for key in keys]
    return sorted(((key, values, len(set(values)) > 1) for key, values in rows), key=lambda row: not row[2])


def leash_text(run: Run) -> str:
    leash = run.config.get("leash")
    if not isinstance(leash, dict):
        return "-"
    target = figure_of(leash, "target_kl_per_sequence")
    return str(leash.get("kind", "fixed")) + (f", budget {number(target)} nats" if target else "")


def duration(seconds: float) -> str:
    """
    >>> duration(7.3), duration(192), duration(7500)
    ('7.3 s', '3 min 12 s', '2 h 5 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def phase_seconds(run: Run) -> dict[str, float]:
    """Seconds of the whole run by phase, and under 'other' what the phases leave of the total."""
    names = ("total", *PHASES)
    sums = {name: math.fsum(filter(None, series(run.timings, f"seconds_{name}"))) for name in names}
    total = sums.pop("total")
    return sums | {"other": max(0.0, total - math.fsum(sums.values()))}


def drawn_series(run: Run) -> dict[str, list[float | None]]:
    """What the plots draw: every key of DRAWN that the run recorded, thinned to MOST_POINTS updates."""
    stride = math.ceil(len(run.records) / MOST_POINTS)
    rows = run.records[::-stride][::-1]
    drawn = {key: series(rows, key) for key in DRAWN}
    return {key: values for key, values in drawn.items() if any(value is not None for value in values)}


def beta_text(run: Run) -> str:
    """The leash's beta, or where it started and ended."""
    known = [value for value in series(run.records, "beta") if value is not None]
    if not known:
        return "-"
    return f"{known[0]:.3g}" if len(set(known)) == 1 else f"{known[0]:.3g} {ARROW} {known[-1]:.3g}"


def short(source: object) -> str:
    """A model or prompt source as a few words: a long path keeps its last two parts."""
    text = source if isinstance(source, str) else json.dumps(source, default=str)
    return text if len(text) <= 32 or not isinstance(source, str) else "/".join(Path(text).parts[-2:])


def facts(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """What was trained, as names and values; 'varies' where the runs differ."""
    found = []
    for name, key in (("Policy", "policy"), ("Reward", "reward"), ("Judge", "eval_reward"), ("Prompts", "prompts")):
        sources = [short(run.config[key]) for run in runs if run.config.get(key) is not None]
        if sources:
            found.append((name, sources[0] if len(set(sources)) == 1 else "varies"))
    done = {f"{run.records[-1]['update']} of {run.config.get('updates') or 'unknown'}" for run in runs}
    found.append(("Updates", done.pop() if len(done) == 1 else "varies"))
    return found


def summary(run: Run, longest: float) -> dict[str, Any]:
    """A run as the template reads it; `longest` is the largest drift on the page, in nats."""
    seconds, moved = phase_seconds(run), drift(run)
    first, last = windows(len(run.records))
    keys = {"length": "response_length_mean", "eos": "eos_share"}
    return {
        "label": run.label,
        "score": score_change(run),
        "judge": judge_change(run),
        "drift": moved,
        "reach": round(math.sqrt(max(0.0, moved.mean) / longest), 4) if moved and longest > 0 else 0,
        **{name: change(run.records, key, key) for name, key in keys.items()},
        "leash": leash_text(run),
        "beta_text": beta_text(run),
        "updates": run.records[-1]["update"],
        "first": first,
        "last": last,
        "pointers": pointers(run),
        "seconds": seconds,
        "total_seconds": math.fsum(seconds.values()),
    }


def embedded_json(data: object) -> Markup:
    """JSON that no HTML parser can leave: the characters <, > and & appear only as escapes."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return Markup(text.translate({ord(mark): f"\\u{ord(mark):04x}" for mark in "<>&"}))


def shown(text: object) -> str:
    """Text with its control characters made visible."""
    return str(text).translate(CONTROL_PICTURES)


def page(runs: Sequence[Run], title: str | None) -> str:
    """The whole page as text."""
    compared = len(runs) > 1
    series_of_runs = [{"label": html.escape(run.label), "series": drawn_series(run)} for run in runs]
    judge = judge_name(runs) if any(judge_change(run) for run in runs) else None
    longest = max((moved.mean for run in runs if (moved := drift(run))), default=0.0)
    data = embedded_json({"runs": series_of_runs, "judge": judge})
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": number, "interval": interval, "duration": duration, "shown": shown}
    template = importlib.resources.files("kleash").joinpath("report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        title=title or (f"{len(runs)} runs compared" if compared else runs[0].label),
        verdict=comparison_verdict(runs) if compared else run_verdict(runs[0]),
        judge=judge,
        facts=facts(runs),
        runs=[summary(run, longest) for run in runs],
        config=config_rows(runs),
        samples=sample_sections(runs),
        data=data,
        nonce=hashlib.sha256(data.encode()).hexdigest()[:32],
        plotly=Markup(get_plotlyjs()),
        version=VERSION,
    )


def write_report(
    runs: Sequence[Path], out: Path, *, labels: Sequence[str] | None = None, title: str | None = None
) -> Path:
    """Writes one self-contained HTML page about one run, or comparing several, and returns its path.

    Args:
      runs: run directories, each with config.yaml and records.jsonl; timings.jsonl and samples.jsonl are
        used when there.
      out: the page; replaced in one step, so that a reader never sees half of it.
      labels: the runs' names on the page; their directories' names otherwise.
      title: the page's title; made from the labels otherwise.

    Raises:
      RunDirectoryError: a directory holds no run, or a file in it cannot be read.
      InputError: no runs, another number of labels than of runs, or `out` is a directory.
    """
    out = Path(out)
    if out.is_dir():
        raise InputError(f"{out} is a directory: name the page to write, such as {out / 'report.html'}.")
    text = page(read_runs(runs, labels), title)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        part.write_bytes(text.encode("utf-8", errors="replace"))
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)
    return out
