"""The self-test: every fault is planted once and named by its check, all other checks hold, and a sound run has none.

Faults are planted as they happen, in files and in run.yaml. Where kleash makes one impossible from outside, the part
that makes it so is taken out, so that the check has something to find.
"""

import json
import math
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from tiny import LIVELY, PROMPTS, WORDS, save_tiny_world, tiny_policy, tiny_reward_model, tiny_run, tiny_tokenizer, tree
from torch import nn
from transformers import GenerationConfig, RwkvConfig, RwkvForCausalLM

import kleash
from kleash.cli import main
from kleash.config import config_from
from kleash.models import causal_model, fingerprint, load_causal_model
from kleash.parts import Given, Parts, load_parts
from kleash.preflight.checks import preflight
from kleash.reference import without_adapter

World = dict[str, str]
Statuses = dict[str, str]
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
MARKS = ["<|user|>", "<|assistant|>", "<|end|>"]
CHECKS = [
    "everything loads", "tokenizers match", "vocabulary fits", "chat template", "pad and EOS", "generation config",
    "dropout off", "KL 0 at step 0", "sampler is scorer", "padding invisible", "ratio 1", "gradients arrive",
    "reward finite", "reward spread", "reward repeats", "reward alone", "score position", "memory",
]  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks for it


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return save_tiny_world(tmp_path_factory.mktemp("world"), dropout=0.5, **LIVELY)


def run_yaml(world: World, directory: Path, **changes: object) -> Path:
    path = directory / "run.yaml"
    path.write_text(json.dumps(tiny_run(world, directory / "run", **changes)))
    return path


def check(path: Path, *flags: str) -> tuple[int, dict[str, dict[str, str]]]:
    """The exit code of `kleash check`, and what it wrote about each check, by name."""
    file = path.parent / "check.json"
    code = main(["check", str(path), "--json", str(file), *flags])
    content = json.loads(file.read_text())
    return code, {one["name"]: one for one in content["checks"]}


def statuses(found: dict[str, dict[str, str]], status: str) -> list[str]:
    return [name for name, one in found.items() if one["status"] == status]


def failing(path: Path, name: str, said: str, *, missing: Sequence[str] = ()) -> dict[str, str]:
    """The one check that fails; every other one passes, but for those that a fault leaves without meaning."""
    code, found = check(path)
    assert code == 1
    assert statuses(found, "FAIL") == [name]
    assert statuses(found, "WARN") == []
    assert set(CHECKS) - set(found) == set(missing)
    assert said in found[name]["found"]
    assert found[name]["remedy"]
    return found[name]


def warning(path: Path, name: str, said: str) -> dict[str, str]:
    """The one check that warns; every other one passes."""
    code, found = check(path)
    assert code == 0
    assert statuses(found, "FAIL") == []
    assert statuses(found, "WARN") == [name]
    assert said in found[name]["found"]
    assert found[name]["remedy"]
    return found[name]


def saved(model: nn.Module, tokenizer: object, directory: Path) -> str:
    model.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    return str(directory)


def tampered(monkeypatch: pytest.MonkeyPatch, change: Callable[[Parts], object]) -> None:
    """Let `kleash check` load the parts that it is told to, and change something about them."""

    def load(*arguments: Any) -> Parts:
        parts = load_parts(*arguments)
        change(parts)
        return parts

    monkeypatch.setattr("kleash.run.load_parts", load)


# --- rewards that run.yaml names ---


def words(prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
    texts = [said if isinstance(said, str) else said[0]["content"] for said in completions]
    return [len(set(text.split())) / 4 + text.count("cat") for text in texts]


def constant(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    return [0.5] * len(prompts)


def nan_for_one(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    return [*words(prompts, completions)[1:], math.nan]


def raising(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    raise LookupError("no such grade")


def nothing(prompts: Sequence[str], completions: Sequence[str]) -> None:
    return None


def graded(prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str]) -> list[float]:
    return words(prompts, completions)


def noisy(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """Draws from each of the three generators that a reward may draw from."""
    return [
        score + random.random() + np.random.random() + float(torch.rand(())) for score in words(prompts, completions)
    ]


def whitened(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """Divides by the spread of its batch, so a score depends on the other responses."""
    scores = torch.tensor(words(prompts, completions))
    return ((scores - scores.mean()) / (scores.std(correction=0) + 1e-3)).tolist()


def whitened_with_some_noise(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    return [score + random.random() / 100 for score in whitened(prompts, completions)]


def words_with_little_noise(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    return [score + random.random() / 10_000 for score in words(prompts, completions)]


def enormous(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    return [1e30 * (1 + len(completion)) for completion in completions]


def at_the_last_place(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """A reward model called in the way that looks right, and reads whatever stands in the last place: padding."""
    tokenizer, model = tiny_tokenizer(), tiny_reward_model(**LIVELY)
    texts = [f"{prompt} {said}" for prompt, said in zip(prompts, completions, strict=True)]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    hidden = model.transformer(input_ids=inputs["input_ids"]).last_hidden_state
    return model.score(hidden[:, -1]).squeeze(-1).tolist()


# --- sound runs ---


def chat_world(directory: Path, prompts: Sequence[Any], *, tokenizer: Any = None, **policy: object) -> World:
    """A policy with a chat template, and prompts for it."""
    tokenizer = tokenizer or chat_tokenizer()
    policy_at = saved(tiny_policy(vocab=len(tokenizer), **{**LIVELY, **policy}), tokenizer, directory / "policy")
    file = directory / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return {"policy": policy_at, "reward": "test_preflight:words", "prompts": str(file)}


def chat_tokenizer(template: str = TEMPLATE) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    tokenizer.chat_template = template
    return tokenizer


def chats(contents: Sequence[str]) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": content}] for content in contents]


def templated(texts: Sequence[str]) -> list[str]:
    return [f"<|user|> {text} <|end|> <|assistant|>" for text in texts]


def adapter_in(world: World, directory: Path, *, drifted: bool) -> str:
    """A LoRA adapter on the world's policy, as peft saves it."""
    options = {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}
    torch.manual_seed(3)
    base = load_causal_model(world["policy"], "test")
    model = peft.get_peft_model(base, peft.LoraConfig(**options, init_lora_weights=not drifted))
    model.save_pretrained(directory / "adapter")
    return str(directory / "adapter")


SOUND: dict[str, Callable[[World, Path], dict[str, object]]] = {
    "a gpt2 and a reward model": lambda world, path: {},
    "a llama and a reward function": lambda world, path: {
        "policy": saved(tiny_policy(architecture="llama", **LIVELY), tiny_tokenizer(), path / "policy"),
        "reward": "test_preflight:words",
    },
    "an adapter that has learnt, and its copy": lambda world, path: {"policy": adapter_in(world, path, drifted=True)},
    "an adapter at its start, and its base": lambda world, path: {
        "policy": adapter_in(world, path, drifted=False),
        "reference": {"kind": "adapter_off"},
    },
    "the policy's own path as reference": lambda world, path: {"reference": world["policy"]},
    "a moving reference": lambda world, path: {"reference": {"kind": "moving_average"}},
    "chat messages": lambda world, path: chat_world(path, chats(PROMPTS)),
    "templated text": lambda world, path: chat_world(path, templated(PROMPTS)),
    "a weighted reward and a judge": lambda world, path: {
        "reward": [{"source": world["reward"], "weight": 2}, {"source": "test_preflight:words", "weight": -1}],
        "eval_reward": "test_preflight:words",
    },
    "k1, no leash, small micro-batches, another temperature": lambda world, path: {
        "kl": "k1",
        "leash": {"beta": 0},
        "ppo": {"minibatches": 2, "micro_batch": 3},
        "rollout": {"prompts_per_update": 8, "max_new_tokens": 6, "temperature": 0.7},
    },
    "a budget and a response of one token": lambda world, path: {
        "leash": {"target_kl_per_sequence": 2},
        "rollout": {"prompts_per_update": 8, "max_new_tokens": 1},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_run_passes_every_check(world: World, tmp_path: Path, name: str) -> None:
    path = run_yaml(world, tmp_path, **SOUND[name](world, tmp_path))
    before = tree(Path(world["policy"]).parent)
    code, found = check(path)
    assert code == 0
    assert statuses(found, "PASS") == list(found)
    assert set(CHECKS) <= set(found)
    assert all(one["remedy"] == "" for one in found.values())
    assert not (tmp_path / "run").exists()
    assert tree(Path(world["policy"]).parent) == before


@pytest.mark.parametrize("adapter", [False, True])
def test_a_sound_run_in_sixteen_bits_passes_every_check(world: World, tmp_path: Path, adapter: bool) -> None:
    policy = adapter_in(world, tmp_path, drifted=True) if adapter else world["policy"]
    config = config_from(tiny_run({**world, "policy": policy}, tmp_path / "run"), "a test")
    parts = load_parts(config, Given())
    checks = preflight(parts, parts.models(), config, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    assert [one for one in checks if one.status != "PASS"] == []
    padding = next(one for one in checks if one.name == "padding invisible")
    assert "(allowed 0.5)" in padding.found


def test_a_sound_run_shows_its_figures(world: World, tmp_path: Path) -> None:
    _, found = check(run_yaml(world, tmp_path, eval_reward="test_preflight:words"))
    said = {name: one["found"] for name, one in found.items()}
    assert list(found) == [
        *CHECKS[:-1],
        *(f"judge {rest}" for rest in ("finite", "spread", "repeats", "alone")),
        "memory",
    ]
    assert said["everything loads"].endswith("; 8 prompts of 1 to 4 tokens")
    assert "parameters learn" in said["everything loads"]
    assert "exactly 0 on 8 responses" in said["KL 0 at step 0"]
    assert said["pad and EOS"] == "pad '<pad>' (0), EOS '<eos>' (1)"
    assert "for a step over 4 x (4 + 6) tokens (" in said["memory"]
    place = said["score position"]
    assert place.startswith("'what' -> ")
    assert "goes to token" in place
    assert "of 8 responses end with EOS" in place


def test_which_token_gets_the_score_is_shown_as_it_is(world: World, tmp_path: Path) -> None:
    """The first response of the sample, sampled again: its last token, its place and the score that lands on it."""
    from kleash.preflight.sample import sample_of

    config = config_from(tiny_run(world, tmp_path / "run"), "a test")
    parts = load_parts(config, Given())
    sample = sample_of(parts, config)
    tokens = sample.rollout.responses[0][sample.rollout.response_mask[0]].tolist()
    score = float(parts.scorer(sample.prompts, sample.rollout)[0])
    found = next(one for one in preflight(parts, parts.models(), config) if one.name == "score position").found
    text = parts.tokenizer.decode(tokens)
    assert f"-> {text!r}: the score {score:.3g} goes to token {len(tokens)} of {len(tokens)}, " in found
    assert f"{parts.tokenizer.decode(tokens[-1:])!r} ({tokens[-1]}); " in found


# --- dropout ---


@pytest.mark.filterwarnings("default::kleash.errors.KleashWarning")  # noise makes the way by full logits needed
def test_dropout_that_heeds_no_eval_is_named(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def always_on(self: nn.Dropout, values: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(values, self.p, training=True)

    monkeypatch.setattr(nn.Dropout, "forward", always_on)
    blind = ["KL 0 at step 0", "sampler is scorer", "padding invisible", "ratio 1"]
    said = "two passes over one text give policy log-probs up to"
    assert "eval()" in failing(run_yaml(world, tmp_path), "dropout off", said, missing=blind)["remedy"]


@pytest.mark.parametrize("role", ["policy", "reference"])
def test_a_model_left_in_training_mode_is_named(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    tampered(monkeypatch, lambda parts: getattr(parts, role).train())
    blind = ["KL 0 at step 0", "sampler is scorer", "padding invisible", "ratio 1"]
    failing(run_yaml(world, tmp_path), "dropout off", f"of the {role} is in training mode", missing=blind)


# --- padding ---


def test_prompts_padded_on_the_wrong_side_are_named(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def right_padded(
        tokens: list[list[int]], pad_token_id: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        longest = max(map(len, tokens))
        ids = torch.tensor([[*row, *[pad_token_id] * (longest - len(row))] for row in tokens])
        return ids, torch.arange(longest) < torch.tensor([[len(row)] for row in tokens])

    monkeypatch.setattr("kleash.rollout.left_padded", right_padded)
    found = failing(run_yaml(world, tmp_path), "padding invisible", "policy log-probs of response 1 differ by up to")
    assert "pad prompts on the left" in found["remedy"]
    assert "largest at response token 0" in found["found"]  # the one that is drawn from a padding slot


def test_a_model_that_does_not_heed_the_mask_is_named(world: World, tmp_path: Path) -> None:
    """RWKV reads the padding as it reads any text, whatever the attention mask says."""
    shape = RwkvConfig(
        vocab_size=12, hidden_size=16, num_hidden_layers=2, context_length=64, attention_hidden_size=16,
        intermediate_size=32, bos_token_id=1, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = RwkvForCausalLM(shape)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    path = saved(model, tiny_tokenizer(), tmp_path / "policy")
    code, found = check(run_yaml(world, tmp_path, policy=path))
    assert code == 1
    assert "padding invisible" in statuses(found, "FAIL")


# --- sampler and scorer ---


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_sampler_at_another_temperature_is_named_with_it(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    from kleash.rollout import draw_tokens

    monkeypatch.setattr(
        "kleash.rollout.draw_tokens",
        lambda logits, uniforms, *, temperature: draw_tokens(logits, uniforms, temperature=factor * temperature),
    )
    failing(
        run_yaml(world, tmp_path),
        "sampler is scorer",
        f"sampled at about temperature {factor:g}, scored at 1",
    )


def test_a_sampler_that_cuts_off_the_tail_is_named(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kleash.rollout import draw_tokens

    def top_3(logits: torch.Tensor, uniforms: torch.Tensor, *, temperature: float) -> Any:
        lowest = logits.topk(3).values[:, -1:]
        return draw_tokens(logits.masked_fill(logits < lowest, -math.inf), uniforms, temperature=temperature)

    monkeypatch.setattr("kleash.rollout.draw_tokens", top_3)
    failing(run_yaml(world, tmp_path), "sampler is scorer", "the sampler cuts off the rest (top-k, top-p)")


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ({"top_p": 0.9}, "top_p 0.9"),
        ({"top_k": 50}, "top_k 50"),
        ({"temperature": 0.6}, "temperature 0.6"),
        ({"repetition_penalty": 1.1}, "repetition_penalty 1.1"),
    ],
)
def test_a_generation_config_that_would_serve_another_distribution_is_said(
    world: World, tmp_path: Path, named: dict[str, float], said: str
) -> None:
    shutil.copytree(world["policy"], tmp_path / "policy")
    GenerationConfig(eos_token_id=1, pad_token_id=0, do_sample=True, **named).save_pretrained(tmp_path / "policy")
    path = run_yaml(world, tmp_path, policy=str(tmp_path / "policy"))
    warning(path, "generation config", f"the policy's generation config says {said}; kleash samples")
    if "temperature" in named:
        assert check(path, "--rollout.temperature", "0.6")[1]["generation config"]["status"] == "PASS"


# --- the reference ---


def test_the_base_under_an_adapter_that_has_learnt_is_named_as_what_it_is(world: World, tmp_path: Path) -> None:
    adapter = adapter_in(world, tmp_path, drifted=True)
    for reference in ({"kind": "adapter_off"}, world["policy"]):
        path = run_yaml(world, tmp_path, policy=adapter, reference=reference)
        found = warning(path, "KL 0 at step 0", "the reference is the base model under the policy's adapter")
        assert "the reference copy measures from the policy's start" in found["remedy"]


def test_the_kl_that_is_named_is_the_exact_one_over_the_sample(world: World, tmp_path: Path) -> None:
    from kleash.preflight.sample import sample_of

    adapter = adapter_in(world, tmp_path, drifted=True)
    config = config_from(tiny_run({**world, "policy": adapter}, tmp_path / "r", reference=world["policy"]), "a test")
    parts = load_parts(config, Given())
    rollout = sample_of(parts, config).rollout
    total = 0.0
    with torch.no_grad():
        for row in range(8):
            tokens = rollout.sequences[row][rollout.attention_mask[row]].unsqueeze(0)
            logs = [
                model(input_ids=tokens).logits.double().log_softmax(-1)[0] for model in (parts.policy, parts.reference)
            ]
            kl = (logs[0].exp() * (logs[0] - logs[1])).sum(-1)
            total += float(kl[-int(rollout.response_mask[row].sum()) - 1 : -1].sum()) / 8
    found = next(one for one in preflight(parts, parts.models(), config) if one.name == "KL 0 at step 0").found
    assert total > 0.1
    assert f"KL(policy || reference) {total:.3g} nats per response on 8 responses" in found


def test_a_copy_that_lost_the_adapter_fails(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kleash.parts.frozen_copy", lambda policy, **_: without_adapter(policy))
    path = run_yaml(world, tmp_path, policy=adapter_in(world, tmp_path, drifted=True))
    failing(path, "KL 0 at step 0", "the reference is the base model under the policy's adapter")


def test_a_copy_that_is_another_model_fails_and_a_named_one_is_said(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = saved(tiny_policy(7, **LIVELY), tiny_tokenizer(), tmp_path / "other")
    warning(
        run_yaml(world, tmp_path, reference=other), "KL 0 at step 0", "since the reference is another model, not the"
    )
    monkeypatch.setattr("kleash.parts.frozen_copy", lambda policy, **_: tiny_policy(7, **LIVELY).requires_grad_(False))
    failing(run_yaml(world, tmp_path), "KL 0 at step 0", "tokens: the reference is another model")


# --- vocabularies ---


def test_a_tokenizer_with_more_tokens_than_embeddings_is_named(world: World, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["bird"])
    policy = saved(tiny_policy(**LIVELY), tokenizer, tmp_path / "policy")
    path = run_yaml(world, tmp_path, policy=policy, reward="test_preflight:words")
    found = failing(
        path,
        "vocabulary fits",
        "the tokenizer has 13 tokens, the policy 12 embeddings and 12 logits",
        missing=CHECKS[CHECKS.index("dropout off") :],
    )
    assert "resize_token_embeddings(13)" in found["remedy"]


def test_embeddings_resized_without_their_tokenizer_are_named(world: World, tmp_path: Path) -> None:
    policy = tiny_policy(**LIVELY)
    policy.resize_token_embeddings(16, mean_resizing=False)
    path = run_yaml(world, tmp_path, policy=saved(policy, tiny_tokenizer(), tmp_path / "policy"))
    code, found = check(path)
    assert code == 1
    assert statuses(found, "FAIL") == ["vocabulary fits"]
    assert "16 logits for 12 tokens, and the policy puts" in found["vocabulary fits"]["found"]


def test_rows_that_are_never_drawn_are_padding_to_a_rounder_size(world: World, tmp_path: Path) -> None:
    policy = tiny_policy(tie_word_embeddings=False, **LIVELY)
    policy.resize_token_embeddings(16, mean_resizing=False)
    head = nn.Linear(16, 16)
    with torch.no_grad():
        head.weight.copy_(policy.lm_head.weight)
        head.bias.copy_(torch.tensor([0.0] * 12 + [-30.0] * 4))
    policy.lm_head = head
    config = config_from(tiny_run(world, tmp_path / "run"), "a test")
    parts = load_parts(config, Given(policy=policy, tokenizer=tiny_tokenizer()))
    found = {one.name: one for one in preflight(parts, parts.models(), config)}
    assert {one.status for one in found.values()} == {"PASS"}
    assert "16 logits for 12 tokens, and the policy puts" in found["vocabulary fits"].found


def test_a_head_of_another_size_than_the_config_says_is_named(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tampered(
        monkeypatch,
        lambda parts: [
            parts.policy.resize_token_embeddings(16, mean_resizing=False),
            setattr(parts.policy.config, "vocab_size", 12),
        ],
    )
    code, found = check(run_yaml(world, tmp_path))
    assert code == 1
    assert "the policy has 16 logits and its config says 12" in found["vocabulary fits"]["found"]


def test_a_reference_with_resized_embeddings_is_refused_by_name(world: World, tmp_path: Path) -> None:
    reference = tiny_policy(**LIVELY)
    reference.resize_token_embeddings(16, mean_resizing=False)
    path = run_yaml(world, tmp_path, reference=saved(reference, None, tmp_path / "reference"))
    failing(path, "models load", "a reference with the policy's vocabulary of 12, found 16", missing=CHECKS)


def test_another_tokenizer_is_named(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swapped = tiny_tokenizer(words=[*WORDS[:6], "dog", "cat", *WORDS[8:]])
    reference = saved(tiny_policy(**LIVELY), swapped, tmp_path / "reference")
    path = run_yaml(world, tmp_path, reference=reference)
    failing(path, "models load", "token 6 is 'dog' there and 'cat' in the policy", missing=CHECKS)
    config = config_from(tiny_run(world, tmp_path / "run"), "a test")
    parts = load_parts(config, Given(tokenizer=swapped))
    found = {one.name: one for one in preflight(parts, parts.models(), config)}
    assert found["tokenizers match"].status == "FAIL"
    assert "token 6 is 'cat' there and 'dog' in the run" in found["tokenizers match"].found


def test_a_reward_model_without_a_tokenizer_is_taken_at_its_word_and_that_is_said(world: World, tmp_path: Path) -> None:
    reward = saved(tiny_reward_model(**LIVELY), None, tmp_path / "reward")
    warning(run_yaml(world, tmp_path, reward=reward), "tokenizers match", "no tokenizer lies beside the reward model")
    small = saved(tiny_reward_model(vocab=8, **LIVELY), tiny_tokenizer(), tmp_path / "small")
    rest = CHECKS[CHECKS.index("dropout off") :]
    failing(run_yaml(world, tmp_path, reward=small), "vocabulary fits", "has 8 embeddings for 12 tokens", missing=rest)


def test_which_models_share_the_ids_and_which_is_given_the_text_is_said(world: World, tmp_path: Path) -> None:
    other = saved(
        tiny_reward_model(**LIVELY), tiny_tokenizer(words=[*WORDS[:3], *reversed(WORDS[3:])]), tmp_path / "other"
    )
    _, found = check(run_yaml(world, tmp_path, eval_reward=other))
    assert found["tokenizers match"]["found"] == (
        "12 tokens, the same ids in policy, reference and reward model; "
        "the judge model has a tokenizer of its own, and is given the text"
    )
    _, found = check(run_yaml(world, tmp_path, reward="test_preflight:words"))
    assert found["tokenizers match"]["found"] == "12 tokens, the same ids in policy and reference"


# --- the chat template ---


@pytest.mark.parametrize(
    "prompts",
    [
        chats(templated(PROMPTS)),
        chats([f"<|user|> {text}" for text in PROMPTS]),
        [f"<|user|> <|user|> {text} <|end|> <|assistant|> <|end|> <|assistant|>" for text in PROMPTS],
    ],
    ids=["in the messages", "its opening in the messages", "twice in plain text"],
)
def test_a_template_applied_twice_is_named(tmp_path: Path, prompts: list[Any]) -> None:
    found = failing(run_yaml(chat_world(tmp_path, prompts), tmp_path), "chat template", "<|user|>")
    assert "and so in 8 of 8: the template is applied twice" in found["found"]
    assert "give bare messages" in found["remedy"]


def test_a_template_without_special_tokens_applied_twice_is_named(tmp_path: Path) -> None:
    template = "User: {{ messages[0]['content'] }} Assistant:"
    tokenizer = chat_tokenizer(template)
    sound = chat_world(tmp_path, chats(["a cat Assistant: it", *PROMPTS[1:]]), tokenizer=tokenizer)
    assert check(run_yaml(sound, tmp_path))[1]["chat template"]["status"] == "PASS"
    twice = chat_world(tmp_path, chats([f"User: {text} Assistant:" for text in PROMPTS]), tokenizer=tokenizer)
    failing(run_yaml(twice, tmp_path), "chat template", "'User:' and 'Assistant:' in a message")


def test_a_mark_in_one_text_of_many_is_said(tmp_path: Path) -> None:
    path = run_yaml(chat_world(tmp_path, chats([*PROMPTS[:7], "what is <|end|>"])), tmp_path)
    warning(path, "chat template", "'<|end|>' in a message in prompt 8, 'what is <|end|>', and so in 1 of 8 prompts")


def test_two_beginnings_of_text_are_named(world: World, tmp_path: Path) -> None:
    """A text that has been through a template with BOS, and a tokenizer that writes BOS before every text."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer(words=[*WORDS, "<s>"])
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 12)])
    once = chat_world(tmp_path, PROMPTS, tokenizer=tokenizer)
    assert check(run_yaml(once, tmp_path))[0] == 0
    twice = chat_world(tmp_path, [f"<s> {text}" for text in PROMPTS], tokenizer=tokenizer)
    failing(run_yaml(twice, tmp_path), "chat template", "two '<s>' at the start in prompt 1")


def test_a_reward_model_or_reference_with_another_template_is_said(tmp_path: Path) -> None:
    world = chat_world(tmp_path, chats(PROMPTS))
    other = chat_tokenizer(TEMPLATE.replace("<|user|>", "<|end|>").replace("<|end|>", ""))
    reward = saved(tiny_reward_model(vocab=15, **LIVELY), other, tmp_path / "reward")
    said = "has another chat template than the policy"
    warning(run_yaml(world, tmp_path, reward=reward), "chat template", f"{reward} {said}")
    reference = saved(tiny_policy(vocab=15, **LIVELY), other, tmp_path / "reference")
    warning(run_yaml(world, tmp_path, reference=reference), "chat template", f"the reference {said}")


# --- pad and EOS ---


def test_one_token_for_pad_and_eos_is_said(world: World, tmp_path: Path) -> None:
    policy = saved(tiny_policy(**LIVELY), tiny_tokenizer(pad_token="<eos>"), tmp_path / "policy")
    warning(run_yaml(world, tmp_path, policy=policy), "pad and EOS", "one token for both; kleash masks the padding")


def test_an_eos_that_can_never_be_written_is_named(world: World, tmp_path: Path) -> None:
    shutil.copytree(world["policy"], tmp_path / "policy")
    GenerationConfig(eos_token_id=[1, 40], pad_token_id=0).save_pretrained(tmp_path / "policy")
    path = run_yaml(world, tmp_path, policy=str(tmp_path / "policy"))
    failing(path, "pad and EOS", "EOS 40 has no logit among 12")


def test_no_pad_token_is_told_with_its_remedy(world: World, tmp_path: Path) -> None:
    policy = saved(tiny_policy(**LIVELY), tiny_tokenizer(pad_token=None), tmp_path / "policy")
    found = failing(
        run_yaml(world, tmp_path, policy=policy),
        "models load",
        "tokenizer with a pad token, found none",
        missing=CHECKS,
    )
    assert "pad_token: '<eos>'" in found["remedy"]


# --- which token gets the score ---


def test_a_score_on_the_padding_is_named(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "kleash.rewards.last_response_position", lambda mask: torch.full((len(mask),), mask.shape[1] - 1)
    )
    failing(run_yaml(world, tmp_path), "score position", "is on token 6 of")


def test_a_closing_eos_in_the_last_place_called_unfinished_is_named(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kleash.rollout import sample_responses

    def forgets(*arguments: Any, **more: Any) -> Any:
        drawn = sample_responses(*arguments, **more)
        return replace(drawn, finished=drawn.finished & ~drawn.mask[:, -1])

    monkeypatch.setattr("kleash.rollout.sample_responses", forgets)
    failing(run_yaml(world, tmp_path), "score position", "an EOS in the last possible place is called unfinished")


# --- the reward ---


@pytest.mark.parametrize("role", ["reward", "judge"])
@pytest.mark.parametrize(
    ("reward", "said", "remedy"),
    [
        ("nan_for_one", "found nan for the prompt", "mend the reward for such a response"),
        ("raising", "found LookupError: no such grade", "mend the reward for such input"),
        ("nothing", "found NoneType", "return one number per completion"),
        ("graded", "(they have prompt)", "add the column, or give the argument a default"),
    ],
)
def test_a_broken_reward_is_named(world: World, tmp_path: Path, reward: str, said: str, remedy: str, role: str) -> None:
    key = {"reward": "reward", "judge": "eval_reward"}[role]
    code, found = check(run_yaml(world, tmp_path, **{key: f"test_preflight:{reward}"}))
    assert code == 1
    assert statuses(found, "FAIL") == [f"{role} finite"]
    assert said in found[f"{role} finite"]["found"]
    assert found[f"{role} finite"]["remedy"] == remedy
    assert not {f"{role} spread", f"{role} repeats", f"{role} alone"} & set(found)


def test_a_constant_reward_is_said(world: World, tmp_path: Path) -> None:
    warning(run_yaml(world, tmp_path, reward="test_preflight:constant"), "reward spread", "one score 0.5 for all")


def test_a_reward_that_does_not_repeat_itself_is_said(world: World, tmp_path: Path) -> None:
    code, found = check(run_yaml(world, tmp_path, reward="test_preflight:noisy"))
    assert code == 0
    assert statuses(found, "WARN") == ["reward repeats", "reward alone"]
    assert "the same responses scored twice are up to" in found["reward repeats"]["found"]
    said = r"which may be its noise of \d\S*: whether the reward reads the padding, or the other responses, cannot be"
    assert re.search(said, found["reward alone"]["found"])


@pytest.mark.parametrize(
    ("reward", "status"), [("whitened_with_some_noise", "FAIL"), ("words_with_little_noise", "PASS")]
)
def test_noise_that_is_not_all_of_the_difference_leaves_no_doubt(
    world: World, tmp_path: Path, reward: str, status: str
) -> None:
    found = check(run_yaml(world, tmp_path, reward=f"test_preflight:{reward}"))[1]
    assert found["reward repeats"]["status"] == "WARN"
    assert found["reward alone"]["status"] == status


@pytest.mark.parametrize("reward", ["at_the_last_place", "whitened"])
def test_a_reward_that_reads_the_padding_or_the_other_responses_is_named(
    world: World, tmp_path: Path, reward: str
) -> None:
    found = failing(run_yaml(world, tmp_path, reward=f"test_preflight:{reward}"), "reward alone", "in the batch and")
    assert "reads the padding, or the other responses" in found["found"]


def test_a_reward_model_read_at_the_last_place_is_named(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "kleash.scorers.last_response_position", lambda mask: torch.full((len(mask),), mask.shape[1] - 1)
    )
    reward = saved(tiny_reward_model(**LIVELY), tiny_tokenizer(), tmp_path / "reward")
    failing(run_yaml(world, tmp_path, reward=reward), "reward alone", "the reward reads the padding")


def test_a_judge_that_reads_the_other_responses_is_named(world: World, tmp_path: Path) -> None:
    failing(run_yaml(world, tmp_path, eval_reward="test_preflight:whitened"), "judge alone", "the judge reads")


# --- ratio and gradients ---


def test_a_ratio_that_does_not_start_at_1_is_named(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kleash.ppo.policy_ratio", lambda new, old, mask: (new - old + 0.01).exp())
    failing(run_yaml(world, tmp_path), "ratio 1", "new / old policy 1.01005 on average")


def test_a_parameter_that_no_gradient_reaches_is_named(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def detached(module: nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        return output.detach()

    tampered(monkeypatch, lambda parts: parts.policy.transformer.wpe.register_forward_hook(detached))
    failing(run_yaml(world, tmp_path), "gradients arrive", "no gradient reaches transformer.wpe.weight of the policy")


def test_an_adapter_cut_off_below_its_base_is_named(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def detached(module: nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        return output.detach()

    tampered(monkeypatch, lambda parts: parts.policy.transformer.h[0].mlp.register_forward_hook(detached))
    path = run_yaml(world, tmp_path, policy=adapter_in(world, tmp_path, drifted=True))
    assert check(path)[0] == 0  # around the MLP the residual stream carries the gradient
    tampered(monkeypatch, lambda parts: parts.value.trunk.ln_f.register_forward_hook(detached))
    failing(path, "gradients arrive", "of the value model, which is to learn")


@pytest.mark.parametrize("role", ["reference", "reward model"])
def test_what_must_stay_and_takes_gradients_is_named(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    def loosen(parts: Parts) -> None:
        model = parts.reference if role == "reference" else parts.scorer.model
        model.requires_grad_(True)

    tampered(monkeypatch, loosen)
    failing(run_yaml(world, tmp_path), "gradients arrive", f"of the {role}, which must stay, takes gradients")


def test_gradients_of_a_reward_that_failed_come_from_scores_that_stand_in(world: World, tmp_path: Path) -> None:
    """The value model's trunk has none below its head of zeros; the policy has, as it would with scores."""
    found = [check(run_yaml(world, tmp_path, reward=f"test_preflight:{name}"))[1] for name in ("words", "nan_for_one")]
    scored, failed = (one["gradients arrive"] for one in found)
    assert (scored["status"], failed["status"]) == ("PASS", "PASS")
    assert failed["found"] == scored["found"] + "; from scores 1 and 0, as the reward gave none"


def test_scores_too_large_to_learn_from_are_named(world: World, tmp_path: Path) -> None:
    path = run_yaml(world, tmp_path, reward="test_preflight:enormous")
    failing(path, "gradients arrive", "the loss is not finite (policy_loss")


def test_weights_that_are_not_finite_are_named(world: World, tmp_path: Path) -> None:
    policy = tiny_policy(**LIVELY)
    policy.transformer.ln_f.bias.data[0] = math.nan
    path = run_yaml(world, tmp_path, policy=saved(policy, tiny_tokenizer(), tmp_path / "policy"))
    failing(path, "models load", "found NaN or infinity in transformer.ln_f.bias", missing=CHECKS)


@pytest.mark.filterwarnings("default::kleash.errors.KleashWarning")  # NaN makes the way by full logits needed
def test_numbers_that_are_not_finite_are_named(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tampered(monkeypatch, lambda parts: parts.policy.transformer.ln_f.bias.data.fill_(math.nan))
    rest = CHECKS[CHECKS.index("dropout off") :]
    said = "Expected finite logits to sample from, found nan"
    failing(run_yaml(world, tmp_path), "numbers finite", said, missing=rest)


@pytest.mark.filterwarnings("default::kleash.errors.KleashWarning")  # the head cannot be tried out either
def test_a_model_that_does_not_run_is_named_with_what_it_says(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*arguments: object) -> None:
        raise ValueError("no such cache.\nand a second line")

    tampered(monkeypatch, lambda parts: parts.policy.register_forward_pre_hook(refuse))
    path, rest = run_yaml(world, tmp_path), CHECKS[CHECKS.index("dropout off") :]
    failing(path, "models run", "and read the answer, found ValueError: no such cache", missing=rest)
    assert main(["train", str(path), "--debug"]) == 2
    assert "in refuse" in capsys.readouterr().err  # the traceback leads to the place


# --- memory ---


def test_memory_is_held_against_what_there_is(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kleash.preflight import memory

    def with_available(available: int) -> None:
        def measured(device: torch.device, step: Callable[[], None], *, sharing: int) -> memory.Measured:
            step()
            return memory.Measured(peak=2**30, available=available)

        monkeypatch.setattr(memory, "_measured", measured)

    state = 2 * 4 * sum(p.numel() for model in (tiny_policy(), tiny_reward_model()) for p in model.parameters())
    need, path = 2**30 + state, run_yaml(world, tmp_path)
    for available, status in ((need - 1, "FAIL"), (need + 1, "WARN"), (int(need / 0.8) + 9, "PASS")):
        with_available(available)
        found = check(path)[1]["memory"]
        assert found["status"] == status
        assert " on cpu for a step over 4 x (4 + 6) tokens (1.0 GiB measured, 0 MiB AdamW)" in found["found"]
    with_available(0)
    failing(path, "memory", "1.0 GiB of 0 MiB on cpu")


MEASURED = """
import torch
from kleash.preflight.memory import _measured
for size in (1, 300):
    found = _measured(torch.device("cpu"), lambda: torch.ones(size, 2**20, dtype=torch.uint8).add_(1), sharing=1)
    print(found.peak, found.available)
"""


def test_the_peak_of_a_step_is_measured() -> None:
    # in a process of its own: one that has freed as much before takes nothing more from the system
    done = subprocess.run([sys.executable, "-c", MEASURED], capture_output=True, text=True, check=True)
    small, large = (tuple(map(int, line.split())) for line in done.stdout.splitlines())
    assert 290 * 2**20 < large[0] < 400 * 2**20
    assert small[0] < 100 * 2**20
    assert large[1] > 2**20


def test_a_step_that_runs_out_of_memory_is_named(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("kleash.preflight.memory._one_step", out_of_memory)
    found = failing(run_yaml(world, tmp_path), "memory", "one step over 4 x (4 + 6) tokens ran out of memory")
    assert "lower ppo.micro_batch" in found["remedy"]


# --- what does not load ---


@pytest.mark.parametrize(
    ("changes", "name", "said"),
    [
        ({"policy": "/nowhere/at/all"}, "models load", "no such directory"),
        ({"reward": "nowhere:score"}, "reward loads", "No module named 'nowhere'"),
        ({"prompts": "missing.jsonl"}, "prompts load", "no such file"),
        ({"rollout": {"prompts_per_update": 8, "max_new_tokens": 61}}, "prompts load", "at most 3 tokens"),
    ],
)
def test_what_does_not_load_is_a_line_of_the_table(
    world: World, tmp_path: Path, changes: dict[str, object], name: str, said: str
) -> None:
    failing(run_yaml(world, tmp_path, **changes), name, said, missing=CHECKS)


def test_an_out_that_nothing_can_be_written_to_is_a_line_of_the_table(world: World, tmp_path: Path) -> None:
    path = run_yaml(world, tmp_path)
    code, found = check(path, "--out", f"{path}/run")
    assert (code, statuses(found, "FAIL")) == (1, ["place to write"])
    assert set(CHECKS) < set(found)
    assert found["place to write"]["found"] == f"Expected to write to {path}/run, found that {path} takes none"
    assert found["place to write"]["remedy"] == "choose another out"
    code, found = check(path, "--out", str(path), "--policy", "/nowhere")
    assert (code, statuses(found, "FAIL")) == (1, ["place to write", "models load"])


def test_a_limit_beyond_the_context_is_a_line_with_what_would_fit(world: World, tmp_path: Path) -> None:
    code, found = check(run_yaml(world, tmp_path), "--rollout.max_new_tokens", "5000")
    said = found["everything loads"]
    assert (code, said["found"]) == (1, "Expected max_new_tokens below the context of 64 tokens, found 5000")
    assert said["remedy"] == "lower it: at most 60 fit after the longest prompt"


def test_a_file_that_is_no_configuration_is_bad_usage(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_yaml(world, tmp_path)
    for words in (
        ["nowhere.yaml"],
        [path, "--polcy", 1],
        [path, "--json", "a", "b"],
        [path, "--seed"],
        ["--json", path],
    ):
        capsys.readouterr()
        assert main(["check", *map(str, words)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("kleash: Expected ")
        assert err.count("\n") == 1


# --- what is shown ---


def test_the_table_has_a_line_for_each_check_its_remedy_below_and_the_count(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "below" / "check.json"
    path = run_yaml(world, tmp_path, reward="test_preflight:constant", eval_reward="test_preflight:whitened")
    assert main(["check", str(path), "--json", str(file)]) == 1
    out, err = capsys.readouterr()
    assert err == ""
    lines, content = out.splitlines(), json.loads(file.read_text())
    assert list(content) == ["version", "passed", "warnings", "failed", "checks"]
    assert (content["version"], content["warnings"], content["failed"]) == (kleash.__version__, 1, 1)
    assert lines[-1] == f"{content['passed']} passed, 1 warning, 1 failed"
    below = [number for number, line in enumerate(lines) if line.strip().startswith("-> ")]
    assert [lines[number - 1][:4] for number in below] == ["WARN", "FAIL"]
    assert len(lines) == len(content["checks"]) + len(below) + 2
    for line, one in zip((line for line in lines if line[:4].strip()), content["checks"], strict=False):
        assert line.split() == f"{one['status']} {one['name']} {one['found']}".split()


def test_what_was_not_tried_is_admitted(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for changes, said in (
        ({"policy": "/nowhere"}, "0 passed, 0 warnings, 1 failed; what rests on a failed check was not tried"),
        ({"reward": "test_preflight:nan_for_one"}, "14 passed, 0 warnings, 1 failed"),
    ):
        capsys.readouterr()
        assert main(["check", str(run_yaml(world, tmp_path, **changes))]) == 1
        assert capsys.readouterr().out.splitlines()[-1] == said


# --- before a run ---


def records(out: Path) -> bytes:
    return (out / "records.jsonl").read_bytes()


def test_a_run_with_the_checks_writes_the_bytes_of_one_without(world: World, tmp_path: Path) -> None:
    for name, flag in (("with", "true"), ("without", "false")):
        path = run_yaml(world, tmp_path, eval_reward="test_preflight:words")
        assert main(["train", str(path), "--preflight", flag, "--out", str(tmp_path / name)]) == 0
    left, right = (tree(tmp_path / name) for name in ("with", "without"))
    differing = {file for file in left.keys() | right.keys() if left.get(file) != right.get(file)}
    assert differing == {"config.yaml", "timings.jsonl", "report.html"}


def test_nothing_is_left_behind(world: World, tmp_path: Path) -> None:
    config = config_from(tiny_run(world, tmp_path / "run", reward="test_preflight:noisy"), "a test")
    parts = load_parts(config, Given())
    models = parts.models()
    kept = torch.ones(12, 16)
    parts.policy.transformer.wte.weight.grad = kept
    before = [fingerprint(model) for model in parts.every_model]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]
    checks = preflight(parts, models, config)
    assert [one.status for one in checks].count("FAIL") == 0
    assert [fingerprint(model) for model in parts.every_model] == before
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    assert not any(module.training for model in parts.every_model for module in model.modules())
    gradients = [p.grad for model in parts.every_model for p in model.parameters() if p.grad is not None]
    assert len(gradients) == 1
    assert gradients[0] is kept
    assert torch.equal(kept, torch.ones(12, 16))


def test_the_same_responses_are_looked_at_every_time(world: World, tmp_path: Path) -> None:
    seen = []

    def reward(prompts: list[str], completions: list[str]) -> list[float]:
        seen.append((tuple(prompts), tuple(completions)))
        return words(prompts, completions)

    from kleash.scorers import FunctionScorer

    config = config_from(tiny_run(world, tmp_path / "run"), "a test")
    parts = load_parts(config, Given(scorer=FunctionScorer(function=reward, name="f")))
    first = preflight(parts, parts.models(), config)
    again = preflight(parts, parts.models(), config)
    assert [len(prompts) for prompts, _ in seen] == 2 * [8, 8, 1, 1, 1, 1]
    assert seen[:6] == seen[6:]
    assert sorted(seen[0][0]) == sorted(PROMPTS)
    assert [one for one in first if one.name != "memory"] == [one for one in again if one.name != "memory"]


def test_train_stops_on_a_fault_before_it_writes_anything(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_yaml(world, tmp_path, reward="test_preflight:whitened")
    before = tree(tmp_path)
    capsys.readouterr()
    assert main(["train", str(path)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    said = "Expected every check before the first update to pass, found that reward alone failed (response"
    assert err.startswith(f"kleash: {said}")
    assert err.count("\n") == 1
    assert "kleash check RUN.yaml shows the whole table; preflight: false trains regardless" in err
    assert tree(tmp_path) == before
    assert main(["train", str(path), "--preflight", "false", "--updates", "1"]) == 0


def test_from_python_a_fault_is_an_error_and_a_doubt_a_warning(world: World, tmp_path: Path) -> None:
    job = {"policy": world["policy"], "prompts": PROMPTS, "updates": 1, "quiet": True}
    sizes = {
        "rollout": kleash.RolloutConfig(prompts_per_update=8, max_new_tokens=4),
        "ppo": kleash.PPOConfig(epochs=1, minibatches=1),
    }
    with pytest.raises(kleash.PreflightError, match="found that reward alone failed"):
        kleash.train(reward=whitened, out=tmp_path / "a", **job, **sizes)
    assert not (tmp_path / "a").exists()
    assert kleash.train(reward=whitened, out=tmp_path / "a", preflight=False, **job, **sizes).completed_updates == 1
    with pytest.warns(
        kleash.KleashWarning, match="Before the first update, reward spread: 8 responses, .*; give a reward"
    ):
        kleash.train(reward=constant, out=tmp_path / "b", **job, **sizes)
    with pytest.raises(kleash.RewardError, match="found LookupError"):  # what has an error of its own keeps it
        kleash.train(reward=raising, out=tmp_path / "c", **job, **sizes)


def test_a_run_may_be_resumed_without_the_checks(world: World, tmp_path: Path) -> None:
    path = run_yaml(world, tmp_path)
    assert main(["train", str(path), "--updates", "1"]) == 0
    assert main(["train", str(path), "--updates", "2", "--resume", "--preflight", "false"]) == 0
    assert len(records(tmp_path / "run").splitlines()) == 2


def test_a_peft_model_that_is_handed_over_is_checked_too(world: World, tmp_path: Path) -> None:
    options = {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True, "init_lora_weights": False}
    model = peft.get_peft_model(load_causal_model(world["policy"], "test"), peft.LoraConfig(**options))
    given = Given(policy=causal_model(model), rows=[{"prompt": text} for text in PROMPTS])
    config = config_from(tiny_run(world, tmp_path / "run"), "a test")
    parts = load_parts(config, given)
    assert {one.status for one in preflight(parts, parts.models(), config)} == {"PASS"}
