"""Token maps as a page carries them: packed, and within budgets, so that a page stays small and opens fast.

A token map is one response, token by token: its pieces of text, the exact KL(policy || reference) at each position,
both models' log-probs of the token drawn there, and the tokens that each model held likeliest. A page shows them in
sets (the responses of an update, or those of a measurement). Numbers of tokens are columns over all responses of a
set, in base64 of little-endian halves (nats, three digits) and of 24-bit places in lists of strings; the page's
script, token_map.js.j2, unpacks them.

What does not fit is left out in a fixed way, and the page says so: the first so many responses are kept, and the
likeliest tokens at the positions with the largest KL.
"""

import base64
import math
import struct
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kleash.alarms import KL, figure_of
from kleash.page import embedded_json, prompt_text
from kleash.token_class import TOKEN_CLASSES
from kleash.verdict import Record

MOST_RESPONSES = 500  # of a set
MOST_TEXT = 4000  # characters of a prompt
LEAST_SHARED = 3  # tokens, and responses, of a beginning that is worth a word
MOST_PIECE = 200  # characters of a token
LIKELIEST = 5  # tokens that are kept of each model at a position
MOST_BYTES = 5_000_000  # of all responses of a page, without the likeliest tokens
MOST_LIKELIEST_BYTES = 4_000_000
BYTES_PER_TOKEN = 13  # 3 halves, 1 place, 1 class: see packed
BYTES_PER_LIKELIEST = 2 * LIKELIEST * 20 / 3 + 4  # a place and a half for each token, and the position
BYTES_PER_RESPONSE = 150  # its numbers
LARGEST_HALF = 65504.0
NOTHING = 2**24 - 1  # stands where a model has fewer tokens than LIKELIEST
NAMES = {  # of a response's numbers on the page
    "kl": KL,
    "k1": f"{KL}_k1",
    "log_ratio": "log_ratio_per_sequence",
    "score": "score",
    "judge": "eval_score",
}


@dataclass(frozen=True)
class MapSet:
    """Responses that stand together on a page.

    label:  what the page calls them, such as 'update 60'; empty where they are the only ones.
    key:    what an address on the page begins with, such as 'update-1-'; empty for the set that is shown first.
    rows:   token maps.
    among:  how many responses there were; None = as many as rows.
    """

    label: str
    key: str
    rows: Sequence[Record]
    among: int | None = None


@dataclass
class Strings:
    """Strings by their place in a list, each there once, and the bytes that they will take."""

    places: dict[Any, int] = field(default_factory=dict)
    size: int = 0

    def place(self, string: Any) -> int:
        """Where a string, or a pair of a string's place and a token id, stands; added if it is new."""
        found = self.places.get(string)
        if found is None:
            found = self.places[string] = len(self.places)
            self.size += escaped_size(string) if isinstance(string, str) else 8
        return found


def shaded(sets: Sequence[MapSet]) -> list[dict[str, Any]]:
    """The sets as JSON for the page; sets without responses are left out.

    Every set gets the same share of the page's budgets.
    """
    full = [some for some in sets if some.rows]
    return [packed(some, 1 / len(full)) for some in full]


def packed(some: MapSet, share: float) -> dict[str, Any]:
    """One set within its share of the page.

    total:     of how many responses these are the first.
    responses: for each its own figures, the number of its tokens, and the place of its prompt.
    strings:   pieces of text; types: the different tokens, as places of their pieces and as token ids.
    type, class, kl, policy, ref: a column each over the tokens of all responses. Not finite = beyond every bound.
    likeliest: at the positions `at` of those columns, LIKELIEST places of strings and as many log-probs of the
               policy's tokens, then as many of the reference's.
    """
    strings, types, prompts = Strings(), Strings(), Strings()
    rows, places = kept_responses(some.rows, share * MOST_BYTES, strings, types, prompts)
    at, pairs = kept_likeliest(rows, share * MOST_LIKELIEST_BYTES, strings)
    texts = [column for column, _ in types.places]
    columns = {"kl": "kl_policy_ref", "policy": "policy_logprobs", "ref": "ref_logprobs"}
    infinite = {"kl": math.inf, "policy": -math.inf, "ref": -math.inf}
    return {
        "label": some.label,
        "key": some.key,
        "total": max(len(some.rows), some.among or 0),
        "shared": shared_beginning(some.rows),
        "responses": [response_row(row, prompts) for row in rows],
        "prompts": list(prompts.places),
        "types": {"piece": texts, "id": [token for _, token in types.places]},
        "type": packed_places(places),
        "class": "".join(str(class_place(name)) for row in rows for name in row["classes"]),
        **{
            name: packed_halves((value for row in rows for value in row[key]), missing=infinite[name])
            for name, key in columns.items()
        },
        "likeliest": {
            "at": packed_places(at),
            "piece": packed_places(place for place, _ in pairs),
            "logprob": packed_halves((value for _, value in pairs), missing=-math.inf),
            "width": LIKELIEST,
        },
        "strings": list(strings.places),
    }


def kept_responses(
    rows: Sequence[Record], budget: float, strings: Strings, types: Strings, prompts: Strings
) -> tuple[list[Record], list[int]]:
    """The first responses that fit the budget of bytes, at least one, and the types of their tokens."""
    kept: list[Record] = []
    places: list[int] = []
    for row in rows[:MOST_RESPONSES]:
        size = strings.size + types.size + prompts.size + BYTES_PER_TOKEN * len(places)
        if kept and size + BYTES_PER_TOKEN * len(row["pieces"]) + BYTES_PER_RESPONSE * len(kept) > budget:
            break
        kept.append(row)
        prompts.place(cut(prompt_text(row["prompt"]), MOST_TEXT))
        pairs = zip(row["pieces"], row["token_ids"], strict=True)
        places += [types.place((strings.place(cut(piece, MOST_PIECE)), token)) for piece, token in pairs]
    return kept, places


def kept_likeliest(
    rows: Sequence[Record], budget: float, strings: Strings
) -> tuple[list[int], list[tuple[int, float | None]]]:
    """The positions with the largest KL that fit the budget, in their order, and (string, log-prob) of their tokens."""
    found = [pair for row in rows for pair in zip(row["kl_policy_ref"], row["alternatives"], strict=True)]
    order = sorted(range(len(found)), key=lambda place: (-largest_if_missing(found[place][0]), place))
    pairs: dict[int, list[tuple[int, float | None]]] = {}
    size_before = strings.size
    for place in order:
        if strings.size - size_before + BYTES_PER_LIKELIEST * (len(pairs) + 1) > budget:
            break
        if found[place][1] is not None:
            pairs[place] = likeliest_pairs(found[place][1], strings)
    at = sorted(pairs)
    return at, [pair for place in at for pair in pairs[place]]


def likeliest_pairs(alternatives: Record, strings: Strings) -> list[tuple[int, float | None]]:
    """LIKELIEST (place, log-prob) of the policy, then of the reference, filled up with NOTHING."""
    pairs: list[tuple[int, float | None]] = []
    for model in ("policy", "ref"):
        own = [(strings.place(cut(piece, MOST_PIECE)), value) for piece, value in alternatives[model][:LIKELIEST]]
        pairs += own + [(NOTHING, None)] * (LIKELIEST - len(own))
    return pairs


def response_row(row: Record, prompts: Strings) -> dict[str, Any]:
    """A response's own figures; those that it lacks are left out."""
    numbers = {name: figure_of(row, key) for name, key in NAMES.items()}
    return {
        "index": row["index"],
        "prompt": prompts.places[cut(prompt_text(row["prompt"]), MOST_TEXT)],
        "tokens": len(row["pieces"]),
        "finished": row.get("finished") is not False,
        **{name: float(f"{value:.6g}") for name, value in numbers.items() if value is not None},
    }


def shared_beginning(rows: Sequence[Record]) -> dict[str, Any] | None:
    """The longest beginning that at least half of the responses share, to several prompts; None below LEAST_SHARED.

    A policy that says the same to every prompt has found what its reward model always likes.

    >>> rows = [{"pieces": ["So", "ak", " it", end], "prompt": end} for end in "abc"]
    >>> rows += [{"pieces": ["No"], "prompt": "d"}]
    >>> shared_beginning(rows) == {"text": "Soak it", "tokens": 3, "count": 3, "of": 4, "prompts": 3, "whole": False}
    True
    """
    beginning: list[str] = []
    sharing = [(row["pieces"], prompt_text(row["prompt"])) for row in rows]
    while True:
        following = Counter(pieces[len(beginning)] for pieces, _ in sharing if len(pieces) > len(beginning))
        piece, count = following.most_common(1)[0] if following else ("", 0)
        if 2 * count < len(rows) or count < LEAST_SHARED:
            break
        beginning.append(piece)
        sharing = [one for one in sharing if one[0][: len(beginning)] == beginning]
    prompts = len({prompt for _, prompt in sharing})
    if len(beginning) < LEAST_SHARED or prompts < 2:
        return None
    whole = all(len(pieces) == len(beginning) for pieces, _ in sharing)
    text = cut("".join(beginning), MOST_PIECE)
    return {
        "text": text,
        "tokens": len(beginning),
        "count": len(sharing),
        "of": len(rows),
        "prompts": prompts,
        "whole": whole,
    }


# --- packing ---------------------------------------------------------------------------------------------


def packed_halves(values: Iterable[float | None], *, missing: float) -> str:
    """Base64 of little-endian 16-bit floats; `missing` for None, infinite beyond what a half can hold."""
    halves = [missing if value is None else in_half(value) for value in values]
    return base64.b64encode(struct.pack(f"<{len(halves)}e", *halves)).decode()


def in_half(value: float) -> float:
    return value if abs(value) <= LARGEST_HALF else math.copysign(math.inf, value)


def packed_places(places: Iterable[int]) -> str:
    """Base64 of little-endian 24-bit numbers: four letters each."""
    return base64.b64encode(b"".join(place.to_bytes(3, "little") for place in places)).decode()


def class_place(name: str) -> int:
    return TOKEN_CLASSES.index(name)


def largest_if_missing(kl: float | None) -> float:
    """A KL that JSON could not say is infinite."""
    return math.inf if kl is None else kl


def cut(text: str, most: int) -> str:
    """A text that is not longer than so many characters, with an ellipsis where it was cut."""
    return text if len(text) <= most else text[: most - 1] + "\u2026"


def escaped_size(text: str) -> int:
    """Bytes of a text in the page's JSON, the comma after it included.

    >>> escaped_size("ab"), escaped_size("<"), escaped_size("\u4e2d")
    (5, 9, 6)
    """
    return len(embedded_json(text).encode()) + 1
