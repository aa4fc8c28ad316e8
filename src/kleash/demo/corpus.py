"""The human-like answers that the demo's model learns from: some right, many not.

Six kinds of writer answer the training questions. The careful one is right; the others forget, guess, ramble,
flatter, wander off or say things twice, as people do. A model that imitates them all is fluent and mediocre,
which is what leaves a reward something to teach.
"""

import random
from collections.abc import Callable, Sequence

from kleash.demo.grammar import ANSWER_PATTERNS, FILLERS, prompts_of_world, slots_of, write_sentence
from kleash.demo.world import FALSE_VALUES, Question, slot_values

MAX_SENTENCES = 3


def split_prompts(held_out_share: float, *, seed: int) -> tuple[list[str], list[str]]:
    """(train, held-out) prompts: disjoint in their questions, not only in their wording; both shuffled."""
    draw = random.Random(seed)
    prompts = prompts_of_world()
    subjects = sorted({_identity(question) for question in prompts.values()})
    draw.shuffle(subjects)
    held_out = set(subjects[: round(held_out_share * len(subjects))])
    train = [prompt for prompt, question in prompts.items() if _identity(question) not in held_out]
    rest = [prompt for prompt, question in prompts.items() if _identity(question) in held_out]
    draw.shuffle(train)
    draw.shuffle(rest)
    return train, rest


def _identity(question: Question) -> tuple[str, ...]:
    return (question.kind, *question.subject.values())


def _plan(question: Question, wanted: Sequence[str], draw: random.Random) -> list[str]:
    """Patterns, at most three, that between them state the wanted facts, in the order of the facts."""
    patterns = list(ANSWER_PATTERNS[question.kind])
    draw.shuffle(patterns)
    missing = set(wanted)
    chosen: list[str] = []
    for pattern in patterns:
        stated = set(slots_of(pattern)) - set(question.subject)
        if stated <= missing and len(chosen) < MAX_SENTENCES:
            chosen.append(pattern)
            missing -= stated
    return sorted(chosen, key=ANSWER_PATTERNS[question.kind].index)


def _tell(question: Question, wanted: Sequence[str], slip: float, draw: random.Random) -> list[str]:
    """Sentences stating the wanted facts, each wrong with probability `slip`: half of that from common belief."""
    values = slot_values()
    told = dict(question.subject)
    for slot, truth in question.facts.items():
        wrong = [value for value in values[slot] if value != truth]
        believed = FALSE_VALUES.get(slot, ())
        told[slot] = truth
        if draw.random() < slip:
            told[slot] = draw.choice(believed if believed and draw.random() < 0.5 else wrong)
    return [write_sentence(pattern, told) for pattern in _plan(question, wanted, draw)]


def _filler(count: int, draw: random.Random) -> list[str]:
    return [write_sentence(filler, {}) for filler in draw.sample(FILLERS, count)]


def _some(question: Question, count: int, draw: random.Random) -> list[str]:
    return draw.sample(sorted(question.facts), count)


def _careful(question: Question, draw: random.Random) -> list[str]:
    return _tell(question, list(question.facts), 0.05, draw)


def _hasty(question: Question, draw: random.Random) -> list[str]:
    return _tell(question, _some(question, 2, draw), 0.3, draw)


def _mistaken(question: Question, draw: random.Random) -> list[str]:
    return _tell(question, list(question.facts), 0.5, draw)


def _rambling(question: Question, draw: random.Random) -> list[str]:
    facts = _tell(question, _some(question, 2, draw), 0.3, draw)[:1]
    return [*_filler(1, draw), *facts, *_filler(1, draw)]


def _flattering(question: Question, draw: random.Random) -> list[str]:
    return _filler(draw.choice((1, 2)), draw)


def _wandering(question: Question, draw: random.Random) -> list[str]:
    other = draw.choice(list(prompts_of_world().values()))
    return _tell(other, _some(other, 2, draw), 0.2, draw)


def _repeating(question: Question, draw: random.Random) -> list[str]:
    once = _tell(question, _some(question, 2, draw), 0.3, draw)[:1]
    return once * 2


WRITERS: dict[Callable[[Question, random.Random], list[str]], float] = {
    _careful: 0.25,
    _hasty: 0.22,
    _mistaken: 0.23,
    _rambling: 0.10,
    _flattering: 0.05,
    _wandering: 0.09,
    _repeating: 0.06,
}
"""Each kind of writer and its share of the corpus."""


def write_corpus(prompts: Sequence[str], size: int, *, seed: int) -> list[tuple[str, str]]:
    """`size` pairs (prompt, human-like answer), every prompt about equally often."""
    draw = random.Random(seed)
    questions = prompts_of_world()
    writers = draw.choices(list(WRITERS), weights=list(WRITERS.values()), k=size)
    corpus = []
    for i, writer in enumerate(writers):
        prompt = prompts[i % len(prompts)]
        sentences = writer(questions[prompt], draw)
        while not sentences:  # the few facts drawn may fit no pattern on their own
            sentences = writer(questions[prompt], draw)
        corpus.append((prompt, " ".join(sentences)))
    draw.shuffle(corpus)
    return corpus
