"""Parts: what a configuration loads, what it makes of a missing one, and that misfits are found before training."""

from pathlib import Path

import pytest
import torch
from tiny import PROMPTS, WORDS, save_tiny_world, tiny_policy, tiny_reward_model, tiny_run, tiny_tokenizer
from transformers import AutoModelForCausalLM

from kleash.config import RunConfig, config_from
from kleash.errors import ModelError, PromptError
from kleash.models import fingerprint
from kleash.parts import Given, load_parts, scorer_from
from kleash.scorers import FunctionScorer, ModelScorer, WeightedScorer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_tiny_world(tmp_path_factory.mktemp("world"), dropout=0.5)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"


def configured(world: dict[str, str], out: Path, **changes: object) -> RunConfig:
    return config_from(tiny_run(world, out, **changes), "a test")


def constant(prompts: list, completions: list, **columns: list) -> list[float]:
    return [1.0] * len(prompts)


def test_a_configuration_loads_every_part(world, out):
    parts = load_parts(configured(world, out, eval_reward=world["reward"]), Given())
    assert parts.prompts.texts == PROMPTS
    assert parts.eos_token_ids == [1]
    assert isinstance(parts.scorer, ModelScorer)
    assert isinstance(parts.eval_scorer, ModelScorer)
    assert not out.exists()  # nothing is written
    for model in (parts.policy, parts.reference, parts.value, parts.scorer.model):
        assert not any(module.training for module in model.modules())  # no dropout anywhere
    trains = {"policy": parts.policy, "value": parts.value}
    stays = {"reference": parts.reference, "reward": parts.scorer.model}
    assert all(p.requires_grad for model in trains.values() for p in model.parameters())
    assert not any(p.requires_grad for model in stays.values() for p in model.parameters())


def test_without_a_reference_it_is_a_copy_of_the_policys_start(world, out):
    parts = load_parts(configured(world, out), Given())
    assert parts.reference is not parts.policy
    assert fingerprint(parts.reference) == fingerprint(parts.policy)
    with torch.no_grad():
        next(parts.policy.parameters()).add_(1)
    assert fingerprint(parts.reference) != fingerprint(parts.policy)


def test_a_named_reference_is_loaded_and_never_the_policy_itself(world, out, tmp_path):
    tiny_policy(9).save_pretrained(tmp_path / "reference")
    parts = load_parts(configured(world, out, reference=str(tmp_path / "reference")), Given())
    assert fingerprint(parts.reference) == fingerprint(tiny_policy(9)) != fingerprint(parts.policy)


def test_the_value_model_starts_from_the_reward_model_where_there_is_one(world, out):
    with_model = load_parts(configured(world, out), Given())
    assert torch.equal(with_model.value.head.weight, tiny_reward_model().score.weight)
    with_function = load_parts(configured(world, out), Given(scorer=FunctionScorer(function=constant, name="f")))
    assert (with_function.value.head.weight == 0).all()
    trunk = with_function.policy.base_model
    assert fingerprint(with_function.value.trunk) == fingerprint(trunk)
    assert with_function.value.trunk is not trunk


def test_given_objects_win_over_names(world, out):
    policy, reference, tokenizer = tiny_policy(5), tiny_policy(6), tiny_tokenizer()
    given = Given(policy=policy, reference=reference, tokenizer=tokenizer, rows=[{"prompt": "a cat", "answer": 4}])
    parts = load_parts(configured(world, out), given)
    assert parts.policy is policy
    assert parts.reference is reference
    assert parts.tokenizer is tokenizer
    assert parts.prompts.texts == ["a cat"]
    assert parts.prompts.columns == {"answer": [4]}
    assert not any(p.requires_grad for p in reference.parameters())


def test_a_reference_may_share_with_the_policy_what_does_not_learn(world, out):
    policy, reference = tiny_policy(), tiny_policy()
    reference.transformer.wpe = policy.transformer.wpe
    with pytest.raises(ModelError, match=r"it shares transformer\.wpe\.weight with the policy; leave reference out"):
        load_parts(configured(world, out), Given(policy=policy, reference=reference))
    policy.transformer.wpe.weight.requires_grad_(False)
    assert load_parts(configured(world, out), Given(policy=policy, reference=reference)).reference is reference


def test_a_policy_that_cannot_learn_is_refused(world, out):
    with pytest.raises(ModelError, match="Expected a policy with parameters that learn, found that all of them are fr"):
        load_parts(configured(world, out), Given(policy=tiny_policy().requires_grad_(False)))


def test_a_weighted_list_of_rewards_becomes_one_scorer(world, tmp_path, monkeypatch):
    (tmp_path / "weighted_rewards.py").write_text("def two(prompts, completions):\n    return [2.0] * len(prompts)\n")
    monkeypatch.chdir(tmp_path)
    source = [{"source": world["reward"], "weight": 0.5}, {"source": "weighted_rewards:two", "weight": -3.0}]
    scorer = scorer_from(configured(world, tmp_path, reward=source).reward, tiny_tokenizer())
    assert isinstance(scorer, WeightedScorer)
    assert scorer.weights == (0.5, -3.0)
    assert [type(part) for part in scorer.scorers] == [ModelScorer, FunctionScorer]


@pytest.fixture(scope="module")
def misfits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("misfits")
    tiny_policy(vocab=13).save_pretrained(directory / "wider")
    tiny_policy().save_pretrained(directory / "other")
    tiny_tokenizer(words=[*WORDS[:6], "dog", "cat", *WORDS[8:]]).save_pretrained(directory / "other")
    tiny_policy().save_pretrained(directory / "unpadded")
    tiny_tokenizer(pad_token=None).save_pretrained(directory / "unpadded")
    return directory


@pytest.mark.parametrize(
    ("name", "message"), [("wider", "vocabulary of 12, found 13"), ("other", "token 6 is 'dog' there and 'cat'")]
)
def test_a_reference_that_does_not_fit_is_refused(world, out, misfits, name, message):
    with pytest.raises(ModelError, match=message):
        load_parts(configured(world, out, reference=str(misfits / name)), Given())


def test_a_reference_handed_over_as_an_object_is_held_against_the_policy_too(world, out, misfits):
    with pytest.raises(ModelError, match="vocabulary of 12, found 13"):
        load_parts(configured(world, out), Given(reference=tiny_policy(vocab=13)))
    other = AutoModelForCausalLM.from_pretrained(misfits / "other")
    with pytest.raises(ModelError, match="token 6 is 'dog' there and 'cat'"):
        load_parts(configured(world, out, reference="given as a GPT2LMHeadModel"), Given(reference=other))


def test_the_pad_token_of_the_configuration_is_used(world, out, misfits):
    with pytest.raises(ModelError, match="name one in the config, for example pad_token: '<eos>'"):
        load_parts(configured(world, out, policy=str(misfits / "unpadded")), Given())
    parts = load_parts(configured(world, out, policy=str(misfits / "unpadded"), pad_token="<eos>"), Given())
    assert parts.tokenizer.pad_token_id == 1


def test_a_tokenizer_handed_over_without_a_pad_token_is_refused(world, out):
    with pytest.raises(ModelError, match="tokenizer with a pad token"):
        load_parts(configured(world, out), Given(tokenizer=tiny_tokenizer(pad_token=None)))


def test_prompts_are_looked_at_before_any_model_is_loaded(world, out):
    with pytest.raises(PromptError, match="no such file"):
        load_parts(configured(world, out, policy="/nowhere", reward="/nowhere", prompts="missing.jsonl"), Given())
    with pytest.raises(PromptError, match="at least one prompt"):
        load_parts(configured(world, out, policy="/nowhere"), Given(rows=[]))
    with pytest.raises(PromptError, match="found text; rename the column"):
        load_parts(configured(world, out, policy="/nowhere"), Given(rows=[{"text": "a cat"}]))


def test_prompts_that_leave_no_room_are_refused(world, out):
    rollout = {"prompts_per_update": 8, "max_new_tokens": 61}
    with pytest.raises(PromptError, match=r"at most 3 tokens \(context 64 less max_new_tokens 61\), found 4 longer"):
        load_parts(configured(world, out, rollout=rollout), Given())
