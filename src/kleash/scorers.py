"""Where scores come from: a reward model, a Python function, or a weighted sum of several.

A scorer maps prompts and their rollout to scores [batch], float32. Whatever the source, a score that is
not finite, a wrong count, or an exception ends in one RewardError that names the prompt.
"""

import importlib
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from kleash.batch import Prompts, PromptText, Rollout
from kleash.errors import RewardError, first_line
from kleash.models import forward_arguments, frozen, loaded_from, tokenizer_beside, why_not
from kleash.rewards import last_response_position
from kleash.weights import require_finite

RewardFunction = Callable[..., Sequence[float]]


class Scorer(Protocol):
    """Anything that scores responses."""

    def __call__(self, prompts: Prompts, rollout: Rollout) -> Tensor:
        """Scores [batch], float32, finite, on the CPU."""


def require_scores(scores: Sequence[float], prompts: Prompts, source: str) -> Tensor:
    """The scores as a float32 tensor [batch], after checking their count and finiteness.

    Raises:
      RewardError: another count than prompts, something that is not a number, or NaN or infinity.
    """
    if len(scores) != len(prompts):
        raise RewardError(
            f"Expected {len(prompts)} scores from {source}, one per completion, found {len(scores)}; return one each."
        )
    try:
        numbers = [float(score) for score in scores]
    except (TypeError, ValueError) as error:
        raise RewardError(
            f"Expected numbers from {source}, found something else ({first_line(error)}); return one per completion."
        ) from error
    for text, number in zip(prompts.texts, numbers, strict=True):
        if not math.isfinite(number):
            raise RewardError(
                f"Expected finite scores from {source}, found {number} for the prompt {shortened(text)}; "
                "mend the reward for such a response."
            )
    return torch.tensor(numbers, dtype=torch.float32)


def shortened(text: PromptText, limit: int = 120) -> str:
    """A prompt for an error message, quoted and cut at `limit` characters."""
    plain = text if isinstance(text, str) else " | ".join(str(message["content"]) for message in text)
    return repr(plain if len(plain) <= limit else plain[:limit] + "...")


@dataclass(frozen=True, kw_only=True)
class FunctionScorer:
    """Scores from `function(prompts, completions, **columns) -> list[float]`.

    Prompts go in as the user wrote them. Completions are strings; for a chat prompt each is a list with
    one assistant message, as TRL's trainers pass them.
    """

    function: RewardFunction
    name: str

    def __call__(self, prompts: Prompts, rollout: Rollout) -> Tensor:
        completions = [
            completion if isinstance(text, str) else [{"role": "assistant", "content": completion}]
            for text, completion in zip(prompts.texts, rollout.completions, strict=True)
        ]
        arguments = {"prompts": list(prompts.texts), "completions": completions, **prompts.columns}
        try:
            scores = self.function(**arguments)
        except Exception as error:
            odd = _arguments_that_differ(self.function, arguments)
            if odd is not None:
                raise RewardError(f"Expected {self.name} to take what it is given, found {odd}.") from error
            raise RewardError(
                f"Expected scores from {self.name}, found {type(error).__name__}: {first_line(error).rstrip('.')}, for "
                f"a batch that begins with the prompt {shortened(prompts.texts[0])}; mend the reward for such input."
            ) from error
        try:
            listed = [scores[index] for index in range(len(scores))]
        except Exception as error:  # whatever was returned may raise anything
            raise RewardError(
                f"Expected a list of scores from {self.name}, found {type(scores).__name__}; "
                "return one number per completion."
            ) from error
        return require_scores(listed, prompts, self.name)


def _arguments_that_differ(function: RewardFunction, given: Mapping[str, Any]) -> str | None:
    """What a function wants and is not given, or is given and does not take, and what to do; None if it may be called.

    The words follow "found" in a sentence.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # one that is written in C may not say
        return None
    named = {one.name: one for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}
    columns = ", ".join(["prompt", *(name for name in given if name not in ("prompts", "completions"))])
    for name, one in named.items():
        if one.default is one.empty and name not in given:
            return (
                f"that it wants {name!r}, which is no column of the prompts (they have {columns}); "
                "add the column, or give the argument a default"
            )
    if not any(one.kind is one.VAR_KEYWORD for one in parameters):
        for name in given:
            if name not in named:
                return f"that it does not take {name!r}; write it as function(prompts, completions, **columns)"
    return None


@dataclass(frozen=True, kw_only=True)
class ModelScorer:
    """Scores of a reward model that shares the policy's tokens, read at the last response token.

    The position comes from the response mask, never from a search for padding, so a closing EOS counts
    also where pad and EOS are the same token.
    """

    model: PreTrainedModel
    name: str
    micro_batch: int = 64

    @torch.no_grad()
    def __call__(self, prompts: Prompts, rollout: Rollout) -> Tensor:
        chunks = [
            self._scores(rollout, slice(start, start + self.micro_batch))
            for start in range(0, len(prompts), self.micro_batch)
        ]
        return require_scores(torch.cat(chunks).tolist(), prompts, self.name)

    def _scores(self, rollout: Rollout, rows: slice) -> Tensor:
        sequences, attention_mask = rollout.sequences[rows], rollout.attention_mask[rows]
        trunk = self.model.base_model
        hidden = trunk(**forward_arguments(trunk, sequences, attention_mask), use_cache=False).last_hidden_state
        prompt_time = sequences.shape[1] - rollout.response_time
        last = prompt_time + last_response_position(rollout.response_mask[rows])
        pooled = hidden[torch.arange(len(last), device=last.device), last]
        head = self.model.get_submodule("score")
        scores: Tensor = head(pooled.to(head.get_parameter("weight").dtype)).squeeze(-1)
        return scores.float()


@dataclass(frozen=True, kw_only=True)
class TextModelScorer:
    """Scores of a reward model with a tokenizer or a head of its own, which reads the text afresh."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    micro_batch: int = 64

    @torch.no_grad()
    def __call__(self, prompts: Prompts, rollout: Rollout) -> Tensor:
        rows = [self._tokens(text, rollout.completions[i]) for i, text in enumerate(prompts.texts)]
        scores: list[float] = []
        for start in range(0, len(rows), self.micro_batch):
            chunk = rows[start : start + self.micro_batch]
            ids = pad_sequence(chunk, batch_first=True, padding_value=self.tokenizer.pad_token_id)
            mask = pad_sequence([torch.ones_like(row) for row in chunk], batch_first=True)
            device = self.model.device
            logits = self.model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
            scores += logits.squeeze(-1).float().tolist()
        return require_scores(scores, prompts, self.name)

    def _tokens(self, prompt: PromptText, completion: str) -> Tensor:
        """[time] the whole text as this model's tokens; a chat template writes its special tokens itself."""
        if isinstance(prompt, str):
            return torch.tensor(self.tokenizer(prompt + completion)["input_ids"])
        messages = [*prompt, {"role": "assistant", "content": completion}]
        try:
            encoded: Any = self.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)
        except (ValueError, TypeError, TemplateError) as error:
            raise RewardError(
                f"Expected the chat template of the reward model {self.name} to take the prompts, found "
                f"{type(error).__name__}: {first_line(error)}; give it one, or use a reward function."
            ) from error
        return torch.tensor(encoded["input_ids"])


@dataclass(frozen=True, kw_only=True)
class WeightedScorer:
    """sum_i weight_i * score_i."""

    scorers: tuple[Scorer, ...]
    weights: tuple[float, ...]

    def __call__(self, prompts: Prompts, rollout: Rollout) -> Tensor:
        weighted = [
            weight * scorer(prompts, rollout) for weight, scorer in zip(self.weights, self.scorers, strict=True)
        ]
        return torch.stack(weighted).sum(0)


def load_scorer(source: str, policy_tokenizer: PreTrainedTokenizerBase) -> Scorer:
    """A scorer from `module:function`, or from a sequence-classification checkpoint with one label.

    Raises:
      RewardError: neither of the two is there, or the checkpoint has no single trained score.
    """
    if ":" in source and not Path(source).exists():
        return FunctionScorer(function=load_function(source), name=source)
    return model_scorer(load_reward_model(source), source, policy_tokenizer)


def load_function(source: str) -> RewardFunction:
    """The function named `module:function`; modules in the working directory are found too."""
    module_name, _, function_name = source.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:  # importing runs the module, which may raise anything
        raise RewardError(
            f"Expected a reward function at {source}, found {type(error).__name__}: {first_line(error)}; "
            "write it as module:function, importable from here."
        ) from error
    if not callable(function):
        raise RewardError(f"Expected a function at {source}, found {type(function).__name__}; name a callable.")
    return function  # type: ignore[no-any-return]


def load_reward_model(source: str) -> PreTrainedModel:
    """A frozen sequence-classification model with one label and a trained head.

    Raises:
      RewardError: nothing loadable there, several labels, or a head that the checkpoint does not hold.
    """
    try:
        model, unloaded = loaded_from(AutoModelForSequenceClassification, source, torch.float32)
    except Exception as error:  # a model's own code may raise anything
        raise RewardError(
            f"Expected a reward model (one label), or module:function, at {source}, found {why_not(source, error)}"
        ) from error
    if unloaded is not None:
        raise RewardError(
            f"Expected a trained reward model at {source}, found {unloaded}; "
            "give one that was trained with a score head, and saved whole."
        )
    require_one_label(model, source)
    require_finite(model, f"reward model {source}", error=RewardError)
    return frozen(model)


def require_one_label(model: PreTrainedModel, source: str) -> None:
    """Raise RewardError unless the model has exactly one label."""
    if model.config.num_labels != 1:
        raise RewardError(
            f"Expected a reward model with one label at {source}, found {model.config.num_labels}; "
            "train it with num_labels=1."
        )


def model_scorer(model: PreTrainedModel, name: str, policy_tokenizer: PreTrainedTokenizerBase) -> Scorer:
    """The scorer for a loaded reward model: by tokens where it shares the policy's, by text otherwise.

    Raises:
      RewardError: the model has its own kind of head and no tokenizer beside it.
    """
    require_one_label(model, name)
    tokenizer = tokenizer_beside(model.config._name_or_path)
    has_linear_head = isinstance(getattr(model, "score", None), torch.nn.Linear)
    same_tokens = tokenizer is None or tokenizer.get_vocab() == policy_tokenizer.get_vocab()
    if has_linear_head and same_tokens:
        return ModelScorer(model=frozen(model), name=name)
    if tokenizer is None or tokenizer.pad_token_id is None:
        raise RewardError(
            f"Expected a tokenizer with a pad token beside the reward model {name}, found none; save one there."
        )
    model.config.pad_token_id = tokenizer.pad_token_id  # transformers looks for the last token by it
    return TextModelScorer(model=frozen(model), tokenizer=tokenizer, name=name)


def reward_models(scorer: Scorer) -> list[PreTrainedModel]:
    """The reward models inside a scorer, in order."""
    return [part.model for part in model_scorers(scorer)]


def model_scorers(scorer: Scorer) -> list[ModelScorer | TextModelScorer]:
    """The scorers by a model inside a scorer, in order."""
    if isinstance(scorer, WeightedScorer):
        return [leaf for part in scorer.scorers for leaf in model_scorers(part)]
    return [scorer] if isinstance(scorer, ModelScorer | TextModelScorer) else []


def value_trunk_source(scorer: Scorer) -> PreTrainedModel | None:
    """The first reward model that reads the policy's own tokens: a value model can start from it."""
    if isinstance(scorer, WeightedScorer):
        return next(filter(None, map(value_trunk_source, scorer.scorers)), None)
    return scorer.model if isinstance(scorer, ModelScorer) else None
