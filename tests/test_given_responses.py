"""Responses from a file: what is understood, their tokens, and how they are laid out."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import WORDS, tiny_tokenizer

from kleash.batch import Prompts
from kleash.errors import PromptError
from kleash.given_responses import (
    given_rollouts,
    load_responses,
    require_room_for_responses,
    tokenized_responses,
)

EOS, DOT = WORDS.index("<eos>"), WORDS.index(".")
CPU = torch.device("cpu")


def saved(directory: Path, *rows: dict[str, object]) -> Path:
    path = directory / "responses.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def tokens_of(text: str, *, finished: bool = True, eos: list[int] | None = None) -> list[int]:
    (tokens,) = tokenized_responses(
        [{"text": text, "finished": finished}], tiny_tokenizer(), eos_token_ids=eos or [EOS]
    )
    return tokens


@pytest.mark.parametrize("column", ["response", "completion"])
def test_rows_are_prompts_and_texts_whatever_the_column_is_called(tmp_path, column):
    chat = [{"role": "user", "content": "what is it"}]
    said = [{"role": "assistant", "content": "a dog"}]
    path = saved(tmp_path, {"prompt": "a", column: "a cat", "score": 1}, {"prompt": "b", column: "it", "score": 2})
    rows, responses = load_responses(path)
    assert rows == [{"prompt": "a"}, {"prompt": "b"}]
    assert responses == [{"text": "a cat", "finished": True}, {"text": "it", "finished": True}]
    path = saved(tmp_path, {"prompt": chat, column: said})
    assert load_responses(path) == ([{"prompt": chat}], [{"text": "a dog", "finished": True}])


@pytest.mark.parametrize(("value", "finished"), [(True, True), (False, False), (1, True), (0, False)])
def test_a_column_says_whether_a_response_was_closed(tmp_path, value, finished):
    path = saved(tmp_path, {"prompt": "a", "response": "it", "finished": value})
    assert load_responses(path)[1] == [{"text": "it", "finished": finished}]


def test_a_csv_file_says_it_too(tmp_path):
    path = tmp_path / "responses.csv"
    path.write_text("prompt,response,finished\na,it runs,False\nb,it,True\n")
    assert [response["finished"] for response in load_responses(path)[1]] == [False, True]


@pytest.mark.parametrize("value", ["no", None, 2, []])
def test_a_finished_that_is_neither_true_nor_false_is_refused(tmp_path, value):
    path = saved(tmp_path, {"prompt": "a", "response": "it", "finished": value})
    with pytest.raises(PromptError, match=r"Expected true or false as `finished` of row 1 in .*, found .*; mend it"):
        load_responses(path)


def test_a_file_without_responses_is_refused_by_what_it_has_instead(tmp_path):
    path = saved(tmp_path, {"prompt": "a", "answer": "it"})
    with pytest.raises(PromptError, match=r"a column `response` or `completion` in .*, found prompt, answer; rename"):
        load_responses(path)


@pytest.mark.parametrize("response", [None, 3, [], [{"role": "assistant"}], [{"content": "a"}, {"content": "b"}]])
def test_a_response_that_is_no_text_and_not_one_message_is_refused_with_its_row(tmp_path, response):
    path = saved(tmp_path, {"prompt": "a", "response": response})
    with pytest.raises(PromptError, match="text or one assistant message as the response of row 1 in"):
        load_responses(path)


def test_a_closed_response_ends_with_eos_and_an_open_one_does_not():
    assert tokens_of("a cat") == [*words("a cat"), EOS]
    assert tokens_of("a cat", finished=False) == words("a cat")


def test_a_response_that_closes_itself_is_not_closed_again():
    assert tokens_of("a cat <eos>") == [*words("a cat"), EOS]
    assert tokens_of("a cat .", eos=[EOS, DOT]) == words("a cat .")
    assert tokens_of("a cat .", eos=[EOS]) == [*words("a cat ."), EOS]


def test_an_empty_response_that_was_closed_is_its_eos_and_an_open_one_is_refused():
    assert tokens_of("") == [EOS]
    with pytest.raises(PromptError, match="at least one token, found none in row 1; drop the row"):
        tokens_of("", finished=False)


def some_prompts(tokens: list[list[int]]) -> Prompts:
    return Prompts(texts=[str(row) for row in tokens], tokens=tokens, columns={})


def test_prompt_and_response_together_must_fit_into_the_context():
    prompts = some_prompts([[3], [3, 4, 5]])
    require_room_for_responses(prompts, [[6] * 5, [6] * 5], context=8)
    require_room_for_responses(prompts, [[6] * 500, [6]], context=None)
    with pytest.raises(PromptError, match="together of at most 7 tokens, found 8 in row 2; shorten or drop the row"):
        require_room_for_responses(prompts, [[6] * 5, [6] * 5], context=7)


def laid_out(prompts: list[list[int]], responses: list[list[int]], **limits: int) -> list:
    asked = {"tokens_at_once": 10_000, "width": 64, **limits}
    return list(
        given_rollouts(
            some_prompts(prompts), responses, tiny_tokenizer(), eos_token_ids=[EOS, DOT], device=CPU, **asked
        )
    )


def test_prompts_are_padded_on_the_left_and_responses_on_the_right():
    ((numbers, rollout),) = laid_out([[3, 4, 5], [6]], [[7, EOS], [8, 9, DOT]])
    assert numbers.tolist() == [0, 1]
    assert rollout.sequences.tolist() == [[3, 4, 5, 7, EOS, 0], [0, 0, 6, 8, 9, DOT]]
    assert rollout.attention_mask.tolist() == [[True] * 5 + [False], [False, False] + [True] * 4]
    assert rollout.response_mask.tolist() == [[True, True, False], [True, True, True]]
    assert rollout.finished.tolist() == [True, True]
    assert rollout.completions == ["dog", "it runs."]
    assert (rollout.rollout_logprobs == 0).all()


def test_a_response_without_a_closing_token_is_not_finished():
    ((_, rollout),) = laid_out([[3], [3]], [[7, EOS], [EOS, 7]])
    assert rollout.finished.tolist() == [True, False]


def test_rows_with_one_prompt_share_the_number_of_the_first():
    ((numbers, _),) = laid_out([[3], [4, 5], [3], [4, 5], [5]], [[7]] * 5)
    assert numbers.tolist() == [0, 1, 0, 1, 4]


rows = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=12)


@given(rows, st.integers(1, 60), st.integers(1, 5))
def test_however_they_are_batched_every_row_comes_once_in_its_order_and_within_the_limits(rows, tokens_at_once, width):
    prompts = [[3 + number % 9] * a for number, (a, _) in enumerate(rows)]
    responses = [[4 + number % 8] * b for number, (_, b) in enumerate(rows)]
    found = []
    for _, rollout in laid_out(prompts, responses, tokens_at_once=tokens_at_once, width=width):
        batch, size = rollout.sequences.shape
        assert batch == 1 or (batch * size <= tokens_at_once and batch <= width)
        for row in range(batch):
            text = rollout.sequences[row][rollout.attention_mask[row]].tolist()
            written = rollout.responses[row][rollout.response_mask[row]].tolist()
            found.append((text[: len(text) - len(written)], written))
    assert found == list(zip(prompts, responses, strict=True))
