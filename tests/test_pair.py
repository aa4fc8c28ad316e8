"""A policy and a reference over one vocabulary: loaded, or taken as they are, and held against each other."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from tiny import LIVELY, WORDS, tiny_policy, tiny_tokenizer

from kleash.errors import ModelError
from kleash.models import load_causal_model
from kleash.pair import load_pair, name_of, training_modes_kept

peft = pytest.importorskip("peft")


def saved(directory: Path, name: str, *, words: list[str] | None = WORDS, seed: int = 0, **config: object) -> str:
    """A model on disk, with a tokenizer of these words beside it; None = without."""
    path = directory / name
    tiny_policy(seed, **{**LIVELY, **config}).save_pretrained(path)
    if words is not None:
        tiny_tokenizer(words=words).save_pretrained(path)
    return str(path)


def test_two_checkpoints_become_a_pair_that_does_not_learn(tmp_path):
    pair = load_pair(saved(tmp_path, "p", seed=1, dropout=0.5), saved(tmp_path, "r", dropout=0.5))
    assert pair.vocab == len(WORDS)
    assert pair.eos_token_ids == [1]
    assert pair.context == 64
    assert pair.tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    assert pair.policy.linear is not None
    for one, seed in ((pair.policy, 1), (pair.reference, 0)):
        expected = tiny_policy(seed, **LIVELY).state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in one.model.state_dict().items())
        assert not one.model.training
        assert not any(parameter.requires_grad for parameter in one.model.parameters())


def test_the_context_is_the_shorter_one_and_none_where_nobody_names_a_limit(tmp_path):
    policy, reference = tiny_policy(), tiny_policy()
    reference.config.max_position_embeddings = 40
    pair = load_pair(policy, reference, tokenizer=tiny_tokenizer())
    assert pair.context == 40
    for model in (policy, reference):
        model.config.max_position_embeddings = None
    assert load_pair(policy, reference, tokenizer=tiny_tokenizer()).context is None


def test_models_that_were_given_are_the_very_same_with_dropout_off(tmp_path):
    policy, reference = tiny_policy(1, dropout=0.5).train(), tiny_policy(0).train()
    pair = load_pair(policy, reference, tokenizer=tiny_tokenizer())
    assert pair.policy.model is policy
    assert pair.reference.model is reference
    assert not any(module.training for module in policy.modules())
    assert all(parameter.requires_grad for parameter in policy.parameters())


def test_every_module_gets_its_training_mode_back_also_after_an_error():
    model = tiny_policy(dropout=0.5).train()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    assert len(set(before)) == 2

    def fails() -> None:
        with training_modes_kept(model, "a path", Path("another")):
            model.eval()
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert [module.training for module in model.modules()] == before


@pytest.mark.usefixtures("absent_accelerator")
def test_models_are_loaded_on_the_cpu_where_the_accelerator_is_absent(tmp_path):
    path = saved(tmp_path, "p")
    assert load_pair(path, path).device == torch.device("cpu")


def test_weights_are_loaded_in_the_type_that_was_asked_for(tmp_path):
    path = saved(tmp_path, "p")
    assert load_pair(path, path).policy.model.dtype == torch.float32
    assert load_pair(path, path, dtype=torch.bfloat16).reference.model.dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks for it
def test_an_adapter_is_loaded_with_its_base_and_without_a_tokenizer_of_its_own_takes_that_of_the_base(tmp_path):
    base = saved(tmp_path, "base", architecture="llama", tie_word_embeddings=False)
    torch.manual_seed(3)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(tiny_policy(architecture="llama", tie_word_embeddings=False, **LIVELY), config)
    adapted.peft_config["default"].base_model_name_or_path = base
    adapted.save_pretrained(tmp_path / "adapter")
    pair = load_pair(tmp_path / "adapter", base)
    tokens = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        found, plain = (one.model(input_ids=tokens).logits for one in (pair.policy, pair.reference))
        expected = adapted.eval()(input_ids=tokens).logits
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert (found - plain).abs().max() > 1e-3
    assert pair.tokenizer.get_vocab() == tiny_tokenizer().get_vocab()


def bytes_of(*models: torch.nn.Module) -> int:
    """What the parameters take, those that several models share once."""
    held = {parameter.data_ptr(): parameter.nbytes for model in models for parameter in model.parameters()}
    return sum(held.values())


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[3, 4, 5, 6]])).logits


ADAPTERS = {
    "low rank": {"target_modules": ["q_proj", "v_proj"]},
    "on the embeddings": {"target_modules": ["embed_tokens", "o_proj"]},
    "with a head of its own": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "with magnitudes": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks for it
@pytest.mark.filterwarnings("ignore:.*(embedding|tie_word)")  # and peft says what it does with embeddings
@pytest.mark.filterwarnings("ignore:Expected a .* found a head of type ModulesToSaveWrapper")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_base_under_two_adapters_or_beside_one_is_held_once_and_says_what_it_said(tmp_path, kind, tied):
    if tied and kind == "with a head of its own":
        pytest.skip("a head of its own is not tied")
    base = saved(tmp_path, "base", architecture="llama", tie_word_embeddings=tied)
    for seed in (3, 4):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=2, init_lora_weights=False, **ADAPTERS[kind])
        adapted = peft.get_peft_model(load_causal_model(base, "test"), config)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.01 * seed)
        adapted.save_pretrained(tmp_path / f"adapter{seed}")
    alone = {
        path: load_causal_model(path, "test") for path in (base, *(tmp_path / f"adapter{seed}" for seed in (3, 4)))
    }
    whole = bytes_of(alone[base])
    for policy, reference in itertools.permutations(alone, 2):
        pair = load_pair(policy, reference, tokenizer=tiny_tokenizer())
        models = {policy: pair.policy.model, reference: pair.reference.model}
        for path, model in models.items():
            assert torch.equal(logits_of(model), logits_of(alone[path])), path
        adapters = sum(bytes_of(alone[path]) - whole for path in models)
        assert bytes_of(*models.values()) == whole + adapters


def test_parameters_that_differ_are_held_by_each_and_those_of_models_that_were_given_are_left_alone(tmp_path):
    path, other = saved(tmp_path, "p"), tiny_policy(0, **LIVELY)
    with torch.no_grad():
        other.transformer.h[0].mlp.c_fc.weight[0, 0] += 1
    other.save_pretrained(tmp_path / "r")
    pair = load_pair(path, tmp_path / "r")
    own, its = (dict(one.model.named_parameters()) for one in (pair.policy, pair.reference))
    assert [name for name in own if own[name] is not its[name]] == ["transformer.h.0.mlp.c_fc.weight"]
    assert torch.equal(logits_of(pair.reference.model), logits_of(other))
    for pair in (load_pair(path, other), load_pair(other, path, tokenizer=tiny_tokenizer())):
        assert bytes_of(pair.policy.model, pair.reference.model) == 2 * bytes_of(other)


def test_another_tokenizer_is_refused_with_the_first_token_that_differs(tmp_path):
    other = [*WORDS[:6], "bird", *WORDS[7:]]
    with pytest.raises(ModelError, match=r"to use the policy's tokenizer, found token 6 is 'bird' there and 'cat' in"):
        load_pair(saved(tmp_path, "p"), saved(tmp_path, "r", words=other))


def test_a_vocabulary_that_one_of_them_pads_to_a_rounder_size_is_cut_to_the_tokens(tmp_path):
    narrow, wide = saved(tmp_path, "narrow"), saved(tmp_path, "wide", vocab=16)
    assert load_pair(narrow, wide).vocab == load_pair(wide, narrow).vocab == len(WORDS)


def test_a_reference_that_lacks_tokens_is_refused(tmp_path):
    few = saved(tmp_path, "few", vocab=8)
    with pytest.raises(ModelError, match=r"a logit for each of the 12 tokens, found 12 in the policy and 8 at"):
        load_pair(saved(tmp_path, "p"), few)


def test_a_wider_reference_without_a_tokenizer_cannot_show_that_the_rest_is_padding(tmp_path):
    with pytest.raises(ModelError, match=r"vocabulary of 12, found 16 at .* and no tokenizer beside it"):
        load_pair(saved(tmp_path, "p"), saved(tmp_path, "r", words=None, vocab=16))


def test_a_policy_without_a_tokenizer_is_refused_by_its_place(tmp_path):
    bare = saved(tmp_path, "bare", words=None)
    with pytest.raises(
        ModelError, match=r"Expected the policy's tokenizer at .*bare, found none; save it beside the policy"
    ):
        load_pair(bare, bare)


def test_a_policy_from_memory_needs_its_tokenizer_given(monkeypatch, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "elsewhere"}))
    monkeypatch.chdir(tmp_path)  # what lies in the working directory is nobody's tokenizer
    with pytest.raises(ModelError, match=r"^Expected a tokenizer for a policy in memory, found none; give one\.$"):
        load_pair(tiny_policy(), tiny_policy())
    tiny_tokenizer(words=WORDS[::-1]).save_pretrained(tmp_path)
    assert load_pair(tiny_policy(), tiny_policy(), tokenizer=tiny_tokenizer()).vocab == len(WORDS)


def test_a_tokenizer_without_a_pad_token_is_refused_with_the_remedy_and_taken_with_it(tmp_path):
    path = saved(tmp_path, "p")
    tiny_tokenizer(pad_token=None).save_pretrained(path)
    with pytest.raises(ModelError, match="Expected a tokenizer with a pad token, found none"):
        load_pair(path, path)
    assert load_pair(path, path, pad_token="<eos>").tokenizer.pad_token_id == 1


def test_nothing_to_load_is_named_with_its_role(tmp_path):
    path = saved(tmp_path, "p")
    with pytest.raises(ModelError, match=r"at .*nowhere for the reference, found no such directory"):
        load_pair(path, tmp_path / "nowhere")


def test_figures_name_a_model_by_its_source_or_its_class(tmp_path):
    path = saved(tmp_path, "p")
    assert name_of(path) == path
    assert name_of(Path(path)) == path
    assert name_of(load_pair(path, path).policy.model) == path
    assert name_of(tiny_policy()) == "a GPT2LMHeadModel in memory"
