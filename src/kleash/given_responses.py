"""Responses that somebody wrote, read from a file and laid out as a rollout."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kleash.batch import Prompts, Rollout
from kleash.errors import PromptError
from kleash.prompts import load_prompts
from kleash.rollout import left_padded

COLUMNS = ("response", "completion")


def load_responses(source: str | Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows with `prompt`, and beside them rows with `text` and `finished`, of a file or data set.

    A response is text, or a list with one assistant message; the column is `response` or `completion`. A column
    `finished` says whether it was closed; without it every response was.

    Raises:
      PromptError: no prompts, no responses, a response that is neither, or a `finished` that is not true or false.
    """
    rows = load_prompts(source, row='{"prompt": "..", "response": ".."}')
    column = next((name for name in COLUMNS if name in rows[0]), None)
    if column is None:
        raise PromptError(
            f"Expected a column `response` or `completion` in {source}, found {', '.join(rows[0])}; rename the column."
        )
    responses = [
        {"text": _text(row[column], number, source), "finished": _finished(row.get("finished", True), number, source)}
        for number, row in enumerate(rows, 1)
    ]
    return [{"prompt": row["prompt"]} for row in rows], responses


def _text(response: object, number: int, source: str | Path) -> str:
    message = response[0] if isinstance(response, list) and len(response) == 1 else None
    text = message.get("content") if isinstance(message, dict) else response
    if not isinstance(text, str):
        raise PromptError(
            f"Expected text or one assistant message as the response of row {number} in {source}, found {response!r}; "
            "mend or drop the row."
        )
    return text


def _finished(value: object, number: int, source: str | Path) -> bool:
    if value not in (True, False):
        raise PromptError(
            f"Expected true or false as `finished` of row {number} in {source}, found {value!r}; mend it, or leave the "
            "column out if every response was closed."
        )
    return bool(value)


def tokenized_responses(
    responses: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, *, eos_token_ids: list[int]
) -> list[list[int]]:
    """The tokens of each response, closed with EOS where it was finished and does not close itself.

    Raises:
      PromptError: a response without a single token.
    """
    found = []
    for number, response in enumerate(responses, 1):
        tokens: list[int] = list(tokenizer(response["text"], add_special_tokens=False)["input_ids"])
        if response["finished"] and not set(tokens[-1:]) & set(eos_token_ids):
            tokens.append(tokenizer.eos_token_id)
        if not tokens:
            raise PromptError(f"Expected a response of at least one token, found none in row {number}; drop the row.")
        found.append(tokens)
    return found


def require_room_for_responses(prompts: Prompts, responses: list[list[int]], *, context: int | None) -> None:
    """Raise PromptError when a prompt with its response is longer than the models' context."""
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompts.tokens, responses, strict=True)]
    if context is not None and max(lengths) > context:
        raise PromptError(
            f"Expected prompt and response together of at most {context} tokens, found {max(lengths)} in row "
            f"{lengths.index(max(lengths)) + 1}; shorten or drop the row."
        )


def given_rollouts(
    prompts: Prompts,
    responses: list[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    eos_token_ids: list[int],
    tokens_at_once: int,
    width: int,
    device: torch.device,
) -> Iterator[tuple[Tensor, Rollout]]:
    """The numbers of the prompts and their rollout, batch by batch; rollout_logprobs are 0, since nobody drew a token.

    Rows with one and the same prompt have the number of the first of them.

    Args:
      prompts, responses: row by row.
      tokenizer: of the policy.
      eos_token_ids: what closes a response.
      tokens_at_once: largest size of a padded batch; one row is always taken.
      width: most rows at once.
      device: where the models are.
    """
    numbers = _numbers_of_equals(prompts)
    start = 0
    while start < len(responses):
        stop, widest, longest = start, 0, 0
        while stop < min(len(responses), start + width):
            widest, longest = max(widest, len(prompts.tokens[stop])), max(longest, len(responses[stop]))
            if stop > start and (stop + 1 - start) * (widest + longest) > tokens_at_once:
                break
            stop += 1
        rows = prompts.rows(start, stop).tokens
        yield (
            torch.tensor(numbers[start:stop]),
            _rollout(rows, responses[start:stop], tokenizer, eos_token_ids=eos_token_ids, device=device),
        )
        start = stop


def _numbers_of_equals(prompts: Prompts) -> list[int]:
    """For each row the first row whose prompt has the same tokens."""
    first: dict[tuple[int, ...], int] = {}
    return [first.setdefault(tuple(tokens), row) for row, tokens in enumerate(prompts.tokens)]


def _rollout(
    prompts: list[list[int]],
    responses: list[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    eos_token_ids: list[int],
    device: torch.device,
) -> Rollout:
    ids, prompt_mask = left_padded(prompts, tokenizer.pad_token_id, device)
    time = max(map(len, responses))
    tokens, mask = left_padded([row[::-1] for row in responses], tokenizer.pad_token_id, device)
    tokens, mask = tokens.flip(1), mask.flip(1)  # padding on the right
    return Rollout(
        sequences=torch.cat([ids, tokens], 1),
        attention_mask=torch.cat([prompt_mask, mask], 1),
        response_mask=mask,
        rollout_logprobs=torch.zeros((len(responses), time), device=device),
        finished=torch.tensor([row[-1] in eos_token_ids for row in responses], device=device),
        completions=tokenizer.batch_decode(responses, skip_special_tokens=True),
    )
