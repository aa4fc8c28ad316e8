"""Prompts: read from a file or data set, turned into tokens, and dealt out in an order that the seed fixes."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from kleash.batch import Prompts, PromptText
from kleash.errors import ConfigError, PromptError, first_line
from kleash.seeds import generator_for

FILE_KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def load_prompts(source: str | Path, *, row: str = '{"prompt": ".."}') -> list[dict[str, Any]]:
    """Rows with a `prompt` column, from a jsonl, json, parquet or csv file, or the train split of a data set.

    Args:
      source: the file, or the data set's name or directory.
      row: as which a file that cannot be read shall be written.

    Raises:
      PromptError: no such file, an unreadable or empty one, no `prompt` column, or a prompt that is neither
        text nor chat messages.
    """
    path = Path(source)
    is_file = path.suffix in FILE_KINDS
    if is_file and not path.is_file():
        raise PromptError(f"Expected prompts in {source}, found no such file; check the path.")
    if is_file and path.stat().st_size == 0:
        raise PromptError(f"Expected prompts in {source}, found an empty file; give at least one row.")
    if not is_file:
        _require_no_other_thing(path, row)
    rows = _read_file(path) if is_file else _read_dataset(str(source))
    require_prompts(rows, source)
    return rows


def as_rows(prompts: Iterable[str | dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with a key `prompt`, of which strings are such.

    >>> as_rows(["a", {"prompt": "b", "answer": 1}])
    [{'prompt': 'a'}, {'prompt': 'b', 'answer': 1}]
    """
    return [{"prompt": row} if isinstance(row, str) else row for row in prompts]


def require_prompts(rows: list[dict[str, Any]], source: str | Path) -> None:
    """Raise PromptError unless there are rows, all with the same columns, and each prompt is text or a chat."""
    if not rows:
        raise PromptError(f"Expected at least one prompt in {source}, found none; give at least one row.")
    for number, row in enumerate(rows, 1):
        _require_prompt(row, number, source)
        if row.keys() != rows[0].keys():
            column = min(row.keys() ^ rows[0].keys())
            raise PromptError(
                f"Expected the same columns in every row of {source}, found {column} only in one of rows 1 and "
                f"{number}; fill it in everywhere."
            )


def _require_no_other_thing(path: Path, row: str) -> None:
    """Raise PromptError for a file of another kind, and for a model's directory."""
    kinds = "jsonl, json, parquet or csv"
    if path.is_file():
        raise PromptError(
            f"Expected prompts in a {kinds} file, found the file {path}; write each of them as a line {row} of a "
            ".jsonl file."
        )
    if any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise PromptError(
            f"Expected prompts in a {kinds} file or a data set, found the model {path}; give the prompts that "
            "the policy shall answer."
        )
    if path.is_absolute() and not path.exists():
        raise PromptError(f"Expected prompts in {path}, found no such file; check the path.")


def _read_file(path: Path) -> list[dict[str, Any]]:
    progress_was_on = datasets.are_progress_bars_disabled() is False
    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(FILE_KINDS[path.suffix], data_files=str(path), split="train")
    except Exception as error:
        if "corresponds to no data" in str(error):
            return []
        cause = first_line(error.__cause__ or error)
        raise PromptError(
            f"Expected rows with a `prompt` column in {path}, found an unreadable file: {cause}"
        ) from error
    finally:
        if progress_was_on:
            datasets.enable_progress_bars()
    return list(loaded)


def _read_dataset(name: str) -> list[dict[str, Any]]:
    try:
        folder = Path(name)
        saved = folder.is_dir() and (folder / "dataset_info.json").exists()
        loaded = datasets.load_from_disk(name) if saved else datasets.load_dataset(name, split="train")
    except Exception as error:
        raise PromptError(
            f"Expected prompts in {name}, found neither a jsonl, json, parquet or csv file nor a data set "
            f"that loads: {first_line(error)}"
        ) from error
    return list(loaded)


def _require_prompt(row: Any, number: int, source: str | Path) -> None:
    if not isinstance(row, dict):
        raise PromptError(
            f"Expected rows with a key `prompt` in {source}, found {type(row).__name__} as row {number}; "
            "write {'prompt': ...}."
        )
    if "prompt" not in row:
        raise PromptError(
            f"Expected a column `prompt` in {source}, found {', '.join(row) or 'no columns'}; rename the column."
        )
    prompt = row["prompt"]
    is_chat = isinstance(prompt, list) and prompt and all(isinstance(m, dict) and "content" in m for m in prompt)
    if not ((isinstance(prompt, str) and prompt.strip()) or is_chat):
        raise PromptError(
            f"Expected text or chat messages as the prompt of row {number} in {source}, found {prompt!r}; "
            "mend or drop the row."
        )


def tokenized_prompts(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> Prompts:
    """All prompts as text and tokens; a chat gets the tokenizer's template with the opening of an answer.

    Raises:
      PromptError: chat messages, and a tokenizer without a chat template or with one that refuses them.
    """
    texts: list[PromptText] = [row["prompt"] for row in rows]
    if any(isinstance(text, list) for text in texts) and tokenizer.chat_template is None:
        raise PromptError(
            "Expected a tokenizer with a chat template for chat prompts, found none; set one, or give plain text."
        )
    names = [name for name in rows[0] if name not in ("prompt", "completions", "prompts")]
    columns = {name: [row[name] for row in rows] for name in names}
    return Prompts(texts=texts, tokens=[_tokens(text, tokenizer) for text in texts], columns=columns)


def _tokens(text: PromptText, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if isinstance(text, str):
        tokens = tokenizer(text)["input_ids"]
        closes = tokens and tokens[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id != tokenizer.bos_token_id
        return list(tokens[:-1] if closes else tokens)
    try:
        encoded: Any = tokenizer.apply_chat_template(text, add_generation_prompt=True, tokenize=True, return_dict=True)
    except (TemplateError, TypeError) as error:
        raise PromptError(
            f"Expected chat messages that the tokenizer's template accepts, found {text!r}: {first_line(error)}; "
            "mend the messages, mostly their roles."
        ) from error
    return list(encoded["input_ids"])


def require_room(prompts: Prompts, *, max_new_tokens: int, context: int | None) -> None:
    """Check that each prompt leaves room for max_new_tokens in the model's context.

    Raises:
      ConfigError: max_new_tokens leaves no room for any prompt.
      PromptError: a prompt is empty, or too long.
    """
    for number, tokens in enumerate(prompts.tokens, 1):
        if not tokens:
            raise PromptError(f"Expected a prompt of at least one token, found none in row {number}; drop the row.")
    if context is None:
        return
    room = context - max_new_tokens
    if room < 1:
        fits = context - max(map(len, prompts.tokens))
        remedy = f"at most {fits} fit after the longest prompt" if fits >= 1 else "shorten or drop the prompts, too"
        raise ConfigError(
            f"Expected max_new_tokens below the context of {context} tokens, found {max_new_tokens}; "
            f"lower it: {remedy}."
        )
    too_long = [(len(tokens), number) for number, tokens in enumerate(prompts.tokens, 1) if len(tokens) > room]
    if too_long:
        length, number = max(too_long)
        raise PromptError(
            f"Expected prompts of at most {room} tokens (context {context} less max_new_tokens {max_new_tokens}), "
            f"found {len(too_long)} longer ones, the longest in row {number} with {length}; shorten or drop them, or "
            "lower max_new_tokens."
        )


def prompts_of_update(prompts: Prompts, update: int, *, per_update: int, seed: int) -> Prompts:
    """The prompts of one update: each pass over the data is a fresh permutation, fixed by the seed.

    Args:
      prompts: all of them.
      update: 1 for the first.
      per_update: prompts in each update; a batch may span two passes.
      seed: the run's seed.
    """
    count = len(prompts)
    first = (update - 1) * per_update
    passes = range(first // count, (first + per_update - 1) // count + 1)
    order = torch.cat([torch.randperm(count, generator=generator_for(seed, "prompts", n)) for n in passes])
    return prompts.at(order[first - passes.start * count :][:per_update].tolist())


def prompts_fingerprint(prompts: Prompts) -> str:
    """SHA-256 over the token ids of all prompts in their order, as hexadecimal."""
    return hashlib.sha256(json.dumps(prompts.tokens).encode()).hexdigest()
