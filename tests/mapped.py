"""Token maps and measurements for the tests of the pages, from formulas and seeded draws."""

import math
import random
from collections.abc import Sequence
from typing import Any

from kleash.alarms import KL

ALPHABETS = (
    "abcdefghij",
    "\u0444\u0436\u0434\u043b\u044f",
    "\u4e2d\u6587\u5b57\u6bcd\u8868",
    "\u0627\u0644\u0645\u0646",
)


def a_token_map(
    pieces: Sequence[str],
    kl: Sequence[float | None],
    *,
    index: int = 0,
    prompt: Any = "Why?",
    alternatives: Sequence[Any] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """A response whose policy finds each token at a half and whose reference finds it exp(kl) times less likely."""
    policy = [math.log(0.5)] * len(pieces)
    ref = [math.log(0.5) - (0 if value is None else value) for value in kl]
    total = math.fsum(value or 0.0 for value in kl)
    beside = [["else", math.log(0.25)], ["other", math.log(0.125)]]
    both = [
        {"policy": [[p, a], *beside], "ref": [*beside, [p, b]]} for p, a, b in zip(pieces, policy, ref, strict=True)
    ]
    last = len(pieces) - 1
    return {
        "index": index,
        "prompt": prompt,
        "finished": pieces[-1] == "<eos>",
        KL: total,
        f"{KL}_k1": total + 0.5,
        "pieces": list(pieces),
        "token_ids": [10 + len(piece) for piece in pieces],
        "classes": [
            "eos" if place == last and piece == "<eos>" else "other" if place else "first_token"
            for place, piece in enumerate(pieces)
        ],
        "kl_policy_ref": list(kl),
        "policy_logprobs": policy,
        "ref_logprobs": ref,
        "alternatives": both if alternatives is None else list(alternatives),
        **changes,
    }


def many_token_maps(count: int, length: int, *, vocabulary: int = 30_000, seed: int = 0) -> list[dict[str, Any]]:
    """Responses over many different strings in several alphabets, each position with five tokens of each model."""
    draw = random.Random(seed)
    words = [" " + "".join(draw.choices(ALPHABETS[number % 4], k=6)) + str(number) for number in range(vocabulary)]
    return [drawn_map(draw, words, index, length) for index in range(count)]


def drawn_map(draw: random.Random, words: list[str], index: int, length: int) -> dict[str, Any]:
    ids = [draw.randrange(len(words)) for _ in range(length)]
    kl = [round(draw.random() ** 8 * 9, 5) for _ in ids]
    row = a_token_map([words[number] for number in ids], kl, index=index, prompt=f"Question {index}? " + "word " * 20)
    both = [
        {model: [[draw.choice(words), -float(place)] for place in range(5)] for model in ("policy", "ref")} for _ in ids
    ]
    return row | {"token_ids": ids, "alternatives": both}


def a_measurement(maps: Sequence[dict[str, Any]], *, written_by_policy: bool = True, **changes: Any) -> dict[str, Any]:
    """What `kleash measure --json` writes, as far as it goes, of some token maps."""
    kl = [row[KL] for row in maps]
    lengths = [len(row["pieces"]) for row in maps]
    longest, count = max(lengths), len(maps)
    other = f"{KL}_k1" if written_by_policy else "log_ratio_per_sequence"
    return {
        "version": "0.0.0",
        "policy": "models/policy",
        "reference": "models/reference",
        "prompts": "prompts.jsonl",
        "responses": None if written_by_policy else "given.jsonl",
        "written_by_policy": written_by_policy,
        "temperature": 1.0,
        "max_new_tokens": longest,
        "seed": 3,
        "dtype": "float32",
        "device": "cpu",
        "prompts_count": len({str(row["prompt"]) for row in maps}),
        "responses_count": count,
        KL: around(math.fsum(kl) / count, 0.4, count),
        other: around(math.fsum(kl) / count + 0.5, 1.6, count),
        "kl_policy_ref_per_token": around(math.fsum(kl) / sum(lengths), 0.02, count),
        "k1_responses_for_same_interval": 3417.2 if written_by_policy else None,
        "policy_entropy_per_token": around(0.5, 0.1, count),
        "ref_entropy_per_token": around(1.5, 0.1, count),
        "response_length": around(sum(lengths) / count, 1.0, count),
        "finished_share": 0.75,
        "interval_covers": "the responses",
        "kl_policy_ref_per_sequence_skewness": 0.5,
        "interval_doubt": None,
        "sampler_doubt": None,
        "writer_doubt": None,
        "by_position": [position_row(maps, place) for place in range(longest)],
        "by_class": {
            "first_token": {"tokens": count, KL: 1.0, "kl_policy_ref_per_token": 1.0},
            "eos": {"tokens": 0, KL: 0.0, "kl_policy_ref_per_token": None},
            "special": {"tokens": 0, KL: 0.0, "kl_policy_ref_per_token": None},
            "other": {"tokens": sum(lengths) - count, KL: 3.0, "kl_policy_ref_per_token": 0.5},
        },
        "by_prompt": [
            {
                "prompt": row["prompt"],
                "responses": 1,
                KL: around(row[KL], None, 1),
                other: row[KL],
                "response_length": 3.0,
            }
            for row in maps
        ],
        "top_tokens": [top_row(maps[0])],
        "drifted_tokens": [{"token": " Use", "token_id": 5, "count": 3, KL: 1.0, "mean_ratio": 5.0}],
        "convergence": [{"n": n, KL: around(4.0, 4 / n, n), other: around(4.1, 9 / n, n)} for n in (8, 16, 32)],
        **changes,
    }


def around(mean: float, half: float | None, n: int) -> dict[str, float | int | None]:
    bounds = {"low": None, "high": None} if half is None else {"low": mean - half, "high": mean + half}
    return {"mean": mean, **bounds, "n": n}


def position_row(maps: Sequence[dict[str, Any]], place: int) -> dict[str, Any]:
    there = [row["kl_policy_ref"][place] or 0.0 for row in maps if place < len(row["pieces"])]
    mean = math.fsum(there) / len(there)
    row = {"position": place, "sequences": len(there), KL: math.fsum(there) / len(maps)}
    return row | {"kl_policy_ref_per_token": mean, "low": 0.5 * mean, "high": 1.5 * mean}


def top_row(row: dict[str, Any]) -> dict[str, Any]:
    place = {"token": row["pieces"][0], "token_id": 5, "class": "first_token", "position": 0, "sequence": 0}
    return place | {"kl_policy_ref": 1.5, "policy_prob": 0.96, "ref_prob": 0.19, "ratio": 5.0, "context": "before"}


def a_drift_map(update: int, kl: list[float], text: str = " Use") -> dict[str, Any]:
    """A line of drift.jsonl: 4 responses, its first position the first tokens, all others of class `other`."""
    rows = [{"position": place, "sequences": 4 - place % 2, KL: value} for place, value in enumerate(kl)]
    place = {"token": text, "token_id": 5, "class": "other", "position": 1, "sequence": 0, "kl_policy_ref": 1.5}
    place |= {"policy_prob": 0.9641, "ref_prob": 0.1882, "ratio": 5.12, "context": f"{text}\nwash"}
    one = {"token": text, "token_id": 5, "count": 3, KL: sum(kl) / 4, "mean_ratio": 0.2}
    first = {"tokens": 4, KL: kl[0], "kl_policy_ref_per_token": kl[0]}
    rest = {"tokens": 12, KL: sum(kl[1:]), "kl_policy_ref_per_token": sum(kl[1:]) / 3}
    nothing = {"tokens": 0, KL: 0.0, "kl_policy_ref_per_token": None}
    by_class = {"first_token": first, "eos": nothing, "special": nothing, "other": rest}
    drifted = sum(kl) > 0
    lists = {"top_tokens": [place] if drifted else [], "drifted_tokens": [one] if drifted else []}
    return {"update": update, "by_position": rows, "by_class": by_class, **lists}
