"""The reference: what it shares with the policy, how it follows, and what it may not hide."""

import json
from pathlib import Path

import pytest
import torch
from tiny import LIVELY, PROMPTS, save_tiny_world, tiny_policy, tiny_rollout, tiny_run, tiny_tokenizer
from torch import nn

import kleash
from kleash.config import ReferenceConfig, config_from
from kleash.divergence import kl_divergence
from kleash.errors import ModelError
from kleash.language_model import LanguageModel, Models, language_models
from kleash.models import fingerprint, frozen, learning_names, response_logits, value_model_from_policy
from kleash.parts import Given, load_parts
from kleash.ppo import PPOConfig
from kleash.reference import frozen_copy, move_towards, require_movable, without_adapter
from kleash.rollout import RolloutConfig
from kleash.scorers import FunctionScorer
from kleash.scoring import score_rollout

peft = pytest.importorskip("peft")

ALL = [torch.arange(len(PROMPTS))]
SEQUENCES = torch.tensor([[3, 4, 5, 6, 7, 8], [9, 10, 4, 6, 3, 1]])
INPUTS = (SEQUENCES, torch.ones_like(SEQUENCES, dtype=torch.bool), 3)


def drifted(model: nn.Module, *, seed: int = 1, size: float = 0.05) -> None:
    """Move everything that learns, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter))


def with_adapter(policy: nn.Module, *, identity: bool = False, **options: object) -> nn.Module:
    """The policy with a low-rank adapter, which changes nothing yet or a good deal."""
    torch.manual_seed(3)
    kept = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": identity, **options}
    policy.add_adapter(peft.LoraConfig(**kept))
    return policy.eval()


# --- a frozen copy ---


def test_what_does_not_learn_is_shared_and_what_learns_is_copied() -> None:
    policy = with_adapter(tiny_policy(architecture="llama"))
    reference = frozen_copy(policy)
    learning = set(learning_names(policy))
    assert learning
    for name, parameter in policy.named_parameters():
        assert (reference.get_parameter(name) is parameter) == (name not in learning), name
        assert parameter.requires_grad == (name in learning)
    own = {buffer.data_ptr() for buffer in reference.buffers()}
    assert own
    assert not own & {buffer.data_ptr() for buffer in policy.buffers()}
    assert not any(parameter.requires_grad for parameter in reference.parameters())


def test_only_the_named_parameters_are_copied_from_a_frozen_model() -> None:
    reference = frozen(tiny_policy())
    again = frozen_copy(reference, own=["transformer.wte.weight"])
    apart = [name for name, parameter in again.named_parameters() if parameter is not reference.get_parameter(name)]
    assert apart == ["transformer.wte.weight"]
    assert again.get_output_embeddings().weight is again.transformer.wte.weight  # tied ones stay tied
    assert fingerprint(again) == fingerprint(reference)


# --- the base under an adapter ---


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}], ids=str)
def test_without_its_adapter_a_policy_is_the_base_model(options: dict[str, object]) -> None:
    base = frozen(tiny_policy(architecture="llama", attention_bias=True, tie_word_embeddings=False))
    start = fingerprint(base)
    plain = response_logits(base, *INPUTS)
    policy = with_adapter(tiny_policy(architecture="llama", attention_bias=True, tie_word_embeddings=False), **options)
    reference = without_adapter(policy)
    assert fingerprint(reference) == start
    assert torch.equal(response_logits(reference, *INPUTS), plain)
    drifted(policy)
    assert fingerprint(reference) == start
    assert not torch.allclose(response_logits(policy, *INPUTS), plain, atol=1e-3)
    shared = {id(p) for p in policy.parameters()} & {id(p) for p in reference.parameters()}
    assert len(shared) >= len(list(reference.parameters())) - len(learning_names(policy))
    assert len(shared) > 0


def test_a_policy_without_an_adapter_has_nothing_to_take_off() -> None:
    with pytest.raises(ModelError, match="Expected a policy with an adapter for the reference adapter_off, found one"):
        without_adapter(tiny_policy())


def test_a_moving_average_is_the_weighted_sum_of_all_policies_since_the_start() -> None:
    """ref_k = decay^k policy_0 + (1 - decay) sum_i decay^(k - i) policy_i."""
    decay, policy = 0.7, tiny_policy().double()
    reference, path = frozen_copy(policy), []
    for update in range(5):
        path.append({name: p.detach().clone() for name, p in policy.named_parameters()})
        if update:
            move_towards(reference, policy, 1 - decay)
        drifted(policy, seed=update)
    last = len(path) - 1
    weights = [decay**last, *((1 - decay) * decay ** (last - i) for i in range(1, last + 1))]
    assert sum(weights) == pytest.approx(1)
    for name, parameter in reference.named_parameters():
        expected = sum(weight * at[name] for weight, at in zip(weights, path, strict=True))
        torch.testing.assert_close(parameter, expected, atol=1e-14, rtol=0)
        assert not parameter.requires_grad


def test_a_share_of_1_copies_every_bit_of_what_learns_and_nothing_else() -> None:
    policy = with_adapter(tiny_policy(architecture="llama"))
    reference = frozen_copy(policy)
    drifted(policy, size=3.0)
    with torch.no_grad():
        policy.get_parameter(learning_names(policy)[0]).view(-1)[0] = -0.0
    buffers = [buffer.clone() for buffer in reference.buffers()]
    base = {name: p for name, p in reference.named_parameters() if name not in learning_names(policy)}
    move_towards(reference, policy, 1.0)
    assert fingerprint(reference) == fingerprint(policy)
    assert all(torch.equal(old, new) for old, new in zip(buffers, reference.buffers(), strict=True))
    assert all(reference.get_parameter(name) is p for name, p in base.items())


def test_tied_weights_move_once() -> None:
    policy = tiny_policy().double()
    reference = frozen_copy(policy)
    start = reference.transformer.wte.weight.clone()
    drifted(policy)
    move_towards(reference, policy, 0.25)
    expected = 0.75 * start + 0.25 * policy.transformer.wte.weight
    torch.testing.assert_close(reference.get_output_embeddings().weight, expected, atol=1e-15, rtol=0)


@pytest.mark.parametrize(
    ("other", "found"),
    [
        (
            {"vocab": 13},
            r"found lm_head.weight \[13, 16\] in the reference and \[12, 16\] in the policy; start it from a",
        ),
        ({"tie_word_embeddings": True}, r"found lm_head.weight missing in the reference and \[12, 16\] in the policy"),
        ({"architecture": "gpt2"}, r"found model.embed_tokens.weight missing in the reference"),
    ],
)
def test_a_reference_of_another_architecture_cannot_follow(other: dict[str, object], found: str) -> None:
    shape = {"architecture": "llama", "tie_word_embeddings": False}
    policy, reference = tiny_policy(**shape), frozen(tiny_policy(**{**shape, **other}))
    require_movable(frozen(tiny_policy(5, **shape)), policy, averaged=True)
    with pytest.raises(ModelError, match=f"Expected a moving reference with the policy's parameters, {found}"):
        require_movable(reference, policy, averaged=False)


def test_a_reference_on_another_base_cannot_follow_an_adapter() -> None:
    policy, same, other = (with_adapter(tiny_policy(seed, architecture="llama")) for seed in (0, 0, 1))
    drifted(same)
    require_movable(frozen(same), policy, averaged=True)
    with pytest.raises(ModelError, match=r"differs from the policy in what learns alone, found another model\.embed"):
        require_movable(frozen(other), policy, averaged=True)
    scaled = with_adapter(tiny_policy(architecture="llama", rope_theta=17.0))
    with pytest.raises(ModelError, match=r"in what learns alone, found another .*inv_freq"):
        require_movable(frozen(scaled), policy, averaged=True)


def test_an_average_needs_digits_and_a_copy_does_not() -> None:
    policy = tiny_policy().to(torch.bfloat16)
    reference = frozen_copy(policy)
    require_movable(reference, policy, averaged=False)
    with pytest.raises(ModelError, match=r"moving average over float32 parameters, found .* in torch.bfloat16, where"):
        require_movable(reference, policy, averaged=True)


# --- what a moving reference may not hide ---


def three_models(*, linear: bool = True) -> Models:
    """A policy that has drifted, a reference that has followed a third of the way, and where that began."""
    policy = tiny_policy(2, **LIVELY).double()
    reference, first = frozen_copy(policy), frozen_copy(policy)
    drifted(policy, size=0.01)
    move_towards(reference, policy, 1 / 3)
    own, other = language_models(policy, reference, vocab=12)
    began = LanguageModel(first, linear=other.linear, vocab=12)
    if not linear:
        own, other, began = (LanguageModel(m.model, linear=None, vocab=12) for m in (own, other, began))
    return Models(policy=own, value=value_model_from_policy(policy), reference=other, first_reference=began)


@torch.no_grad()
@pytest.mark.parametrize("linear", [True, False])
def test_the_kl_to_the_first_reference_is_the_plain_one_in_float64(linear: bool) -> None:
    models = three_models(linear=linear)
    rollout = tiny_rollout(models.policy.model, seed=3, eos=(1, 4), temperature=0.8)
    micro_batches = [torch.tensor([6, 2, 0]), torch.tensor([1]), torch.tensor([7, 3, 4, 5])]
    scored = score_rollout(models, rollout, micro_batches, temperature=0.8)
    inputs = (rollout.sequences, rollout.attention_mask, rollout.response_time)
    policy, ref, first = (
        (response_logits(m.model, *inputs) / 0.8).log_softmax(-1)
        for m in (models.policy, models.reference, models.first_reference)
    )
    mask = rollout.response_mask
    for found, other in ((scored.kl_policy_ref_per_token, ref), (scored.kl_policy_first_ref_per_token, first)):
        torch.testing.assert_close(found[mask], kl_divergence(policy, other)[mask], atol=1e-11, rtol=0)
        assert (found[~mask] == 0).all()
    ratio = scored.kl_policy_ref_per_token.sum() / scored.kl_policy_first_ref_per_token.sum()
    assert 0.3 < float(ratio) < 0.6  # about (2 / 3)^2 where the KL is a square


@torch.no_grad()
def test_a_reference_that_stays_is_its_own_first_one_and_costs_nothing_more() -> None:
    models = three_models()
    alone = Models(policy=models.policy, value=models.value, reference=models.reference)
    rollout = tiny_rollout(models.policy.model)
    scored, beside = (score_rollout(m, rollout, ALL, temperature=1.0, keep_ref_states=True) for m in (alone, models))
    assert scored.kl_policy_first_ref_per_token is scored.kl_policy_ref_per_token
    for name in ("policy_logprobs", "ref_logprobs", "kl_policy_ref_per_token", "policy_entropy", "ref_states"):
        assert torch.equal(getattr(scored, name), getattr(beside, name)), name
    assert not torch.equal(beside.kl_policy_first_ref_per_token, scored.kl_policy_first_ref_per_token)


def records(tmp_path: Path, reference: dict[str, object], updates: int) -> list[dict[str, float]]:
    """The lines of a short run that rewards long responses and drifts quickly."""

    def words(prompts: list[str], completions: list[str]) -> list[float]:
        return [len(completion.split()) / 4 for completion in completions]

    result = kleash.train(
        policy=tiny_policy(**LIVELY),
        tokenizer=tiny_tokenizer(),
        reward=words,
        prompts=PROMPTS,
        out=tmp_path / "run",
        reference=ReferenceConfig(**reference),
        rollout=RolloutConfig(prompts_per_update=8, max_new_tokens=4),
        ppo=PPOConfig(epochs=2, minibatches=2, learning_rate=3e-3),
        updates=updates,
        quiet=True,
    )
    return [json.loads(line) for line in (result.out / "records.jsonl").read_text().splitlines()]


KL, FIRST_KL = "kl_policy_ref_per_sequence", "kl_policy_first_ref_per_sequence"


def test_after_a_refresh_the_kl_is_exactly_0_and_the_kl_to_the_start_is_not(tmp_path: Path) -> None:
    lines = records(tmp_path, {"kind": "periodic", "every": 2}, updates=6)
    assert [line[KL] == 0 for line in lines] == [True, False, True, False, True, False]
    assert [line["ratio_max_first_step"] for line in lines] == [1.0] * 6
    assert lines[0][FIRST_KL] == 0
    assert lines[1][FIRST_KL] == lines[1][KL]
    assert all(line[FIRST_KL] > 0 for line in lines[1:])


def test_the_kl_to_a_moving_average_falls_below_the_kl_to_its_start(tmp_path: Path) -> None:
    lines = records(tmp_path, {"kind": "moving_average", "decay": 0.5}, updates=6)
    assert lines[0][KL] == lines[0][FIRST_KL] == 0
    assert all(0 < line[KL] < line[FIRST_KL] for line in lines[1:])
    assert lines[-1][KL] < 0.7 * lines[-1][FIRST_KL]


def test_of_a_reference_that_stays_both_are_one_number(tmp_path: Path) -> None:
    for line in records(tmp_path, {}, updates=3):
        for end in ("", "_low", "_high"):
            assert line[KL + end] == line[FIRST_KL + end]


# --- which reference a configuration means ---


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("world")
    tiny_policy(7).save_pretrained(directory / "other")
    tiny_tokenizer().save_pretrained(directory / "other")
    return {**save_tiny_world(directory), "other": str(directory / "other")}


def parts_with(world: dict[str, str], reference: object, **given: object) -> object:
    config = config_from(tiny_run(world, "unused", reference=reference), "run.yaml")
    scorer = FunctionScorer(function=lambda prompts, completions: [0.0] * len(prompts), name="nought")
    return load_parts(config, Given(scorer=scorer, **given))


def test_a_reference_that_follows_starts_where_it_is_told_and_its_start_is_kept(world: dict[str, str]) -> None:
    own = fingerprint(tiny_policy())
    for kind in ({"kind": "moving_average"}, {"kind": "periodic", "every": 2}):
        parts = parts_with(world, kind)
        assert fingerprint(parts.reference) == fingerprint(parts.first_reference) == own
        move_towards(parts.reference, tiny_policy(5), 1.0)
        assert fingerprint(parts.first_reference) == own != fingerprint(parts.reference)
        parts = parts_with(world, {**kind, "path": world["other"]})
        assert fingerprint(parts.reference) == fingerprint(parts.first_reference) == fingerprint(tiny_policy(7)) != own
    for stays in (None, world["other"], {"kind": "copy"}, {"path": world["other"]}):
        assert parts_with(world, stays).first_reference is None


def test_the_base_is_the_reference_only_of_a_policy_with_an_adapter(world: dict[str, str]) -> None:
    with pytest.raises(ModelError, match="Expected a policy with an adapter for the reference adapter_off"):
        parts_with(world, {"kind": "adapter_off"})
    policy = tiny_policy()
    policy.add_adapter(peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False))
    parts = parts_with(world, {"kind": "adapter_off"}, policy=policy)
    assert fingerprint(parts.reference) == fingerprint(tiny_policy())


def test_a_reference_with_an_architecture_of_its_own_is_refused_if_it_is_to_follow(
    world: dict[str, str], tmp_path: Path
) -> None:
    wide = tiny_policy()
    wide.resize_token_embeddings(16, mean_resizing=False)
    wide.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    parts_with(world, str(tmp_path))
    with pytest.raises(ModelError, match=r"the policy's parameters, found transformer.wte.weight \[16, 16\]"):
        parts_with(world, {"kind": "moving_average", "path": str(tmp_path)})
