"""Scorers: the score of the last response token, of a function, or of both; and how each says what is wrong."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import LIVELY, PROMPTS, WORDS, tiny_policy, tiny_prompts, tiny_reward_model, tiny_rollout, tiny_tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from kleash.batch import Prompts, Rollout
from kleash.errors import RewardError
from kleash.scorers import (
    FunctionScorer,
    ModelScorer,
    TextModelScorer,
    WeightedScorer,
    load_reward_model,
    load_scorer,
    model_scorer,
    reward_models,
    shortened,
    value_trunk_source,
)

ARCHITECTURES = ["gpt2", "llama"]
TEMPLATE = "{% for m in messages %}{{ m.content + ' . ' }}{% endfor %}{% if add_generation_prompt %}a {% endif %}"


def rollout_of_tiny(**options: object) -> Rollout:
    return tiny_rollout(tiny_policy(2, **LIVELY), seed=3, max_new_tokens=8, **options)


def lively_reward_model(seed: int = 1, **config: object) -> PreTrainedModel:
    return tiny_reward_model(seed, **LIVELY, **config)


@torch.no_grad()
def head_at_last_token(model: PreTrainedModel, rollout: Rollout, row: int) -> float:
    """The score by hand: the text alone, without padding, the head on its last token."""
    text = rollout.sequences[row][rollout.attention_mask[row]].unsqueeze(0)
    return float(model.score(model.base_model(input_ids=text).last_hidden_state)[0, -1, 0])


# --- reward models ---


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_score_is_that_of_the_models_own_forward_pass(architecture):
    """Where pad is not EOS the model finds the last token by itself: alone, and in a right-padded batch."""
    model, rollout = lively_reward_model(architecture=architecture), rollout_of_tiny()
    scores = ModelScorer(model=model, name="reward")(tiny_prompts(), rollout)
    texts = [sequence[mask] for sequence, mask in zip(rollout.sequences, rollout.attention_mask, strict=True)]
    own = [i for i, text in enumerate(texts) if text[-1] != 0]  # the model itself takes a closing 0 for padding
    assert len(own) > 5
    with torch.no_grad():
        alone = torch.cat([model(input_ids=text.unsqueeze(0)).logits.flatten() for text in texts])
        ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
        batched = model(input_ids=ids, attention_mask=mask).logits.flatten()
    torch.testing.assert_close(scores[own], alone[own], atol=1e-5, rtol=0)
    torch.testing.assert_close(scores[own], batched[own], atol=1e-5, rtol=0)
    assert scores.std() > 0.1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_where_pad_is_eos_the_closing_eos_is_still_the_token_that_is_scored(architecture):
    model = lively_reward_model(architecture=architecture)
    rollout = rollout_of_tiny()
    padded_with_eos = rollout.sequences.masked_fill(~rollout.attention_mask, 1)
    same = Rollout(**{**vars(rollout), "sequences": padded_with_eos})
    assert rollout.finished.any()
    assert not rollout.finished.all()
    scores = ModelScorer(model=model, name="reward")(tiny_prompts(), same)
    expected = [head_at_last_token(model, rollout, row) for row in range(8)]
    torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-5, rtol=0)


def test_a_model_score_reads_no_padding():
    model, rollout = lively_reward_model(), rollout_of_tiny()
    scorer = ModelScorer(model=model, name="reward")
    rubbish = torch.where(rollout.attention_mask, rollout.sequences, torch.randint(0, 12, rollout.sequences.shape))
    changed = Rollout(**{**vars(rollout), "sequences": rubbish})
    assert torch.equal(scorer(tiny_prompts(), rollout), scorer(tiny_prompts(), changed))


def test_scoring_in_small_batches_gives_the_same_scores():
    model, rollout = lively_reward_model(), rollout_of_tiny()
    whole = ModelScorer(model=model, name="reward")(tiny_prompts(), rollout)
    few = ModelScorer(model=model, name="reward", micro_batch=3)(tiny_prompts(), rollout)
    torch.testing.assert_close(whole, few, atol=1e-5, rtol=0)


def test_a_reward_model_that_says_nan_names_the_prompt():
    model = lively_reward_model()
    with torch.no_grad():
        model.score.weight[:] = math.nan
    with pytest.raises(RewardError, match=r"finite scores from my-reward, found nan for the prompt 'what is a cat'"):
        ModelScorer(model=model, name="my-reward")(tiny_prompts(), rollout_of_tiny())


# --- reward functions ---


def asked(*texts: object, **columns: list) -> Prompts:
    return Prompts(texts=list(texts), tokens=[[3]] * len(texts), columns=columns)


def answered(*completions: str) -> Rollout:
    """A rollout of which a function sees the text only."""
    mask = torch.ones((len(completions), 1), dtype=torch.bool)
    return Rollout(
        sequences=torch.full((len(completions), 2), 3),
        attention_mask=torch.cat([mask, mask], 1),
        response_mask=mask,
        rollout_logprobs=torch.zeros(mask.shape),
        finished=torch.ones(len(completions), dtype=torch.bool),
        completions=list(completions),
    )


def scored_by(function: object, prompts: Prompts | None = None, *completions: str) -> Tensor:
    prompts = prompts or asked("first question", "second question")
    return FunctionScorer(function=function, name="mine:f")(prompts, answered(*(completions or ("yes", "no"))))


def test_a_function_gets_prompts_completions_and_every_column_by_name():
    seen = {}

    def reward(prompts: list, completions: list, answer: list, **others: list) -> list[float]:
        seen.update(prompts=prompts, completions=completions, answer=answer, others=others)
        return [1.5, -2]

    scores = scored_by(reward, asked("a", "b", answer=[1, 2], hint=["x", None]))
    assert scores.tolist() == [1.5, -2.0]
    assert scores.dtype == torch.float32
    assert seen == {
        "prompts": ["a", "b"], "completions": ["yes", "no"], "answer": [1, 2], "others": {"hint": ["x", None]}
    }  # fmt: skip


def test_a_chat_prompt_goes_in_as_messages_and_so_does_its_completion():
    chat = [{"role": "user", "content": "hello"}]
    seen = []

    def reward(prompts: list, completions: list) -> list[float]:
        seen.extend([prompts, completions])
        return [0.0, 0.0]

    scored_by(reward, asked(chat, "plain"))
    assert seen == [[chat, "plain"], [[{"role": "assistant", "content": "yes"}], "no"]]


@pytest.mark.parametrize(
    "output",
    [
        [1, 0.5],
        (1.0, 0.5),
        np.array([1.0, 0.5]),
        np.array([1.0, 0.5], dtype=np.float32),
        torch.tensor([1.0, 0.5]),
        torch.tensor([[1.0], [0.5]]),
        [torch.tensor(1.0), np.float16(0.5)],
        [True, 0.5],
    ],
    ids=repr,
)
def test_any_sequence_of_numbers_will_do(output):
    assert scored_by(lambda prompts, completions: output).tolist() == [1.0, 0.5]


def test_a_function_that_raises_is_named_with_its_error_and_a_prompt():
    def reward(prompts: list, completions: list) -> list[float]:
        return [1 / 0]

    said = r"from mine:f, found ZeroDivisionError: .*, for a batch that begins with the prompt 'first .*; mend"
    with pytest.raises(RewardError, match=said):
        scored_by(reward)


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        (lambda prompts: [0.0, 0.0], "found that it does not take 'completions'; write it as function(prompts, comple"),
        (
            lambda prompts, completions, answer: [0.0, 0.0],
            "found that it wants 'answer', which is no column of the prompts (they have prompt); add the column, or",
        ),
        (
            lambda completions, *, answer, **others: [0.0, 0.0],
            "found that it wants 'answer', which is no column of the prompts (they have prompt); add the column, or",
        ),
    ],
)
def test_a_function_without_the_right_arguments_is_told_what_differs(reward, said):
    with pytest.raises(RewardError, match=re.escape(f"Expected mine:f to take what it is given, {said}")):
        scored_by(reward)


def test_a_function_that_does_not_take_a_column_is_told_which():
    prompts = Prompts(texts=["a"], tokens=[[5]], columns={"answer": [1], "grade": [2]})
    for reward, said in (
        (lambda prompts, completions, answer: [0.0], "found that it does not take 'grade'; write it as function(pro"),
        (
            lambda prompts, completions, level, **more: [0.0],
            "wants 'level', which is no column of the prompts (they have prompt, answer, grade); add",
        ),
    ):
        with pytest.raises(RewardError, match=re.escape(said)):
            FunctionScorer(function=reward, name="mine:f")(prompts, answered("it"))


@pytest.mark.parametrize("output", [[1.0], [1.0, 2.0, 3.0], []], ids=repr)
def test_another_count_than_completions_is_refused(output):
    with pytest.raises(RewardError, match=f"Expected 2 scores from mine:f, one per completion, found {len(output)};"):
        scored_by(lambda prompts, completions: output)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_names_its_prompt(wrong):
    said = rf"mine:f, found {wrong} for the prompt 'second question'; mend the reward for such a response\.$"
    with pytest.raises(RewardError, match=said):
        scored_by(lambda prompts, completions: [0.0, wrong])


@pytest.mark.parametrize(
    "output", [["good", 1.0], [None, 1.0], [[1.0, 2.0], [1.0, 2.0]], [torch.zeros(2), 1.0]], ids=repr
)
def test_what_is_no_number_is_refused(output):
    with pytest.raises(RewardError, match=r"Expected numbers from mine:f, found .*; return one per completion"):
        scored_by(lambda prompts, completions: output)


@pytest.mark.parametrize("output", [None, 3.0, {"a": 1.0, "b": 2.0}])
def test_what_is_no_list_is_refused(output):
    kind = type(output).__name__
    with pytest.raises(RewardError, match=f"list of scores from mine:f, found {kind}; return one number per completi"):
        scored_by(lambda prompts, completions: output)


def test_a_long_or_spoken_prompt_is_shortened_for_an_error():
    assert shortened("x" * 500) == repr("x" * 120 + "...")
    chat = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hello"},
        {"role": "tool", "content": None},
    ]
    assert shortened(chat) == "'be kind | hello | None'"


# --- several ---


def test_a_weighted_scorer_adds_up():
    parts = (
        FunctionScorer(function=lambda prompts, completions: [1.0, 2.0], name="a"),
        FunctionScorer(function=lambda prompts, completions: [10.0, -10.0], name="b"),
    )
    scores = WeightedScorer(scorers=parts, weights=(0.5, -2.0))(asked("x", "y"), answered("p", "q"))
    assert scores.tolist() == [-19.5, 21.0]


def test_the_models_inside_a_scorer_are_found_and_a_value_model_can_start_from_one_of_the_same_tokens():
    by_text = TextModelScorer(model=tiny_reward_model(1), tokenizer=tiny_tokenizer(), name="t")
    by_tokens = ModelScorer(model=tiny_reward_model(2), name="m")
    function = FunctionScorer(function=len, name="f")
    inner = WeightedScorer(scorers=(by_text, by_tokens), weights=(1.0, 1.0))
    nested = WeightedScorer(scorers=(function, inner), weights=(1.0, 1.0))
    assert reward_models(nested) == [by_text.model, by_tokens.model]
    assert value_trunk_source(nested) is by_tokens.model
    assert value_trunk_source(function) is None
    assert value_trunk_source(WeightedScorer(scorers=(function, by_text), weights=(1.0, 1.0))) is None


# --- from a name ---


@pytest.fixture
def reward_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of reward functions in the working directory."""
    (tmp_path / "my_rewards.py").write_text(
        "LIMIT = 3\n\ndef length(prompts, completions, **columns):\n    return [float(len(c)) for c in completions]\n"
    )
    (tmp_path / "my_broken.py").write_text("def f(:\n")
    (tmp_path / "my_failing.py").write_text("raise RuntimeError('no licence')\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_function_is_loaded_from_the_working_directory(reward_module):
    scorer = load_scorer("my_rewards:length", tiny_tokenizer())
    assert scorer(asked("x", "y"), answered("four", "to")).tolist() == [4.0, 2.0]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("my_rewards:width", "has no attribute 'width'"),
        ("my_rewards:LIMIT", "Expected a function at my_rewards:LIMIT, found int"),
        ("my_rewards:", "Expected a reward function at my_rewards:"),
        (":length", "Expected a reward function at :length"),
        ("my_broken:f", "SyntaxError"),
        ("my_failing:f", "RuntimeError: no licence"),
    ],
)
def test_a_function_that_is_not_there_is_one_sentence(reward_module, source, message):
    with pytest.raises(RewardError) as caught:
        load_scorer(source, tiny_tokenizer())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of several kinds, each with the tiny tokenizer beside it unless its name says otherwise."""
    directory = tmp_path_factory.mktemp("checkpoints")
    models = {
        "reward": tiny_reward_model(4, **LIVELY),
        "alone": tiny_reward_model(4, **LIVELY),
        "three": tiny_reward_model(4, labels=3),
        "causal": tiny_policy(0),
        "other": tiny_reward_model(4, vocab=13, **LIVELY),
        "unpadded": tiny_reward_model(4, vocab=13, **LIVELY),
    }
    for name, model in models.items():
        model.save_pretrained(directory / name)
    other_words = [WORDS[0], *WORDS[2:], "<eos>", "hello"]
    for name in ("reward", "three", "causal"):
        tiny_tokenizer().save_pretrained(directory / name)
    tiny_tokenizer(words=other_words).save_pretrained(directory / "other")
    tiny_tokenizer(words=other_words, pad_token=None).save_pretrained(directory / "unpadded")
    return directory


@pytest.mark.parametrize("name", ["reward", "alone"])
def test_a_reward_model_of_the_same_tokens_reads_the_tokens(checkpoints, name):
    """With the policy's tokenizer beside it, or with none."""
    scorer = load_scorer(str(checkpoints / name), tiny_tokenizer())
    assert isinstance(scorer, ModelScorer)
    assert not any(parameter.requires_grad for parameter in scorer.model.parameters())
    expected = ModelScorer(model=tiny_reward_model(4, **LIVELY), name="x")(tiny_prompts(), rollout_of_tiny())
    torch.testing.assert_close(scorer(tiny_prompts(), rollout_of_tiny()), expected)


def test_a_reward_model_with_another_tokenizer_reads_the_text(checkpoints):
    scorer = load_scorer(str(checkpoints / "other"), tiny_tokenizer())
    assert isinstance(scorer, TextModelScorer)
    prompts, completions = asked(*PROMPTS[:3]), (" a dog .", "", " it sleeps")
    scores = TextModelScorer(model=scorer.model, tokenizer=scorer.tokenizer, name="x", micro_batch=2)(
        prompts, answered(*completions)
    )
    for score, text, completion in zip(scores, prompts.texts, completions, strict=True):
        ids = torch.tensor([scorer.tokenizer(text + completion)["input_ids"]])
        with torch.no_grad():
            hidden = scorer.model.base_model(input_ids=ids).last_hidden_state
            assert float(score) == pytest.approx(float(scorer.model.score(hidden)[0, -1, 0]), abs=1e-5)


def test_a_reward_model_with_another_tokenizer_gets_a_chat_through_its_own_template_once(checkpoints):
    scorer = load_scorer(str(checkpoints / "other"), tiny_tokenizer())
    scorer.tokenizer.chat_template = TEMPLATE
    chat = [{"role": "user", "content": "what is"}]
    with torch.no_grad():
        ids = torch.tensor([scorer.tokenizer("what is . it runs .")["input_ids"]])
        expected = float(scorer.model.score(scorer.model.base_model(input_ids=ids).last_hidden_state)[0, -1, 0])
    mixed = scorer(asked(chat, "a dog"), answered("it runs", " sleeps"))
    assert float(mixed[0]) == pytest.approx(expected, abs=1e-5)
    scorer.tokenizer.chat_template = None
    with pytest.raises(RewardError, match="Expected the chat template of the reward model"):
        scorer(asked(chat), answered("it runs"))


def test_a_reward_model_whose_config_names_no_pad_token_still_finds_the_last_token(checkpoints, tmp_path):
    model = tiny_reward_model(4, vocab=13, **LIVELY)
    model.config.pad_token_id = None
    model.save_pretrained(tmp_path)
    tiny_tokenizer(words=[WORDS[0], *WORDS[2:], "<eos>", "hello"]).save_pretrained(tmp_path)
    prompts, completions = asked("what is", "a"), (" a dog .", "")
    found = load_scorer(str(tmp_path), tiny_tokenizer())(prompts, answered(*completions))
    expected = load_scorer(str(checkpoints / "other"), tiny_tokenizer())(prompts, answered(*completions))
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("three", "with one label at .*three, found 3; train it with num_labels=1"),
        ("causal", r"trained reward model at .*causal, found a checkpoint without score\.weight"),
        ("nothing-here", "Expected a reward model .*nothing-here, found "),
        ("unpadded", "tokenizer with a pad token beside the reward model .*unpadded"),
    ],
)
def test_a_checkpoint_that_is_no_reward_model_is_one_sentence(checkpoints, name, message):
    with pytest.raises(RewardError, match=message) as caught:
        load_scorer(str(checkpoints / name), tiny_tokenizer())
    assert "\n" not in str(caught.value)


def test_a_reward_model_handed_over_as_an_object_must_have_one_label_too():
    with pytest.raises(RewardError, match="one label at mine, found 2"):
        model_scorer(tiny_reward_model(labels=2), "mine", tiny_tokenizer())
    assert isinstance(model_scorer(tiny_reward_model(), "mine", tiny_tokenizer()), ModelScorer)


def test_a_loaded_reward_model_is_frozen_and_without_dropout(tmp_path):
    tiny_reward_model(dropout=0.5).save_pretrained(tmp_path)
    model = load_reward_model(str(tmp_path))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
