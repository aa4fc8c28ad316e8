"""Models: what is refused when they are loaded, what freezing means, and which logits belong to which token."""

import copy
from pathlib import Path

import pytest
import torch
from tiny import LIVELY, WORDS, tiny_policy, tiny_prompts, tiny_reward_model, tiny_rollout, tiny_tokenizer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from kleash.errors import ModelError
from kleash.models import (
    accepts,
    context_length,
    eos_token_ids,
    fingerprint,
    first_vocabulary_difference,
    forward_arguments,
    frozen,
    load_causal_model,
    load_tokenizer,
    require_same_vocabulary,
    require_special_tokens,
    response_logits,
    tokenizer_beside,
    trainable_parameters,
    unwrapped,
    value_model_from_policy,
    value_model_from_reward,
)
from kleash.reference import frozen_copy
from kleash.rollout import left_padded
from kleash.scorers import ModelScorer

ARCHITECTURES = ["gpt2", "llama"]


# --- tokenizers ---


def saved_tokenizer(path: Path, **options: object) -> Path:
    tiny_tokenizer(**options).save_pretrained(path)
    return path


def test_a_reward_model_is_no_policy(tmp_path):
    tiny_reward_model().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="found GPT2ForSequenceClassification; give the model that"):
        load_causal_model(tmp_path, "policy")


def test_a_tokenizer_without_a_pad_token_is_told_the_remedy(tmp_path):
    source = saved_tokenizer(tmp_path, pad_token=None)
    with pytest.raises(ModelError, match="name one in the config, for example pad_token: '<eos>'"):
        load_tokenizer(source)
    assert load_tokenizer(source, pad_token="<eos>").pad_token_id == 1
    assert load_tokenizer(source, pad_token="cat").pad_token_id == WORDS.index("cat")


def test_a_pad_token_that_is_no_token_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"pad_token in the vocabulary of .*, found '<nothing>'"):
        load_tokenizer(saved_tokenizer(tmp_path), pad_token="<nothing>")


def test_the_pad_token_of_the_config_wins_over_the_tokenizers_own(tmp_path):
    assert load_tokenizer(saved_tokenizer(tmp_path)).pad_token == "<pad>"
    assert load_tokenizer(saved_tokenizer(tmp_path), pad_token="<eos>").pad_token == "<eos>"


def test_a_tokenizer_without_an_eos_token_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="tokenizer with an EOS token"):
        require_special_tokens(tokenizer)


def test_pad_equal_to_eos_is_welcome():
    require_special_tokens(tiny_tokenizer(pad_token="<eos>"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_saved_without_its_tokenizer_is_one_sentence(tmp_path, architecture):
    """For some architectures transformers makes up an empty tokenizer: that is none."""
    tiny_policy(architecture=architecture).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="Expected the policy's tokenizer at") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_nothing_at_all_is_one_sentence(tmp_path):
    for load in (load_tokenizer, lambda source: load_causal_model(source, "policy")):
        with pytest.raises(ModelError, match=r"Expected .* at .*missing.*, found ") as caught:
            load(tmp_path / "missing")
        assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match=r"causal language model at .* for the reference"):
        load_causal_model(tmp_path, "reference")


def refused(load, place):
    with pytest.raises(ModelError) as caught:
        load(place)
    return str(caught.value)


@pytest.mark.parametrize("load", [load_tokenizer, lambda place: load_causal_model(place, "policy")])
def test_what_is_no_model_says_what_to_give_and_names_the_policy_in_a_run_only_where_it_lies(tmp_path, load):
    (tmp_path / "prompts.jsonl").write_text("{}")
    assert refused(load, tmp_path / "prompts.jsonl").endswith("found a file; give a model's directory or name.")
    run = tmp_path / "run"
    for name in ("000002", "000010", ".000012.partial"):
        (run / "checkpoints" / name).mkdir(parents=True)
    for place in (run, run / "checkpoints" / "000010"):
        assert refused(load, place).endswith("without config.json; give one that save_pretrained wrote.")
    for name in ("000002", "000010", ".000012.partial"):
        (run / "checkpoints" / name / "policy").mkdir()
    newest, oldest = (run / "checkpoints" / name / "policy" for name in ("000010", "000002"))
    assert refused(load, run).endswith(f"without config.json; give {newest}.")
    assert refused(load, oldest.parent).endswith(f"without config.json; give {oldest}.")
    assert refused(load, oldest).endswith("without config.json; give one that save_pretrained wrote.")


# --- reference and policy ---


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_loaded_model_is_float32_without_dropout_and_says_what_the_saved_one_said(tmp_path, architecture):
    model = tiny_policy(2, architecture=architecture, dropout=0.5, **LIVELY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = load_causal_model(tmp_path, "policy")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert not loaded.training
    assert all(not module.training for module in loaded.modules())
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(loaded(input_ids=ids).logits, loaded(input_ids=ids).logits)
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_frozen_copy_stays_while_the_policy_learns():
    policy = tiny_policy(2, dropout=0.5, **LIVELY).train()
    reference = frozen_copy(policy)
    before = fingerprint(reference)
    assert before == fingerprint(policy)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    policy(input_ids=torch.tensor([[3, 4]])).logits.square().sum().backward()
    optimizer.step()
    assert fingerprint(reference) == before != fingerprint(policy)
    assert not reference.training
    assert not any(p.requires_grad or p.grad is not None for p in reference.parameters())
    assert all(p.requires_grad for p in policy.parameters())
    assert policy.training  # the original is left as it was


def test_the_fingerprint_sees_every_parameter():
    model = tiny_policy(2, tie_word_embeddings=False)
    before, seen = fingerprint(model), set()
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            old = parameter.view(-1)[-1].item()
            parameter.view(-1)[-1] += 1e-6 * max(abs(old), 1.0)
            assert fingerprint(model) not in {before, *seen}, name
            seen.add(fingerprint(model))
            parameter.view(-1)[-1] = old
    assert fingerprint(model) == before


def test_the_fingerprint_survives_saving_and_loading_and_sees_the_dtype(tmp_path):
    model = tiny_policy(2)
    model.save_pretrained(tmp_path)
    assert fingerprint(load_causal_model(tmp_path, "policy")) == fingerprint(model)
    assert fingerprint(copy.deepcopy(model).to(torch.bfloat16)) != fingerprint(model)


def test_the_fingerprint_sees_which_name_holds_which_value_and_its_shape():
    one, other = (
        nn.ParameterDict({"a": torch.zeros(2), "b": torch.ones(2)}),
        nn.ParameterDict({"a": torch.ones(2), "b": torch.zeros(2)}),
    )
    flat = nn.ParameterDict({"a": torch.zeros(1, 2), "b": torch.ones(2)})
    assert len({fingerprint(one), fingerprint(other), fingerprint(flat)}) == 3


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reference checkpoints with the policy's tokenizer, another one, none, and padded or cut vocabularies."""
    directory = tmp_path_factory.mktemp("references")
    swapped, longer = [*WORDS[:6], "dog", "cat", *WORDS[8:]], [*WORDS, "bird"]
    for name, (vocab, words) in {
        "same": (12, WORDS),
        "alone": (12, None),
        "other": (12, swapped),
        "longer": (12, longer),
        "padded": (16, WORDS),
        "padded_alone": (16, None),
        "padded_other": (16, swapped),
        "padded_longer": (16, longer),
        "cut": (11, WORDS),
    }.items():
        tiny_policy(vocab=vocab).save_pretrained(directory / name)
        if words is not None:
            tiny_tokenizer(words=words).save_pretrained(directory / name)
    return directory


@pytest.mark.parametrize(("name", "width"), [("same", 12), ("alone", 12), ("padded", 16), ("padded_alone", 16)])
def test_a_reference_of_the_same_tokens_is_accepted(references, name, width):
    reference = load_causal_model(references / name, "reference")
    require_same_vocabulary(tiny_tokenizer(), references / name, reference, width)


@pytest.mark.parametrize(("name", "width"), [("padded", 12), ("padded", 13), ("padded", 64), ("same", 16)])
def test_either_vocabulary_may_be_padded_where_a_tokenizer_shows_it(references, name, width):
    reference = load_causal_model(references / name, "reference")
    require_same_vocabulary(tiny_tokenizer(), references / name, reference, width)


@pytest.mark.parametrize(
    ("name", "width", "message"),
    [
        ("cut", 12, "each of the 12 tokens, found 12 in the policy and 11 at .*cut; choose the model that the policy"),
        ("padded", 11, "each of the 12 tokens, found 11 in the policy and 16 at .*padded; choose the model"),
        (
            "padded_alone",
            12,
            "vocabulary of 12, found 16 at .*padded_alone and no tokenizer beside it .*; load it from",
        ),
        ("padded_other", 12, "found token 6 is 'dog' there and 'cat' in the policy"),
        ("padded_longer", 12, "found token 12 is 'bird' there and None in the policy"),
    ],
)
def test_another_number_of_logits_that_is_not_mere_padding_is_refused(references, name, width, message):
    reference = load_causal_model(references / name, "reference")
    with pytest.raises(ModelError, match=message):
        require_same_vocabulary(tiny_tokenizer(), references / name, reference, width)


def test_the_tokens_count_by_their_largest_id_and_not_by_their_number(references):
    """A vocabulary with gaps: one word of twelve, but with the id 14."""
    gapped = tiny_tokenizer()
    vocabulary = {**gapped.get_vocab(), ".": 14}
    gapped.get_vocab = lambda: vocabulary
    reference = load_causal_model(references / "padded", "reference")
    with pytest.raises(ModelError, match="each of the 15 tokens, found 13 in the policy and 16"):
        require_same_vocabulary(gapped, references / "padded", reference, 13)


def test_the_tokenizer_beside_a_model_is_found_and_an_empty_one_is_none(references, tmp_path, monkeypatch):
    assert tokenizer_beside(references / "same").get_vocab() == tiny_tokenizer().get_vocab()
    for architecture in ARCHITECTURES:
        tiny_policy(architecture=architecture).save_pretrained(tmp_path / architecture)
        assert tokenizer_beside(tmp_path / architecture) is None
    monkeypatch.chdir(references / "same")
    assert tokenizer_beside("") is None  # a model built in memory comes from nowhere, not from here
    assert first_vocabulary_difference(tiny_tokenizer(), tiny_tokenizer()) is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("other", "found token 6 is 'dog' there and 'cat' in the policy"),
        ("longer", "found token 12 is 'bird' there and None in the policy"),
    ],
)
def test_a_reference_of_other_tokens_is_refused_with_the_first_difference(references, name, message):
    reference = load_causal_model(references / name, "reference")
    with pytest.raises(ModelError, match=message):
        require_same_vocabulary(tiny_tokenizer(), references / name, reference, 12)


def test_every_token_that_closes_a_response_is_known():
    tokenizer: PreTrainedTokenizerFast = tiny_tokenizer()
    model = tiny_policy()
    assert eos_token_ids(model, tokenizer) == [1]
    model.generation_config.eos_token_id = [7, 4, 1]
    assert eos_token_ids(model, tokenizer) == [1, 4, 7]
    model.generation_config.eos_token_id = None
    assert eos_token_ids(model, tokenizer) == [1]
    model.generation_config = None
    assert eos_token_ids(model, tokenizer) == [1]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_context_is_the_number_of_positions(architecture):
    assert context_length(tiny_policy(architecture=architecture)) == 64


# --- logits and values ---


class NoLogitsToKeep(nn.Module):
    """The same model behind a forward without logits_to_keep and position_ids."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> object:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_row_t_of_the_response_logits_is_what_token_t_was_drawn_from(architecture):
    model = tiny_policy(2, architecture=architecture, **LIVELY)
    sequences = torch.tensor([[3, 4, 5, 6, 7, 8], [9, 10, 4, 6, 3, 1]])
    mask = torch.ones_like(sequences, dtype=torch.bool)
    full = model(input_ids=sequences).logits
    for time in (1, 2, 5):
        found = response_logits(model, sequences, mask, time)
        torch.testing.assert_close(found, full[:, 6 - time - 1 : -1], atol=1e-6, rtol=0)
        plain = response_logits(NoLogitsToKeep(model), sequences, mask, time)
        torch.testing.assert_close(plain, found, atol=1e-6, rtol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_left_padding_changes_no_logit_beyond_float_error(architecture):
    model = tiny_policy(2, architecture=architecture, **LIVELY)
    tokens = [[*prompt, 6, 8, 11] for prompt in tiny_prompts().tokens]
    for pad in (0, 1, 5):
        padded = response_logits(model, *left_padded(tokens, pad, torch.device("cpu")), 3)
        for row, text in enumerate(tokens):
            alone = model(input_ids=torch.tensor([text])).logits[0, -4:-1]
            torch.testing.assert_close(padded[row], alone, atol=2e-5, rtol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("time", [1, 2, 5])
def test_a_frozen_copy_gives_the_very_bits_of_its_policy(architecture, time):
    """Whether a weight wants a gradient must not choose another routine, with another rounding."""
    for seed in range(12):
        policy = tiny_policy(seed, architecture=architecture, **LIVELY)
        reference = frozen_copy(policy)
        sequences = torch.randint(3, 12, (1 + seed % 3, 6), generator=torch.Generator().manual_seed(seed))
        mask = torch.ones_like(sequences, dtype=torch.bool)
        logits = response_logits(policy, sequences, mask, time)
        assert torch.equal(logits.detach(), response_logits(reference, sequences, mask, time))


def test_the_arguments_of_a_forward_pass_are_those_that_it_names():
    assert accepts(tiny_policy(), "logits_to_keep")
    assert not accepts(NoLogitsToKeep(tiny_policy()), "logits_to_keep")
    assert accepts(tiny_policy(), "logits_to_keep")  # asked again after another class was


def test_a_cached_step_has_the_positions_of_its_own_tokens_alone():
    mask = torch.tensor([[False, False, True, True, True], [True, True, True, True, True]])
    model, ids = tiny_policy(), torch.arange(10).view(2, 5)
    whole = forward_arguments(model, ids, mask)
    assert whole["input_ids"] is ids
    assert whole["attention_mask"].tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert whole["position_ids"].tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
    step = forward_arguments(model, ids[:, -1:], mask)
    assert step["input_ids"].tolist() == [[4], [9]]
    assert step["attention_mask"].tolist() == whole["attention_mask"].tolist()
    assert step["position_ids"].tolist() == [[2], [4]]
    assert "position_ids" not in forward_arguments(NoLogitsToKeep(model), ids, mask)


def test_only_a_data_parallel_wrapper_is_taken_off():
    model = nn.Sequential()
    model.module = nn.Linear(1, 1)
    assert unwrapped(model) is model
    wrapper = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper.module = model
    assert unwrapped(wrapper) is model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_value_model_from_the_policy_starts_at_0_and_learns_on_its_own(architecture):
    policy = tiny_policy(2, architecture=architecture, dropout=0.5, **LIVELY)
    value, rollout = value_model_from_policy(policy), tiny_rollout(policy)
    inputs = (rollout.sequences, rollout.attention_mask, rollout.response_time)
    values = value(*inputs)
    assert values.shape == rollout.response_mask.shape
    assert (values == 0).all()
    assert all(p.requires_grad for p in value.parameters())
    assert not value.training
    mine, policys = {id(p) for p in value.parameters()}, {id(p) for p in policy.parameters()}
    assert not mine & policys
    values.sum().backward()
    assert value.head.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in policy.parameters())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_value_model_from_the_reward_model_starts_as_its_score(architecture):
    """The value before a token is what the reward model says of the text so far."""
    reward = frozen(tiny_reward_model(3, architecture=architecture, **LIVELY))
    value, rollout = value_model_from_reward(reward), tiny_rollout(tiny_policy(2, **LIVELY))
    inputs = (rollout.sequences, rollout.attention_mask, rollout.response_time)
    values = value(*inputs)
    for row, text in enumerate(rollout.sequences):
        real = text[rollout.attention_mask[row]]
        length = int(rollout.response_mask[row].sum())
        hidden = reward.base_model(input_ids=real.unsqueeze(0)).last_hidden_state
        before_each_token = reward.score(hidden)[0, -length - 1 : -1, 0]
        torch.testing.assert_close(values[row, :length], before_each_token, atol=1e-5, rtol=0)
    longer = torch.cat([rollout.sequences, torch.zeros(8, 1, dtype=torch.int64)], 1)
    mask = torch.cat([rollout.attention_mask, torch.ones(8, 1, dtype=torch.bool)], 1)
    full = rollout.response_mask.all(1)
    scores = ModelScorer(model=reward, name="r")(tiny_prompts(), rollout)
    torch.testing.assert_close(value(longer, mask, 1)[full, 0], scores[full], atol=1e-5, rtol=0)
    assert all(p.requires_grad for p in value.parameters())
    assert not any(p.requires_grad for p in reward.parameters())


def test_the_optimizer_holds_every_trainable_parameter_once_and_nothing_frozen():
    policy = tiny_policy()
    value = value_model_from_policy(policy)
    held = list(trainable_parameters(policy, value, frozen_copy(policy)))
    assert len({id(p) for p in held}) == len(held)
    assert len(held) == len(list(policy.parameters())) + len(list(value.parameters()))
