"""What the pages share: no text becomes markup, and what cannot be seen is written out."""

import json

import pytest

from kleash.errors import InputError
from kleash.page import embedded_json, prompt_text, require_file_name, short, visible, write_page


def test_what_cannot_be_seen_of_a_token_is_written_out() -> None:
    hidden = " \t\n\x00\u202e\u00a0\ud800a"
    assert visible(hidden) == "\u2423\u21e5\u21b5U+0000U+202EU+00A0U+D800a"
    assert visible("") == "(empty)"
    assert visible("n\u00e9\u4e2d\u0644") == "n\u00e9\u4e2d\u0644"


def test_embedded_json_cannot_leave_its_script_element_and_says_the_same() -> None:
    data = {"text": "</script><!-- & \u2028", "number": 0.5}
    text = str(embedded_json(data))
    assert not set(text) & set("<>&\u2028")
    assert json.loads(text) == data


def test_halves_of_characters_survive_in_json_and_whole_ones_stay_short() -> None:
    text = str(embedded_json(["\ud800", "\u4e2d\U0001f600"]))
    assert text == '["\\ud800","\u4e2d\U0001f600"]'
    assert json.loads(text) == ["\ud800", "\u4e2d\U0001f600"]


def test_chat_messages_are_read_as_text() -> None:
    assert prompt_text("hello") == "hello"
    assert prompt_text([{"role": "user", "content": "a"}, {"content": "b"}, "c"]) == "user: a\nmessage: b\nmessage: c"


def test_a_long_path_keeps_its_end() -> None:
    assert short("/home/someone/models/a/b/policy/of/mine") == "of/mine"
    assert short("org/model") == "org/model"
    assert short({"kind": "copy"}) == '{"kind": "copy"}'


def test_a_page_is_replaced_in_one_step_and_never_a_directory(tmp_path) -> None:
    out = tmp_path / "deep" / "page.html"
    assert write_page("one \ud800", out) == out
    assert write_page("two", out).read_text() == "two"
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]
    with pytest.raises(InputError, match=r"is a directory: name the page to write, such as .*x\.html"):
        require_file_name(tmp_path, "x.html")
