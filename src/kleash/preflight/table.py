"""The self-test as a person reads it, and as a program does."""

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kleash.preflight.check import Check, Status, counted
from kleash.version import VERSION

THROUGHOUT = {"ratio 1", "memory"}  # checks that are there if all are
COLOURS: dict[Status, str] = {"PASS": "green", "WARN": "yellow", "FAIL": "bold red"}


def table_of(checks: Sequence[Check]) -> RenderableType:
    """One row for each check, its remedy below it, and the count at the end."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in checks:
        colour = COLOURS[check.status]
        table.add_row(Text(check.status, style=colour), Text(check.name), _found_and_remedy(check, colour))
    return Group(table, Text(), Text(summary_of(checks), style=COLOURS[_worst(checks)]))


def _found_and_remedy(check: Check, colour: str) -> RenderableType:
    if not check.remedy:
        return Text(check.found)
    remedy = Table.grid(padding=(0, 1, 0, 0))
    remedy.add_column(no_wrap=True)
    remedy.add_column(overflow="fold")
    remedy.add_row(Text("->", style=colour), Text(check.remedy, style=colour))
    return Group(Text(check.found), remedy)


def summary_of(checks: Sequence[Check]) -> str:
    """
    >>> summary_of([])
    '0 passed, 0 warnings, 0 failed'
    """
    found = counted(checks)
    whole = not found["FAIL"] or {check.name for check in checks} >= THROUGHOUT
    untried = "" if whole else "; what rests on a failed check was not tried"
    return (
        f"{found['PASS']} passed, {found['WARN']} warning{'s' * (found['WARN'] != 1)}, {found['FAIL']} failed{untried}"
    )


def _worst(checks: Sequence[Check]) -> Status:
    return next((status for status, count in reversed(counted(checks).items()) if count), "PASS")


def as_json(checks: Sequence[Check]) -> dict[str, Any]:
    """What `kleash check --json` writes."""
    found = counted(checks)
    return {
        "version": VERSION,
        "passed": found["PASS"],
        "warnings": found["WARN"],
        "failed": found["FAIL"],
        "checks": [
            {"name": one.name, "status": one.status, "found": one.found, "remedy": one.remedy} for one in checks
        ],
    }
