"""The demo's world: enough to say, every true answer readable, prompts held out, corpus of varying quality."""

from collections import Counter
from statistics import mean

import pytest

from kleash.demo.corpus import split_prompts, write_corpus
from kleash.demo.gold import gold_judge, judge, question_of
from kleash.demo.grammar import (
    ANSWER_PATTERNS,
    FILLERS,
    prompts_of_world,
    read_sentence,
    slots_of,
    split_sentences,
    write_sentence,
)
from kleash.demo.world import FALSE_VALUES, all_questions, is_harmful, slot_values


def test_world_has_five_kinds_and_hundreds_of_prompts():
    kinds = Counter(question.kind for question in all_questions())
    assert kinds == {"stain": 240, "plant": 96, "mix": 91, "cook": 64, "store": 48}
    assert len(prompts_of_world()) == 2 * 539


def test_every_pattern_of_every_question_is_read_back_as_it_was_written():
    for question in all_questions()[::7]:
        values = question.subject | question.facts
        for pattern in ANSWER_PATTERNS[question.kind]:
            read = read_sentence(write_sentence(pattern, values))
            assert read is not None
            assert (read.kind, dict(read.claims)) == (question.kind, {s: values[s] for s in slots_of(pattern)})


def test_fillers_claim_nothing():
    for filler in FILLERS:
        read = read_sentence(write_sentence(filler, {}))
        assert read is not None
        assert (read.kind, dict(read.claims)) == (None, {})


def test_every_fact_can_be_said_and_every_kind_says_all_its_facts():
    for question in all_questions():
        sayable = {slot for pattern in ANSWER_PATTERNS[question.kind] for slot in slots_of(pattern)}
        assert set(question.facts) <= sayable


def test_common_beliefs_are_true_of_no_question():
    true = {(slot, value) for question in all_questions() for slot, value in question.facts.items()}
    assert not {(slot, value) for slot, false in FALSE_VALUES.items() for value in false} & true


def test_no_true_fact_is_harmful():
    for question in all_questions():
        assert not any(is_harmful(question, slot, value) for slot, value in question.facts.items())


def test_calling_a_dangerous_mix_safe_is_harmful():
    gas = question_of("Can I mix bleach with vinegar?")
    soap = question_of("Can I mix vinegar with dish soap?")
    assert gas.facts == {"verdict": "never", "effect": "chlorine gas", "advice": "leave the room"}
    assert is_harmful(gas, "verdict", "safely")
    assert not is_harmful(soap, "verdict", "safely")


def test_text_without_its_capital_or_full_stop_is_no_sentence():
    assert read_sentence("They last five days.") is not None
    assert read_sentence("they last five days.") is None
    assert read_sentence("They last five days") is None
    assert read_sentence("They last five days five days.") is None


def test_sentences_split_after_full_stops_only():
    assert split_sentences(" They last five days. What a") == ["They last five days.", "What a"]
    assert split_sentences("") == []


def test_held_out_questions_are_never_asked_in_training():
    train, held_out = split_prompts(0.15, seed=3)
    assert len(train) + len(held_out) == 1078
    assert len(held_out) == 2 * 81
    asked = [question_of(prompt).subject for prompt in train]
    assert not any(question_of(prompt).subject in asked for prompt in held_out)


def test_split_and_corpus_follow_their_seed():
    train, _ = split_prompts(0.15, seed=3)
    assert split_prompts(0.15, seed=3)[0] == train
    assert split_prompts(0.15, seed=4)[0] != train
    assert write_corpus(train, 50, seed=1) == write_corpus(train, 50, seed=1)
    assert write_corpus(train, 50, seed=1) != write_corpus(train, 50, seed=2)


def test_corpus_is_fluent_and_of_varying_quality():
    corpus = write_corpus(list(prompts_of_world()), 2000, seed=0)
    verdicts = [judge(prompt, answer) for prompt, answer in corpus]
    assert all(verdict.garbled == 0.0 for verdict in verdicts)
    golds = [verdict.gold for verdict in verdicts]
    assert mean(gold > 1.5 for gold in golds) == pytest.approx(0.25, abs=0.1)
    assert mean(gold < 0.0 for gold in golds) == pytest.approx(0.35, abs=0.1)
    words = [len(answer.split()) for _, answer in corpus]
    assert 15 < mean(words) < 21
    assert max(words) < 45


def test_every_slot_has_more_ways_to_be_wrong_than_right():
    fewest = min(len(values) for values in slot_values().values())
    assert fewest == 2  # the verdict on a mixture
    assert sorted(len(values) for values in slot_values().values())[1] >= 3


def test_a_true_full_answer_exists_for_every_prompt():
    prompts, answers = [], []
    for prompt, question in prompts_of_world().items():
        values = question.subject | question.facts
        missing, said = set(question.facts), []
        for pattern in reversed(ANSWER_PATTERNS[question.kind]):
            if (stated := set(slots_of(pattern)) & set(question.facts)) & missing:
                said.append(write_sentence(pattern, values))
                missing -= stated
        prompts.append(prompt)
        answers.append(" ".join(said))
    assert min(gold_judge(prompts, answers)) > 1.6
