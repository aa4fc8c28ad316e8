"""The self-test as a person reads it, and as a program does."""

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from kleash.preflight.check import Check, Status, counted
from kleash.version import VERSION

COLOURS: dict[Status, str] = {"PASS": "green", "WARN": "yellow", "FAIL": "bold red"}


def table_of(checks: Sequence[Check]) -> RenderableType:
    """One row for each check, its remedy below it, and the count at the end."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in checks:
        colour = COLOURS[check.status]
        found = escape(check.found) + (f"\n[{colour}]-> {escape(check.remedy)}[/]" if check.remedy else "")
        table.add_row(f"[{colour}]{check.status}[/]", check.name, found)
    return Group(table, Text(), Text(summary_of(checks), style=COLOURS[_worst(checks)]))


def summary_of(checks: Sequence[Check]) -> str:
    """
    >>> summary_of([])
    '0 passed, 0 warnings, 0 failed'
    """
    found = counted(checks)
    untried = "; what rests on a failed check was not tried" if found["FAIL"] else ""
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
