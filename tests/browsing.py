"""What the tests of the pages share when they drive a browser."""

import time
from typing import Any

TOO_WIDE = """
Array.from(document.querySelectorAll("main *, header *"))
  .filter((part) => !part.closest(".legend, .canvas, thead") && part.getBoundingClientRect().right > innerWidth + 1)
  .map((part) => part.outerHTML.slice(0, 80))
"""


def eventually(tab: Any, condition: str) -> None:
    """Ask the page until the condition holds; its own content policy forbids that it asks itself."""
    deadline = time.monotonic() + 20
    while not tab.evaluate(condition):
        assert time.monotonic() < deadline, condition
        tab.wait_for_timeout(50)


def require_quiet_offline_and_narrow(tab: Any, heard: tuple[list[str], list[str]], page: str) -> None:
    """The page has said nothing, asked for itself alone, run no foreign script, and fits into 360 pixels."""
    said, asked = heard
    assert tab.evaluate(TOO_WIDE) == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    assert tab.evaluate("window.pwned") is None
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [page]


def listened(tab: Any) -> tuple[list[str], list[str]]:
    """What the page says on its console or throws, and the addresses that it asks for, from now on."""
    said: list[str] = []
    asked: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    return said, asked
