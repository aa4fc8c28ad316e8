"""Responses token by token on a page, driven in a browser: what is shown, what every key and button does."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import TOO_WIDE, eventually, listened
from mapped import a_measurement, a_token_map, many_token_maps

from kleash import page, shading
from kleash.measure_page import write_measure_page

ATTACK = "</script><script>window.pwned=1</script><img src=x onerror='window.pwned=1'>"
WORDS = ["Soak", " it", ",", " little", "<eos>"]
COUNT = 30
DEEP = 3  # the position of the largest KL in each response


def some_maps() -> list[dict[str, Any]]:
    """Responses 0 to 29: response i has i / 10 nats at its position 3, and (29 - i) / 100 at its EOS, else 0."""
    return [
        a_token_map(WORDS, [0.0, 0.0, 0.0, i / 10, (29 - i) / 100], index=i, prompt=f"Question {i}?")
        for i in range(COUNT)
    ]


WRITINGS = {
    "arabic": ["\u0645\u0631", "\u062d\u0628\u0627", " \u0628\u0643"],
    "chinese": ["\u4f60", "\u597d", "\uff0c", "\u4e16\u754c"],
    "lines": ["one", ".\n\n", "  two", "\tthree", "   "],
    "family": ["\U0001f468", "\u200d", "\U0001f469", "", "!"],
}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("maps")
    shades = [0.0, 0.05, 0.1, 0.3, 0.5, 1.0, 1.7, 2.0, 4.0, 8.0, 300.0, None]
    vile = {"policy": [[ATTACK, -0.1], ["\x00\u202e", -3.0]], "ref": [[ATTACK, -9.0]]}
    attacked = a_token_map([ATTACK, "\x00\ud800\u202e", ATTACK * 4], [1.0, 2.0, 3.0], prompt=ATTACK) | {
        "alternatives": [vile, None, vile]
    }
    writings = [
        a_token_map(pieces, [0.5] * len(pieces), index=index, prompt=name)
        for index, (name, pieces) in enumerate(WRITINGS.items())
    ]
    long = a_token_map([f" word{place}" for place in range(900)], [0.1] * 899 + [5.0], index=3)
    content = {
        "plain": some_maps(),
        "shades": [a_token_map(["w"] * len(shades), shades)],
        "attacked": [attacked, attacked | {"index": 1, "prompt": [{"role": ATTACK, "content": ATTACK}]}],
        "writings": writings,
        "long": [long],
        "sharp": [a_token_map(["a", "b", "c"], [1000.0, 25.0, 15.0])],
        "strong": [
            a_token_map(["a", "b", "c", "d", "e"], [0.5, 9.0, 2.0, 2.5, 0.003], index=0),
            a_token_map(["a", "b", "c"], [0.1, 0.0, 1.9], index=1),
            a_token_map(["a", "b"], [0.0, 0.0], index=2),
            a_token_map(["a", "b"], [0.3, 0.0], index=3),
        ],
    }
    with pytest.MonkeyPatch.context() as patch:  # the plots are tested elsewhere, and take a second of each page
        patch.setattr(page, "get_plotlyjs", lambda: "const Plotly = { react() {} };")
        return {
            name: write_measure_page(a_measurement(maps), maps, base / f"{name}.html") for name, maps in content.items()
        }


@pytest.fixture
def opened(pages: dict[str, Path], browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens a page by name, wide or narrow, and afterwards asserts that nothing went wrong on it."""
    tabs = []

    def open_page(name: str, *, width: int = 1280, scheme: str = "light", hash: str = "", touch: bool = False) -> Any:
        context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme, has_touch=touch, is_mobile=touch
        )
        tab = context.new_page()
        heard = listened(tab)
        tab.goto(pages[name].as_uri() + hash)
        tab.locator(".responses .t").first.wait_for()
        tabs.append((tab, context, heard, pages[name].as_uri()))
        return tab

    yield open_page
    for tab, context, (said, asked), address in tabs:
        assert said == []
        assert {url.split("#")[0] for url in asked if not url.startswith("data:")} == {address}
        assert tab.evaluate("window.pwned") is None
        context.close()


def token(tab: Any, response: int, position: int) -> Any:
    return tab.locator(f"#response-{response} .t").nth(position)


def order(tab: Any) -> list[int]:
    """The responses that the list shows, by their numbers."""
    return [
        int(name.split("-")[1]) for name in tab.locator(".response[id]").evaluate_all("all => all.map((o) => o.id)")
    ]


def drifts(tab: Any) -> list[str]:
    return tab.locator(".drifted b").all_inner_texts()


def card(tab: Any) -> str:
    return str(tab.locator("#token-card").inner_text())


def focused(tab: Any) -> list[str]:
    """The response and the text of the token that has the focus."""
    return tab.evaluate(
        "[document.activeElement.closest('.response').id, document.activeElement.textContent, "
        "String(document.activeElement.matches(':focus-visible'))]"
    )


# --- the card --------------------------------------------------------------------------------------------


def test_pointing_at_a_token_shows_what_both_models_held_of_it(opened: Callable[..., Any]) -> None:
    tab = opened("plain")
    assert tab.locator("#token-card").is_hidden()
    token(tab, 20, DEEP).hover()
    said = card(tab)
    assert said.startswith("\u2423little")
    assert "7.4\u00d7 more likely than under the reference. Position 3, token 17." in said
    assert re.search(r"Policy\s+50 %\s+Reference\s+6.8 %", said), said
    assert "2.00 nats of KL at this position" in said
    assert re.search(r"else\s+25 %\s+other\s+12.5 %", said), said
    drawn = tab.locator("#token-card .drawn")
    assert drawn.all_inner_texts() == ["\u2423little\n50 %", "\u2423little\n6.8 %"]
    token(tab, 20, 4).hover()
    assert "End of the response".lower() in card(tab).lower()
    tab.mouse.move(5, 5)
    assert tab.locator("#token-card").is_hidden()


def test_a_pressed_token_keeps_its_card_until_escape_or_a_press_elsewhere(opened: Callable[..., Any]) -> None:
    tab = opened("plain")
    token(tab, 29, DEEP).click()
    tab.mouse.move(5, 5)
    token(tab, 29, 0).hover()
    assert "2.90 nats" in card(tab)
    tab.keyboard.press("Escape")
    assert tab.locator("#token-card").is_hidden()
    token(tab, 29, DEEP).click()
    tab.locator("#map-heading").click()
    assert tab.locator("#token-card").is_hidden()
    token(tab, 29, DEEP).click()
    tab.get_by_role("button", name="Close").click()
    assert tab.locator("#token-card").is_hidden()
    for hidden in (False, True):
        token(tab, 29, DEEP).click()
        tab.mouse.move(5, 5)
        assert tab.locator("#token-card").is_hidden() == hidden, "a second press closes it"


def test_the_cards_buttons_walk_from_token_to_token(opened: Callable[..., Any]) -> None:
    tab = opened("plain")
    token(tab, 29, DEEP).click()
    tab.get_by_role("button", name="Next token").click()
    assert tab.locator(".token-piece").inner_text() == "<eos>"
    tab.get_by_role("button", name="Next token").click()
    assert focused(tab)[:2] == ["response-28", "Soak"]
    tab.get_by_role("button", name="Next strongest").click()
    assert focused(tab)[:2] == ["response-28", "little"], "from a weak token to the strongest of its response"


def test_the_card_says_so_where_the_likeliest_tokens_were_not_kept(
    tmp_path: Path, browser: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shading, "MOST_LIKELIEST_BYTES", 5.5 * shading.BYTES_PER_LIKELIEST)
    out = write_measure_page(a_measurement(some_maps()), some_maps(), tmp_path / "page.html")
    tab = browser.new_page(viewport={"width": 1280, "height": 800})
    tab.goto(out.as_uri())
    token(tab, 29, DEEP).hover()
    assert tab.locator(".likely").count() == 6
    token(tab, 29, 0).hover()
    assert "were not kept here; the page has them for the 5 positions with the largest KL" in card(tab)
    tab.close()


def test_on_a_phone_a_tap_opens_a_sheet_that_does_not_cover_the_token(opened: Callable[..., Any]) -> None:
    tab = opened("plain", width=360, touch=True)
    for response in (29, 27):
        token(tab, response, DEEP).scroll_into_view_if_needed()
        token(tab, response, DEEP).tap()
        sheet, box = tab.locator("#token-card").bounding_box(), token(tab, response, DEEP).bounding_box()
        assert (sheet["x"], round(sheet["width"]), round(sheet["y"] + sheet["height"])) == (0, 360, 800)
        assert box["y"] + box["height"] <= sheet["y"]
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    tab.get_by_role("button", name="Next strongest").tap()
    assert focused(tab)[:2] == ["response-26", "little"]
    box = token(tab, 26, DEEP).bounding_box()
    assert 0 <= box["y"] < tab.locator("#token-card").bounding_box()["y"]
    tab.get_by_role("button", name="Close").tap()
    assert tab.locator("#token-card").is_hidden()


def test_the_card_stays_on_the_screen(opened: Callable[..., Any]) -> None:
    tab = opened("long", width=800)
    for place in (0, 5, 11):
        token(tab, 3, place).hover()
        box = tab.locator("#token-card").bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 800


# --- the keyboard ----------------------------------------------------------------------------------------


def test_the_keyboard_walks_the_tokens(opened: Callable[..., Any]) -> None:
    tab = opened("plain")
    tab.locator("#response-29 .asked a").focus()
    tab.keyboard.press("Tab")
    assert focused(tab) == ["response-29", "Soak", "true"]
    assert tab.locator("#token-card").is_visible()
    walked = []
    for key in ("ArrowRight", "ArrowRight", "End", "ArrowRight", "ArrowLeft", "Home", "ArrowDown", "ArrowUp"):
        tab.keyboard.press(key)
        walked.append(tuple(focused(tab)[:2]))
    assert walked == [
        *[("response-29", "it"), ("response-29", ","), ("response-29", "<eos>"), ("response-28", "Soak")],
        *[("response-29", "<eos>"), ("response-29", "Soak"), ("response-28", "Soak"), ("response-29", "Soak")],
    ]
    assert "Soak: 0 nats, about as likely" in tab.locator(".token-live").inner_text()
    outline = "getComputedStyle(document.activeElement).outline"
    assert "3px" in tab.evaluate(outline)
    tab.keyboard.press("Escape")
    assert tab.locator("#token-card").is_hidden()
    tab.keyboard.press("Shift+Tab")
    assert tab.evaluate("document.activeElement.getAttribute('aria-label')") == "Link to response 29"


def jumps(tab: Any, keys: str) -> list[tuple[str, str]]:
    """Where each key leads: the response and the text of the token."""
    walked = []
    for key in keys:
        tab.keyboard.press(key)
        walked.append((focused(tab)[0].removeprefix("response-"), focused(tab)[1]))
    return walked


def test_n_and_p_walk_the_strong_tokens_of_each_response_from_the_strongest_down(opened: Callable[..., Any]) -> None:
    tab = opened("strong")
    token(tab, 0, 4).click()
    assert jumps(tab, "nnn") == [("0", "b"), ("0", "d"), ("0", "c")], "of the same KL the first comes first"
    assert jumps(tab, "nn") == [("1", "c"), ("3", "a")], "the strongest where none is strong; none without a drift"
    assert jumps(tab, "n") == [("3", "a")], "the last stays"
    assert jumps(tab, "ppppp") == [("1", "c"), ("0", "c"), ("0", "d"), ("0", "b"), ("0", "b")]
    token(tab, 0, 0).click()
    assert jumps(tab, "p") == [("0", "b")]
    tab.keyboard.press("Escape")
    tab.get_by_role("button", name="Other").press("Enter")
    token(tab, 0, 4).click()
    assert jumps(tab, "n") == [("0", "a")], "a class that is not chosen is not walked"
    assert "through the underlined ones, the strongest of a response first" in tab.locator(".map-keys").inner_text()


def test_the_keyboard_reaches_responses_that_were_not_shown_yet(opened: Callable[..., Any]) -> None:
    tab = opened("plain")
    assert len(order(tab)) == 10
    token(tab, 20, 4).focus()
    tab.keyboard.press("ArrowRight")
    assert focused(tab)[:2] == ["response-19", "Soak"]
    assert len(order(tab)) == 11


def test_in_a_text_from_right_to_left_the_left_arrow_goes_on(opened: Callable[..., Any]) -> None:
    tab = opened("writings")
    token(tab, 0, 0).focus()
    tab.keyboard.press("ArrowLeft")
    assert focused(tab)[1] == WRITINGS["arabic"][1]
    tab.keyboard.press("ArrowRight")
    assert focused(tab)[1] == WRITINGS["arabic"][0]


def test_only_one_token_of_a_response_is_a_stop_of_the_tab_key(opened: Callable[..., Any]) -> None:
    tab = opened("plain")
    token(tab, 29, 2).click()
    assert tab.locator("#response-29 .t[tabindex='0']").all_inner_texts() == [","]


# --- sort, filter, search --------------------------------------------------------------------------------


def test_responses_are_sorted_by_their_drift(opened: Callable[..., Any]) -> None:
    tab = opened("plain")
    assert order(tab) == list(range(29, 19, -1))
    assert drifts(tab)[0] == "2.90"
    tab.get_by_label("Sort").select_option("Smallest drift")
    assert order(tab)[:3] == [0, 1, 2]
    tab.get_by_label("Sort").select_option("As sampled")
    assert order(tab) == list(range(10))
    assert tab.get_by_label("Sort").locator("option").count() == 3, "no scores, no order by score"


def test_classes_that_are_not_chosen_lose_their_shade_and_their_share_of_the_drift(opened: Callable[..., Any]) -> None:
    tab = opened("plain")
    status = tab.locator(".map-count")
    assert status.inner_text() == "30 responses: 1.59 nats each on average"
    tab.get_by_role("button", name="Other").press("Enter")
    assert tab.get_by_role("button", name="Other").get_attribute("aria-pressed") == "false"
    assert status.inner_text() == "30 responses: 0.15 nats each on average, in the chosen classes"
    assert order(tab)[:3] == [0, 1, 2]
    assert drifts(tab)[:2] == ["0.29", "0.28"]
    assert token(tab, 0, DEEP).get_attribute("class") == "t off"
    assert token(tab, 0, 4).get_attribute("class") == "t eos"
    for name in ("EOS", "First tokens"):
        tab.get_by_role("button", name=name).click()
    assert status.inner_text() == "30 responses: 0 nats each on average, no class is chosen"
    tab.get_by_role("button", name="Other").click()
    assert order(tab)[0] == 29
    assert "strong" in token(tab, 29, DEEP).get_attribute("class")


def test_the_log_ratio_of_a_response_is_that_of_the_chosen_classes_too(opened: Callable[..., Any]) -> None:
    tab = opened("plain")
    beside = tab.locator("#response-20 .drifted")
    assert ("2.09 nats" in beside.inner_text(), "k1 2.59" in beside.inner_text()) == (True, True)
    tab.get_by_role("button", name="Other").click()
    tab.get_by_label("Search in prompts and responses").fill("question 20")
    assert ("0.090 nats" in beside.inner_text(), "k1 0.090" in beside.inner_text()) == (True, True)
    for name in ("EOS", "First tokens"):
        tab.get_by_role("button", name=name).click()
    assert beside.inner_text().split("k1")[1].strip() == "0"
    for name in ("EOS", "First tokens", "Other"):
        tab.get_by_role("button", name=name).click()
    assert "k1 2.59" in beside.inner_text()


def test_the_search_finds_words_of_prompts_and_responses(opened: Callable[..., Any]) -> None:
    tab = opened("plain")
    search = tab.get_by_label("Search in prompts and responses")
    search.fill("QUESTION 2")
    assert tab.locator(".map-count").inner_text().startswith("11 of 30 responses: 2.31 nats")
    assert sorted(order(tab)) == [20, *range(21, 30)]
    search.fill("it, little")
    assert tab.locator(".map-count").inner_text().startswith("30 responses")
    search.fill("nowhere")
    assert tab.locator(".responses").inner_text() == "No response has these words."
    assert tab.locator(".map-count").inner_text().startswith("0 of 30 responses")
    search.fill("")
    assert len(order(tab)) == 10


def test_more_responses_are_shown_when_asked_for(opened: Callable[..., Any]) -> None:
    tab = opened("plain")
    tab.get_by_role("button", name="Show 20 more").click()
    assert len(order(tab)) == 30
    assert tab.locator(".more").is_hidden()
    assert focused(tab)[0] == "response-19"


def test_all_responses_at_a_glance_lead_to_the_one_that_is_pressed(opened: Callable[..., Any]) -> None:
    tab = opened("plain")
    canvas = tab.locator(".glance canvas")
    assert "All 30 responses at a glance" in canvas.get_attribute("aria-label")
    box = canvas.bounding_box()
    canvas.hover(position={"x": box["width"] * 0.7, "y": 2})
    assert "2.90 nats" in card(tab)
    canvas.click(position={"x": box["width"] * 0.7, "y": box["height"] * 25.5 / 30})
    assert focused(tab)[:2] == ["response-4", "little"]
    line = "(c) => Array.from(c.getContext('2d').getImageData(0, 2, c.width, 1).data)"
    inks = canvas.evaluate(line)
    white, ink = (4 * int(len(inks) / 4 * share) for share in (0.1, 0.7))
    assert inks[white : white + 3] == [255, 255, 255]
    red, green, blue = inks[ink : ink + 3]
    assert red > green > blue


# --- links -----------------------------------------------------------------------------------------------


def test_an_address_opens_its_response_wherever_it_is(opened: Callable[..., Any]) -> None:
    tab = opened("plain", hash="#response-3")
    place = "document.querySelector('#response-3').getBoundingClientRect().top"
    eventually(tab, f"{place} > 0 && {place} < 300")
    assert tab.locator(".meant").get_attribute("id") == "response-3"
    assert tab.locator("#response-3 .t").count() == 5
    tab.get_by_label("Search in prompts and responses").fill("question 7")
    tab.get_by_label("Sort").select_option("As sampled")
    tab.evaluate("location.hash = '#response-25'")
    eventually(tab, "document.querySelector('.meant')?.id === 'response-25'")
    assert tab.locator(".map-search").input_value() == ""
    assert order(tab) == list(range(26))


def test_each_response_has_a_link_to_itself(opened: Callable[..., Any]) -> None:
    tab = opened("plain")
    link = tab.get_by_role("link", name="Link to response 28")
    link.click()
    assert tab.evaluate("location.hash") == "#response-28"
    assert tab.locator(".meant").get_attribute("id") == "response-28"


def test_an_address_of_something_else_or_of_nothing_does_no_harm(opened: Callable[..., Any]) -> None:
    for address in ("#response-999", "#positions", "#%E4%B8%AD"):
        tab = opened("plain", hash=address)
        assert tab.locator(".meant").count() == 0


# --- what it looks like ----------------------------------------------------------------------------------

COLOURS = """
(spans) => spans.map((span) => {
  const pen = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const style = getComputedStyle(span);
  return [style.backgroundColor, style.color].map((ink) => {
    pen.fillStyle = ink;
    pen.fillRect(0, 0, 1, 1);
    return Array.from(pen.getImageData(0, 0, 1, 1).data).slice(0, 3);
  });
})
"""


def luminance(rgb: list[int]) -> float:
    parts = [value / 255 for value in rgb]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stays_readable_on_every_shade_and_shades_go_one_way(opened: Callable[..., Any], scheme: str) -> None:
    tab = opened("shades", scheme=scheme)
    inks = tab.locator(".responses .t").evaluate_all(COLOURS)
    levels = []
    for ground, text in inks:
        dim, bright = sorted((luminance(ground), luminance(text)))
        assert (bright + 0.05) / (dim + 0.05) >= 4.5
        levels.append(luminance(ground))
    steps = levels[:10] if scheme == "dark" else [-level for level in levels[:10]]
    assert steps == sorted(steps)
    assert len({tuple(ground) for ground, _ in inks}) == 10, "8, 300 and infinite nats have the full colour"
    strong = tab.locator(".responses .t.strong")
    assert strong.count() == 5, "2, 4, 8, 300 and infinite nats"
    assert "underline" in strong.first.evaluate("(span) => getComputedStyle(span).textDecorationLine")


def test_the_legend_has_the_shades_that_the_tokens_have(opened: Callable[..., Any]) -> None:
    tab = opened("shades")
    ticks = tab.locator(".ticks i").evaluate_all(
        "all => all.map((i) => [i.textContent, i.style.getPropertyValue('--at')])"
    )
    assert [name for name, _ in ticks] == ["0", "0.1", "0.5", "2", "8", "nats"]
    depth = tab.locator(".responses .t").evaluate_all("all => all.map((t) => +t.style.getPropertyValue('--t'))")
    shown = dict(zip([0.0, 0.05, 0.1, 0.3, 0.5, 1.0, 1.7, 2.0, 4.0, 8.0, 300.0, None], depth, strict=True))
    for name, at in ticks[:5]:
        assert shown[float(name)] == pytest.approx(float(at), abs=1e-3)
    assert shown[300.0] == shown[None] == 1


def test_an_infinite_kl_is_called_so(opened: Callable[..., Any]) -> None:
    tab = opened("shades")
    token(tab, 0, 11).hover()
    assert "\u221e nats of KL" in card(tab)


def test_a_chance_too_small_to_be_told_is_below_one_in_a_milliard(opened: Callable[..., Any]) -> None:
    tab = opened("sharp")
    for place, (more, chance) in enumerate(
        [
            ("> 10\u2079\u00d7 more", "< 1 in 10\u2079"),
            ("> 10\u2079\u00d7 more", "< 1 in 10\u2079"),
            ("3,300,000\u00d7 more", "1 in 6,600,000"),
        ]
    ):
        token(tab, 0, place).hover()
        assert more in card(tab)
        assert re.search(rf"Reference\s+{chance}\s", card(tab)), card(tab)


def test_every_writing_survives_and_what_cannot_be_seen_is_marked(opened: Callable[..., Any]) -> None:
    tab = opened("writings")
    for index, pieces in enumerate(WRITINGS.values()):
        text = tab.locator(f"#response-{index} .tokens").evaluate("(part) => part.textContent")
        assert text == "".join(pieces)
        assert tab.locator(f"#response-{index} .t").count() == len(pieces)
    direction = "(part) => getComputedStyle(part).direction"
    assert tab.locator("#response-0 .tokens").evaluate(direction) == "rtl"
    assert tab.locator("#response-1 .tokens").evaluate(direction) == "ltr"
    assert tab.locator("#response-2 .line").count() == 2
    token(tab, 3, 3).hover()
    assert "(part of a character)" in card(tab)


def test_control_characters_are_written_out_and_cannot_turn_the_page(opened: Callable[..., Any]) -> None:
    tab = opened("attacked")
    assert token(tab, 0, 1).inner_text() == "\u2400U+D800U+202E"
    token(tab, 0, 0).hover()
    assert "\u2400U+202E" in card(tab)
    assert ATTACK.replace(" ", "\u2423") in card(tab)


@pytest.mark.parametrize("width", [1280, 360])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["plain", "attacked", "writings", "long", "shades"])
def test_it_is_quiet_offline_and_fits(opened: Callable[..., Any], name: str, scheme: str, width: int) -> None:
    tab = opened(name, width=width, scheme=scheme)
    tab.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    tab.locator(".responses .t").first.hover()
    assert tab.evaluate(TOO_WIDE) == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= width


def test_a_long_response_is_folded_until_it_is_asked_for(opened: Callable[..., Any]) -> None:
    tab = opened("long")
    tokens = tab.locator("#response-3 .tokens")
    assert tokens.bounding_box()["height"] < 360
    tab.get_by_role("button", name="Show all 900 tokens").click()
    assert tokens.bounding_box()["height"] > 600
    assert focused(tab)[1] == "word0"
    tab.keyboard.press("n")
    assert focused(tab)[1] == "word899"
    box = token(tab, 3, 899).bounding_box()
    assert 0 < box["y"] < 800


def test_on_paper_the_responses_are_all_there(opened: Callable[..., Any]) -> None:
    tab = opened("plain", scheme="dark")
    tab.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert tab.locator(".response .t").count() == 5 * COUNT
    tab.emulate_media(media="print")
    assert tab.locator(".map-tools").is_hidden()
    ground, _ = tab.locator(".responses .t").evaluate_all(COLOURS)[0]
    assert ground == [255, 255, 255]


# --- large pages -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "length", "kept"), [(500, 64, 500), (700, 16, 500)])
def test_a_page_of_five_hundred_responses_is_small_and_says_what_it_left_out(
    tmp_path: Path, browser: Any, count: int, length: int, kept: int
) -> None:
    maps = many_token_maps(count, length)
    out = write_measure_page(a_measurement(maps), maps, tmp_path / "page.html")
    assert out.stat().st_size < 15e6
    tab = browser.new_page(viewport={"width": 1280, "height": 800})
    tab.goto(out.as_uri())
    said = tab.locator(".map-count").inner_text()
    assert said.startswith("500 responses: " if count == kept else f"{kept} of {count} responses, the first ones: ")
    assert tab.locator(".response").count() == 10
    inks = tab.locator(".glance canvas").evaluate(
        "(c) => new Set(new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer)).size"
    )
    assert 20 < inks <= 33 + 1, "a cell has the shade of the legend, not a blend with its neighbour's"
    tab.goto(out.as_uri() + "#response-499")
    eventually(tab, "document.querySelector('#response-499 .t') !== null")
    tab.close()


@pytest.mark.slow
@pytest.mark.parametrize("length", [256, 512])
def test_a_page_of_long_responses_stays_below_fifteen_megabytes(tmp_path: Path, length: int) -> None:
    maps = many_token_maps(500, length, vocabulary=100_000)
    assert write_measure_page(a_measurement(maps), maps, tmp_path / "page.html").stat().st_size < 15e6
