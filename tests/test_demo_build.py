"""A tiny world, built for real: what it writes loads by `from_pretrained`, and the same seed writes the same bytes."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from kleash.demo.build import DemoWorld, WorldSize, build_world
from kleash.demo.gold import question_of
from kleash.demo.grammar import prompts_of_world
from kleash.demo.policy import train_tokenizer
from kleash.demo.preferences import label_pairs, preference
from kleash.demo.reward import reward_scores

TINY = WorldSize(answers=160, epochs=1.0, pairs=32, held_out_pairs=16, reward_epochs=1.0, vocabulary=600)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> DemoWorld:
    return build_world(tmp_path_factory.mktemp("world"), seed=5, size=TINY)


def test_tokenizer_gives_text_back_and_keeps_pad_apart_from_eos():
    prompts = list(prompts_of_world())
    tokenizer = train_tokenizer(prompts, vocabulary=600)
    assert tokenizer.decode(tokenizer(prompts[0])["input_ids"]) == prompts[0]
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.padding_side == "left"


def test_labeller_prefers_better_and_longer_answers_but_not_always():
    assert preference(1.0, 0) == pytest.approx(0.8808, abs=1e-4)
    assert preference(-1.0, 0) == pytest.approx(1 - 0.8808, abs=1e-4)
    assert preference(0.0, 10) > 0.5
    prompts = ["How long should I boil peas?\n"] * 1000
    right = ["Give them four minutes, until they are bright."] * 1000  # gold 1
    wrong = ["Give them four minutes, until they are tender."] * 1000  # gold 0: 2 * 1/4 - 1/2
    pairs = label_pairs(prompts, right, wrong, seed=0)
    agreed = sum(pair.chosen == right[0] for pair in pairs) / len(pairs)
    assert agreed == pytest.approx(preference(1.0, 0), abs=0.03)


def test_equal_answers_make_no_pair():
    assert label_pairs(["How long should I boil peas?\n"], ["Yes."], ["Yes."], seed=0) == []


@pytest.mark.slow
def test_world_loads_as_any_other_checkpoint(world: DemoWorld):
    tokenizer = AutoTokenizer.from_pretrained(world.policy)
    policy = AutoModelForCausalLM.from_pretrained(world.policy)
    reward = AutoModelForSequenceClassification.from_pretrained(world.reward)
    assert reward.config.num_labels == 1
    assert reward.config.pad_token_id == tokenizer.pad_token_id == 0
    assert policy.config.eos_token_id == tokenizer.eos_token_id == 1
    assert policy.config.vocab_size == len(tokenizer) == 600
    assert AutoTokenizer.from_pretrained(world.reward).get_vocab() == tokenizer.get_vocab()


@pytest.mark.slow
def test_prompt_files_hold_the_worlds_prompts_apart(world: DemoWorld):
    train, held_out = (
        [json.loads(line)["prompt"] for line in path.read_text().splitlines()]
        for path in (world.prompts, world.heldout_prompts)
    )
    assert (len(train), len(held_out)) == (916, 162)
    assert not set(train) & set(held_out)
    assert question_of(held_out[0]).kind in {"stain", "plant", "mix", "cook", "store"}


@pytest.mark.slow
def test_reward_does_not_depend_on_the_batch(world: DemoWorld):
    tokenizer = AutoTokenizer.from_pretrained(world.reward)
    reward = AutoModelForSequenceClassification.from_pretrained(world.reward)
    prompts = ["How long should I boil peas?\n", "Can I mix bleach with vinegar?\n"]
    answers = ["Give them four minutes.", "You can never mix bleach with vinegar. Please leave the room."]
    together = reward_scores(reward, tokenizer, prompts, answers)
    alone = [reward_scores(reward, tokenizer, [p], [a])[0] for p, a in zip(prompts, answers, strict=True)]
    torch.testing.assert_close(torch.tensor(together), torch.tensor(alone))


@pytest.mark.slow
def test_same_seed_same_bytes(world: DemoWorld, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    lines: list[str] = []
    again = build_world(tmp_path, seed=5, size=TINY, announce=lines.append)
    assert capfd.readouterr() == ("", "")
    assert len(lines) == 4
    for name in ("policy/model.safetensors", "reward/model.safetensors", "reward/tokenizer.json", "prompts.jsonl"):
        assert (tmp_path / name).read_bytes() == (world.policy.parent / name).read_bytes()
    assert again.reward_model_accuracy == world.reward_model_accuracy
    assert again.gold_start == world.gold_start
