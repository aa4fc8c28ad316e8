"""Every example runs, and does what it says."""

import re
import subprocess
import sys
from pathlib import Path

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
