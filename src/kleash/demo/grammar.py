"""The sentences of the small world: how its questions and its claims are put into words, and read back.

A pattern is a sentence with slots: "work {agent} into the {item}". Filled, it is text; turned into a regular
expression, it reads the claims back out of a text. Writer and judge share the patterns, so that what the judge
calls a sentence is exactly what the world can say.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from kleash.demo.world import Question, all_questions, slot_values

QUESTION_PATTERNS = {
    "stain": ("how do I get {stain} out of a {item}?", "what takes {stain} off my {item}?"),
    "cook": ("how long should I {method} {food}?", "what is the best way to {method} {food}?"),
    "plant": ("how do I look after {plant} in {place}?", "will {plant} grow well in {place}?"),
    "store": ("how should I keep {form} {produce}?", "where do {form} {produce} stay fresh?"),
    "mix": ("can I mix {first} with {second}?", "is it safe to use {first} and {second} together?"),
}

ANSWER_PATTERNS = {
    "stain": (
        "{step} the {stain} before you wash it",
        "{step} the {stain} and work {agent} into the {item}",
        "use {agent} on the {item}",
        "treat the {stain} with {agent} and rinse it in {water} water",
        "rinse the {item} in {water} water and {drying}",
        "then use {water} water and {drying}",
        "{step} it, put {agent} on the {stain}, rinse in {water} water, and {drying}",
    ),
    "cook": (
        "{method} the {food} in {medium}",
        "{method} the {food} in {medium} for {minutes} minutes",
        "give them {minutes} minutes, until they are {sign}",
        "the {food} are done when they look {sign}",
        "finish them with {seasoning}",
        "{method} them for {minutes} minutes, until {sign}, and add {seasoning}",
    ),
    "plant": (
        "water the {plant} every {interval}",
        "water it every {interval} and plant it in {soil}",
        "the {plant} likes {soil}",
        "in {place} you should {remedy}",
        "give the {plant} {soil}, and in {place} {remedy}",
    ),
    "store": (
        "put the {form} {produce} in {spot}",
        "keep them in {box} in {spot}",
        "wrap the {produce} in {box}",
        "they last {days} days",
        "{form} {produce} keep for {days} days in {spot}",
    ),
    "mix": (
        "you can {verdict} mix {first} with {second}",
        "{first} and {second} make {effect}",
        "the mixture gives {effect}, so {advice}",
        "please {advice} when you use {first}",
        "you can {verdict} mix them, because they make {effect}, so {advice}",
    ),
}

FILLERS = (
    "what a wonderful question that is",
    "I am very happy to help you with this",
    "I am a very helpful helper and I love to help",
    "it really depends on many different things",
    "some people do it in one way and some do it in another",
    "my aunt always said that a good home needs a lot of love",
    "you will do very well, I am quite sure of it",
    "please ask me anything else at any time",
    "this is something that a great many people ask about",
    "I hope that this is useful to you",
)


@dataclass(frozen=True)
class Sentence:
    """A sentence that the grammar could read.

    Attributes:
      kind: the kind of question that it answers; None for a filler, which claims nothing.
      claims: slot -> value, subjects and facts alike.
    """

    kind: str | None
    claims: Mapping[str, str]


def write_sentence(pattern: str, values: Mapping[str, str]) -> str:
    """The pattern filled with values, with a capital letter, and a full stop if it has no mark of its own.

    >>> write_sentence("use {agent} on the {item}", {"agent": "dish soap", "item": "denim rug"})
    'Use dish soap on the denim rug.'
    """
    text = pattern.format_map(values)
    return text[0].upper() + text[1:] + ("" if text.endswith("?") else ".")


def slots_of(pattern: str) -> tuple[str, ...]:
    """The slots of a pattern, in order."""
    return tuple(re.findall(r"\{(\w+)\}", pattern))


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    """A regular expression that matches any filling of the pattern, one named group per slot."""
    values = slot_values()
    parts = re.split(r"\{(\w+)\}", pattern)
    for i in range(0, len(parts), 2):
        parts[i] = re.escape(parts[i])
    for i in range(1, len(parts), 2):
        longest_first = sorted(values[parts[i]], key=len, reverse=True)
        parts[i] = f"(?P<{parts[i]}>{'|'.join(map(re.escape, longest_first))})"
    return re.compile("".join(parts))


@cache
def read_sentence(text: str) -> Sentence | None:
    """The claims of one sentence, or None where it is no sentence of the world.

    >>> read_sentence("Use dish soap on the denim rug.").claims
    {'agent': 'dish soap', 'item': 'denim rug'}
    >>> read_sentence("Soap soap denim the.") is None
    True
    """
    if not (text.endswith(".") and text[0].isupper()):
        return None
    body = text[:-1]
    for start in (body, body[0].lower() + body[1:]):
        if start in FILLERS:
            return Sentence(None, {})
        for kind, patterns in ANSWER_PATTERNS.items():
            for pattern in patterns:
                if match := _compiled(pattern).fullmatch(start):
                    return Sentence(kind, match.groupdict())
    return None


def split_sentences(text: str) -> list[str]:
    """The text cut after each full stop; the last piece may lack one.

    >>> split_sentences("They last five days. What a")
    ['They last five days.', 'What a']
    """
    return [piece for piece in re.split(r"(?<=\.)\s+", text.strip()) if piece]


@cache
def prompts_of_world() -> Mapping[str, Question]:
    """Every prompt of the world, with the question that it asks; two wordings for each question.

    A prompt ends with a new line: the answer begins on its own.
    """
    return {
        write_sentence(pattern, question.subject) + "\n": question
        for question in all_questions()
        for pattern in QUESTION_PATTERNS[question.kind]
    }
