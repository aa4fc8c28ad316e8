"""Prompts: every form they come in, what is wrong with the others, and the order that the seed fixes."""

import json
import re
from collections import Counter

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import PROMPTS, tiny_tokenizer
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from kleash.batch import Prompts
from kleash.errors import ConfigError, PromptError
from kleash.given_responses import load_responses
from kleash.prompts import (
    load_prompts,
    prompts_fingerprint,
    prompts_of_update,
    require_prompts,
    require_room,
    tokenized_prompts,
)

ROWS = [{"prompt": "what is a cat", "answer": 1}, {"prompt": 'it runs, "fast"', "answer": 2}]
CHAT = [{"role": "system", "content": "a dog"}, {"role": "user", "content": "what is it"}]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data sets are cached in a directory of the test's own, so that none sees another's."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


# --- files ---


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_rows_come_with_their_columns_from_every_kind_of_file(tmp_path, kind):
    path = tmp_path / f"prompts.{kind}"
    match kind:
        case "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        case "json":
            path.write_text(json.dumps(ROWS))
        case "csv":
            path.write_text('prompt,answer\nwhat is a cat,1\n"it runs, ""fast""",2\n')
        case "parquet":
            datasets.Dataset.from_list(ROWS).to_parquet(path)
    assert load_prompts(path) == ROWS
    assert load_prompts(str(path)) == ROWS


def test_chat_messages_survive_the_file(tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"prompt": CHAT}) + "\n")
    assert load_prompts(path) == [{"prompt": CHAT}]


def test_a_data_set_saved_on_disk_is_found(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "splits")
    assert load_prompts(tmp_path / "one") == ROWS
    assert load_prompts(tmp_path / "splits") == ROWS


def test_a_file_that_changed_is_read_afresh(tmp_path):
    path = tmp_path / "prompts.jsonl"
    for text in ("first", "second one"):
        path.write_text(json.dumps({"prompt": text}) + "\n")
        assert load_prompts(path) == [{"prompt": text}]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_a_missing_or_empty_file_is_named(tmp_path, kind):
    path = tmp_path / f"prompts.{kind}"
    with pytest.raises(PromptError, match=rf"Expected prompts in .*\.{kind}, found no such file"):
        load_prompts(path)
    path.touch()
    with pytest.raises(PromptError, match=rf"Expected prompts in .*\.{kind}, found an empty file"):
        load_prompts(path)


@pytest.mark.parametrize(
    ("name", "text"), [("a.jsonl", "\n\n"), ("a.csv", "prompt\n"), ("b.csv", "prompt,answer\n"), ("a.json", "[]")]
)
def test_a_file_without_rows_is_named(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(PromptError, match=rf"Expected at least one prompt in .*{name}, found none"):
        load_prompts(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", '{"prompt": '),
        ("b.jsonl", '"abc"\n'),
        ("a.json", "{{"),
        ("a.parquet", "nonsense"),
        ("a.csv", '"\n"x'),
    ],
)
def test_a_broken_file_is_one_sentence(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(PromptError, match=f"{name}") as caught:
        load_prompts(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_another_column_name_is_told_what_to_rename(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "hello", "id": 3}\n')
    with pytest.raises(
        PromptError, match=r"Expected a column `prompt` in .*a\.jsonl, found text, id; rename the column"
    ):
        load_prompts(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    "prompt",
    ["", "  \n ", 3, None, [], [{"role": "user"}], ["plain", "texts"], {"role": "user", "content": "hello"}],
    ids=repr,
)
def test_a_prompt_that_is_neither_text_nor_chat_names_its_row(tmp_path, prompt):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"prompt": prompt}]))
    with pytest.raises(
        PromptError, match=r"Expected text or chat messages as the prompt of row 1 in .*a\.json, found "
    ):
        load_prompts(path)
    with pytest.raises(PromptError, match="row 2 in the list"):
        require_prompts([{"prompt": "fine"}, {"prompt": prompt}], "the list")


@pytest.mark.parametrize("row", [CHAT, 3, None])
def test_a_row_that_is_no_row_is_refused(row):
    with pytest.raises(PromptError, match=f"rows with a key `prompt` in the list, found {type(row).__name__} as row 2"):
        require_prompts([{"prompt": "fine"}, row], "the list")


def test_rows_with_different_columns_are_refused():
    with pytest.raises(
        PromptError, match="same columns in every row of the list, found answer only in one of rows 1 and 2"
    ):
        require_prompts([{"prompt": "a", "answer": 1}, {"prompt": "b"}], "the list")


def test_what_is_neither_file_nor_data_set_is_one_sentence(tmp_path):
    with pytest.raises(PromptError, match="neither a jsonl, json, parquet or csv file nor a data set") as caught:
        load_prompts(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["missing", "missing.txt", "missing/folder"])
def test_a_path_to_nothing_is_named(tmp_path, name):
    with pytest.raises(PromptError, match=f"Expected prompts in .*{name}, found no such file; check the path"):
        load_prompts(tmp_path / name)


def test_a_file_of_another_kind_is_told_how_to_write_its_lines(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("what is a cat\n")
    said = (
        f"Expected prompts in a jsonl, json, parquet or csv file, found the file {path}; write each of them as a line "
    )
    with pytest.raises(PromptError) as caught:
        load_prompts(path)
    assert str(caught.value) == said + '{"prompt": ".."} of a .jsonl file.'
    with pytest.raises(PromptError) as caught:
        load_responses(path)
    assert str(caught.value) == said + '{"prompt": "..", "response": ".."} of a .jsonl file.'


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json"])
def test_a_model_in_place_of_prompts_is_called_one(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(PromptError, match=r"found the model .*; give the prompts that the policy shall answer"):
        load_prompts(tmp_path)


# --- tokens ---


def closing_tokenizer(single: str) -> PreTrainedTokenizerFast:
    """A tokenizer that adds special tokens of its own to every text."""
    tokenizer = tiny_tokenizer(words=["<pad>", "<eos>", "<unk>", "<bos>", "what", "is", "it", "a", "dog"])
    tokenizer.bos_token = "<bos>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<bos>", 3), ("<eos>", 1)]
    )
    return tokenizer


def tokens_of(prompt: object, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    return tokenized_prompts([{"prompt": prompt}], tokenizer).tokens[0]


def test_text_becomes_the_tokenizers_own_tokens_without_padding():
    prompts = tokenized_prompts([{"prompt": text} for text in PROMPTS], tiny_tokenizer())
    assert prompts.tokens[0] == [3, 4, 5, 6]
    assert list(map(len, prompts.tokens)) == [len(text.split()) for text in PROMPTS]


def test_a_bos_stays_and_a_closing_eos_goes():
    """A prompt that ends in EOS asks for nothing more: the policy would go on after the end."""
    assert tokens_of("what is it", closing_tokenizer("<bos> $A <eos>")) == [3, 4, 5, 6]
    assert tokens_of("what is it", closing_tokenizer("<bos> $A")) == [3, 4, 5, 6]
    assert tokens_of("what is it", closing_tokenizer("$A <eos>")) == [4, 5, 6]


def test_a_bos_that_is_also_eos_is_not_taken_for_a_closing_one():
    tokenizer = closing_tokenizer("$A")
    tokenizer.bos_token = "<eos>"
    assert tokens_of("it <eos>", tokenizer) == [6, 1]


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ ' ' + m.content + ' <eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' it' }}{% endif %}"
)


def test_a_chat_gets_its_template_once_with_the_opening_of_an_answer_and_one_bos():
    tokenizer = closing_tokenizer("<bos> $A <eos>")
    tokenizer.chat_template = TEMPLATE
    assert tokens_of(CHAT, tokenizer) == [3, 7, 8, 1, 4, 5, 6, 1, 6]  # bos, a dog eos, what is it eos, it


def test_chat_and_text_may_stand_side_by_side():
    tokenizer = closing_tokenizer("<bos> $A")
    tokenizer.chat_template = TEMPLATE
    prompts = tokenized_prompts([{"prompt": "a dog"}, {"prompt": CHAT}], tokenizer)
    assert prompts.tokens == [[3, 7, 8], [3, 7, 8, 1, 4, 5, 6, 1, 6]]
    assert prompts.texts == ["a dog", CHAT]


def test_a_chat_without_a_template_is_told_the_remedy():
    with pytest.raises(PromptError, match="tokenizer with a chat template for chat prompts, found none; set one"):
        tokens_of(CHAT, tiny_tokenizer())


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('roles must alternate') }}", "{% for m in messages %}{{ m.name + m.content }}{% endfor %}"],
)
def test_a_chat_that_its_template_refuses_is_one_sentence(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(PromptError, match="chat messages that the tokenizer's template accepts") as caught:
        tokens_of(CHAT, tokenizer)
    assert "\n" not in str(caught.value)


def test_other_columns_come_along_but_not_those_that_a_reward_function_gets_anyway():
    rows = [{"prompt": "it", "answer": 1, "completions": "x", "prompts": "y"}]
    assert tokenized_prompts(rows, tiny_tokenizer()).columns == {"answer": [1]}


def test_prompts_must_leave_room_for_the_response():
    prompts = tokenized_prompts(
        [{"prompt": text} for text in ("it", "what is a cat", "a dog sleeps .")], tiny_tokenizer()
    )
    require_room(prompts, max_new_tokens=4, context=8)
    require_room(prompts, max_new_tokens=10**9, context=None)
    with pytest.raises(
        PromptError, match=r"at most 3 tokens \(context 8 less max_new_tokens 5\), found 2 longer ones, .* row 3 with 4"
    ):
        require_room(prompts, max_new_tokens=5, context=8)
    for context, tokens, remedy in (
        (8, 10**6, "at most 4 fit after the longest prompt."),
        (8, 8, "at most 4 fit after the longest prompt."),
        (4, 4, "shorten or drop the prompts, too."),
    ):
        said = f"Expected max_new_tokens below the context of {context} tokens, found {tokens}; lower it: {remedy}"
        with pytest.raises(ConfigError, match=re.escape(said)):
            require_room(prompts, max_new_tokens=tokens, context=context)


def test_a_prompt_without_a_token_is_refused():
    prompts = Prompts(texts=["it", "<nothing>"], tokens=[[8], []], columns={})
    with pytest.raises(PromptError, match="at least one token, found none in row 2"):
        require_room(prompts, max_new_tokens=1, context=None)


def test_the_fingerprint_knows_tokens_and_their_order():
    def fingerprint(*texts: str) -> str:
        return prompts_fingerprint(tokenized_prompts([{"prompt": text} for text in texts], tiny_tokenizer()))

    assert fingerprint("it", "a cat") == fingerprint("it", "a cat")
    assert len({fingerprint("it", "a cat"), fingerprint("a cat", "it"), fingerprint("it a", "cat")}) == 3


# --- order ---


def numbered(count: int) -> Prompts:
    return Prompts(
        texts=[f"text {i}" for i in range(count)],
        tokens=[[i] for i in range(count)],
        columns={"answer": [10 * i for i in range(count)]},
    )


def dealt(count: int, per_update: int, updates: int, *, seed: int = 0) -> list[int]:
    """The numbers of the prompts that so many updates get, one after the other."""
    batches = [prompts_of_update(numbered(count), n + 1, per_update=per_update, seed=seed) for n in range(updates)]
    assert all(len(batch) == per_update for batch in batches)
    return [tokens[0] for batch in batches for tokens in batch.tokens]


@given(st.integers(1, 12), st.integers(1, 30), st.integers(0, 10**9))
def test_each_pass_over_the_data_is_a_permutation(count, per_update, seed):
    """Also where a batch spans two passes, or several."""
    updates = 3 * count // per_update + 1
    order = dealt(count, per_update, updates, seed=seed)
    for start in range(0, len(order) - count + 1, count):
        assert sorted(order[start : start + count]) == list(range(count))
    appearances = Counter(order)
    assert max(appearances.values()) - min(appearances[i] for i in range(count)) <= 1


def test_the_passes_differ_and_the_seed_fixes_them():
    order = dealt(10, 5, 8)
    assert len({tuple(order[start : start + 10]) for start in range(0, 40, 10)}) == 4
    assert order == dealt(10, 5, 8)
    assert order != dealt(10, 5, 8, seed=1)


@pytest.mark.parametrize("per_update", [1, 4, 5, 7, 20])
def test_the_size_of_an_update_does_not_change_the_order(per_update):
    assert dealt(10, per_update, 20 // per_update + 1)[:20] == dealt(10, 20, 1)


def test_an_update_can_be_dealt_without_those_before_it():
    whole = dealt(7, 3, 10)
    last = prompts_of_update(numbered(7), 10, per_update=3, seed=0)
    assert [tokens[0] for tokens in last.tokens] == whole[-3:]


def test_texts_tokens_and_columns_of_a_row_stay_together():
    batch = prompts_of_update(numbered(9), 2, per_update=6, seed=3)
    for text, tokens, answer in zip(batch.texts, batch.tokens, batch.columns["answer"], strict=True):
        assert text == f"text {tokens[0]}"
        assert answer == 10 * tokens[0]
