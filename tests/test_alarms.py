"""The alarms: raised by what they are for, at the right update; silent on healthy runs and on missing figures."""

import math
import random
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, ValidationError

from kleash.alarms import (
    FIRST_KL,
    KEYS,
    KL,
    Alarm,
    AlarmContext,
    AlarmsConfig,
    AlarmWatch,
    History,
    alarms_at,
    figures,
    pooled,
)
from kleash.glossary import GLOSSARY

ROOT = Path(__file__).parents[1]
NAMES = tuple(AlarmsConfig.model_fields)
BUDGET = AlarmContext(target_kl_per_sequence=6.0, beta_min=1e-6, beta_max=10.0)
SEQUENCES = 64

Run = list[dict[str, float | int | None]]


def with_interval(key: str, stem: str, mean: float, spread: float) -> dict[str, float]:
    half_width = 2 * spread / math.sqrt(SEQUENCES)
    return {key: mean, f"{stem}_low": mean - half_width, f"{stem}_high": mean + half_width}


def wobble(noise: random.Random, updates: int, size: float) -> list[float]:
    """Log-normal wobble around 1; what is above the mean in one update mostly is in the next (correlation 0.6)."""
    steps, log = [], 0.0
    for _ in range(updates):
        log = 0.6 * log + 0.8 * noise.gauss(0, size)
        steps.append(math.exp(log))
    return steps


def healthy_run(seed: int, updates: int = 120, *, final_kl: float = 6.0, pace: float = 15.0, size: float = 0.1) -> Run:
    """KL, score and judge rise and flatten; entropy halves; lengths grow by a third; 64 sequences of noise."""
    noise = random.Random(seed)
    mean_of = lambda mean, spread: mean + noise.gauss(0, spread / math.sqrt(SEQUENCES))  # noqa: E731
    records: Run = []
    for update, factor in enumerate(wobble(noise, updates, size), start=1):
        way = 1 - math.exp(-(update - 1) / pace)
        kl, length = final_kl * way**2 * factor, mean_of(30 * (1 + way / 3), 10)
        spread, spread_k1 = 0.7 * kl, 0.7 * kl + math.sqrt(2 * kl)
        records.append(
            {
                "update": update,
                **with_interval(KL, KL, abs(mean_of(kl, spread)), spread),
                **with_interval(f"{KL}_k1", f"{KL}_k1", mean_of(kl, spread_k1), spread_k1),
                **with_interval("score_mean", "score", mean_of(2 * way, 1.0), 1.0),
                **with_interval("eval_score_mean", "eval_score", mean_of(0.8 * way, 1.0), 1.0),
                "entropy_per_token": mean_of(2.5 - 1.2 * way, 0.5),
                "response_length_mean": length,
                "truncated_share": abs(mean_of(0.1, 0.3)),
                "distinct_2_per_sequence": mean_of(0.9 - 0.1 * way, 0.1),
                "distinct_2_over_batch": mean_of(0.6 - 0.1 * way, 0.2),
                "kl_rollout_policy_per_token_k3": abs(noise.gauss(0, 1e-3)),
                "score_tail_gap": abs(noise.gauss(3.2, 0.8)),
                "score_tail_index": abs(noise.gauss(2.7, 1.0)),
                "beta": 0.1 * factor,
            }
        )
        records[-1][FIRST_KL] = records[-1][KL]
    return records


def changed(
    records: Run, change: Callable[[int], dict[str, float | None]], *, first: int = 61, last: int = 10**9
) -> Run:
    """The run with other figures in the updates from `first` to `last`; change gets the number of the update."""
    return [
        {**record, **change(update)} if first <= update <= last else record
        for update, record in enumerate(records, start=1)
    ]


def history_of_alarms(records: Run, config: AlarmsConfig, context: AlarmContext) -> dict[str, list[Alarm]]:
    watch = AlarmWatch(config, context)
    raised: dict[str, list[Alarm]] = {name: [] for name in NAMES}
    for record in records:
        for alarm in watch.see(record):
            raised[alarm.name].append(alarm)
    return raised


def updates_of(alarms: Iterable[Alarm]) -> list[int]:
    return [alarm.update for alarm in alarms]


def exploding(update: int) -> dict[str, float | None]:
    kl = with_interval(KL, KL, 6 * math.exp(0.2 * (update - 60)), 4.0)
    return {**kl, FIRST_KL: kl[KL]}


def hacking(update: int) -> dict[str, float | None]:
    return {
        **with_interval("score_mean", "score", 2 + 0.05 * (update - 60), 1.0),
        **with_interval("eval_score_mean", "eval_score", 0.8 - 0.03 * (update - 60), 1.0),
    }


# name: what goes wrong from update 61 on, the first and the last update at which the alarm may be new
SICK: dict[str, tuple[Callable[[int], dict[str, float | None]], int, int]] = {
    "drift_beyond_budget": (lambda _: with_interval(KL, KL, 10.0, 1.0), 66, 69),
    "drift_runaway": (exploding, 66, 72),
    "score_against_judge": (hacking, 66, 84),
    "repetition_collapse": (lambda _: {"distinct_2_per_sequence": 0.2}, 63, 64),
    "length_collapse": (lambda _: {"response_length_mean": 8.0}, 64, 65),
    "entropy_collapse": (lambda _: {"entropy_per_token": 0.2}, 63, 64),
    "heavy_reward_tail": (lambda _: {"score_tail_gap": 14.0}, 65, 65),
    "sampler_mismatch": (lambda _: {"kl_rollout_policy_per_token_k3": 0.1}, 62, 62),
    "negative_k1": (lambda _: with_interval(f"{KL}_k1", f"{KL}_k1", -8.0, 2.0), 65, 68),
    "saturated_beta": (lambda _: {"beta": 10.0}, 70, 70),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", NAMES)
def test_a_sick_run_raises_its_alarm_in_time_and_to_the_end(name: str, seed: int) -> None:
    change, earliest, latest = SICK[name]
    raised = history_of_alarms(changed(healthy_run(seed, 90), change), AlarmsConfig(), BUDGET)[name]
    first = raised[0].update
    assert earliest <= first <= latest
    if name != "drift_runaway":  # what fills the whole window has no growth over its first half any more
        assert updates_of(raised) == list(range(first, 91))
    assert {alarm.since for alarm in raised} == {first}


OTHER_BRANCHES = [
    ("repetition_collapse", lambda _: {"distinct_2_over_batch": 0.1}, "over all responses"),
    ("length_collapse", lambda _: {"response_length_mean": 90.0}, "times their start (alarm above 2)"),
    ("length_collapse", lambda _: {"truncated_share": 0.9}, "cuts 90% of the responses"),
    ("saturated_beta", lambda _: {"beta": 1e-6}, "stood at beta_min 1e-06"),
]


@pytest.mark.parametrize(("name", "change", "words"), OTHER_BRANCHES)
def test_an_alarm_with_two_sides_hears_the_other_one_too(
    name: str, change: Callable[[int], dict[str, float | None]], words: str
) -> None:
    (alarm,) = alarms_at(changed(healthy_run(0, 90), change), AlarmsConfig(), BUDGET)
    assert alarm.name == name
    assert words in alarm.sentence


def test_a_tail_index_is_looked_at_only_when_asked_for() -> None:
    records = changed(healthy_run(0, 90), lambda _: {"score_tail_index": 1.0})
    assert alarms_at(records, AlarmsConfig(), BUDGET) == []
    asked = AlarmsConfig.model_validate({"heavy_reward_tail": {"least_tail_index": 1.5}})
    (alarm,) = alarms_at(records, asked, BUDGET)
    assert (alarm.name, alarm.value, alarm.threshold) == ("heavy_reward_tail", 1.0, 1.5)


def test_a_single_wild_update_raises_nothing() -> None:
    for name, (change, _, _) in SICK.items():
        raised = history_of_alarms(changed(healthy_run(0, 90), change, last=61), AlarmsConfig(), BUDGET)
        assert not raised[name], name


SHAPES = {"steady": (6.0, 15.0), "slow": (6.0, 40.0), "quick": (6.0, 6.0), "far": (20.0, 25.0)}


@pytest.mark.parametrize("shape", SHAPES)
def test_healthy_runs_raise_nothing(shape: str) -> None:
    """No false alarm in 15 runs of 120 updates each; docs/alarms.md has the rates over more runs."""
    final_kl, pace = SHAPES[shape]
    for context in (AlarmContext(), AlarmContext(target_kl_per_sequence=final_kl, beta_min=1e-6, beta_max=10.0)):
        for seed in range(15):
            records = healthy_run(seed, final_kl=final_kl, pace=pace)
            raised = history_of_alarms(records, AlarmsConfig(), context)
            assert not any(raised.values()), (seed, {name: updates_of(raised[name]) for name in NAMES if raised[name]})


def test_a_kl_that_grows_with_the_square_of_the_update_does_not_run_away() -> None:
    """The start of every run: relative growth falls as 2 / update, however long it lasts."""
    records: Run = [{"update": u, FIRST_KL: 0.02 * (u - 1) ** 2} for u in range(1, 200)]
    assert not history_of_alarms(records, AlarmsConfig(), AlarmContext())["drift_runaway"]


def test_an_exponential_runs_away_once_it_is_above_the_budget_or_five_nats() -> None:
    records: Run = [{"update": u, FIRST_KL: 0.01 * math.exp(0.2 * u)} for u in range(1, 60)]
    for budget, least in ((None, 5.0), (50.0, 50.0)):
        raised = history_of_alarms(records, AlarmsConfig(), AlarmContext(target_kl_per_sequence=budget))
        first = raised["drift_runaway"][0].update
        # the median of the last three updates is the KL of the last but one
        assert 0.01 * math.exp(0.2 * (first - 2)) <= least < 0.01 * math.exp(0.2 * (first - 1))


def test_fast_growth_of_a_large_kl_runs_away_even_if_it_slows() -> None:
    growth = [0.4] * 10 + [0.2] * 10
    for end, raised in ((15.0, False), (25.0, True)):  # nats per sequence; large is above 20
        records: Run = [{FIRST_KL: end * math.exp(-sum(growth[place:]))} for place in range(1, 20)] + [{FIRST_KL: end}]
        shifted = [
            {FIRST_KL: float(row[FIRST_KL] or 0) * math.exp(0.2)} for row in records
        ]  # the median of the end is end
        assert bool(alarms_at(shifted, AlarmsConfig(), AlarmContext())) is raised


def test_a_judge_that_falls_with_the_score_is_not_a_hacked_reward() -> None:
    records = changed(healthy_run(0, 90), lambda u: {**hacking(u), **with_interval("score_mean", "score", 0.0, 1.0)})
    assert alarms_at(records, AlarmsConfig(), BUDGET) == []


def test_scores_without_spread_part_by_infinitely_many_half_widths() -> None:
    def certain(update: int) -> dict[str, float | None]:
        row = with_interval("score_mean", "score", 1.0 * update, 0.0)
        return row | with_interval("eval_score_mean", "eval_score", -1.0 * (update // 20), 0.0)

    raised = history_of_alarms([certain(u) for u in range(1, 30)], AlarmsConfig(), AlarmContext())
    assert updates_of(raised["score_against_judge"]) == list(range(20, 30))
    assert raised["score_against_judge"][0].value == math.inf


def test_a_negative_k1_at_a_kl_near_zero_is_chance() -> None:
    def near_zero(_: int) -> dict[str, float | None]:
        return with_interval(KL, KL, 0.05, 0.01) | with_interval(f"{KL}_k1", f"{KL}_k1", -0.5, 0.1)

    assert alarms_at(changed(healthy_run(0, 90), near_zero), AlarmsConfig(), BUDGET) == []
    sharper = AlarmsConfig.model_validate({"negative_k1": {"threshold": 0.0}})
    assert [alarm.name for alarm in alarms_at(changed(healthy_run(0, 90), near_zero), sharper, BUDGET)] == [
        "negative_k1"
    ]


def test_beta_counts_as_saturated_only_where_every_update_says_so() -> None:
    for third, raised in ((10.0, True), (9.0, False), (None, False)):
        records: Run = [{"beta": third if update == 3 else 10.0} for update in range(1, 11)]
        assert bool(alarms_at(records, AlarmsConfig(), BUDGET)) is raised


def test_a_rule_waits_for_its_window_and_for_a_start_of_its_own() -> None:
    entropies: Run = [{"entropy_per_token": 1.0 if update <= 5 else 0.0} for update in range(1, 20)]
    raised = history_of_alarms(entropies, AlarmsConfig(), AlarmContext())["entropy_collapse"]
    assert updates_of(raised) == list(range(10, 20))
    mismatched: Run = [{"kl_rollout_policy_per_token_k3": 0.1}] * 5
    raised = history_of_alarms(mismatched, AlarmsConfig(), AlarmContext())["sampler_mismatch"]
    assert updates_of(raised) == [3, 4, 5]


@pytest.mark.parametrize("key", ["score_tail_gap", "kl_rollout_policy_per_token_k3"])
def test_one_figure_however_wild_does_not_move_a_median(key: str) -> None:
    assert alarms_at(changed(healthy_run(0, 63), lambda _: {key: 1e6}, last=61)[:62], AlarmsConfig(), BUDGET) == []


def test_a_start_of_zero_is_no_start() -> None:
    zeros: Run = [{key: 0.0 for key in KEYS if key != "update"}] * 20
    assert alarms_at(zeros, AlarmsConfig(), AlarmContext()) == []
    later: Run = [*zeros, *([{"entropy_per_token": 1.0, "response_length_mean": 9.0, KL: 3.0}] * 5)]
    assert alarms_at(later, AlarmsConfig(), AlarmContext()) == []
    rising: Run = [{FIRST_KL: kl} for kl in [0.0] * 8 + [1.0] * 2 + [40.0] * 10]
    assert [alarm.name for alarm in alarms_at(rising, AlarmsConfig(), AlarmContext())] == ["drift_runaway"]


def test_since_starts_anew_after_the_rule_was_kept() -> None:
    records: Run = [{"update": u, "kl_rollout_policy_per_token_k3": 0.1 if u % 20 > 10 else 0.0} for u in range(1, 41)]
    raised = history_of_alarms(records, AlarmsConfig(), AlarmContext())["sampler_mismatch"]
    # the median of three follows one update late: broken in 12..20 and in 32..40
    assert updates_of(raised) == [*range(12, 21), *range(32, 41)]
    assert [alarm.since for alarm in raised] == [12] * 9 + [32] * 9


def test_the_update_is_the_records_own_number_or_else_its_place() -> None:
    rows: Run = [{"kl_rollout_policy_per_token_k3": 0.1}] * 3
    assert alarms_at(rows, AlarmsConfig(), AlarmContext())[0].update == 3
    numbered: Run = [{**row, "update": 100 + place} for place, row in enumerate(rows)]
    assert alarms_at(numbered, AlarmsConfig(), AlarmContext())[0].update == 102


def test_a_watch_that_saw_every_record_says_what_the_records_say_at_once() -> None:
    records = changed(healthy_run(1, 90), lambda u: {**exploding(u), **hacking(u), "entropy_per_token": 0.1})
    watch = AlarmWatch(AlarmsConfig(), BUDGET)
    for count, record in enumerate(records, start=1):
        assert watch.see(record) == alarms_at(records[:count], AlarmsConfig(), BUDGET)
    assert {alarm.name for alarm in alarms_at(records, AlarmsConfig(), BUDGET)} >= {"entropy_collapse"}


def test_a_record_costs_the_windows_and_not_the_run() -> None:
    """Each record is looked up as often at update 2000 as at update 200, whatever alarms stay raised."""
    looked_up = 0

    class Counted(dict[str, float | int | None]):
        def get(self, key: str, default: object = None) -> object:  # type: ignore[override]
            nonlocal looked_up
            looked_up += 1
            return super().get(key, default)

    watch, counts = AlarmWatch(AlarmsConfig(), BUDGET), []
    for record in changed(healthy_run(0, 2000), lambda u: {**SICK["drift_beyond_budget"][0](u), "beta": 10.0}):
        looked_up = 0
        watch.see(Counted(record))
        counts.append(looked_up)
    assert counts[1999] == counts[199] < 1000


def test_what_is_read_is_said_and_is_in_the_glossary() -> None:
    read: set[str] = set()

    class Watched(dict[str, float | int | None]):
        def get(self, key: str, default: object = None) -> object:  # type: ignore[override]
            read.add(key)
            return super().get(key, default)

    alarms_at([Watched(record) for record in healthy_run(0, 60)], AlarmsConfig(), BUDGET)
    assert read == set(KEYS)
    assert set(KEYS) <= set(GLOSSARY)


@pytest.mark.parametrize("name", NAMES)
def test_missing_figures_never_raise_an_alarm(name: str) -> None:
    change, _, _ = SICK[name]
    sick = changed(healthy_run(0, 90), change)
    config = AlarmsConfig()
    assert name in {alarm.name for alarm in alarms_at(sick[:72], config, BUDGET)} | {
        alarm.name for alarm in alarms_at(sick, config, BUDGET)
    }
    reads = config.by_name[name].reads
    for missing in ({}, dict.fromkeys(reads), dict.fromkeys(reads, math.nan)):
        without: Run = [{key: value for key, value in row.items() if key not in reads} | missing for row in sick]
        assert not history_of_alarms(without, config, BUDGET)[name]
    nothing: Run = [{}] * 90
    assert alarms_at(nothing, config, BUDGET) == alarms_at([], config, BUDGET) == []


def test_a_leash_without_budget_and_bounds_raises_neither_of_its_alarms() -> None:
    for name in ("drift_beyond_budget", "saturated_beta"):
        records = changed(healthy_run(0, 90), SICK[name][0])
        assert alarms_at(records, AlarmsConfig(), AlarmContext()) == []


def test_half_of_a_window_is_enough_and_less_is_not() -> None:
    rows: Run = [{"beta": 1.0}, {"beta": None}, {}, {"beta": 3.0}]
    assert figures(rows, "beta") == [1.0, 3.0]
    assert figures([*rows, {}], "beta") == []
    known = with_interval("score_mean", "score", 2.0, 1.0)
    assert pooled([known, {**known, "score_low": None}], "score_mean", "score") is not None
    assert pooled([known, {}, {}], "score_mean", "score") is None


def test_the_best_window_is_the_best_of_those_before_the_last() -> None:
    values, history = [random.Random(3).gauss(0, 1) for _ in range(50)], History()
    for count, value in enumerate(values, start=1):
        history.add({"eval_score_mean": value})
        firsts = range(count - 8 + 1)
        best = max(firsts, key=lambda first: sum(values[first : first + 4]), default=None)
        found = [row["eval_score_mean"] for row in history.best(4, "eval_score_mean")]
        assert found == ([] if best is None else values[best : best + 4])


def test_the_pooled_interval_is_that_of_independent_updates() -> None:
    rows: Run = [dict(with_interval("score_mean", "score", mean, 4.0)) for mean in (1.0, 2.0, 6.0, 7.0)]
    window = pooled(rows, "score_mean", "score")
    assert window is not None
    assert (window.mean, window.half_width) == (4.0, 0.5)  # half-widths 1, over sqrt(4)
    assert (window.low, window.high) == (3.5, 4.5)


def test_a_threshold_can_be_moved_and_the_sentence_says_so() -> None:
    records = changed(healthy_run(0, 90), lambda _: {"entropy_per_token": 1.0})  # 40 % of about 2.3
    assert alarms_at(records, AlarmsConfig(), BUDGET) == []
    config = AlarmsConfig.model_validate({"entropy_collapse": {"threshold": 0.5, "action": "stop"}})
    (alarm,) = alarms_at(records, config, BUDGET)
    assert (alarm.name, alarm.action, alarm.threshold, alarm.update) == ("entropy_collapse", "stop", 0.5, 90)
    assert alarm.value == pytest.approx(0.42, abs=0.02)
    assert alarm.sentence == (
        f"Entropy fell to 1 nats per token, {alarm.value:.0%} of its start (alarm below 50%): the responses are "
        "becoming alike; tighten the leash or lower the learning rate."
    )


@pytest.mark.parametrize("name", NAMES)
def test_an_alarm_that_is_off_is_not_raised(name: str) -> None:
    records = changed(healthy_run(0, 90), SICK[name][0])
    off = AlarmsConfig.model_validate(yaml.safe_load(f"{name}: {{action: off}}"))  # a bare off is false in YAML
    assert not history_of_alarms(records, off, BUDGET)[name]


def test_a_part_of_the_yaml_leaves_the_other_defaults() -> None:
    class OfARun(BaseModel):
        model_config = ConfigDict(frozen=True, extra="forbid")
        alarms: AlarmsConfig = AlarmsConfig()

    config = OfARun.model_validate(yaml.safe_load("alarms: {entropy_collapse: {action: stop, threshold: 0.3}}")).alarms
    default = AlarmsConfig()
    assert config.entropy_collapse.model_dump() == {"action": "stop", "threshold": 0.3, "window": 5}
    assert config.model_copy(update={"entropy_collapse": default.entropy_collapse}) == default
    assert {alarm.action for alarm in default.by_name.values()} == {"log"}
    assert AlarmsConfig.model_validate(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))) == config


@pytest.mark.parametrize(
    "content",
    [
        {"entropy": {}},
        {"entropy_collapse": {"level": 1}},
        {"entropy_collapse": {"action": "halt"}},
        {"entropy_collapse": {"threshold": 1.5}},
        {"entropy_collapse": {"window": 0}},
        {"length_collapse": {"threshold": math.inf}},
        {"sampler_mismatch": {"threshold": math.nan}},
    ],
)
def test_what_no_alarm_knows_is_refused(content: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        AlarmsConfig.model_validate(content)


anything = st.none() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.floats(0, 5)
records_of_anything = st.lists(st.dictionaries(st.sampled_from(KEYS), anything), max_size=6)


@settings(deadline=None)
@given(records_of_anything, st.integers(1, 8), st.none() | st.floats(1e-9, 1e9))
def test_no_record_makes_an_alarm_fail(rows: Run, repeats: int, bound: float | None) -> None:
    context = AlarmContext(target_kl_per_sequence=bound, beta_min=bound, beta_max=bound)
    short = AlarmsConfig.model_validate({name: {"window": 2} for name in NAMES if name != "drift_runaway"})
    for config in (AlarmsConfig(), short):
        for alarm in alarms_at(rows * repeats, config, context):
            assert "\n" not in alarm.sentence
            assert alarm.sentence.endswith(f"; {config.by_name[alarm.name].remedy}.")


def row_of_the_page(name: str) -> str:
    alarm = AlarmsConfig().by_name[name]
    others = alarm.model_dump(exclude={"action", "threshold", "window"})
    threshold = "; ".join([f"{alarm.threshold:g}", *(f"`{key}` {value:g}" for key, value in others.items())])
    return f"| `{name}` | {alarm.rule} | {threshold} | {alarm.window} | {alarm.action} | {alarm.remedy} |"


def test_the_page_of_alarms_has_exactly_the_alarms_of_the_code() -> None:
    page = (ROOT / "docs" / "alarms.md").read_text(encoding="utf-8")
    assert [line for line in page.splitlines() if line.startswith("| `")] == [row_of_the_page(name) for name in NAMES]


def test_a_reference_that_moves_hides_no_drift_that_runs_away():
    records: Run = [{KL: 0.5, FIRST_KL: 0.01 * math.exp(0.2 * u)} for u in range(1, 60)]
    assert {alarm.name for alarm in alarms_at(records, AlarmsConfig(), AlarmContext())} == {"drift_runaway"}


@pytest.mark.parametrize(("word", "action"), [("stop", "stop"), ("off", "off"), (False, "off")])
def test_an_action_alone_is_short_for_the_alarm_with_it(word, action):
    short = AlarmsConfig.model_validate({"entropy_collapse": word})
    assert short == AlarmsConfig.model_validate({"entropy_collapse": {"action": action}})
