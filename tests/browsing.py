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


def listened(tab: Any) -> tuple[list[str], list[str]]:
    """What the page says on its console or throws, and the addresses that it asks for, from now on."""
    said: list[str] = []
    asked: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    return said, asked
