"""What a measurement says in a terminal: every figure that it names is that of the measurement."""

from dataclasses import replace

import pytest
from rich.console import Console
from test_measurement import GIVEN, tiny_measure, write
from tiny import LIVELY, tiny_policy

from kleash.measured import MeasuredDrift
from kleash.readout import readout


def said(measured: MeasuredDrift, *, width: int = 120) -> str:
    console = Console(width=width, highlight=False, color_system=None)
    with console.capture() as capture:
        console.print(readout(measured))
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


@pytest.fixture(scope="module")
def measured() -> MeasuredDrift:
    return tiny_measure(config={"samples": 40})


def row(text: str, name: str) -> str:
    """The line that begins with the name."""
    return next(line for line in text.splitlines() if line.startswith(name))


def test_the_estimates_stand_beside_each_other_with_their_intervals(measured):
    text = said(measured)
    assert text.startswith("KL(policy || reference), nats")
    for name, interval in (
        ("exact, per response", measured.kl_policy_ref_per_sequence),
        ("k1, per response", measured.log_ratio_per_sequence),
        ("exact, per token", measured.kl_policy_ref_per_token),
    ):
        cells = row(text, name).removeprefix(name).split()
        assert cells[-1] == "40"
        numbers = [float(cell) for cell in (cells[0], cells[1], cells[3])]
        assert numbers == pytest.approx([interval.mean, interval.low, interval.high], rel=0.05, abs=0.006), name


def test_it_says_how_many_responses_k1_would_take(measured):
    own = measured.figures["k1_responses_for_same_interval"]
    assert own > 1.05 * 40
    for needed, words in (
        (own, f"{float(f'{own:.2g}'):,.0f} responses to be as sure, {own / 40:.1f} times as many."),
        (1400.0, "1,400 responses to be as sure, 35 times as many."),
        (70_398_750.0, "70,000,000 responses to be as sure, 1,800,000 times as many."),
        (40.5, "about as many responses to be as sure."),
        (24.2, "only 25 responses to be as sure."),
    ):
        found = replace(measured, figures={**measured.figures, "k1_responses_for_same_interval": needed})
        assert f"k1 would take {words}" in " ".join(said(found).split())
    assert "The intervals cover chance in the responses." in said(measured)
    few = tiny_measure(config={"samples": 8})
    assert "The intervals cover chance in the responses and the choice of prompts." in said(few)


def test_what_there_is_to_doubt_stands_right_below_the_table(measured):
    doubts = {"interval_doubt": "Too short.", "writer_doubt": "Not its own."}
    lines = said(replace(measured, figures={**measured.figures, **doubts})).splitlines()
    assert lines[4].startswith("exact, per token")
    assert lines[5:8] == ["", "Too short.", "Not its own."]
    assert lines[8].startswith("The intervals cover")


def test_entropies_length_and_how_many_ended_are_named(measured):
    text = " ".join(said(measured).split())
    policy, ref = measured.policy_entropy_per_token.mean, measured.ref_entropy_per_token.mean
    assert f"policy {policy:.2f}, reference {ref:.2f} nats" in text
    share = measured.figures["finished_share"]
    assert f"Responses: {measured.response_length.mean:.1f} tokens, {share:.0%} ended by themselves." in text


def test_half_of_the_drift_lies_where_its_sum_first_reaches_half(measured):
    kl = [row["kl_policy_ref_per_sequence"] for row in measured.figures["by_position"]]
    count = next(count for count in range(1, 9) if sum(kl[:count]) >= sum(kl) / 2)
    where = "position" if count == 1 else f"{count} positions"
    assert f"Half of the drift lies in the first {where} of {len(kl)}." in said(measured)


def with_tokens(measured: MeasuredDrift, *tokens: dict[str, object]) -> MeasuredDrift:
    drifted = [{"count": 3, "kl_policy_ref_per_sequence": 1.0, **token} for token in tokens]
    figures = {**measured.figures, "drifted_tokens": drifted}
    figures["kl_policy_ref_per_sequence"] = {**figures["kl_policy_ref_per_sequence"], "mean": 4.0}
    return replace(measured, figures=figures)


def test_a_token_says_how_much_likelier_it_is_than_under_the_reference(measured):
    text = said(
        with_tokens(
            measured,
            {"token": " certainly", "mean_ratio": 5.0},
            {"token": "sorry", "mean_ratio": 0.2},
            {"token": "ok", "mean_ratio": 1.01},
            {"token": "\n", "mean_ratio": None},
            {"token": "sharp", "mean_ratio": 1e300},
            {"token": "blunt", "mean_ratio": 1e-300},
        )
    )
    certainly = " ".join(row(text, "\u2423certainly").split())
    assert certainly == "\u2423certainly 3x 25% 5.0\u00d7 more likely than the reference"
    assert row(text, "sorry").endswith("5.0\u00d7 less likely than the reference")
    assert row(text, "ok").endswith("about as likely")
    assert row(text, "\u21b5").endswith("-")
    assert row(text, "sharp").endswith(" > 10\u2079\u00d7 more likely than the reference")
    assert row(text, "blunt").endswith(" > 10\u2079\u00d7 less likely than the reference")


def test_classes_with_tokens_have_a_line_and_their_shares_add_up(measured):
    lines = said(measured).split("By class of token")[1].split("\n\n")[0].splitlines()[2:]
    assert len(lines) == sum(entry["tokens"] > 0 for entry in measured.figures["by_class"].values())
    shares = [int(word.rstrip("%")) for line in lines for word in line.split() if word.endswith("%")]
    assert abs(sum(shares) - 100) <= len(lines)


def test_the_prompts_with_the_most_drift_come_first(measured):
    lines = said(measured).split("By prompt: the 5 with the most drift of 8")[1].splitlines()[2:]
    found = [line.split("   ")[0].strip() for line in lines]
    ordered = sorted(measured.figures["by_prompt"], key=lambda entry: -entry["kl_policy_ref_per_sequence"]["mean"])
    assert found == [entry["prompt"] for entry in ordered[:5]]


def test_a_model_that_has_not_drifted_has_no_tables_of_where():
    text = said(tiny_measure(tiny_policy(2, **LIVELY), tiny_policy(2, **LIVELY)))
    assert row(text, "exact, per response").split()[3:] == ["0", "0", "to", "0", "24"]
    assert "Where the drift is" not in text
    assert "Half of the drift" not in text
    assert "k1 would take" not in text


def test_of_responses_that_somebody_else_wrote_it_says_that_nothing_estimates_the_kl(tmp_path):
    path = write(tmp_path / "given.jsonl", GIVEN)
    text = " ".join(said(tiny_measure(responses=path)).split())
    assert text.startswith("Policy beside reference along the given responses, nats")
    assert "no figure here estimates KL(policy || reference)" in text
    assert "log policy - log reference, per response" in text
    assert "k1" not in text
    own = said(tiny_measure(responses=path, config={"written_by_policy": True}))
    assert "k1, per response" in own


def test_one_response_has_no_known_interval():
    text = said(tiny_measure(config={"samples": 1}))
    assert "not known from one" in row(text, "exact, per response")
    assert "One response has no interval" in text
    assert "intervals cover" not in text
    assert "inf" not in text
    assert "nan" not in text


@pytest.mark.parametrize("width", [80, 120])
def test_no_line_is_wider_than_the_terminal_and_no_table_cuts_a_number(measured, width):
    text = said(measured, width=width)
    assert max(map(len, text.splitlines())) <= width
    assert "\u2026" not in text


def test_a_long_prompt_is_cut_and_a_chat_shows_its_last_message(measured):
    chat = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "why\n\nis  it"}]
    entry = measured.figures["by_prompt"][0]
    prompts = [{**entry, "prompt": "long " * 40}, {**entry, "prompt": chat}]
    text = said(replace(measured, figures={**measured.figures, "by_prompt": prompts}), width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert "long long" in text
    assert "..." in text
    assert "why is it" in text
    assert "be kind" not in text


def test_half_widths_have_two_digits(measured):
    entry = measured.figures["by_prompt"][0]
    wide = {**entry, "kl_policy_ref_per_sequence": {"mean": 42.7, "low": -138.11, "high": 223.51, "n": 2}}
    text = said(replace(measured, figures={**measured.figures, "by_prompt": [wide]}))
    assert row(text, entry["prompt"]).endswith("42.70 \u00b1180")
