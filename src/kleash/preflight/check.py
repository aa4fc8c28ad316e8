"""One line of the self-test: what was looked at, how it stands, what was found, what to do."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kleash.errors import KleashError, ModelError, PromptError, RewardError

Status = Literal["PASS", "WARN", "FAIL"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """A check and its outcome.

    remedy is empty for a PASS. error is what stands behind a FAIL that kleash raises elsewhere too.
    """

    name: str
    status: Status
    found: str
    remedy: str = ""
    error: KleashError | None = None


def passed(name: str, found: str) -> Check:
    return Check(name=name, status="PASS", found=found)


def warned(name: str, found: str, remedy: str) -> Check:
    return Check(name=name, status="WARN", found=found, remedy=remedy)


def failed(name: str, found: str, remedy: str) -> Check:
    return Check(name=name, status="FAIL", found=found, remedy=remedy)


def failed_with(name: str, error: KleashError) -> Check:
    """A FAIL from an error's sentence, which ends with its remedy.

    >>> check = failed_with("prompts load", PromptError("Expected prompts in x, found no such file; check the path."))
    >>> check.found, check.remedy
    ('Expected prompts in x, found no such file', 'check the path')
    """
    found, _, remedy = str(error).rpartition("; ")
    if not found:
        found, remedy = remedy, "mend what the sentence names"
    return Check(name=name, status="FAIL", found=found, remedy=remedy.rstrip("."), error=error)


def of_loading(error: KleashError) -> Check:
    """What could not be loaded."""
    names: dict[type[KleashError], str] = {
        PromptError: "prompts load",
        ModelError: "models load",
        RewardError: "reward loads",
    }
    return failed_with(names.get(type(error), "everything loads"), error)


def counted(checks: Sequence[Check]) -> dict[Status, int]:
    """How many checks have each status.

    >>> counted([passed("a", ""), passed("b", ""), warned("c", "", "")])
    {'PASS': 2, 'WARN': 1, 'FAIL': 0}
    """
    statuses: tuple[Status, ...] = ("PASS", "WARN", "FAIL")
    return {status: sum(check.status == status for check in checks) for status in statuses}
