"""Every example runs, and does what it says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_training_with_a_function_raises_the_score_from_a_drift_of_zero() -> None:
    script = EXAMPLES / "train_with_a_function.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True, timeout=300)
    first, last = (
        [float(number) for number in re.findall(r"(?:score|reference\)) ([-\d.]+)", line)]
        for line in done.stdout.splitlines()
    )
    assert first[1] == 0
    assert last[0] > first[0] + 0.2
    assert 0 < last[1] < 20


def test_the_exact_kl_of_two_models_lies_in_the_wide_interval_of_k1_with_a_narrow_one_of_its_own() -> None:
    script = EXAMPLES / "exact_kl_of_two_models.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True, timeout=300)
    exact, k1 = ([float(n) for n in re.findall(r"[-\d]+\.\d+", line)] for line in done.stdout.splitlines()[1:])
    assert k1[1] < exact[0] < k1[2]
    assert 0 < 10 * (exact[2] - exact[1]) < k1[2] - k1[1]


def test_a_budget_alone_is_held_within_a_quarter_on_twelve_words_and_32_responses() -> None:
    script = EXAMPLES / "hold_a_budget.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True, timeout=300)
    (budget,), (held,), betas, scores = (
        [float(number) for number in re.findall(r"\d+\.\d+", line)] for line in done.stdout.splitlines()
    )
    assert held == pytest.approx(budget, rel=0.25)
    assert 0 < betas[0] != betas[1] > 0
    assert scores[1] > scores[0]


def test_the_drift_inside_trl_starts_at_zero_is_less_on_a_leash_and_ends_where_kleash_measure_says() -> None:
    script = EXAMPLES / "drift_in_trl.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True, timeout=300)
    rows = re.findall(
        r"^(0\.\d) +(\d+) +([\d.]+) +([\d.]+) to ([\d.]+) +([\d.]+) +([-\d.]+)", done.stdout, re.MULTILINE
    )
    kl = {(float(beta), int(step)): float(exact) for beta, step, exact, *_ in rows}
    assert [step for beta, step in kl] == [0, 8, 16, 24, 0, 8, 16, 24]
    assert kl[0.0, 0] == kl[0.5, 0] == 0
    assert kl[0.0, 24] > 2 * kl[0.5, 24] > 0
    assert {row[6] for row in rows[:4]} == {"-"}  # TRL logs no KL where beta is 0
    last = rows[-1]
    assert float(last[6]) == pytest.approx(float(last[5]), rel=0.5)  # and an estimate of ours elsewhere
    measured = re.search(r"exact, per response +([\d.]+) +([\d.]+) to ([\d.]+)", done.stdout)
    assert measured is not None
    assert measured.groups() == last[2:5]
