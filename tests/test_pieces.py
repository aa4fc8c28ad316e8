"""Tokens as text: the pieces of a response join to what its tokenizer decodes, for tokenizers of every family."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import WORDS, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from kleash.pieces import UNFINISHED, Pieces

TEXTS = [
    "the cat sleeps, the cat runs.",
    "na\u00efve caf\u00e9 \u00fcber",
    "\u4f60\u597d \u4e16\u754c",
    "\U0001f600 ok",
]
MARKS = ["<pad>", "<eos>", "<unk>"]


def wrapped(tokenizer: Tokenizer, special: list[str] = MARKS) -> PreTrainedTokenizerBase:
    names = dict(zip(("pad_token", "eos_token", "unk_token"), special, strict=False))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def byte_level() -> PreTrainedTokenizerBase:
    """A byte-level BPE as GPT-2 has: a character may be spread over up to four tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS * 2, trainers.BpeTrainer(vocab_size=300, special_tokens=MARKS[:2], initial_alphabet=alphabet)
    )
    return wrapped(tokenizer, MARKS[:2])


def metaspace() -> PreTrainedTokenizerBase:
    """As sentencepiece writes it: spaces are marks on words, the first one is dropped, unknown characters are bytes."""
    pieces = ["\u2581", "\u2581the", "\u2581cat", "\u2581sleeps", "s", ",", ".", "a", "t", "c", "\u00e9", "e", "k", "o"]
    tokens = [*MARKS, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    tokenizer = Tokenizer(
        models.BPE({token: number for number, token in enumerate(tokens)}, [], byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return wrapped(tokenizer)


def suffixed() -> PreTrainedTokenizerBase:
    """As the first GPT wrote it: a mark ends each word, so what a token adds depends on the one before it."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.BPEDecoder("</w>")
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=MARKS, end_of_word_suffix="</w>")
    tokenizer.train_from_iterator(TEXTS * 2, trainer)
    return wrapped(tokenizer)


TOKENIZERS = {
    "byte level": byte_level(),
    "words": tiny_tokenizer(),
    "metaspace": metaspace(),
    "suffixed": suffixed(),
}
text = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=12)


def decoded(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, clean_up_tokenization_spaces=False)


def joined(name: str, tokens: list[int]) -> str:
    """The pieces of the tokens, behind an ordinary word, as they stand in a response."""
    pieces = Pieces(TOKENIZERS[name]).of_response(tokens)
    assert len(pieces) == len(tokens)
    return "".join(pieces)


def written_behind_a_word(name: str, tokens: list[int]) -> str:
    """What the tokens add to the word that Pieces reads them behind."""
    tokenizer = TOKENIZERS[name]
    before = Pieces(tokenizer)._before
    return decoded(tokenizer, [*before, *tokens]).removeprefix(decoded(tokenizer, before))


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=text | st.sampled_from(TEXTS))
def test_the_pieces_of_any_text_join_to_it(name, text):
    tokens = TOKENIZERS[name](text, add_special_tokens=False)["input_ids"]
    assert joined(name, tokens) == written_behind_a_word(name, tokens)


@pytest.mark.parametrize("name", ["byte level", "words", "suffixed"])
@given(draw=st.data())
def test_the_pieces_of_any_tokens_join_to_what_is_decoded_though_they_be_no_text(name, draw):
    """A model with random weights writes bytes that are no characters."""
    tokens = draw.draw(st.lists(st.integers(0, len(TOKENIZERS[name]) - 1), max_size=12))
    assert joined(name, tokens) == written_behind_a_word(name, tokens)


@given(text=text)
def test_byte_level_pieces_are_the_text_itself_and_its_spaces(text):
    assert joined("byte level", TOKENIZERS["byte level"](text)["input_ids"]) == text


def test_a_character_of_several_tokens_stands_at_its_last_one():
    tokenizer = TOKENIZERS["byte level"]
    tokens = [*tokenizer("a")["input_ids"], *tokenizer("\u20ac")["input_ids"], *tokenizer("b")["input_ids"]]
    assert len(tokens) == 5
    assert Pieces(tokenizer).of_response(tokens) == ["a", "", "", "\u20ac", "b"]


def test_a_character_that_is_cut_off_shows_as_unfinished_at_the_end():
    tokenizer = TOKENIZERS["byte level"]
    tokens = tokenizer("a\u20ac")["input_ids"][:-1]
    assert Pieces(tokenizer).of_response(tokens) == ["a", "", UNFINISHED]


def test_three_broken_bytes_do_not_swallow_the_character_behind_them():
    tokenizer = TOKENIZERS["byte level"]
    tail, accent = tokenizer("\u20ac")["input_ids"][-1], tokenizer("\u00f1")["input_ids"]
    assert len(accent) == 2
    pieces = Pieces(tokenizer).of_response([tail, tail, tail, *accent])
    assert "".join(pieces) == UNFINISHED * 3 + "\u00f1"


def test_words_have_the_space_before_them():
    tokenizer = TOKENIZERS["words"]
    assert Pieces(tokenizer).of_response(tokenizer("a cat .")["input_ids"]) == [" a", " cat", "."]
    metaspaced = TOKENIZERS["metaspace"]
    numbers = metaspaced.convert_tokens_to_ids(["\u2581the", "\u2581cat", "s"])
    assert Pieces(metaspaced).of_response(numbers) == [" the", " cat", "s"]


def test_special_tokens_are_shown_as_they_are_written():
    tokenizer = TOKENIZERS["byte level"]
    assert Pieces(tokenizer).of_response([*tokenizer("a")["input_ids"], tokenizer.eos_token_id]) == ["a", "<eos>"]
    assert Pieces(tiny_tokenizer()).of_token(WORDS.index("<eos>")).strip() == "<eos>"


def test_a_token_on_its_own_is_what_it_adds_behind_a_word_or_its_name_where_that_is_no_character():
    tokenizer = TOKENIZERS["byte level"]
    pieces, first = Pieces(tokenizer), tokenizer("\u20ac")["input_ids"][0]
    assert pieces.of_token(tokenizer(" ")["input_ids"][0]) == " "
    assert pieces.of_token(first) == tokenizer.convert_ids_to_tokens(first)
    assert UNFINISHED not in pieces.of_token(first)
    assert Pieces(TOKENIZERS["metaspace"]).of_token(3 + 0xE4) == "<0xE4>"
    assert Pieces(TOKENIZERS["words"]).of_token(WORDS.index("cat")) == " cat"


def test_nothing_has_no_pieces():
    assert Pieces(tiny_tokenizer()).of_response([]) == []
