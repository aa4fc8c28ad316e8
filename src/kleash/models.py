"""Policy, reference and value model: loading, freezing, and the one way their forward pass is called.

Dropout is off in all of them, always: a policy in training is the distribution that is sampled from.
"""

import copy
import functools
import hashlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from kleash.errors import ModelError, first_line
from kleash.masking import position_ids


def load_tokenizer(source: str | Path, *, pad_token: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer saved beside a model, with a pad token.

    Args:
      source: path or hub name.
      pad_token: names an existing token to pad with, for tokenizers that have none of their own.

    Raises:
      ModelError: nothing loadable there, no EOS token, no pad token, or pad_token is not in the vocabulary.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"Expected a tokenizer at {source}, found {why_not(source, error)}") from error
    if not has_words(tokenizer):
        raise ModelError(f"Expected a tokenizer at {source}, found none; save the policy's tokenizer beside it.")
    if pad_token is not None:
        if pad_token not in tokenizer.get_vocab():
            raise ModelError(
                f"Expected pad_token in the vocabulary of {source}, found {pad_token!r}; name one that is."
            )
        tokenizer.pad_token = pad_token
    require_special_tokens(tokenizer)
    return tokenizer


def why_not(source: str | Path, error: Exception) -> str:
    """Why nothing could be loaded from a source, in words that end a sentence."""
    path = Path(source)
    names_a_path = str(source).startswith(("/", ".", "~")) or len(path.parts) > 2
    if names_a_path and not path.is_dir():
        return "no such directory; check the path."
    if path.is_dir() and not (path / "config.json").is_file():
        return "a directory without config.json; give one that save_pretrained wrote."
    cause = first_line(error).rstrip(".")
    return f"none that loads ({cause}); check the name, or give a directory that save_pretrained wrote."


def tokenizer_beside(source: str | Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer saved beside a model; None if there is none, as for a model built in memory (an empty source)."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError):
        return None
    return tokenizer if has_words(tokenizer) else None


def has_words(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer knows anything but special tokens: transformers makes an empty one where no file is."""
    return len(tokenizer.get_vocab()) > len(tokenizer.all_special_ids)


def require_special_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ModelError unless the tokenizer has an EOS token and a pad token (they may be one and the same)."""
    if tokenizer.eos_token_id is None:
        raise ModelError("Expected a tokenizer with an EOS token, found none; set tokenizer.eos_token and save it.")
    if tokenizer.pad_token_id is None:
        raise ModelError(
            "Expected a tokenizer with a pad token, found none; name one in the config, "
            f"for example pad_token: {tokenizer.eos_token!r} (padding is masked, so EOS will do)."
        )


def load_causal_model(source: str | Path, role: str) -> PreTrainedModel:
    """A causal language model in float32 with dropout off; `role` names it in errors.

    Raises:
      ModelError: nothing loadable there.
    """
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(
            f"Expected a causal language model at {source} for the {role}, found {why_not(source, error)}"
        ) from error
    model.eval()  # type: ignore[no-untyped-call]
    return model


def frozen(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, without gradients and without dropout."""
    model.eval()  # type: ignore[no-untyped-call]
    model.requires_grad_(False)
    return model


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A deep copy that training never touches: the reference of a run that names none."""
    return frozen(copy.deepcopy(model))


def context_length(model: PreTrainedModel) -> int | None:
    """The longest sequence the model has positions for, in tokens; None when it names no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that closes a response: the tokenizer's EOS and those of the generation config, sorted."""
    named = model.generation_config.eos_token_id if model.generation_config is not None else None
    several = named if isinstance(named, list) else [named]
    return sorted({token for token in [tokenizer.eos_token_id, *several] if token is not None})


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over the names, types, shapes and bytes of all parameters and buffers, as hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def forward_arguments(model: nn.Module, sequences: Tensor, attention_mask: Tensor) -> dict[str, Tensor | bool]:
    """The arguments every forward pass shares; position_ids only for a model that takes them.

    Args:
      model: what will be called with them.
      sequences: [batch, fresh] token ids, without those that a cache holds.
      attention_mask: [batch, time] bool, over those in the cache and the fresh ones at the end.
    """
    arguments: dict[str, Tensor | bool] = {"input_ids": sequences, "attention_mask": attention_mask.long()}
    if accepts(model, "position_ids"):
        arguments["position_ids"] = position_ids(attention_mask)[:, -sequences.shape[1] :]
    return arguments


def accepts(model: nn.Module, argument: str) -> bool:
    """Whether the model's own forward names this argument."""
    return argument in _parameter_names(type(unwrapped(model)).forward)


@functools.cache
def _parameter_names(function: Callable[..., object]) -> frozenset[str]:
    """The parameters of a function; cached, as sampling asks once per token."""
    return frozenset(inspect.signature(function).parameters)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside a data-parallel wrapper, or the model itself."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def response_logits(model: nn.Module, sequences: Tensor, attention_mask: Tensor, response_time: int) -> Tensor:
    """Logits from which each response token was drawn, from one forward pass.

    The logits at a position speak of the next token, so row t belongs to response token t. The head is
    applied to the response only.

    Args:
      model: a causal language model, perhaps inside a data-parallel wrapper.
      sequences: [batch, prompt + time] token ids, the response at the end.
      attention_mask: [batch, prompt + time] bool, True on prompt and response tokens.
      response_time: time, at least 1.

    Returns:
      [batch, time, vocab] logits in the dtype of the model's head.
    """
    arguments = forward_arguments(model, sequences, attention_mask)
    arguments["use_cache"] = False
    end = sequences.shape[1] - 1
    if accepts(model, "logits_to_keep"):
        # Positions, not a count: a count hands the head a view, and torch multiplies views by another
        # routine, with another rounding, when the head is frozen. The reference must say the policy's bits.
        kept = torch.arange(end - response_time, end, device=sequences.device)
        logits: Tensor = model(**arguments, logits_to_keep=kept).logits
        return logits
    return model(**arguments).logits[:, end - response_time : end]  # type: ignore[no-any-return]


class ValueModel(nn.Module):
    """A trunk of its own with a linear head: the expected reward-to-go before each response token."""

    def __init__(self, trunk: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head
        self.requires_grad_(True)
        self.eval()

    def forward(self, sequences: Tensor, attention_mask: Tensor, response_time: int) -> Tensor:
        """[batch, prompt + time] tokens -> [batch, time] values, float32 (float64 for a float64 trunk)."""
        arguments = forward_arguments(self.trunk, sequences, attention_mask)
        hidden = self.trunk(**arguments, use_cache=False).last_hidden_state[:, -response_time - 1 : -1]
        values: Tensor = self.head(hidden.to(self.head.weight.dtype)).squeeze(-1)
        return values if values.dtype == torch.float64 else values.float()


def value_model_from_policy(policy: PreTrainedModel) -> ValueModel:
    """A value model on a copy of the policy's trunk, with a head of zeros: every value starts at 0."""
    output: nn.Module | None = policy.get_output_embeddings()  # type: ignore[no-untyped-call]
    if output is None:
        raise ModelError(f"Expected a policy with output embeddings, found {type(policy).__name__} without any.")
    trunk = copy.deepcopy(policy.base_model)
    weight = output.get_parameter("weight")
    head = nn.Linear(weight.shape[1], 1, bias=False, dtype=weight.dtype)
    nn.init.zeros_(head.weight)
    return ValueModel(trunk, head)


def value_model_from_reward(reward_model: PreTrainedModel) -> ValueModel:
    """A value model that starts as a copy of a reward model with a linear `score` head."""
    head = copy.deepcopy(reward_model.get_submodule("score"))
    assert isinstance(head, nn.Linear)
    return ValueModel(copy.deepcopy(reward_model.base_model), head)


def trainable_parameters(*models: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that an optimizer should hold, in a fixed order."""
    for model in models:
        yield from (parameter for parameter in model.parameters() if parameter.requires_grad)


def require_same_vocabulary(
    policy_tokenizer: PreTrainedTokenizerBase, reference_source: str | Path, reference: PreTrainedModel, width: int
) -> None:
    """Raise ModelError unless the reference gives every token id the meaning that the policy gives it.

    One of the two may have more logits, as a vocabulary padded to a rounder size has: then both must cover the
    tokens, and the reference must prove by a tokenizer beside it that they are the same.

    Args:
      policy_tokenizer: tokenizer of the policy.
      reference_source: where the reference came from; its tokenizer is read there if it has one.
      reference: the loaded reference model.
      width: number of logits of the policy.
    """
    theirs = tokenizer_beside(reference_source)
    found = reference.config.get_text_config().vocab_size
    known = max(policy_tokenizer.get_vocab().values()) + 1
    if found != width and min(found, width) < known:
        raise ModelError(
            f"Expected policy and reference to have a logit for each of the {known} tokens, found {width} in the "
            f"policy and {found} at {reference_source}; choose the model that the policy started from."
        )
    if found != width and theirs is None:
        raise ModelError(
            f"Expected a reference with the policy's vocabulary of {width}, found {found} at {reference_source} and no "
            "tokenizer beside it that shows the rest to be padding; load it from a directory with that tokenizer."
        )
    difference = None if theirs is None else first_vocabulary_difference(policy_tokenizer, theirs)
    if difference is not None:
        raise ModelError(
            f"Expected the reference at {reference_source} to use the policy's tokenizer, found {difference}; "
            "choose the model that the policy started from."
        )


def first_vocabulary_difference(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> str | None:
    """The first token id that the policy's tokenizer and another one read differently, in words; None if none."""
    our_tokens = {index: token for token, index in ours.get_vocab().items()}
    their_tokens = {index: token for token, index in theirs.get_vocab().items()}
    for index in sorted(our_tokens.keys() | their_tokens.keys()):
        if our_tokens.get(index) != their_tokens.get(index):
            return f"token {index} is {their_tokens.get(index)!r} there and {our_tokens.get(index)!r} in the policy"
    return None
