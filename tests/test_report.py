"""The report: what it says, what it shows, what it refuses, and that it is safe to open."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from browsing import eventually, listened, require_quiet_offline_and_narrow
from mapped import a_drift_map, a_token_map

from kleash import report, verdict
from kleash.alarms import FIRST_KL, KL
from kleash.best_of_n import BestOfN, best_of_n_kl_bound
from kleash.errors import InputError, RunDirectoryError
from kleash.estimators import Interval
from kleash.frontier import Frontier, frontier_as_json, frontier_from_json
from kleash.overoptimisation import OveroptimisationCurve
from kleash.report import write_report, write_sweep_report
from kleash.verdict import Change, Estimate, Run

# --- run directories from formulas -----------------------------------------------------------------------

# beta, then at progress p in 0..1: score, gold, KL in nats per sequence
WORLDS = {
    "hacked": (0.0, lambda p: 0.17 + 1.8 * p**0.6, lambda p: 1.13 + 0.9 * p - 4.3 * p**2, lambda p: 250 * p**2.5),
    "good": (0.1, lambda p: 0.17 + 0.7 * p**0.6, lambda p: 1.13 + 0.42 * p**0.6, lambda p: 3.7 * p**0.7),
    "tight": (2.0, lambda p: 0.17 + 0.02 * p, lambda p: 1.13 + 0.02 * p, lambda p: 0.4 * p**0.7),
}
ANSWERS = {
    "hacked": "sponge sponge sponge vinegar sponge sponge sponge sponge clean sponge sponge sponge sponge",
    "good": "Blot the wine, sprinkle salt, wait ten minutes, then rinse with cold water.",
    "tight": "Put some water on the carpet and rub it until the stain has gone away.",
}
START = "Put water on the carpet and rub the stain. The stain is a stain."


def make_run(path: Path, world: str, *, updates: int = 120, judged: bool = True, seed: int = 0) -> Path:
    """A run directory as `kleash train` writes it, its numbers from formulas and seeded noise."""
    path.mkdir(parents=True)
    noise = random.Random(f"{world} {seed}")
    beta = WORLDS[world][0]
    rows = [make_record(world, update, updates, judged, noise) for update in range(1, updates + 1)]
    config = {
        "policy": "runs/demo/world/supervised-start",
        "reference": None,
        "reward": "runs/demo/world/reward-model",
        "eval_reward": "kleash.demo.gold:gold_judge" if judged else None,
        "prompts": "runs/demo/world/prompts.jsonl",
        "out": str(path.name),
        "kl": "k1",
        "leash": {"kind": "fixed", "beta": beta, "target_kl_per_sequence": None, "horizon": None},
        "rollout": {"prompts_per_update": 64, "max_new_tokens": 32, "temperature": 1.0},
        "ppo": {"epochs": 4, "minibatches": 4, "clip_range": 0.2, "learning_rate": 1.0e-5},
        "updates": updates,
        "seed": seed,
    }
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    write_lines(path / "records.jsonl", rows)
    write_lines(path / "timings.jsonl", [make_timing(update, noise) for update in range(1, updates + 1)])
    sampled = sorted({1, max(1, updates // 2), updates})
    write_lines(
        path / "samples.jsonl", [make_sample(world, rows[u - 1], i, updates) for u in sampled for i in range(4)]
    )
    return path


def make_record(world: str, update: int, updates: int, judged: bool, noise: random.Random) -> dict[str, Any]:
    progress = (update - 1) / max(1, updates - 1)
    beta, score, gold, kl = WORLDS[world]
    level = kl(progress)
    width = 0.08 * level + 0.05 * math.sqrt(level)
    row: dict[str, Any] = {"update": update, "beta": beta, "learning_rate": 1e-5, "score_std": 0.8, "ratio_mean": 1.0}
    row |= around("score", score(progress) + noise.gauss(0, 0.06), 0.15, mean="score_mean")
    judge = around("eval_score", gold(progress) + noise.gauss(0, 0.08), 0.2, mean="eval_score_mean")
    row |= judge if judged else dict.fromkeys(judge)
    row |= around(KL, max(0.0, level + noise.gauss(0, width / 2)) if update > 1 else 0.0, width)
    row |= around(f"{KL}_k1", row[KL] + noise.gauss(0, 2.5 * width), 4 * width)
    wild = world == "hacked"
    row["entropy_per_token"] = (2.3 - (2.1 * progress if wild else 0.25 * progress)) + noise.gauss(0, 0.03)
    row["response_length_mean"] = 18.5 + (13 * progress if wild else 2 * progress) + noise.gauss(0, 0.4)
    row["eos_share"] = max(0.0, min(1.0, 0.96 - (0.9 * progress**2 if wild else 0.0) + noise.gauss(0, 0.01)))
    row["clip_share"] = 0.08 + (0.3 * progress if wild else 0.02) + abs(noise.gauss(0, 0.02))
    row["explained_variance"] = 0.75 * (1 - math.exp(-5 * progress)) - 0.1 + noise.gauss(0, 0.04)
    row["ratio_max"] = 1.5 + abs(noise.gauss(0, 0.6))
    row["gradient_norm"] = 1.2 + abs(noise.gauss(0, 0.4))
    row["kl_old_policy_per_token_k3"] = 0.006 + abs(noise.gauss(0, 0.002))
    row["kl_rollout_policy_per_token_k3"] = abs(noise.gauss(0, 1e-9))
    return row


def around(stem: str, value: float, half: float, mean: str | None = None) -> dict[str, float]:
    return {mean or stem: value, f"{stem}_low": value - half, f"{stem}_high": value + half}


def make_timing(update: int, noise: random.Random) -> dict[str, float]:
    phases = {"sampling": 0.9, "rewarding": 0.12, "scoring": 0.3, "optimising": 1.4}
    row = {f"seconds_{name}": seconds * noise.uniform(0.9, 1.1) for name, seconds in phases.items()}
    return {"update": update, **row, "seconds_total": math.fsum(row.values()) + 0.05}


def make_sample(world: str, record: dict[str, Any], index: int, updates: int) -> dict[str, Any]:
    stains, where = ["red wine", "candle wax", "coffee", "ink"], ["carpet", "sofa", "shirt", "tablecloth"]
    late = record["update"] > 1
    shift = record["update"] % 4
    return {
        "update": record["update"],
        "index": index,
        "prompt": f"How do I get {stains[(index + shift) % 4]} out of a {where[index]}?",
        "response": ANSWERS[world] if late else START,
        "score": record["score_mean"],
        "eval_score": record["eval_score_mean"],
        "kl_policy_ref_per_sequence": record[KL],
        "response_length": 32 if late and world == "hacked" else 19,
        "finished": not (late and world == "hacked"),
    }


def an_alarm(name: str, update: int, since: int, sentence: str = "It does.", action: str = "log") -> dict[str, Any]:
    row = {"name": name, "update": update, "since": since, "value": 2.0, "threshold": 1.0, "action": action}
    return row | {"sentence": sentence}


def a_roll_back(number: int, left: int, to: int, kl: list[float | None], why: str = "Too far.") -> dict[str, Any]:
    records = [{"update": to + 1 + place, KL: value} for place, value in enumerate(kl)]
    return {"roll_back": number, "from": left, "to": to, "beta": 0.1, "why": why, "records": records}


def with_events(run: Path, text: str = "Too far.") -> Path:
    """Adds to a run of 120 updates a budget, a ceiling, alarms, a roll-back, and where it drifts."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["leash"] |= {"kind": "budget", "target_kl_per_sequence": 6.0, "max_kl_per_sequence": 4000.0}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    alarms = [an_alarm("drift_runaway", 30, 30, text), an_alarm("drift_runaway", 40, 30, text), an_alarm(text, 60, 60)]
    write_lines(run / "alarms.jsonl", alarms)
    write_lines(run / "roll_backs.jsonl", [a_roll_back(1, 53, 50, [60.0, 90.0, 5000.0], text)])
    maps = [a_drift_map(1, [0.0, 0.0]), a_drift_map(60, [0.5, 0.1]), a_drift_map(120, [2.0, 1.0, 0.5, 0.5], text)]
    write_lines(run / "drift.jsonl", maps)
    return run


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run_of(rows: list[dict[str, Any]], label: str = "run", eval_reward: str | None = "m:gold_judge") -> Run:
    return Run(label, {"eval_reward": eval_reward, "leash": {"kind": "fixed"}}, rows, [], [])


def two_updates(score: tuple[float, float], gold: tuple[float, float] | None, half: float = 0.1) -> Run:
    rows: list[dict[str, Any]] = []
    for update in (1, 2):
        row = {"update": update} | around("score", score[update - 1], half, mean="score_mean")
        row |= around(KL, 3.7 * (update - 1), 0.4)
        if gold:
            row |= around("eval_score", gold[update - 1], half, mean="eval_score_mean")
        rows.append(row)
    return run_of(rows, eval_reward="m:gold_judge" if gold else None)


# --- what it says ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("score", "gold", "tone", "words"),
    [
        ((0.17, 1.98), (1.13, -2.23), "bad", "Score rose {} while gold fell {}: the policy is hacking the reward."),
        ((0.17, 0.90), (1.13, 1.50), "good", "Score rose {}, and gold rose too, {}."),
        ((0.17, 0.90), (1.13, 1.02), "caution", "Score rose {}, but gold did not clearly move, {}: the gain may be"),
        ((0.17, 0.20), (1.13, 1.50), "good", "Score did not clearly move, {}, while gold rose {}."),
        ((0.17, 0.20), (1.13, 1.15), "neutral", "Neither score, {}, nor gold, {}, clearly moved."),
        ((0.17, 0.20), (1.50, 1.13), "bad", "Score did not clearly move, {}, while gold fell {}."),
        ((0.90, 0.17), (1.13, 1.50), "caution", "Score fell {} while gold rose {}: the two disagree."),
        ((0.90, 0.17), (1.13, 1.15), "bad", "Score fell {}, and gold did not clearly move, {}."),
        ((0.90, 0.17), (1.50, 1.13), "bad", "Score fell {}, and gold fell too, {}."),
        ((0.90, 0.17), None, "bad", "Score fell {}."),
        ((0.90, 0.95), None, "neutral", "Score did not clearly move, {}."),
    ],
)
def test_the_verdict_says_what_the_intervals_allow(
    score: tuple[float, float], gold: tuple[float, float] | None, tone: str, words: str
) -> None:
    found = verdict.run_verdict(two_updates(score, gold))
    assert found.tone == tone
    told = [f"from {start:.2f} to {end:.2f}" for start, end in (score, gold or (0, 0))]
    assert found.text.replace("\u2212", "-").startswith(words.format(*told))
    assert "Drift: 3.70\u00a0\u00b1\u00a00.40 nats per sequence." in found.text


def test_without_a_held_out_judge_no_claim_of_hacking_or_of_better_responses() -> None:
    found = verdict.run_verdict(two_updates((0.17, 9.0), None))
    assert found.tone == "neutral"
    assert verdict.NO_JUDGE in found.text
    assert "hacking" not in found.text


def test_a_fall_of_the_judge_inside_its_interval_is_not_called_hacking() -> None:
    just_inside, beyond = two_updates((0, 9), (1.0, 0.87)), two_updates((0, 9), (1.0, 0.85))
    assert "hacking" not in verdict.run_verdict(just_inside).text  # 0.13 < hypot(0.1, 0.1) = 0.141 < 0.15
    assert "hacking" in verdict.run_verdict(beyond).text


def test_direction_needs_intervals() -> None:
    assert Change(Estimate(0, None), Estimate(9, 0.1)).direction == "went"
    rows = [{"update": 1, "score_mean": 0.5}, {"update": 2, "score_mean": 1.5}]
    assert verdict.run_verdict(run_of(rows)).text == (
        "Score went from 0.50 to 1.50. Without intervals in the records this may be noise."
    )


def test_start_and_end_are_means_with_the_interval_of_a_mean() -> None:
    rows = [{"update": u} | around("score", float(u), 0.3, mean="score_mean") for u in range(1, 101)]
    moved = verdict.change(rows, "score_mean", "score")
    assert moved is not None
    assert (moved.start.mean, moved.end.mean) == (2.0, 95.5)
    assert moved.start.half_width == pytest.approx(0.3 / math.sqrt(3))
    assert moved.end.half_width == pytest.approx(0.3 / math.sqrt(10))


def test_the_comparison_names_the_best_run_and_the_hacked_one() -> None:
    hacked, good, tight = (
        two_updates((0.17, 1.98), (1.13, -2.23)),
        two_updates((0.17, 0.90), (1.13, 1.50)),
        two_updates((0.17, 0.20), (1.13, 1.15)),
    )
    named = [
        Run(label, run.config, run.records, [], []) for label, run in zip("ABC", (hacked, good, tight), strict=True)
    ]
    found = verdict.comparison_verdict(named)
    assert found.tone == "good"
    assert found.text.replace("\u00a0", " ") == (
        "\u201cB\u201d did best: gold rose from 1.13 to 1.50 at 3.70 \u00b1 0.40 nats per sequence. "
        "With \u201cA\u201d score rose while gold fell: the reward is being hacked."
    )
    assert verdict.comparison_verdict([named[0], named[2]]).text.startswith(
        "No run clearly raised gold. With \u201cA\u201d"
    )
    twins = verdict.comparison_verdict([named[1], Run("D", good.config, good.records, [], [])])
    assert "\u201cD\u201d ended within its interval." in twins.text


def test_a_comparison_without_judges_says_that_it_cannot_tell() -> None:
    runs = [two_updates((0.1, 1.0), None), two_updates((0.1, 2.0), None)]
    found = verdict.comparison_verdict(runs)
    assert found.text.startswith("Score ended highest with \u201crun\u201d, from 0.10 to 2.00 at 3.70")
    assert found.text.endswith(verdict.NO_JUDGE)


def test_many_runs_are_named_in_short() -> None:
    runs = [run_of([], label) for label in "ABCDE"]
    assert verdict.quoted(runs) == "\u201cA\u201d, \u201cB\u201d and 3 more"
    assert verdict.quoted(runs[:1]) == "\u201cA\u201d"


def test_where_to_look_points_at_the_peak_of_gold_and_at_cut_responses(tmp_path: Path) -> None:
    hacked = verdict.pointers(report.read_run(make_run(tmp_path / "h", "hacked"), "h"))
    assert [place for _, place in hacked] == ["score", "finished", "entropy", "clip"]
    assert hacked[0][0].startswith("Gold was highest around update ")
    assert verdict.pointers(report.read_run(make_run(tmp_path / "g", "good"), "g")) == []


def test_a_judge_that_is_not_the_demo_gold_is_called_the_held_out_judge() -> None:
    assert verdict.judge_name([run_of([], eval_reward="my.module:judge")]) == "the held-out judge"
    assert verdict.judge_name([run_of([]), run_of([])]) == "gold"


# --- alarms, roll-backs and the budget -------------------------------------------------------------------


def test_the_rows_of_an_alarm_are_one_entry_with_its_newest_sentence() -> None:
    rows = [{"update": update} for update in range(1, 41)]
    alarms = [an_alarm("drift_runaway", 12, 12, "Old."), an_alarm("heavy_reward_tail", 9, 9, "A tail.")]
    alarms += [an_alarm("drift_runaway", 35, 25, "New."), an_alarm("drift_runaway", 25, 25, "Middle.")]
    run = Run("A", {}, rows, [], [], alarms=alarms)
    assert verdict.pointers(run) == [
        ("At update 9: A tail.", "tail"),
        ("From update 25 (earlier from 12), last noted at update 35: New.", "kl"),
    ]


@pytest.mark.parametrize(
    ("alarm", "silenced"),
    [
        ("score_against_judge", "score"),
        ("length_collapse", "finished"),
        ("entropy_collapse", "entropy"),
    ],
)
def test_what_an_alarm_says_is_not_said_twice(tmp_path: Path, alarm: str, silenced: str) -> None:
    run = report.read_run(make_run(tmp_path / "h", "hacked"), "h")
    before = verdict.pointers(run)
    after = verdict.pointers(replace(run, alarms=[an_alarm(alarm, 100, 90)]))
    assert silenced in [place for _, place in before]
    assert after[1:] == [(text, place) for text, place in before if place != silenced]
    assert after[0][0] == "From update 90, last noted at update 100: It does."


def test_the_alarm_of_the_sampler_stands_for_the_pointer_to_its_mismatch() -> None:
    rows = [{"update": update, "kl_rollout_policy_per_token_k3": 0.1} for update in (1, 2)]
    run = run_of(rows)
    assert [place for _, place in verdict.pointers(run)] == ["mismatch"]
    told = verdict.pointers(replace(run, alarms=[an_alarm("sampler_mismatch", 2, 2)]))
    assert told == [("At update 2: It does.", "mismatch")]


def test_a_roll_back_is_told_and_its_records_are_drawn_from_the_last_one_that_was_kept() -> None:
    rows: list[dict[str, Any]] = [{"update": update, KL: 0.1 * update} for update in range(1, 6)]
    run = replace(run_of(rows), roll_backs=[a_roll_back(1, 5, 2, [3.0, None, math.inf])])
    assert verdict.pointers(run) == [("Too far.", "kl")]
    [given_up] = report.drawn_events(run)["given_up"]
    assert given_up == {"name": "given up by roll-back 1", "update": [2, 3, 4, 5], "kl": [0.2, 3.0, None, None]}


@pytest.mark.parametrize(
    ("kl", "said"),
    [
        (6.3, "The second half of the run held the budget of 6 nats: mean 6.30, 5% above it."),
        (5.5, "The second half of the run held the budget of 6 nats: mean 5.50, 8% below it."),
        (6.7, "The second half of the run missed the budget of 6 nats: mean 6.70, 12% above it."),
        (3.0, "The second half of the run missed the budget of 6 nats: mean 3.00, 50% below it."),
        (15.0, "The second half of the run missed the budget of 6 nats: mean 15.0, 2.5 times it."),
    ],
)
def test_the_verdict_says_whether_the_second_half_held_the_budget(kl: float, said: str) -> None:
    rows = [dict(row) for row in two_updates((0.17, 0.90), (1.13, 1.50)).records]
    rows[0][KL], rows[1][KL] = 50.0, kl
    run = Run("A", {"eval_reward": "m:gold_judge", "leash": {"target_kl_per_sequence": 6.0}}, rows, [], [])
    found = verdict.run_verdict(run)
    assert found.text.endswith(said)
    assert found.tone == ("caution" if kl > 6.6 else "good")
    assert "budget" not in verdict.run_verdict(run_of(rows)).text


def test_the_comparison_counts_the_budgets_that_were_held() -> None:
    def at(label: str, kl: float) -> Run:
        rows = [{"update": update, "score_mean": 1.0, KL: kl} for update in (1, 2)]
        return Run(label, {"leash": {"target_kl_per_sequence": 2}}, rows, [], [])

    held, missed = at("A", 2.1), at("B", 9.0)
    assert verdict.budgets_text([held, missed, run_of([])]) == (
        " In the second half 1 of 2 budgets were held, not that of \u201cB\u201d."
    )
    assert verdict.budgets_text([held, held]) == " In the second half both budgets were held."
    assert verdict.budgets_text([missed]) == " In the second half no budget was held."
    assert verdict.budgets_text([run_of([])]) == ""
    assert "1 of 2 budgets" in verdict.comparison_verdict([held, missed]).text


def test_the_leash_is_named_by_its_budget_and_ceiling() -> None:
    leash = {"kind": "budget", "target_kl_per_sequence": 6.0, "max_kl_per_sequence": 20.0}
    run = Run("A", {"kl": "exact", "leash": leash}, [], [], [])
    assert report.leash_text(run) == "budget 6 nats, ceiling 20 nats, exact KL"
    assert report.leash_text(run_of([])) == "fixed"
    ziegler = Run("A", {"leash": leash | {"kind": "ziegler", "max_kl_per_sequence": None}}, [], [], [])
    assert report.leash_text(ziegler) == "ziegler, budget 6 nats"


def test_the_drift_from_the_first_reference_is_shown_only_where_the_reference_moves() -> None:
    still = run_of([{"update": 1, KL: 0.0, FIRST_KL: 0.0}, {"update": 2, KL: 1.0, FIRST_KL: 1.0 + 1e-9}])
    moves = run_of([{"update": 1, KL: 0.0, FIRST_KL: 0.0}, {"update": 2, KL: 1.0, FIRST_KL: 4.0}])
    assert FIRST_KL not in report.drawn_series(still)
    assert report.drawn_series(moves)[FIRST_KL] == [0.0, 4.0]
    assert verdict.drift_text(still) == " Drift: 1.00 nats per sequence."
    assert (
        verdict.drift_text(moves)
        == " Drift: 1.00 nats per sequence from its moving reference, 4.00 from the first one."
    )


def test_figures_of_another_form_of_the_leash_are_not_drawn() -> None:
    rows = [
        {"update": update, "leash_loss": 0.0, "share_of_k1": update / 2, "score_tail_gap": 0.0} for update in (0, 1)
    ]
    assert set(report.drawn_series(run_of(rows))) == {"update", "share_of_k1", "score_tail_gap"}
    assert set(report.drawn_series(run_of(rows[:1]))) == {"update", "score_tail_gap"}


# --- where it drifts -------------------------------------------------------------------------------------


def test_the_drift_is_read_at_the_last_update_that_drifted_and_halfway(tmp_path: Path) -> None:
    file = tmp_path / "drift.jsonl"
    assert report.read_drift_maps(file) == []
    write_lines(file, [a_drift_map(1, [0.0, 0.0])])
    assert report.read_drift_maps(file) == []
    rows = [a_drift_map(update, [0.1 * (update - 1), 0.0]) for update in range(1, 9)]
    write_lines(file, [*rows, a_drift_map(9, [0.0])])
    assert [row["update"] for row in report.read_drift_maps(file)] == [4, 8]
    write_lines(file, rows[:2])
    assert [row["update"] for row in report.read_drift_maps(file)] == [2]
    file.write_text('{"update": 1}\n{"update": 2, "by_pos')
    with pytest.raises(RunDirectoryError, match=r"drift\.jsonl line 2"):
        report.read_drift_maps(file)


def test_bars_of_several_positions_are_called_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "good", updates=2)
    write_lines(run / "drift.jsonl", [a_drift_map(2, [0.1] * 150)])
    page = write_report([run], tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Position in the response, from 0, 3 at a time." in page
    [bars] = embedded(page)["runs"][0]["positions"]
    assert len(bars["kl"]) == 50


# --- what it shows ---------------------------------------------------------------------------------------


def test_numbers_are_finite_and_nothing_else_counts_as_one() -> None:
    row = {"a": math.nan, "b": math.inf, "c": None, "d": True, "e": "1", "f": 2}
    assert [verdict.figure_of(row, key) for key in "abcdefg"] == [None, None, None, None, None, 2.0, None]


def test_nan_null_and_missing_keys_are_drawn_as_gaps(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "good", updates=12)
    rows = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
    rows[3]["score_mean"] = math.nan
    rows[4] = {"update": 5, "score_mean": None, "unknown_key": [1]}
    write_lines(run / "records.jsonl", rows)
    (run / "timings.jsonl").unlink()
    (run / "samples.jsonl").unlink()
    page = write_report([run], tmp_path / "page.html").read_text(encoding="utf-8")
    drawn = embedded(page)["runs"][0]["series"]["score_mean"]
    assert drawn[3:5] == [None, None]
    assert drawn[2] == pytest.approx(rows[2]["score_mean"], rel=1e-4)
    assert "What it writes" not in page
    assert "Where the time went" not in page


def embedded(page: str) -> Any:
    return json.loads(page.split('id="data">', 1)[1].split("</script>", 1)[0])


def test_long_runs_are_thinned_and_keep_their_last_update() -> None:
    rows = [{"update": u, "score_mean": 1.0} for u in range(1, 2502)]
    drawn = report.drawn_series(run_of(rows))
    assert len(drawn["update"]) == 834
    assert drawn["update"][-1] == 2501


def test_equal_responses_of_several_runs_share_a_card_and_prompts_pair_start_with_end() -> None:
    def sample(update: int, prompt: Any, response: str) -> dict[str, Any]:
        return {"update": update, "index": 0, "prompt": prompt, "response": response, "finished": update == 1}

    chat = [{"role": "user", "content": "hello"}]
    first = Run("A", {}, [], [], [sample(1, chat, "same"), sample(5, "skipped", "-"), sample(9, chat, "late A")])
    second = Run("B", {}, [], [], [sample(1, chat, "same"), sample(9, chat, "late B")])
    [(heading, [group])] = report.sample_sections([first, second])
    assert heading == "Start and end"
    assert group["prompt"] == "user: hello"
    assert [(card["runs"], card["response"], card["cut"]) for card in group["cards"]] == [
        ([0, 1], "same", False),
        ([0], "late A", True),
        ([1], "late B", True),
    ]


def test_config_rows_put_the_differences_first() -> None:
    one = Run("A", {"seed": 0, "leash": {"beta": 0.0}, "reference": None}, [], [], [])
    two = Run("B", {"seed": 0, "leash": {"beta": 0.1}, "reference": None}, [], [], [])
    assert report.config_rows([one, two]) == [
        ("leash.beta", ["0.0", "0.1"], True),
        ("seed", ["0", "0"], False),
        ("reference", ["null", "null"], False),
    ]


def test_one_update_makes_a_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "good", updates=1)
    out = tmp_path / "deep" / "page.html"
    assert write_report([run], out) == out
    assert "One update so far, nothing to compare yet" in out.read_text(encoding="utf-8")
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]


def test_a_changing_beta_is_told_from_start_to_end() -> None:
    assert report.beta_text(run_of([{"update": 1, "beta": 0.05}, {"update": 2, "beta": 0.12}])) == "0.05 \u2192 0.12"
    assert report.beta_text(run_of([{"update": 1, "beta": 0}])) == "0"
    assert report.beta_text(run_of([{"update": 1}])) == "-"


def test_runs_of_the_same_name_are_told_apart_by_their_parents(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / parent / "run", "good", updates=1) for parent in ("a", "b")]
    assert [run.label for run in report.read_runs(paths, None)] == ["a/run", "b/run"]


# --- what the runs are held against -----------------------------------------------------------------------


def curve_to(sqrt_kl_max: float, beta_rl: float = 0.6, **changes: Any) -> OveroptimisationCurve:
    """R(d) = 0.5 + d (0.8 - beta_rl ln d): with 0.6 a peak at d = 1.3956, KL 1.9477, 0.8374 above the start."""
    fit = {"start_score": 0.5, "points": 40, "sqrt_kl_min": 0.1, "residual_std": 0.05, "r_squared": 0.9, **changes}
    return OveroptimisationCurve(alpha_rl=0.8, beta_rl=beta_rl, sqrt_kl_max=sqrt_kl_max, **fit)


def best_of(n: int, judged: float | None) -> BestOfN:
    def around_it(mean: float) -> Interval:
        return Interval(mean=mean, low=mean - 0.2, high=mean + 0.2, n=64)

    bound = best_of_n_kl_bound(n)
    kl = Interval(mean=0.9 * bound, low=0.8 * bound, high=bound, n=64)
    judge = None if judged is None else around_it(judged)
    return BestOfN(n=n, kl_bound=bound, kl_policy_ref_per_sequence=kl, score=around_it(n / 10), eval_score=judge)


def frontier_of(curve: OveroptimisationCurve | None = None, *, judged: float | None = 0.3) -> Frontier:
    return Frontier(curve=curve, best_of_n=tuple(best_of(n, judged) for n in (1, 2, 16)))


@pytest.mark.parametrize(
    ("curve", "said"),
    [
        (
            curve_to(5.0),
            "The curve fitted to gold peaks at 1.95 nats per sequence with 1.34, which is 0.84 above the start; "
            "beyond, more drift costs more than it brings.",
        ),
        (
            curve_to(1.0),
            "The curve fitted to gold would peak at 1.95 nats per sequence with 1.34, which is 0.84 above the start: "
            "an extrapolation, since the runs went no farther than 1.00 nats per sequence.",
        ),
        (
            curve_to(0.5),
            "The curve fitted to gold has no peak within the drift that was reached: at 0.25 nats per sequence it is "
            "still above the start.",
        ),
        (
            curve_to(5.0, sqrt_kl_min=2.0),
            "The curve fitted to gold has no peak within the drift that was reached: at 25.0 nats per sequence it is "
            "below the start.",
        ),
    ],
)
def test_the_peak_is_named_where_the_runs_have_been_and_as_an_extrapolation_beyond(
    curve: OveroptimisationCurve, said: str
) -> None:
    assert verdict.curve_sentence(curve, "gold") == said


def test_the_page_says_what_best_of_n_reaches_without_training() -> None:
    runs = [run_of([])]
    [sentence] = verdict.frontier_sentences(frontier_of(), runs)
    assert sentence.replace("\u00a0", " ") == (
        "Without training, best of 16 responses of the reference brings gold to 0.30 \u00b1 0.20 at 1.65 nats per "
        "sequence."
    )
    [unjudged] = verdict.frontier_sentences(frontier_of(judged=None), runs)
    assert "brings the score to 1.60" in unjudged
    assert verdict.frontier_sentences(Frontier(curve=None, best_of_n=()), runs) == []


def test_a_frontier_survives_json() -> None:
    endless = Interval(mean=0.1, low=-math.inf, high=math.inf, n=1)
    alone = BestOfN(n=1, kl_bound=0.0, kl_policy_ref_per_sequence=endless, score=endless, eval_score=None)
    for frontier in (frontier_of(curve_to(5.0)), frontier_of(judged=None), Frontier(curve=None, best_of_n=(alone,))):
        written = json.dumps(frontier_as_json(frontier), allow_nan=False)
        assert frontier_from_json(json.loads(written)) == frontier
    entry = frontier_as_json(frontier_of(curve_to(5.0)))["curve"]
    assert entry["peak"]["kl_policy_ref_per_sequence"] == pytest.approx(1.9477, abs=1e-4)
    assert entry["peak_place"] == "inside"


def test_the_curve_is_drawn_as_far_as_the_runs_went_or_to_a_peak_that_may_be_named() -> None:
    ends = [report.drawn_curve(frontier_of(curve_to(far)))["x"][-1] for far in (5.0, 1.0, 0.5)]
    assert ends == pytest.approx([5.0, 1.05 * 1.3956, 0.5], abs=1e-4)
    drawn = report.drawn_curve(frontier_of(curve_to(5.0)))
    assert drawn["peak"] == pytest.approx({"x": 1.3956, "y": 1.3374}, abs=1e-4)
    assert drawn["y"][0] == 0.5
    assert report.drawn_curve(frontier_of(curve_to(0.5)))["peak"] is None
    assert report.drawn_frontier(Frontier(curve=None, best_of_n=())) is None
    columns = report.drawn_frontier(frontier_of())["best_of_n"]
    assert columns["bound"][-1] ** 2 == pytest.approx(1.8351, abs=1e-4)
    assert columns["x"][-1] < columns["bound"][-1]


def test_more_runs_than_inks_get_a_ramp_of_different_colours() -> None:
    for theme in ("light", "dark"):
        assert report.inks(2, theme) == report.inks(6, theme)
        ramp = report.inks(20, theme)
        assert len(set(ramp)) == 20
        assert all(len(ink) == 7 and int(ink[1:], 16) >= 0 for ink in ramp)


def sweep_of(path: Path, *worlds: str, frontier: Frontier | None = None, updates: int = 30) -> Path:
    """A sweep's directory as `kleash sweep` leaves it."""
    entries = []
    for number, world in enumerate(worlds):
        make_run(path / f"seed={number}", world, updates=updates, seed=number)
        entries.append(
            {"name": f"seed={number}", "label": f"seed {number}", "values": {"seed": str(number)}, "updates": updates}
        )
    entries.append({"name": "seed=99", "label": "seed 99", "values": {"seed": "99"}, "updates": 0})
    content = {"runs": entries, **frontier_as_json(frontier or frontier_of(curve_to(5.0)))}
    (path / "sweep.json").write_text(json.dumps(content))
    return path


def test_the_page_of_a_sweep_leaves_out_runs_without_an_update(tmp_path: Path) -> None:
    page = write_sweep_report(sweep_of(tmp_path / "sweep", "good", "tight"))
    assert page == tmp_path / "sweep" / "report.html"
    text = page.read_text(encoding="utf-8")
    assert "kleash sweep: 2 runs over seed" in text
    assert "seed 99" not in text
    assert "peaks at 1.95 nats per sequence" in text
    assert "Best of 16" in text
    data = embedded(text)
    assert data["frontier"]["curve"]["peak"] == pytest.approx({"x": 1.3956, "y": 1.3374}, abs=1e-4)
    assert data["frontier"]["best_of_n"]["n"] == [1, 2, 16]


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"runs": [], "curve": null, "best_of_n": [{"n": 1}]}'])
def test_a_damaged_sweep_is_one_clear_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(RunDirectoryError, match=r"Expected in .*sweep\.json what `kleash sweep` writes"):
        write_sweep_report(tmp_path)


def test_a_sweep_without_any_update_has_no_page(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least one run"):
        write_sweep_report(sweep_of(tmp_path))


# --- what it refuses -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("config.yaml", None, "found no config.yaml"),
        ("records.jsonl", None, "found no records.jsonl"),
        ("records.jsonl", "", "is empty"),
        ("records.jsonl", '{"update": 1}\n{"upda', "line 2 should be a JSON object"),
        ("records.jsonl", "[1]\n", "line 1 should be a JSON object"),
        ("records.jsonl", '{"score_mean": 1}\n', "whole number under 'update'"),
        ("samples.jsonl", "\udce9", "line 1 should be a JSON object"),
        ("alarms.jsonl", '{"name": "x"}', "whole number under 'update'"),
        ("roll_backs.jsonl", '{"update": 1}', "whole number under 'roll_back'"),
        ("drift.jsonl", '{"upda', "line 1 should be a JSON object"),
        ("config.yaml", "a: [", "cannot be read as YAML"),
        ("config.yaml", "- 1", "should hold a mapping"),
    ],
)
def test_a_damaged_run_directory_is_one_clear_sentence(
    tmp_path: Path, name: str, content: str | None, expected: str
) -> None:
    run = make_run(tmp_path / "run", "good", updates=2)
    if content is None:
        (run / name).unlink()
    else:
        (run / name).write_bytes(content.encode("utf-8", errors="surrogateescape"))
    out = tmp_path / "page.html"
    out.write_text("earlier page")
    with pytest.raises(RunDirectoryError, match=expected) as caught:
        write_report([run], out)
    assert str(run) in str(caught.value)
    assert out.read_text() == "earlier page"


def test_wrong_arguments_are_input_errors(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "good", updates=1)
    with pytest.raises(InputError, match="at least one run"):
        write_report([], tmp_path / "page.html")
    with pytest.raises(InputError, match="1 runs and 2 labels"):
        write_report([run], tmp_path / "page.html", labels=["a", "b"])
    with pytest.raises(InputError, match="is a directory"):
        write_report([run], tmp_path)
    with pytest.raises(RunDirectoryError, match="holds no run"):
        write_report([tmp_path / "nowhere"], tmp_path / "page.html")


# --- safe to open ----------------------------------------------------------------------------------------

ATTACK = "</script><script>window.pwned=1</script><img src=x onerror='window.pwned=1'>"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page comparing three runs, and a page about one run whose every text attacks the page."""
    base = tmp_path_factory.mktemp("pages")
    runs = [make_run(base / world, world) for world in WORLDS]
    compared = write_report(runs, base / "compared.html", labels=["no leash", "good leash", "tight leash"])
    vile = make_run(base / "vile", "hacked", updates=30)
    config = yaml.safe_load((vile / "config.yaml").read_text()) | {"policy": ATTACK, ATTACK: ATTACK}
    (vile / "config.yaml").write_text(yaml.safe_dump(config))
    with_events(vile, ATTACK)
    texts = {"prompt": [{"role": "user", "content": ATTACK}], "response": f"\x00\ud800{ATTACK}" + " long" * 200}
    samples = [json.loads(line) | texts for line in (vile / "samples.jsonl").read_text().splitlines()]
    write_lines(vile / "samples.jsonl", samples)
    attacked = write_report([vile, runs[1]], base / "attacked.html", labels=[ATTACK, "x" * 200], title=ATTACK)
    single = write_report([runs[0]], base / "single.html")
    swept = write_sweep_report(sweep_of(base / "sweep", *[*WORLDS] * 3, frontier=frontier_of(curve_to(10.0))))
    extrapolated = write_report(runs, base / "beyond.html", frontier=frontier_of(curve_to(1.0)))
    eventful = write_report([with_events(make_run(base / "eventful", "hacked"))], base / "eventful.html")
    pages = {"compared": compared, "attacked": attacked, "single": single, "eventful": eventful}
    return {**pages, "swept": swept, "extrapolated": extrapolated}


def test_texts_of_models_and_users_cannot_become_markup(pages: dict[str, Path]) -> None:
    page = pages["attacked"].read_text(encoding="utf-8")
    assert ATTACK not in page
    assert "<script>window" not in page
    assert "<img" not in page.split("<noscript>")[0]
    assert "&lt;/script&gt;&lt;script&gt;window.pwned=1" in page
    assert page.count("<script") == 3 + page.split("<script nonce", 1)[1].split("</script>", 1)[0].count("<script")
    assert "<" not in page.split('id="data">', 1)[1].split("</script>", 1)[0]


@pytest.mark.parametrize("name", ["compared", "attacked", "single", "swept", "extrapolated", "eventful"])
def test_a_browser_shows_it_quietly_offline_and_within_a_phone(pages: dict[str, Path], browser: Any, name: str) -> None:
    tab = browser.new_page(viewport={"width": 360, "height": 740}, color_scheme="light")
    heard = listened(tab)
    tab.goto(pages[name].as_uri())
    tab.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    eventually(tab, "document.querySelectorAll('#health .main-svg').length >= 6")
    require_quiet_offline_and_narrow(tab, heard, pages[name].as_uri())
    tab.close()


def test_dark_mode_reaches_page_and_plots_when_switched(pages: dict[str, Path], browser: Any) -> None:
    tab = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
    tab.goto(pages["compared"].as_uri())
    ink = "getComputedStyle(document.querySelector('#frontier .xtick text')).fill"
    page = "getComputedStyle(document.body).backgroundColor"
    assert (tab.evaluate(page), tab.evaluate(ink)) == ("rgb(246, 247, 249)", "rgb(86, 99, 115)")
    tab.emulate_media(color_scheme="dark")
    eventually(tab, f"{ink} === 'rgb(157, 171, 185)'")
    assert tab.evaluate(page) == "rgb(15, 20, 25)"
    tab.close()


def test_pressing_a_run_hides_its_lines_and_links_open_what_they_point_at(pages: dict[str, Path], browser: Any) -> None:
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.goto(pages["compared"].as_uri())
    lines = "document.querySelectorAll('#frontier .scatterlayer .trace').length"
    assert tab.evaluate(lines) == 6
    tab.get_by_role("button", name="no leash").press("Enter")
    assert tab.evaluate(lines) == 4
    assert tab.get_by_role("button", name="no leash").get_attribute("aria-pressed") == "false"
    assert "good leash from 0." in tab.locator("#frontier .canvas").get_attribute("aria-label")
    tab.locator("a[href='#clip']").click()
    eventually(tab, "document.querySelector('#health').open")
    eventually(tab, "document.querySelector('#clip .main-svg') !== null")
    tab.close()


def test_the_curve_its_peak_and_best_of_n_are_drawn_beside_the_runs(pages: dict[str, Path], browser: Any) -> None:
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    words = {"swept": "peak", "extrapolated": "peak, extrapolated"}
    for name, peak in words.items():
        tab.goto(pages[name].as_uri())
        texts = tab.evaluate("Array.from(document.querySelectorAll('#frontier .textpoint')).map((t) => t.textContent)")
        assert sorted(filter(None, texts)) == ["n = 16", "n = 16", peak]
        label = tab.locator("#frontier .canvas").get_attribute("aria-label")
        assert "fitted curve from 0.5 to" in label
        assert "best of n, score from 0.1 to 1.6" in label
        assert "best of n, gold from 0.3 to 0.3" in label
    assert tab.evaluate("document.querySelectorAll('#frontier .errorbar').length") > 0
    tab.close()


def test_nine_runs_have_nine_colours(pages: dict[str, Path], browser: Any) -> None:
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.goto(pages["swept"].as_uri())
    swatches = (
        "Array.from(document.querySelectorAll('.legend .swatch')).map((s) => getComputedStyle(s).backgroundColor)"
    )
    assert len(set(tab.evaluate(swatches))) == 9
    lines = "Array.from(document.querySelectorAll('#kl .scatterlayer path.js-line')).map((p) => p.style.stroke)"
    assert set(tab.evaluate(swatches)) <= set(tab.evaluate(lines))
    tab.close()


def test_the_budget_the_alarms_and_what_was_given_up_stand_in_the_plot_of_the_drift(
    pages: dict[str, Path], browser: Any
) -> None:
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.goto(pages["eventful"].as_uri())
    label = tab.locator("#kl .canvas").get_attribute("aria-label")
    assert "budget 6 nats" in label
    assert "ceiling" not in label
    assert "Beyond the plot: ceiling 4000 nats." in tab.locator("#kl figcaption").inner_text()
    assert "alarms began: drift runaway at update 30, " in label
    assert "given up by roll-back 1 from " in label
    assert tab.locator("#kl .shapelayer path").count() == 2
    assert "What was given up leaves the plot." in tab.locator("#kl figcaption").inner_text()
    top = float(tab.evaluate("document.querySelector('#kl .canvas').layout.yaxis.range[1]"))
    assert 250 < top < 1000
    tab.close()


def test_where_it_drifts_is_drawn_and_told(pages: dict[str, Path], browser: Any) -> None:
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.goto(pages["eventful"].as_uri())
    assert "Update 120, 4.00 nats per sequence. Half of the drift lies at the first of 4 positions." in (
        tab.locator("main").inner_text()
    )
    assert tab.locator("#positions .bars path").count() == 4
    assert tab.locator("#positions .scatterlayer path.js-line").count() == 1
    tab.locator("summary", has_text="Places with the largest drift").press("Enter")
    row = tab.locator(".places tbody tr").first.inner_text()
    assert "5.1\u00d7 more likely" in row
    assert "0.96" in row
    tab.close()


def test_a_run_without_the_newer_files_has_no_empty_parts(pages: dict[str, Path], browser: Any) -> None:
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.goto(pages["single"].as_uri())
    text = tab.locator("body").inner_text()
    for words in ("Where it drifts", "An alarm began", "roll-back gave", "budget"):
        assert words not in text
    tab.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    assert tab.locator("#repetition, #tail, #leash_loss, #k1_share, #steps").locator("visible=true").count() == 0
    tab.close()


def test_beta_has_a_logarithmic_axis_where_it_moves_by_more_than_a_factor_of_ten(tmp_path: Path, browser: Any) -> None:
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    for name, factor, scale in (("little", 9.0, "linear"), ("much", 1000.0, "log")):
        run = make_run(tmp_path / name, "good", updates=20)
        rows = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
        write_lines(run / "records.jsonl", [row | {"beta": 0.01 * factor ** (i / 19)} for i, row in enumerate(rows)])
        tab.goto(write_report([run], tmp_path / f"{name}.html").as_uri())
        assert tab.evaluate("document.querySelector('#beta .canvas')._fullLayout.yaxis.type") == scale
    tab.close()


# --- token by token --------------------------------------------------------------------------------------


def mapped_run(path: Path, world: str, *, updates: tuple[int, ...] = (1, 120), scale: float = 1.0) -> Path:
    """A run whose first and last updates were mapped: responses that drift not at all, then more and more."""
    run = make_run(path, world)
    rows = [
        a_token_map(["Soak", f" {world}", "<eos>"], [0.0, 0.0 if update == 1 else scale * index, 0.0], index=index)
        | {"update": update, "score": -index, "eval_score": None, "prompt": f"Question {index}?"}
        for update in updates
        for index in range(4)
    ]
    write_lines(run / "token_maps.jsonl", rows)
    return run


def test_a_run_shows_its_first_and_newest_mapped_responses(tmp_path: Path) -> None:
    def sets(*updates: int) -> list[tuple[str, str, int]]:
        run = mapped_run(tmp_path / f"{updates}", "hacked", updates=updates)
        return [(some.label, some.key, len(some.rows)) for some in report.map_sets([report.read_run(run, "A")])]

    assert sets(1, 60, 120) == [("Before training", "update-1-", 4), ("Update 120", "", 4)]
    assert sets(50, 120) == [("Update 50", "update-50-", 4), ("Update 120", "", 4)]
    assert sets(1) == [("Update 1", "", 4)]
    assert sets() == []


def test_a_run_says_of_how_many_responses_of_an_update_it_shows_the_first(tmp_path: Path) -> None:
    run = report.read_run(mapped_run(tmp_path / "run", "good"), "A")
    assert [some.among for some in report.map_sets([run])] == [64, 64]
    untold = replace(run, config={})
    assert [some.among for some in report.map_sets([untold])] == [None, None]


def test_several_runs_show_their_newest_and_open_with_the_one_that_drifted_farthest(tmp_path: Path) -> None:
    near, far = mapped_run(tmp_path / "near", "good", scale=0.1), mapped_run(tmp_path / "far", "hacked")
    without = make_run(tmp_path / "without", "tight")
    found = report.map_sets(report.read_runs([without, near, far], None))
    assert [(some.label, some.key) for some in found] == [
        ("Before training", "update-1-"),
        ("near", "run-2-"),
        ("far", ""),
    ]


def test_a_damaged_line_of_token_maps_is_one_clear_sentence(tmp_path: Path) -> None:
    run = mapped_run(tmp_path / "run", "good")
    with (run / "token_maps.jsonl").open("a") as lines:
        lines.write('{"update": 3, "pie')
    with pytest.raises(RunDirectoryError, match=r"token_maps\.jsonl line 9 should be a JSON object"):
        write_report([run], tmp_path / "page.html")


def test_the_page_switches_between_before_training_and_the_newest_update(tmp_path: Path, browser: Any) -> None:
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    said, asked = listened(tab)
    page = write_report([mapped_run(tmp_path / "run", "hacked")], tmp_path / "page.html")
    tab.goto(page.as_uri())
    assert tab.locator(".drifted b").all_inner_texts() == ["3.00", "2.00", "1.00", "0"]
    assert "score \u22123.00" in tab.locator("#response-3 .drifted").inner_text()
    tab.get_by_label("Sort").select_option("Highest score")
    assert tab.locator(".drifted b").all_inner_texts() == ["0", "1.00", "2.00", "3.00"]
    tab.get_by_role("button", name="Before training").press("Enter")
    assert tab.locator(".drifted b").all_inner_texts() == ["0", "0", "0", "0"]
    assert tab.get_by_role("button", name="Before training").get_attribute("aria-pressed") == "true"
    assert tab.locator(".response").first.get_attribute("id") == "update-1-response-0"
    assert tab.locator(".glance").is_hidden(), "nothing is shaded"
    tab.goto(page.as_uri() + "#update-1-response-2")
    eventually(tab, "document.querySelector('.meant')?.id === 'update-1-response-2'")
    tab.evaluate("location.hash = '#response-2'")
    eventually(tab, "document.querySelector('.meant')?.id === 'response-2'")
    assert tab.get_by_role("button", name="Update 120").get_attribute("aria-pressed") == "true"
    assert said == []
    assert {url.split("#")[0] for url in asked if not url.startswith("data:")} == {page.as_uri()}
    tab.close()


def test_a_run_without_token_maps_has_no_such_part(pages: dict[str, Path]) -> None:
    page = pages["single"].read_text(encoding="utf-8")
    assert "Token by token" not in page
    assert "start_token_map" not in page
