"""What a person sees while a run goes on, in a terminal and in a log."""

import io

import pytest
from rich.console import Console
from transformers.utils import logging as transformers_logging

from kleash.progress import ROWS_ON_SCREEN, RunProgress, figures_of, silent_libraries

RECORD = {
    "update": 7,
    "score_mean": 0.12345,
    "eval_score_mean": -1.5,
    "kl_policy_ref_per_sequence": 3.14159,
    "kl_policy_first_ref_per_sequence": 3.14159,
    "kl_policy_ref_per_sequence_low": 2.9,
    "kl_policy_ref_per_sequence_high": 3.4,
    "beta": 0.05,
    "entropy_per_token": 1.234,
    "response_length_mean": 12.34,
}
TIMINGS = {
    "update": 7,
    "seconds_sampling": 0.94,
    "seconds_rewarding": 0.1,
    "seconds_scoring": 0.26,
    "seconds_optimising": 2.0,
}


def shown(*, terminal: bool, updates: int = 1, title: str = "first", quiet: bool = False) -> str:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=160, no_color=True)
    with RunProgress(title=title, updates=20, console=console, quiet=quiet) as progress:
        for number in range(1, updates + 1):
            progress.show({**RECORD, "update": number}, TIMINGS)
        progress.say("Finishing [this] update.")
    return screen.getvalue()


def test_the_figures_carry_their_names_their_unit_and_half_the_interval() -> None:
    assert figures_of(RECORD, TIMINGS) == {
        "update": "7",
        "score": "0.123",
        "held-out": "-1.500",
        "KL/seq (nats)": "3.14 ±0.25",
        "beta": "0.0500",
        "entropy/token": "1.23",
        "length": "12.3",
        "sample+reward+score+optimise (s)": "0.9+0.1+0.3+2.0",
    }


def test_a_run_without_a_judge_shows_no_column_for_one() -> None:
    assert "held-out" not in figures_of({**RECORD, "eval_score_mean": None}, TIMINGS)


def test_a_figure_that_is_missing_is_shown_as_missing() -> None:
    nothing = {**RECORD, "score_mean": None, "kl_policy_ref_per_sequence_low": None}
    figures = figures_of(nothing, TIMINGS)
    assert (figures["score"], figures["KL/seq (nats)"]) == ("-", "3.14 ±?")


def test_a_log_gets_one_plain_line_per_update() -> None:
    lines = shown(terminal=False, updates=2, title="runs [bold]first").splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("runs [bold]first: update 1, score 0.123, held-out -1.500, KL/seq (nats) 3.14 ±0.25, b")
    assert lines[2] == "Finishing [this] update."
    assert "\x1b" not in "".join(lines)


def test_a_terminal_gets_a_table_of_the_latest_updates_and_a_bar() -> None:
    screen = shown(terminal=True, updates=ROWS_ON_SCREEN + 3, title="[red]first")
    last = screen[screen.rindex("KL/seq (nats)") :]
    rows = [line.split()[0] for line in last.splitlines() if "3.14 ±0.25" in line]
    assert rows == [str(number) for number in range(4, ROWS_ON_SCREEN + 4)]
    assert "[red]first" in last
    assert "15/20 updates" in last


@pytest.mark.parametrize("terminal", [True, False])
def test_quiet_says_nothing(terminal: bool) -> None:
    assert shown(terminal=terminal, quiet=True) == ""


def test_the_libraries_are_silent_within_and_as_before_afterwards() -> None:
    before = transformers_logging.is_progress_bar_enabled()
    with silent_libraries():
        assert not transformers_logging.is_progress_bar_enabled()
        with silent_libraries():
            pass
        assert not transformers_logging.is_progress_bar_enabled()
    assert transformers_logging.is_progress_bar_enabled() is before
    with pytest.raises(KeyboardInterrupt), silent_libraries():
        raise KeyboardInterrupt
    assert transformers_logging.is_progress_bar_enabled() is before


def test_a_reference_that_moves_cannot_hide_the_drift_from_the_screen():
    moved = {**RECORD, "kl_policy_first_ref_per_sequence": 12.5}
    assert figures_of(moved, TIMINGS)["to the first reference"] == "12.50"
    assert "to the first reference" not in figures_of(RECORD, TIMINGS)
