"""A policy with an adapter: loaded, trained, saved and taken up again; its reference is the start it came with."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import LIVELY, PROMPTS, tiny_policy, tiny_rollout, tiny_tokenizer
from torch import nn

import kleash
from kleash.checkpoint import CheckpointState, Learners, load_learners, save_checkpoint
from kleash.config import ReferenceConfig
from kleash.errors import ModelError
from kleash.models import (
    adapter_tensors,
    base_of_adapter,
    causal_model,
    fingerprint,
    learning_names,
    load_causal_model,
    load_tokenizer,
    response_logits,
    trainable_parameters,
    value_model_from_policy,
)
from kleash.parts import require_learning
from kleash.reference import frozen_copy
from kleash.training import RunResult

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks for it

SEQUENCES = torch.tensor([[3, 4, 5, 6, 7, 8]])
INPUTS = (SEQUENCES, torch.ones_like(SEQUENCES, dtype=torch.bool), 3)
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
KINDS = {
    "low rank": LORA,
    "with a task": {**LORA, "task_type": "CAUSAL_LM", "lora_dropout": 0.5},
    "with a head": {**LORA, "modules_to_save": ["lm_head"]},
    "on the embeddings": {**LORA, "target_modules": ["embed_tokens", "o_proj"]},
    "with magnitudes": {**LORA, "use_dora": True},
}


def policy_with_an_adapter(seed: int = 0, **options: object) -> nn.Module:
    policy = tiny_policy(seed, architecture="llama", tie_word_embeddings=False)
    policy.add_adapter(peft.LoraConfig(**{**LORA, **options}))
    return policy.eval()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model with its tokenizer on disk."""
    directory = tmp_path_factory.mktemp("base")
    tiny_policy(architecture="llama", tie_word_embeddings=False, dropout=0.5, **LIVELY).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def peft_model(base: Path, *, seed: int = 0, **options: object) -> nn.Module:
    torch.manual_seed(seed)
    return peft.get_peft_model(load_causal_model(base, "test"), peft.LoraConfig(**{**LORA, **options}))


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on disk as peft saves it: no tokenizer, no base."""
    directory = tmp_path_factory.mktemp("adapter")
    peft_model(base).save_pretrained(directory)
    return directory


# --- the reference ---


def test_the_reference_of_an_adapter_policy_is_its_start_and_not_the_base_model() -> None:
    policy = policy_with_an_adapter()
    reference = frozen_copy(policy)
    with torch.no_grad():
        start = response_logits(policy, *INPUTS)
        assert torch.equal(response_logits(reference, *INPUTS), start)
        policy.disable_adapters()
        assert not torch.allclose(response_logits(policy, *INPUTS), start, atol=1e-4)
        assert torch.equal(response_logits(reference, *INPUTS), start)


def test_training_an_adapter_leaves_its_reference_alone() -> None:
    policy = policy_with_an_adapter()
    reference = frozen_copy(policy)
    before = fingerprint(reference)
    with torch.no_grad():
        for parameter in trainable_parameters(policy):
            parameter.add_(1.0)
    assert list(trainable_parameters(policy))
    assert all("lora" in name for name in learning_names(policy))
    assert fingerprint(reference) == before != fingerprint(policy)
    assert not list(trainable_parameters(reference))


# --- the value model ---


def test_the_value_model_of_an_adapter_policy_learns_an_adapter_and_a_head_over_the_same_base() -> None:
    policy = policy_with_an_adapter()
    value, rollout = value_model_from_policy(policy), tiny_rollout(policy)
    learning = learning_names(value)
    assert [name.removeprefix("trunk.") for name in learning] == [*learning_names(policy.base_model), "head.weight"]
    base = [p for p in policy.base_model.parameters() if not p.requires_grad]
    assert {id(p) for p in base} == {id(p) for p in value.parameters() if not p.requires_grad}
    assert not {id(p) for p in trainable_parameters(policy)} & {id(p) for p in trainable_parameters(value)}
    inputs = (rollout.sequences, rollout.attention_mask, rollout.response_time)
    assert (value(*inputs) == 0).all()
    nn.init.normal_(value.head.weight)
    value(*inputs).sum().backward()
    assert all(value.get_parameter(name).grad.abs().sum() > 0 for name in learning)
    assert all(p.grad is None for p in policy.parameters())


# --- loading ---


@pytest.mark.parametrize("learns", [True, False])
def test_an_adapters_directory_is_a_model_on_its_base(base: Path, adapter: Path, learns: bool) -> None:
    assert base_of_adapter(adapter) == str(base)
    assert base_of_adapter(base) is None
    model = load_causal_model(adapter, "policy", adapter_learns=learns)
    assert all(("lora" in name) == (learns and p.requires_grad) for name, p in model.named_parameters() if learns)
    assert bool(learning_names(model)) == learns
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not any(module.training for module in model.modules())
    expected = causal_model(peft.PeftModel.from_pretrained(load_causal_model(base, "test"), adapter))
    with torch.no_grad():
        found = response_logits(model, *INPUTS)
        assert torch.equal(found, response_logits(expected, *INPUTS))
        assert not torch.allclose(found, response_logits(load_causal_model(base, "test"), *INPUTS), atol=1e-3)


def test_the_tokenizer_of_an_adapter_without_one_is_that_of_its_base(adapter: Path) -> None:
    assert load_tokenizer(adapter).get_vocab() == tiny_tokenizer().get_vocab()
    assert load_tokenizer(adapter, pad_token="<eos>").pad_token_id == 1


@pytest.mark.slow
def test_an_adapter_and_its_base_go_by_their_hub_names(base: Path, adapter: Path, tmp_path: Path) -> None:
    """From a hub's cache as a download leaves it, without a network, in a process that reads where the cache is."""
    for name, directory in (("base", base), ("adapter", adapter)):
        place = tmp_path / "hub" / f"models--somebody--{name}"
        shutil.copytree(directory, place / "snapshots" / "abc")
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text("abc")
    config = tmp_path / "hub/models--somebody--adapter/snapshots/abc/adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "somebody/base"}))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "what is"}\n')
    by_name, by_path = tmp_path / "by_name.json", tmp_path / "by_path.json"
    for models, found in ((["somebody/adapter", "somebody/base"], by_name), ([str(adapter), str(base)], by_path)):
        words = [*models, "--prompts", "prompts.jsonl", "--max-new-tokens", "6", "--samples", "8", "--json", str(found)]
        ended = subprocess.run(
            [sys.executable, "-m", "kleash.cli", "measure", *words],
            cwd=tmp_path,
            env={
                **os.environ,
                "HF_HOME": str(tmp_path),
                "HF_HUB_OFFLINE": "1",
                "PYTHONPATH": os.pathsep.join(sys.path),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr
    figures = [json.loads(path.read_text())["kl_policy_ref_per_sequence"] for path in (by_name, by_path)]
    assert figures[0] == figures[1]
    assert figures[0]["mean"] > 0.01


def test_an_adapter_whose_base_is_gone_or_not_named_is_one_sentence(adapter: Path, tmp_path: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    gone, file = str(tmp_path / "gone"), tmp_path / "adapter_config.json"
    for base, said in (
        (gone, f"base model at {gone}, as {file} says, found no such directory; correct base_model_name_or_path"),
        ("./gone", f"base model at ./gone, as {file} says, found no such directory; correct base_model_name_or_path"),
        ("runs/gone", f"at runs/gone (the base that adapter_config.json in {tmp_path} names)"),
        (None, "name the adapter's base model there"),
    ):
        file.write_text(json.dumps({**config, "base_model_name_or_path": base}))
        for load in (lambda place: load_causal_model(place, "policy"), load_tokenizer):
            with pytest.raises(ModelError, match=re.escape(said)) as caught:
                load(tmp_path)
            assert "\n" not in str(caught.value)


def test_an_adapter_s_config_that_is_no_json_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"Expected JSON in .*adapter_config\.json, found a mistake"):
        load_causal_model(tmp_path, "policy")


def test_an_adapter_without_its_weights_is_one_sentence(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    with pytest.raises(ModelError, match=r"the policy's adapter in .*, found no adapter_model\.safetensors; "):
        load_causal_model(tmp_path, "policy")


def test_an_adapter_whose_weights_were_cut_short_is_one_sentence(adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors damaged or cut short; save or copy the adapter"):
        load_causal_model(tmp_path, "policy")


def test_an_adapter_that_adds_tokens_brings_their_embeddings(base: Path, tmp_path: Path) -> None:
    wider = load_causal_model(base, "test")
    wider.resize_token_embeddings(15, mean_resizing=False)
    words = tiny_tokenizer()
    words.add_tokens(["bird", "fish", "ant"])
    words.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        peft.get_peft_model(wider, peft.LoraConfig(**LORA)).save_pretrained(tmp_path)
    model = load_causal_model(tmp_path, "policy")
    assert model.get_input_embeddings().weight.shape == (15, 16)
    with torch.no_grad():
        assert torch.equal(response_logits(model, *INPUTS), response_logits(wider, *INPUTS))


def test_what_peft_wrapped_is_the_model_inside(base: Path) -> None:
    wrapped = peft_model(base)
    inner = causal_model(wrapped)
    assert inner is wrapped.get_base_model()
    assert causal_model(inner) is inner
    assert torch.equal(inner(input_ids=SEQUENCES).logits, wrapped(input_ids=SEQUENCES).logits)


def test_an_adapter_beside_the_layers_and_a_second_adapter_are_refused(base: Path) -> None:
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(
        ModelError, match="Expected an adapter in the model's layers, such as LoRA, found PROMPT_TUNING"
    ):
        causal_model(peft.get_peft_model(load_causal_model(base, "test"), prompts))
    two = peft_model(base)
    two.add_adapter("other", peft.LoraConfig(**LORA))
    with pytest.raises(ModelError, match="Expected one adapter in a model, found default, other; delete all but"):
        causal_model(two)


def test_a_policy_that_does_not_learn_or_learns_beside_its_adapter_is_refused() -> None:
    policy = policy_with_an_adapter()
    require_learning(policy)
    policy.lm_head.weight.requires_grad_(True)
    with pytest.raises(ModelError, match=r"whose adapter alone learns, found that lm_head\.weight does too; freeze it"):
        require_learning(policy)
    require_learning(policy_with_an_adapter(modules_to_save=["lm_head"]))
    with pytest.raises(ModelError, match="Expected a policy with parameters that learn, found that all of them are"):
        require_learning(policy.requires_grad_(False))


# --- checkpoints ---


def learners_after(steps: int, policy: nn.Module) -> Learners:
    """Policy, value model and AdamW after some steps on a loss that touches everything that learns."""
    value = value_model_from_policy(policy)
    optimizer = torch.optim.AdamW(trainable_parameters(policy, value), lr=1e-2, fused=True)
    for _ in range(steps):
        optimizer.zero_grad()
        sum((parameter**3).sum() for parameter in trainable_parameters(policy, value)).backward()
        optimizer.step()
    return Learners(policy=policy, value=value, optimizer=optimizer)


STATE = CheckpointState(
    update=1, seed=0, leash={}, scheduler={}, reference_fingerprint="a" * 64, prompts_fingerprint="b" * 64
)


def saved(directory: Path, learners: Learners) -> Path:
    return save_checkpoint(directory, learners, tiny_tokenizer(), STATE, keep=1)


@pytest.mark.parametrize("wrapped", [True, False], ids=["peft", "transformers"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:Model has `tie_word_embeddings")
def test_an_adapter_policy_comes_back_bit_for_bit_and_is_peft_s_own(
    base: Path, tmp_path: Path, kind: str, wrapped: bool
) -> None:
    def fresh(seed: int) -> nn.Module:
        if wrapped:
            return causal_model(peft_model(base, seed=seed, **KINDS[kind])).eval()
        policy = load_causal_model(base, "test")
        torch.manual_seed(seed)
        policy.add_adapter(peft.LoraConfig(**{**LORA, **KINDS[kind]}))
        return policy.eval()

    original, other = learners_after(2, fresh(1)), learners_after(0, fresh(2))
    checkpoint = saved(tmp_path / "checkpoints", original)
    assert fingerprint(other.policy) != fingerprint(original.policy)
    load_learners(checkpoint, other)
    assert fingerprint(other.policy) == fingerprint(original.policy)
    assert fingerprint(other.value) == fingerprint(original.value)
    directory = checkpoint / "policy"
    with torch.no_grad():
        expected = original.policy(input_ids=SEQUENCES).logits
        for found in (
            load_causal_model(directory, "policy"),
            peft.AutoPeftModelForCausalLM.from_pretrained(directory),
            peft.PeftModel.from_pretrained(load_causal_model(base, "test"), directory),
        ):
            assert torch.equal(found.eval()(input_ids=SEQUENCES).logits, expected)


def test_the_checkpoint_of_an_adapter_holds_neither_base_nor_shared_trunk(base: Path, tmp_path: Path) -> None:
    learners = learners_after(1, causal_model(peft_model(base)))
    checkpoint = saved(tmp_path, learners)
    assert sorted(path.name for path in (checkpoint / "policy").iterdir() if "token" not in path.name) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    weights = sum(p.numel() for p in trainable_parameters(learners.value))
    assert weights * 4 < (checkpoint / "value.safetensors").stat().st_size < weights * 4 + 4096


def test_the_adapter_is_saved_as_peft_would(base: Path, tmp_path: Path) -> None:
    wrapped = peft_model(base)
    wrapped.save_pretrained(tmp_path / "theirs")
    ours = saved(tmp_path / "ours", learners_after(0, causal_model(wrapped))) / "policy"
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        a, b = ((directory / file).read_bytes() for directory in (ours, tmp_path / "theirs"))
        if file.endswith("json"):
            a, b = ({**json.loads(x), "target_modules": sorted(json.loads(x)["target_modules"])} for x in (a, b))
        assert a == b, file


def test_the_names_in_a_saved_adapter_are_sorted_so_every_process_writes_the_same_bytes(tmp_path: Path) -> None:
    """They are a set in memory, and the order of a set of words is another one in every process."""
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"]
    policy = policy_with_an_adapter(target_modules=names)
    config = saved(tmp_path, learners_after(0, policy)) / "policy" / "adapter_config.json"
    assert json.loads(config.read_text())["target_modules"] == sorted(names)
    assert policy.peft_config["default"].target_modules == set(names)  # the model's own is left as it was


def test_a_checkpoint_with_another_adapter_is_refused(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, learners_after(0, policy_with_an_adapter()))
    for other, found in (
        ({"r": 3}, r"found size mismatch for model\..*\[8, 2\].*\[8, 3\]\); give its own"),
        (
            {"target_modules": ["q_proj"]},
            r"found model\..*v_proj\.lora_A\.weight without a place; give its own",
        ),
        (
            {"target_modules": ["q_proj", "v_proj", "o_proj"]},
            r"found nothing for model\..*o_proj\.lora_A\.default\.weight",
        ),
        ({"modules_to_save": ["lm_head"]}, "found 'lm_head"),
    ):
        with pytest.raises(ModelError, match=found) as caught:
            load_learners(checkpoint, learners_after(0, policy_with_an_adapter(**other)))
        assert "\n" not in str(caught.value)


# --- runs ---


def words(prompts: list[str], completions: list[str]) -> list[float]:
    return [len(completion.split()) / 4 for completion in completions]


def train(out: Path, policy: object, **changes: object) -> RunResult:
    common = {
        "reward": words,
        "prompts": PROMPTS,
        "rollout": kleash.RolloutConfig(prompts_per_update=4, max_new_tokens=4),
        "ppo": kleash.PPOConfig(epochs=2, minibatches=2, learning_rate=3e-2),
        "updates": 3,
        "quiet": True,
    }
    return kleash.train(policy=policy, out=out, **{**common, **changes})


def rows_of(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]


def test_a_peft_model_is_trained_in_place_and_its_base_is_left_alone(base: Path, tmp_path: Path) -> None:
    wrapped = peft_model(base)
    before = {name: p.detach().clone() for name, p in wrapped.named_parameters()}
    result = train(tmp_path / "run", wrapped)
    for name, parameter in wrapped.named_parameters():
        assert torch.equal(parameter, before[name]) == ("lora" not in name), name
    first, *_, last = rows_of(result.out)
    assert first["kl_policy_ref_per_sequence"] == 0 < last["kl_policy_ref_per_sequence"]
    assert "given as a PeftModel" in (result.out / "config.yaml").read_text()
    kept = load_causal_model(result.checkpoint / "policy", "policy")
    assert adapter_tensors(kept).keys() == adapter_tensors(causal_model(wrapped)).keys()
    for name, tensor in adapter_tensors(kept).items():
        assert torch.equal(tensor, adapter_tensors(causal_model(wrapped))[name])


def test_a_trained_adapter_is_the_reference_of_another_run_by_object_and_by_path(base: Path, tmp_path: Path) -> None:
    reference = train(tmp_path / "first", peft_model(base)).checkpoint / "policy"
    given = peft.AutoPeftModelForCausalLM.from_pretrained(reference)
    lines = []
    for name, one in (("path", reference), ("object", given)):
        result = train(tmp_path / name, reference, reference=one, updates=2)
        lines.append(rows_of(result.out))
        assert lines[-1][0]["kl_policy_ref_per_sequence"] == 0 < lines[-1][1]["kl_policy_ref_per_sequence"]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("reference", [{}, {"kind": "moving_average", "decay": 0.5}, {"kind": "periodic", "every": 2}])
def test_a_resumed_adapter_run_writes_the_bytes_of_the_straight_one(
    adapter: Path, tmp_path: Path, reference: dict[str, object]
) -> None:
    def run(out: str, updates: int, **more: object) -> RunResult:
        return train(tmp_path / out, adapter, updates=updates, reference=ReferenceConfig(**reference), **more)

    straight, stopped = run("straight", 4), run("stopped", 3)
    resumed = run("stopped", 4, resume=True)
    assert stopped.out == resumed.out
    assert (resumed.out / "records.jsonl").read_bytes() == (straight.out / "records.jsonl").read_bytes()
    files = sorted(f.relative_to(straight.checkpoint) for f in straight.checkpoint.rglob("*") if f.is_file())
    assert (Path("reference.safetensors") in files) == bool(reference)
    for file in files:
        assert (resumed.checkpoint / file).read_bytes() == (straight.checkpoint / file).read_bytes(), file
    assert len({row["gradient_norm"] for row in rows_of(straight.out)}) == 4


def test_the_base_is_a_reference_that_the_policy_s_start_is_away_from(adapter: Path, tmp_path: Path) -> None:
    with pytest.warns(kleash.KleashWarning, match="the KL is above 0 before the first update"):
        result = train(tmp_path / "run", adapter, reference=ReferenceConfig(kind="adapter_off"), updates=2)
    assert rows_of(result.out)[0]["kl_policy_ref_per_sequence"] > 0
    state = json.loads((result.checkpoint / "state.json").read_text())
    assert state["reference_fingerprint"] == fingerprint(load_causal_model(base_of_adapter(adapter), "test"))
