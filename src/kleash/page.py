"""What kleash's HTML pages share: how they are made, written, and how they show a text that a model wrote.

A page holds everything it shows. Its content-security policy forbids every network request and every script but
its own; everything that a model or a user wrote is escaped, and its unseen characters are made visible.
"""

import hashlib
import importlib.resources
import json
import os
import re
import unicodedata
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from kleash.errors import InputError
from kleash.verdict import interval, number
from kleash.version import VERSION

INKS = {  # of lines and bars, on a light and on a dark page
    "light": ("#0072b2", "#d55e00", "#00875f", "#b3568f", "#b07900", "#2f93c9"),
    "dark": ("#4fb0ec", "#ff8b45", "#2fcb9b", "#e391c3", "#f0b93a", "#a5d8f7"),
}
WHITESPACE = {" ": "\u2423", "\n": "\u21b5", "\t": "\u21e5"}  # open box, return arrow, tab arrow
ESCAPED = re.compile("[<>&\u2028\u2029\ud800-\udfff]")
CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}


def prompt_text(prompt: object) -> str:
    """A prompt as text: itself, or 'role: content' for each chat message."""
    if not isinstance(prompt, list):
        return str(prompt)
    messages = (turn if isinstance(turn, dict) else {"content": turn} for turn in prompt)
    return "\n".join(f"{turn.get('role', 'message')}: {turn.get('content', '')}" for turn in messages)


def likelihood(ratio: float | None) -> str:
    """The ratio policy / reference of a token's probabilities in words.

    >>> [likelihood(ratio).replace("\u00d7", "x") for ratio in (5.0, 0.147, 1.04, 1.06, 123.4)]
    ['5.0x more likely', '6.8x less likely', 'about as likely', '1.1x more likely', '120x more likely']
    >>> likelihood(3e40) == likelihood(1e300) == "> 10\u2079\u00d7 more likely"
    True
    """
    if ratio is None or ratio <= 0:
        return "-"
    factor = max(ratio, 1 / ratio)
    if factor < 1.05:
        return "about as likely"
    size = f"{factor:.1f}" if factor < 10 else f"{float(f'{factor:.2g}'):,.0f}" if factor < 1e9 else "> 10\u2079"
    return f"{size}\u00d7 {'more' if ratio > 1 else 'less'} likely"


def visible(token: object) -> str:
    """A token with its spaces and all characters that cannot be seen written out.

    >>> visible(" Use\u200b").isascii(), visible(" Use\u200b")[1:], visible("")
    (False, 'UseU+200B', '(empty)')
    """
    unseen = ("C", "Z")  # categories: control, format, surrogate and unassigned characters; separators
    marks = (
        WHITESPACE.get(mark) or (f"U+{ord(mark):04X}" if unicodedata.category(mark)[0] in unseen else mark)
        for mark in str(token if token is not None else "")
    )
    return "".join(marks) or "(empty)"


def shown(text: object) -> str:
    """Text with its control characters made visible."""
    return str(text).translate(CONTROL_PICTURES)


def short(source: object) -> str:
    """A model or prompt source as a few words: a long path keeps its last two parts."""
    text = source if isinstance(source, str) else json.dumps(source, default=str)
    return text if len(text) <= 32 or not isinstance(source, str) else "/".join(Path(text).parts[-2:])


def duration(seconds: float) -> str:
    """
    >>> duration(7.3), duration(192), duration(7500)
    ('7.3 s', '3 min 12 s', '2 h 5 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def embedded_json(data: object) -> Markup:
    """JSON that no HTML parser can leave: <, > and & appear only as escapes; so do halves of characters."""
    text = json.dumps(data, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return Markup(ESCAPED.sub(lambda mark: f"\\u{ord(mark[0]):04x}", text))


@cache
def template_text(name: str) -> str:
    """A template of the package, by its file's name."""
    return importlib.resources.files("kleash").joinpath(name).read_text(encoding="utf-8")


def rendered(template: str, *, data: object, words: Mapping[str, Any]) -> str:
    """A whole page as text.

    Args:
      template: the template's file name.
      data: what the page's script draws; any JSON.
      words: what the template is filled with.
    """
    environment = Environment(
        loader=FunctionLoader(template_text),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "interval": interval, "duration": duration, "shown": shown}
    embedded = embedded_json(data)
    return environment.get_template(template).render(
        {"inks": INKS, "version": VERSION, "plotly": Markup(get_plotlyjs()), **words},
        data=embedded,
        nonce=hashlib.sha256(embedded.encode()).hexdigest()[:32],
    )


def require_file_name(out: Path, example: str) -> None:
    """Raise InputError when the page to write is a directory."""
    if out.is_dir():
        raise InputError(f"{out} is a directory: name the page to write, such as {out / example}.")


def write_page(text: str, out: Path) -> Path:
    """Writes a page in one step, so that a reader never sees half of it, and returns its path."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        part.write_bytes(text.encode("utf-8", errors="replace"))
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)
    return out
