"""The page of a measurement: its sentence, its tiles, its tables, its plots, and that it is safe to open."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from browsing import eventually, listened, require_quiet_offline_and_narrow
from mapped import a_measurement, a_token_map, around

from kleash import measure_page
from kleash.alarms import KL
from kleash.best_of_n import best_of_n_kl_bound
from kleash.errors import InputError
from kleash.measure_page import as_choice, tiles, verdict_text, write_measure_page

ATTACK = "</script><script>window.pwned=1</script><img src=x onerror='window.pwned=1'>"


def some_maps() -> list[dict[str, Any]]:
    return [
        a_token_map(["Soak", " it", "<eos>"], [1.0, index / 4, 0.5], index=index, prompt=f"Question {index}?")
        for index in range(20)
    ]


def plain(text: str) -> str:
    return text.replace("\u00a0", " ").replace("\u00b1", "+-")


# --- in words --------------------------------------------------------------------------------------------


def test_the_verdict_says_how_far_the_policy_went_and_beside_what() -> None:
    measured = a_measurement(some_maps())
    assert plain(verdict_text(measured)) == (
        "The policy has drifted 3.88 +- 0.40 nats per response from the reference, "
        "as far as the best of 87 to 200 of the reference's responses could be."
    )
    still = measured | {KL: around(0.0, 0.0, 20)}
    assert verdict_text(still) == "The policy has not moved: its drift from the reference is exactly 0."
    endless = measured | {KL: {"mean": None, "low": None, "high": None, "n": 20}}
    assert verdict_text(endless).startswith("The drift is not finite")
    alone = measured | {KL: around(21.0, None, 1)}
    assert verdict_text(alone) == "The one response that was measured lies 21.0 nats from the reference."


def test_a_drift_is_beside_a_best_of_n_only_as_surely_as_its_interval_is_narrow() -> None:
    million = best_of_n_kl_bound(10**6)
    assert as_choice(million + 0.1, 36.0) == "farther than the best of a million of the reference's responses could be"
    assert as_choice(6.0, 36.0) == "as far as the best of 1,100 of the reference's responses could be or farther"
    assert as_choice(-0.5, 0.01) == "hardly at all"
    assert as_choice(0.01, 0.5).startswith("at most as far as the best of ")
    assert as_choice(0.01, 36.0) == "an interval too wide to say how far"
    wide = a_measurement(some_maps()) | {KL: around(21.0, 15.0, 9)}
    assert "million" not in verdict_text(wide)


@pytest.mark.parametrize("changes", [{"written_by_policy": False}, {"writer_doubt": "Not its own."}])
def test_the_verdict_on_given_responses_claims_no_drift_of_the_policy(changes: dict[str, Any]) -> None:
    said = plain(verdict_text(a_measurement(some_maps(), **changes)))
    assert said == (
        "Along the given responses the policy parts from the reference by 3.88 +- 0.40 nats each, "
        "1.292 +- 0.020 nats per token."
    )


@pytest.mark.parametrize("n", [2, 7, 64, 990_000])
def test_the_best_of_n_that_is_named_is_the_first_that_could_be_as_far(n: int) -> None:
    said = f"{n:,}"
    kl = best_of_n_kl_bound(n)
    assert f"best of {said} of the" in as_choice(kl, kl)
    assert f"best of {said} of the" in as_choice(kl - 1e-9, kl - 1e-9)


def test_the_tiles_have_each_figure_with_its_interval_and_what_it_is() -> None:
    found = {name: (plain(value), note) for name, value, note in tiles(a_measurement(some_maps()))}
    assert found["Drift, exact"] == ("3.88 +- 0.40", "nats per response, KL(policy \u2016 reference)")
    assert found["Drift, k1"] == (
        "4.4 +- 1.6",
        "the one-token estimate; needs 3,400 responses, not 20, for the exact one's interval",
    )
    for need, said in ((20.4, "needs about as many responses for"), (12.0, "needs only 12 responses, not 20, for")):
        measured = a_measurement(some_maps(), k1_responses_for_same_interval=need)
        assert tiles(measured)[1][2] == f"the one-token estimate; {said} the exact one's interval"
    assert found["Drift per token"][0] == "1.292 +- 0.020"
    assert found["Entropy"][0] == "0.50 +- 0.10"
    assert plain(found["Entropy"][1]) == "nats per token; the reference there 1.50 +- 0.10"
    assert found["Response length"] == ("3.0 +- 1.0", "tokens; 75% end by themselves")


def test_the_log_ratio_of_given_texts_is_called_no_estimate() -> None:
    found = {name: note for name, _, note in tiles(a_measurement(some_maps(), written_by_policy=False))}
    assert "no estimate of the KL" in found["Log ratio of the texts"]
    assert "Drift, k1" not in found
    assert "summed along the texts" in found["Drift, exact"]


@pytest.mark.parametrize("name", ["interval_doubt", "sampler_doubt", "writer_doubt"])
def test_what_there_is_to_doubt_is_said_beside_what_the_interval_covers(name: str) -> None:
    page = measure_page.page(a_measurement(some_maps(), **{name: "Skewness 3 < 4."}), [])
    assert "Skewness 3 &lt; 4." in page.split("How sure the number is")[1].split("plots")[0]
    assert "Skewness" not in measure_page.page(a_measurement(some_maps()), [])


# --- tables and plots ------------------------------------------------------------------------------------


def test_prompts_are_listed_from_the_largest_drift_down() -> None:
    rows = measure_page.prompt_rows(a_measurement(some_maps()))
    assert [row["prompt"] for row in rows[:2]] == ["Question 19?", "Question 18?"]
    assert (rows[0]["kl"].mean, rows[0]["reach"], rows[-1]["reach"]) == (6.25, 1.0, 0.24)
    endless = {"prompt": [{"role": "user", "content": "hi"}], "responses": 1, KL: {"mean": None}}
    first = measure_page.prompt_rows(a_measurement(some_maps(), by_prompt=[endless, *rows]))[0]
    assert (first["prompt"], first["kl"], first["reach"]) == ("user: hi", None, 1.0)


@pytest.mark.parametrize("width", [1, 2, 7])
def test_the_bars_add_up_to_the_drift_and_have_the_mean_of_the_tokens_in_them(width: int) -> None:
    maps = [a_token_map(["a"] * length, [float(place) for place in range(length)]) for length in (6, 3, 2)]
    bars = measure_page.position_bars(a_measurement(maps), width)
    for first, last, per_token in zip(bars["first"], bars["last"], bars["per_token"], strict=True):
        there = [kl for row in maps for place, kl in enumerate(row["kl_policy_ref"]) if first <= place <= last]
        assert per_token == pytest.approx(sum(there) / len(there))
    assert math.fsum(bars["kl"]) == pytest.approx(sum(row[KL] for row in maps) / 3)
    if width == 1:
        assert bars["low"] == pytest.approx([0.5 * kl for kl in bars["kl"]])
        assert bars["high"] == pytest.approx([1.5 * kl for kl in bars["kl"]])
    else:
        assert set(bars["low"]) == set(bars["high"]) == {None}


def test_the_narrowing_has_both_figures_and_gaps_for_what_is_missing() -> None:
    measured = a_measurement(some_maps())
    measured["convergence"][0][f"{KL}_k1"]["low"] = None
    drawn = measure_page.narrowing(measured)
    assert drawn["n"] == [8, 16, 32]
    assert drawn["exact_low"] == [4.0 - 4 / n for n in (8, 16, 32)]
    assert drawn["other_low"] == [None, 4.1 - 9 / 16, 4.1 - 9 / 32]


def test_how_it_was_measured_is_told_in_full() -> None:
    told = dict(measure_page.settings(a_measurement(some_maps())))
    assert (told["Policy"], told["Temperature"], told["Seed"]) == ("models/policy", "1.0", "3")
    assert told["Responses"] == "written by the policy"
    given = dict(measure_page.settings(a_measurement(some_maps(), written_by_policy=False)))
    assert given["Responses"] == "given.jsonl"


def test_a_directory_in_the_way_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a directory"):
        write_measure_page(a_measurement(some_maps()), [], tmp_path)


# --- in a browser ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("measure")
    maps = some_maps()
    vile = a_measurement([row | {"prompt": ATTACK, "pieces": [ATTACK] * 3} for row in maps])
    vile |= dict.fromkeys(("policy", "reference", "prompts", "device"), ATTACK)
    vile["top_tokens"][0] |= {"token": ATTACK, "context": ATTACK}
    vile["drifted_tokens"][0]["token"] = ATTACK
    given = [row | {"log_ratio_per_sequence": -0.5} for row in maps]
    for row in given:
        del row[f"{KL}_k1"]
    one = maps[:1]
    alone = a_measurement(one, convergence=[{"n": 1, KL: around(1.5, None, 1), f"{KL}_k1": around(2.0, None, 1)}])
    still = [a_token_map(["Soak", "<eos>"], [0.0, 0.0], index=index, prompt=str(index)) for index in range(3)]
    return {
        "measured": write_measure_page(a_measurement(maps), maps, base / "measured.html"),
        "given": write_measure_page(a_measurement(maps, written_by_policy=False), given, base / "given.html"),
        "attacked": write_measure_page(vile, maps, base / "attacked.html"),
        "alone": write_measure_page(alone, one, base / "alone.html"),
        "unmapped": write_measure_page(a_measurement(maps), [], base / "unmapped.html"),
        "still": write_measure_page(a_measurement(still, drifted_tokens=[], top_tokens=[]), still, base / "still.html"),
    }


def test_texts_of_models_and_users_cannot_become_markup(pages: dict[str, Path]) -> None:
    page = pages["attacked"].read_text(encoding="utf-8")
    assert ATTACK not in page
    assert "<script>window" not in page
    assert "<img" not in page.split("<noscript>")[0]
    assert "<" not in page.split('id="data">', 1)[1].split("</script>", 1)[0]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["measured", "given", "attacked", "alone", "unmapped", "still"])
def test_a_browser_shows_it_quietly_offline_and_within_a_phone(
    pages: dict[str, Path], browser: Any, name: str, scheme: str
) -> None:
    tab = browser.new_page(viewport={"width": 360, "height": 740}, color_scheme=scheme)
    heard = listened(tab)
    tab.goto(pages[name].as_uri())
    eventually(tab, "document.querySelectorAll('.main-svg').length >= 2")
    tab.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    require_quiet_offline_and_narrow(tab, heard, pages[name].as_uri())
    tab.close()


@pytest.mark.parametrize("converging", [[], [{"n": 2, KL: around(4.0, 1.0, 2), f"{KL}_k1": around(4.1, 1.0, 2)}]])
def test_of_one_response_there_is_its_map_and_no_plot_of_how_the_estimate_narrows(
    tmp_path: Path, browser: Any, converging: list[dict[str, Any]]
) -> None:
    maps = some_maps()[7:8]
    measured = a_measurement(maps, **{KL: around(3.25, None, 1)}, convergence=converging)
    tab = browser.new_page(viewport={"width": 360, "height": 740})
    heard = listened(tab)
    out = write_measure_page(measured, maps, tmp_path / "page.html")
    tab.goto(out.as_uri())
    tab.locator("#response-7 .t").nth(1).click()
    assert "1.75 nats of KL" in tab.locator("#token-card").inner_text()
    assert tab.locator("#narrowing").is_visible() == bool(converging)
    assert tab.locator("#positions .bars path").count() >= 3
    assert "One response has no interval" in tab.locator("main").inner_text()
    require_quiet_offline_and_narrow(tab, heard, out.as_uri())
    tab.close()


def test_the_estimate_narrows_and_every_position_has_its_bar(pages: dict[str, Path], browser: Any) -> None:
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.goto(pages["measured"].as_uri())
    label = tab.locator("#narrowing .canvas").get_attribute("aria-label")
    assert "exact from 4 to 4" in label
    assert "k1 from 4.1 to 4.1" in label
    assert tab.locator("#narrowing .scatterlayer path.js-fill").count() == 2
    assert tab.locator("#positions .bars path").count() == 3 + 3, "bars and their whiskers"
    tab.goto(pages["given"].as_uri())
    assert "log ratio from 4.1" in tab.locator("#narrowing .canvas").get_attribute("aria-label")
    assert "no estimate of the KL" in tab.locator("#narrowing figcaption").inner_text()
    assert "log ratio \u22120.50" in tab.locator("#response-13 .drifted").inner_text()
    assert "k1" not in tab.locator("main").inner_text()
    tab.close()


def a_convergence(last: int) -> list[dict[str, Any]]:
    counts = sorted({max(2, round(2 * (last / 2) ** (step / 39))) for step in range(40)})
    return [{"n": n, KL: around(4.0, 4 / n, n), f"{KL}_k1": around(4.1, 9 / n, n)} for n in counts]


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("last", [2, 7, 64, 648, 65536])
def test_the_numbers_of_responses_have_room_and_lie_level(tmp_path: Path, browser: Any, width: int, last: int) -> None:
    measured = a_measurement(some_maps(), convergence=a_convergence(last))
    tab = browser.new_page(viewport={"width": width, "height": 900})
    tab.goto(write_measure_page(measured, [], tmp_path / "page.html").as_uri())
    eventually(tab, "document.querySelectorAll('#narrowing .xtick text').length > 0")
    named = tab.locator("#narrowing .xtick text").all()
    assert {"2", f"{last:,}"} <= {text.text_content() for text in named}
    assert len(named) >= min(last, 5) - 2
    boxes = sorted((text.bounding_box() for text in named), key=lambda box: box["x"])
    assert all(box["height"] < 20 for box in boxes)
    assert all(left["x"] + left["width"] + 4 <= right["x"] for left, right in pairwise(boxes))
    tab.close()


def test_a_point_says_after_how_many_responses_it_is(tmp_path: Path, browser: Any) -> None:
    measured = a_measurement(some_maps(), convergence=a_convergence(65536))
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.goto(write_measure_page(measured, [], tmp_path / "page.html").as_uri())
    point = tab.locator("#narrowing .points path").nth(-3)
    point.scroll_into_view_if_needed()
    box = point.bounding_box()
    tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + 40)
    eventually(tab, "document.querySelector('#narrowing .hoverlayer text')")
    assert tab.locator("#narrowing .hoverlayer text").first.text_content() == "38,452 responses"
    tab.close()


def test_the_page_says_where_it_drifts_and_folds_long_lists(pages: dict[str, Path], browser: Any) -> None:
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.goto(pages["measured"].as_uri())
    text = tab.locator("main").inner_text()
    assert "Half of the drift lies in the first 2 of 3 positions." in text
    assert "5.0\u00d7 more likely" in text
    fold = tab.locator("summary", has_text="12 more prompts")
    fold.press("Enter")
    assert tab.get_by_text("Question 0?", exact=True).last.is_visible()
    assert tab.locator(".settings").inner_text().count("models/") == 2
    tab.goto(pages["unmapped"].as_uri())
    assert "Token by token" not in tab.locator("main").inner_text()
    tab.close()


def test_what_most_responses_begin_with_is_said_above_them(pages: dict[str, Path], browser: Any) -> None:
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.goto(pages["measured"].as_uri())
    assert tab.locator(".map-same").inner_text() == (
        "20 of 20 responses are the same text, to 20 different prompts: Soak it<eos>"
    )
    tab.goto(pages["alone"].as_uri())
    assert tab.locator(".map-same").is_hidden()
    tab.close()


def test_the_data_of_a_page_is_json(pages: dict[str, Path]) -> None:
    page = pages["measured"].read_text(encoding="utf-8")
    data = json.loads(page.split('id="data">', 1)[1].split("</script>", 1)[0])
    assert len(data["maps"][0]["responses"]) == 20


def test_the_page_says_of_how_many_responses_it_shows_the_first(tmp_path: Path, browser: Any) -> None:
    maps = some_maps()
    out = write_measure_page(a_measurement(maps, responses_count=1648), maps, tmp_path / "page.html")
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.goto(out.as_uri())
    assert tab.locator(".map-count").inner_text().startswith("20 of 1,648 responses, the first ones: 3.88 nats")
    tab.close()
