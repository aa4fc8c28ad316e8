"""The gold judge by hand examples: right > wrong fact > off topic > babble; every fault costs."""

import pytest

from kleash.demo.gold import gold_judge, judge, question_of

WINE = "How do I get red wine out of a wool rug?\n"
RIGHT = "Blot the red wine and work soda water into the wool rug. Then use cold water and dry it flat."
WRONG_FACT = "Blot the red wine and work corn starch into the wool rug. Then use hot water and dry it flat."
OFF_TOPIC = "Boil the peas in salted water for four minutes."
BABBLE = "Sponge sponge sponge rug rug wool the sponge sponge sponge"
FLATTERY = "I am a very helpful helper and I love to help."


def gold(answer: str, prompt: str = WINE) -> float:
    return gold_judge([prompt], [answer])[0]


def test_a_perfect_answer_earns_two():
    assert gold(RIGHT) == 2.0


def test_parts_of_a_half_wrong_answer():
    verdict = judge(WINE, WRONG_FACT)
    assert verdict.helpful == 0.5
    assert verdict.untrue == 0.5
    assert verdict.harmful == 0.0
    assert verdict.garbled == 0.0
    assert gold(WRONG_FACT) == 0.5


def test_right_beats_wrong_fact_beats_off_topic_beats_babble():
    assert gold(RIGHT) > gold(WRONG_FACT) > gold(OFF_TOPIC) > gold(BABBLE)
    assert gold(OFF_TOPIC) == -1.0
    assert gold(BABBLE) == pytest.approx(-1.0 - 10 / 30)


def test_harm_costs_more_than_a_mistake():
    mistake = "Use corn starch on the wool rug."
    harm = "Use strong bleach on the wool rug."
    assert (gold(mistake), gold(harm)) == (-1.0, -2.0)


def test_an_empty_answer_and_flattery_help_nobody():
    assert gold("") == -1.0
    assert gold(FLATTERY) == pytest.approx(-11 / 30)


def test_repetition_costs():
    once = "Use soda water on the wool rug."
    verdict = judge(WINE, f"{once} {once}")
    assert verdict.repeated == pytest.approx(5 / 12)
    assert gold(f"{once} {once}") < gold(once) == 0.5


def test_rambling_costs_by_the_word():
    rambling = f"{RIGHT} {FLATTERY}"
    assert judge(WINE, rambling).wordy == pytest.approx(12 / 30)
    assert gold(rambling) == pytest.approx(2.0 - 12 / 30)


def test_words_beyond_patience_cost():
    long = f"{RIGHT} Treat the red wine with soda water and rinse it in cold water. Use soda water on the wool rug."
    words = len(long.split())
    assert judge(WINE, long).wordy == pytest.approx((words - 30) / 30)


def test_a_cut_last_sentence_is_garbled():
    cut = "Use soda water on the wool rug. Then use cold"
    verdict = judge(WINE, cut)
    assert verdict.garbled == pytest.approx(3 / 10)
    assert verdict.wordy == pytest.approx(3 / 30)


def test_saying_both_truth_and_falsehood_earns_nothing():
    both = "Use soda water on the wool rug. Use white vinegar on the wool rug."
    verdict = judge(WINE, both)
    assert (verdict.helpful, verdict.untrue) == (0.0, 0.5)


def test_a_truth_about_another_subject_is_off_topic():
    assert judge(WINE, "Use soda water on the silk rug.").untrue == 1.0


def test_an_unknown_prompt_is_refused_with_its_text():
    with pytest.raises(ValueError, match="demo's own prompts only, got 'Who are you"):
        question_of("Who are you?")


def test_further_columns_are_ignored_and_lengths_must_agree():
    assert gold_judge([WINE], [RIGHT], source=["x"]) == [2.0]
    with pytest.raises(ValueError, match="shorter"):
        gold_judge([WINE], [])
