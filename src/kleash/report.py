"""The report: one self-contained HTML page about one run, or comparing several.

The page answers four questions in this order: what was trained, did it get better, how far did it drift,
where to look. Its first sentence is computed here, by small pure functions, and claims no more than the 95%
intervals in the records allow. Everything that a model or a user wrote is escaped, and the page's
content-security policy forbids every network request and every script but its own two.
"""

import html
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from plotly.colors import sample_colorscale, unlabel_rgb

from kleash.alarms import FIRST_KL, KL, figure_of
from kleash.drift_tables import bar_width, drawn_positions, drift_summary, objects, total_drift
from kleash.errors import InputError, RunDirectoryError
from kleash.frontier import Frontier, frontier_from_json
from kleash.page import INKS, prompt_text, rendered, require_file_name, short, write_page
from kleash.shading import MapSet, shaded
from kleash.verdict import (
    ARROW,
    Record,
    Run,
    as_estimate,
    budget_held,
    change,
    comparison_verdict,
    drift,
    frontier_sentences,
    judge_change,
    judge_name,
    leash_figure,
    noted_alarms,
    pointers,
    reference_moves,
    run_verdict,
    score_change,
    series,
    windows,
)

DRAWN = (
    *("update", "score_mean", "score_low", "score_high", "eval_score_mean", "eval_score_low", "eval_score_high"),
    *(KL, KL + "_low", KL + "_high", KL + "_k1", "beta", "entropy_per_token", "response_length_mean", "eos_share"),
    *("clip_share", "explained_variance", "ratio_max", "ratio_mean", "gradient_norm"),
    *("kl_old_policy_per_token_k3", "kl_rollout_policy_per_token_k3", "distinct_2_per_sequence"),
    *("distinct_2_over_batch", "score_tail_gap", "leash_loss", "share_of_k1", "optimizer_steps", FIRST_KL),
)
NOT_DRAWN_AT = {"leash_loss": 0, "share_of_k1": 0}  # all along: it is another form of the leash
PHASES = ("sampling", "rewarding", "scoring", "optimising")
MOST_POINTS = 1000  # drawn per line
SAMPLES_SHOWN = 3  # per update and run
CURVE_POINTS = 80
RAMP = {"light": (0.0, 0.85), "dark": (0.25, 1.0)}  # of Viridis, where there are more runs than inks

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
    return Run(
        label,
        config,
        records,
        read_lines(path / "timings.jsonl"),
        read_lines(path / "samples.jsonl"),
        alarms=read_lines(path / "alarms.jsonl"),
        roll_backs=read_lines(path / "roll_backs.jsonl", "roll_back"),
        drift_maps=read_drift_maps(path / "drift.jsonl"),
        token_maps=read_lines(path / "token_maps.jsonl"),
    )


def read_lines(path: Path, key: str = "update") -> list[dict[str, Any]]:
    """The objects of a jsonl file, each with a whole number under a key; empty when there is no file."""
    return [parsed(path, count, line, key) for count, line in numbered_lines(path)]


def numbered_lines(path: Path) -> list[tuple[int, bytes]]:
    """The lines of a file that are not blank, with their numbers; none when there is no file."""
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    return [(count, line) for count, line in enumerate(lines, start=1) if line.strip()]


def parsed(path: Path, count: int, line: bytes, key: str = "update") -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict) or type(row.get(key)) is not int:
        raise RunDirectoryError(
            f"{path} line {count} should be a JSON object with a whole number under '{key}', and is not: "
            "the file was cut short or edited; resume the run, or remove the line."
        )
    return row


def read_drift_maps(path: Path) -> list[Record]:
    """Where the policy drifted halfway and at the last update that did; these lines alone are parsed, they are long."""
    lines = numbered_lines(path)
    last = None
    while lines and last is None:
        row = parsed(path, *lines[-1])
        last = row if total_drift(row) > 0 else None
        lines.pop()
    if last is None:
        return []
    halfway = parsed(path, *lines[len(lines) // 2]) if lines else {}
    return [halfway, last] if total_drift(halfway) > 0 else [last]


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


def read_sweep(path: Path) -> tuple[list[Record], Frontier]:
    """The entries of a sweep's runs that have records, and its frontier, from sweep.json.

    Raises:
      RunDirectoryError: sweep.json is not what a sweep writes.
    """
    file = path / "sweep.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        entries = [{key: entry[key] for key in ("name", "label", "values", "updates")} for entry in content["runs"]]
        return [entry for entry in entries if entry["updates"]], frontier_from_json(content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunDirectoryError(
            f"Expected in {file} what `kleash sweep` writes, found something else; run the sweep again with --resume."
        ) from error


# --- the page --------------------------------------------------------------------------------------------


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
    """Adds a response to its prompt's cards, or a run to the card that holds the same response, judged the same."""
    response = str(row.get("response") or "")
    keys = {"score": "score", "judge": "eval_score", "kl": KL, "length": "response_length"}
    numbers = {name: figure_of(row, key) for name, key in keys.items()}
    for card in cards:
        judged = (card["stage"], card["response"], card["score"], card["judge"])
        same = judged == (stage, response, numbers["score"], numbers["judge"])
        if same and index not in card["runs"]:
            card["runs"].append(index)
            return
    cut = row.get("finished") is False
    cards.append({"stage": stage, "runs": [index], "response": response, "at": row["update"], "cut": cut, **numbers})


# --- what was trained ------------------------------------------------------------------------------------


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
    kind, target = str(leash.get("kind", "fixed")), leash_figure(run, "target_kl_per_sequence")
    ceiling = leash_figure(run, "max_kl_per_sequence")
    parts = [kind] if kind != "budget" or target is None else []
    parts += [f"budget {target:g} nats"] if target is not None else []
    parts += [f"ceiling {ceiling:g} nats"] if ceiling is not None else []
    return ", ".join(parts + ([f"{run.config['kl']} KL"] if "kl" in run.config else []))


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
    drawn = {key: series(rows, key) for key in DRAWN if key != FIRST_KL or reference_moves(run)}
    return {key: values for key, values in drawn.items() if set(values) - {None, NOT_DRAWN_AT.get(key)}}


def drawn_events(run: Run) -> dict[str, Any]:
    """What the KL plot shows beside the KL: budget and ceiling, where alarms began, and what was given up."""
    limits = {"budget": "target_kl_per_sequence", "ceiling": "max_kl_per_sequence"}
    known = {name: leash_figure(run, key) for name, key in limits.items()}
    return {
        "limits": [{"name": f"{name} {value:g} nats", "value": value} for name, value in known.items() if value],
        "alarms": [
            {"update": update, "name": html.escape(alarm.name.replace("_", " "))}
            for alarm in noted_alarms(run)
            for update in alarm.begins
        ],
        "given_up": [drawn_roll_back(run, row) for row in run.roll_backs],
    }


def drawn_roll_back(run: Run, row: Record) -> dict[str, Any]:
    """The KL of the records that a roll-back gave up, from the last record that was kept."""
    kept = [record for record in run.records if record["update"] == row.get("to")]
    rows = kept + [record for record in objects(row, "records") if type(record.get("update")) is int]
    return {
        "name": f"given up by roll-back {row['roll_back']}",
        "update": [record["update"] for record in rows],
        "kl": series(rows, KL),
    }


def beta_text(run: Run) -> str:
    """The leash's beta, or where it started and ended."""
    known = [value for value in series(run.records, "beta") if value is not None]
    if not known:
        return "-"
    return f"{known[0]:.3g}" if len(set(known)) == 1 else f"{known[0]:.3g} {ARROW} {known[-1]:.3g}"


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
        "budget": budget_held(run),
        "drifts": drift_summary(run),
        "beta_text": beta_text(run),
        "updates": run.records[-1]["update"],
        "first": first,
        "last": last,
        "pointers": pointers(run),
        "seconds": seconds,
        "total_seconds": math.fsum(seconds.values()),
    }


def inks(count: int, theme: str) -> list[str]:
    """A colour for each run, at least as many as INKS has; more runs than that get a ramp, in their order.

    >>> inks(3, "light")[0], len(inks(3, "light")), inks(8, "light")[0], len(inks(8, "light"))
    ('#0072b2', 6, '#440154', 8)
    """
    if count <= len(INKS[theme]):
        return list(INKS[theme])
    low, high = RAMP[theme]
    places = [low + (high - low) * run / (count - 1) for run in range(count)]
    return [
        "#" + "".join(f"{round(part):02x}" for part in unlabel_rgb(c)) for c in sample_colorscale("Viridis", places)
    ]


def drawn_frontier(frontier: Frontier | None) -> dict[str, Any] | None:
    """The fitted curve and best of n as the plot draws them, over d = sqrt(KL); None where there is neither."""
    if frontier is None or not (frontier.curve or frontier.best_of_n):
        return None
    return {"curve": drawn_curve(frontier), "best_of_n": drawn_best_of_n(frontier)}


def drawn_curve(frontier: Frontier) -> dict[str, Any] | None:
    """The curve over the drift that was reached, and a little beyond it if its peak lies there and may be named."""
    curve = frontier.curve
    if curve is None:
        return None
    peak = curve.peak if curve.peak_place != "none" else None
    end = max(curve.sqrt_kl_max, 1.05 * peak.sqrt_kl if peak else 0.0)
    along = [end * step / CURVE_POINTS for step in range(CURVE_POINTS + 1)]
    return {
        "x": [round(d, 5) for d in along],
        "y": [round(curve.score_at(d), 5) for d in along],
        "reached": curve.sqrt_kl_max,
        "peak": {"x": peak.sqrt_kl, "y": curve.score_at(peak.sqrt_kl)} if peak else None,
    }


def drawn_best_of_n(frontier: Frontier) -> dict[str, list[float | None]]:
    """Columns over n: d = sqrt(KL) as estimated and at the bound, score, held-out score."""
    points = frontier.best_of_n
    return {
        "n": [float(best.n) for best in points],
        "x": [math.sqrt(max(0.0, best.kl_policy_ref_per_sequence.mean)) for best in points],
        "bound": [math.sqrt(best.kl_bound) for best in points],
        "score": [best.score.mean for best in points],
        "judged": [best.eval_score.mean if best.eval_score else None for best in points],
    }


def best_of_n_rows(frontier: Frontier | None) -> list[dict[str, Any]]:
    """Best of n for the table: n, both KLs, score and held-out score with their intervals."""
    return [
        {
            "n": best.n,
            "kl": as_estimate(best.kl_policy_ref_per_sequence),
            "bound": best.kl_bound,
            "score": as_estimate(best.score),
            "judge": as_estimate(best.eval_score) if best.eval_score else None,
        }
        for best in (frontier.best_of_n if frontier else ())
    ]


# --- token by token --------------------------------------------------------------------------------------


def map_sets(runs: Sequence[Run]) -> list[MapSet]:
    """What the page shows token by token: one run's first and newest mapped responses; of several, each run's newest.

    The first of several runs whose first update was mapped gives the responses before training.
    """
    newest = [(place, rows) for place, run in enumerate(runs) if (rows := maps_at(run, -1))]
    first, among = next(((rows, responses_each_update(run)) for run in runs if (rows := maps_at(run, 0))), ([], None))
    if not newest:
        return []
    named = {place: f"Update {rows[0]['update']}" if len(runs) == 1 else runs[place].label for place, rows in newest}
    # the page opens with the run that drifted farthest; its responses have the short addresses
    shown_first = max(newest, key=lambda pair: mean_drift(pair[1]))[0]
    keys = {place: "" if place == shown_first else f"run-{place + 1}-" for place, _ in newest}
    ends = [MapSet(named[place], keys[place], rows, responses_each_update(runs[place])) for place, rows in newest]
    began = first[0]["update"]
    if len(runs) == 1 and began == newest[0][1][0]["update"]:
        return ends
    return [MapSet("Before training" if began == 1 else f"Update {began}", f"update-{began}-", first, among), *ends]


def maps_at(run: Run, which: int) -> list[Record]:
    """A run's token maps of its first (0) or newest (-1) mapped update."""
    updates = sorted({row["update"] for row in run.token_maps})
    return [row for row in run.token_maps if row["update"] == updates[which]]


def responses_each_update(run: Run) -> int | None:
    """How many responses an update samples; None where the configuration does not say."""
    rollout = run.config.get("rollout")
    found = rollout.get("prompts_per_update") if isinstance(rollout, dict) else None
    return found if type(found) is int else None


def mean_drift(rows: Sequence[Record]) -> float:
    """Mean exact KL of some token maps, nats per sequence."""
    return math.fsum(figure_of(row, KL) or 0.0 for row in rows) / len(rows)


# --- the page --------------------------------------------------------------------------------------------


def page(runs: Sequence[Run], title: str | None, frontier: Frontier | None = None) -> str:
    """The whole page as text."""
    compared = len(runs) > 1
    width = bar_width(runs)
    drawn_runs = [
        {
            "label": html.escape(run.label),
            "series": drawn_series(run),
            **drawn_events(run),
            "positions": [drawn_positions(row, width) for row in run.drift_maps],
        }
        for run in runs
    ]
    judge = judge_name(runs) if any(judge_change(run) for run in runs) else None
    longest = max((moved.mean for run in runs if (moved := drift(run))), default=0.0)
    maps = shaded(map_sets(runs))
    words = {
        "title": title or (f"{len(runs)} runs compared" if compared else runs[0].label),
        "verdict": comparison_verdict(runs) if compared else run_verdict(runs[0]),
        "judge": judge,
        "facts": facts(runs),
        "runs": [summary(run, longest) for run in runs],
        "config": config_rows(runs),
        "samples": sample_sections(runs),
        "curve": frontier.curve if frontier else None,
        "best_of_n": best_of_n_rows(frontier),
        "frontier_sentences": frontier_sentences(frontier, runs) if frontier else [],
        "inks": {theme: inks(len(runs), theme) for theme in INKS},
        "marks": {
            "alarms": any(run.alarms for run in runs),
            "given_up": any(run.roll_backs for run in runs),
            "bar_width": width,
            "halfway": runs[0].drift_maps[0]["update"] if len(runs[0].drift_maps) > 1 else None,
        },
        "maps": bool(maps),
    }
    data = {"runs": drawn_runs, "judge": judge, "frontier": drawn_frontier(frontier), "maps": maps}
    return rendered("report.html.j2", data=data, words=words)


def write_report(
    runs: Sequence[Path],
    out: Path,
    *,
    labels: Sequence[str] | None = None,
    title: str | None = None,
    frontier: Frontier | None = None,
) -> Path:
    """Writes one self-contained HTML page about one run, or comparing several, and returns its path.

    Args:
      runs: run directories, each with config.yaml and records.jsonl; timings.jsonl, samples.jsonl, alarms.jsonl,
        roll_backs.jsonl, drift.jsonl and token_maps.jsonl are used when there.
      out: the page; replaced in one step, so that a reader never sees half of it.
      labels: the runs' names on the page; their directories' names otherwise.
      title: the page's title; made from the labels otherwise.
      frontier: what the runs are held against, see kleash.frontier.

    Raises:
      RunDirectoryError: a directory holds no run, or a file in it cannot be read.
      InputError: no runs, another number of labels than of runs, or `out` is a directory.
    """
    out = Path(out)
    require_file_name(out, "report.html")
    return write_page(page(read_runs(runs, labels), title, frontier), out)


def write_sweep_report(sweep: Path, out: Path | None = None) -> Path:
    """Writes the page about a sweep's directory, and returns its path.

    Args:
      sweep: the directory that holds sweep.json and the runs.
      out: the page; None = report.html beside sweep.json.

    Raises:
      RunDirectoryError: sweep.json, or a run that it names, is missing or damaged.
      InputError: no run of the sweep has finished an update, or `out` is a directory.
    """
    entries, frontier = read_sweep(sweep)
    swept = " and ".join(entries[0]["values"]) if entries else ""
    return write_report(
        [sweep / entry["name"] for entry in entries],
        out or sweep / "report.html",
        labels=[entry["label"] for entry in entries],
        title=f"kleash sweep: {len(entries)} runs over {swept}",
        frontier=frontier,
    )
