"""The glossary page is the glossary of the code, word for word; the README's doctest lines are run."""

import doctest
from pathlib import Path

from kleash.glossary import GLOSSARY

ROOT = Path(__file__).parents[1]


def glossary_rows() -> list[str]:
    return [f"| `{name}` | {m.meaning} | {m.unit} | {m.healthy} |".replace("||", "‖") for name, m in GLOSSARY.items()]


def test_the_page_of_metrics_has_exactly_the_rows_of_the_glossary() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert rows == glossary_rows()


def test_the_examples_of_the_readme_print_what_they_say() -> None:
    result = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
    assert result.attempted >= 3
    assert result.failed == 0
