"""Policy, reference and value model: loading, freezing, and the one way their forward pass is called.

Dropout is off in all of them, always: a policy in training is the distribution that is sampled from.

A model with an adapter is the transformers model with the adapter's layers in place, whether peft wrapped it or not.
"""

import copy
import functools
import hashlib
import inspect
import json
import logging
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.peft_utils import find_adapter_config_file

from kleash.errors import ModelError, first_line
from kleash.masking import position_ids
from kleash.weights import require_finite, unloaded_weight

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

AnyModule = TypeVar("AnyModule", bound=nn.Module)

ADAPTER_PREFIX = "base_model.model."  # peft writes it before every name in a file, and reads it again
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def load_tokenizer(source: str | Path, *, pad_token: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer saved beside a policy, or beside the base of its adapter, with a pad token.

    Args:
      source: path or hub name.
      pad_token: names an existing token to pad with, for tokenizers that have none of their own.

    Raises:
      ModelError: nothing loadable there, no EOS token, no pad token, or pad_token is not in the vocabulary.
    """
    base = base_of_adapter(source)
    if base is not None and tokenizer_beside(source) is not None:
        base = None
    expected = f"Expected the policy's tokenizer at {_place(source, base)}"
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(base or source)
    except Exception as error:  # the tokenizers library raises nothing narrower for a damaged file
        raise ModelError(f"{expected}, found {why_not(base or source, error)}") from error
    if not has_words(tokenizer):
        raise ModelError(f"{expected}, found none; save it beside the policy.")
    if pad_token is not None:
        if pad_token not in tokenizer.get_vocab():
            raise ModelError(
                f"Expected pad_token in the vocabulary of {source}, found {pad_token!r}; name one that is."
            )
        tokenizer.pad_token = pad_token
    require_special_tokens(tokenizer)
    return tokenizer


def _place(source: str | Path, base: str | None) -> str:
    """Where something is looked for, in an error's words: with a base, there, and which file says so."""
    return str(source) if base is None else f"{base} (the base that adapter_config.json in {source} names)"


def why_not(source: str | Path, error: Exception) -> str:
    """Why nothing could be loaded from a source, in words that end a sentence."""
    path = Path(source)
    if path.is_file():
        return "a file; give a model's directory or name."
    if is_a_path_to_nothing(source):
        return "no such directory; check the path."
    if path.is_dir() and not (path / "config.json").is_file():
        below = policy_below(path)
        there = "give one that save_pretrained wrote" if below is None else f"give {below}"
        return f"a directory without config.json; {there}."
    damaged = damaged_file(path)
    if damaged is not None:
        return f"{damaged} damaged or cut short; copy or save it again."
    cause = first_line(error).rstrip(".")
    return f"none that loads ({cause}); check the name, or give a directory that save_pretrained wrote."


def is_a_path_to_nothing(source: str | Path) -> bool:
    """Whether a source is written as a path, not as a hub name, and no directory is there."""
    path = Path(source)
    return (str(source).startswith(("/", ".", "~")) or len(path.parts) > 2) and not path.is_dir()


def damaged_file(directory: Path) -> Path | None:
    """The first safetensors file of a directory that cannot be opened; reads no weights."""
    for file in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError):
            return file
    return None


def policy_below(path: Path) -> Path | None:
    """The policy in a checkpoint's directory, or in the newest checkpoint of a run's; None where there is none."""
    found = [path / "policy", *sorted(path.glob("checkpoints/[0-9]*/policy"), reverse=True)]
    return next((place for place in found if place.is_dir()), None)


def tokenizer_beside(source: str | Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer saved beside a model; None if there is none, as for a model built in memory (an empty source)."""
    if not str(source):  # transformers would look in the working directory
        return None
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source)
    except Exception:  # as in load_tokenizer
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


def load_causal_model(
    source: str | Path, role: str, *, adapter_learns: bool = False, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A causal language model with dropout off; `role` names it in errors.

    Args:
      source: path or hub name of a model, or of an adapter, whose base is loaded with it.
      role: policy or reference, say.
      adapter_learns: whether an adapter wants gradients; its base never does.
      dtype: of the weights.

    Raises:
      ModelError: nothing loadable there, a model of another kind, a weight that is missing or not finite, or an
        adapter that is not in the model's layers.
    """
    base = base_of_adapter(source)
    expected = f"Expected a causal language model at {_place(source, base)} for the {role}"
    try:
        model, unloaded = loaded_from(AutoModelForCausalLM, base or source, dtype)
    except Exception as error:  # a model's own code may raise anything
        raise ModelError(f"{expected}, found {why_not(base or source, error)}") from error
    _require_saved_as_a_language_model(model, source, role)
    if unloaded is not None:
        raise ModelError(f"{expected}, found {unloaded}; give one that was saved whole.")
    if base is not None:
        model = _adapted(model, source, role, learns=adapter_learns)
    require_finite(model, f"{role} {source}")
    model.eval()  # type: ignore[no-untyped-call]
    return model


def _adapted(model: PreTrainedModel, source: str | Path, role: str, *, learns: bool) -> PreTrainedModel:
    """The base model with the adapter in place; whatever peft says against it becomes a ModelError."""
    directory = Path(source)
    if directory.is_dir() and not any((directory / name).is_file() for name in ADAPTER_WEIGHTS):
        raise ModelError(
            f"Expected the weights of the {role}'s adapter in {source}, found no {ADAPTER_WEIGHTS[0]}; "
            "save or copy the adapter again."
        )
    try:
        return _with_adapter(model, source, learns=learns)
    except ModelError:
        raise
    except Exception as error:  # peft passes on what lies below it
        damaged = damaged_file(directory)
        cause = f"one that does not load ({first_line(error).rstrip('.')})"
        found = cause if damaged is None else f"{damaged} damaged or cut short"
        raise ModelError(
            f"Expected an adapter at {source} for the {role}, found {found}; save or copy the adapter again."
        ) from error


def loaded_from(kind: Any, source: str | Path, dtype: torch.dtype) -> tuple[PreTrainedModel, str | None]:
    """A model as transformers loads it, and the first weight that it did not find, in words that follow "found".

    Args:
      kind: the class to load, or one of transformers' Auto classes.
      source: path or hub name.
      dtype: of the weights.
    """
    with _no_table_of_missing_weights():
        model, loading = kind.from_pretrained(
            source, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    return model, unloaded_weight(model, loading["missing_keys"], loading["mismatched_keys"])


@contextmanager
def _no_table_of_missing_weights() -> Iterator[None]:
    """Keeps back transformers' table where it holds a weight that kleash refuses in a sentence."""

    def is_other(record: logging.LogRecord) -> bool:
        said = record.getMessage()
        return "LOAD REPORT" not in said or not ("MISSING" in said or "MISMATCH" in said)

    loggers = [logging.getLogger(f"transformers.{name}") for name in ("modeling_utils", "utils.loading_report")]
    for logger in loggers:
        logger.addFilter(is_other)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_other)


def _require_saved_as_a_language_model(model: PreTrainedModel, source: str | Path, role: str) -> None:
    """Raise ModelError for a classifier: its trunk loads as a language model, and says what nobody trained."""
    other = [name for name in model.config.architectures or () if name.endswith("Classification")]
    if other:
        raise ModelError(
            f"Expected a causal language model at {source} for the {role}, found {other[0]}; "
            "give the model that writes."
        )


def base_of_adapter(source: str | Path) -> str | None:
    """The model that an adapter was trained on, by path or hub name; None where no adapter lies."""
    try:
        file = find_adapter_config_file(str(source))
    except (OSError, ValueError):  # no model's name either: whoever loads it says why
        return None
    if file is None:
        return None
    try:
        base: str | None = json.loads(Path(file).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except ValueError as error:
        raise ModelError(f"Expected JSON in {file}, found a mistake; save the adapter again.") from error
    if not base:
        raise ModelError(
            f"Expected base_model_name_or_path in {file}, found none; name the adapter's base model there."
        )
    if is_a_path_to_nothing(base):
        raise ModelError(
            f"Expected the adapter's base model at {base}, as {file} says, found no such directory; "
            "correct base_model_name_or_path there."
        )
    return base


def _with_adapter(model: PreTrainedModel, source: str | Path, *, learns: bool) -> PreTrainedModel:
    """The base model with the adapter in place, grown for tokens that the adapter's tokenizer adds."""
    from peft import PeftConfig, inject_adapter_in_model, load_peft_weights

    tokenizer = tokenizer_beside(source)
    if tokenizer is not None and len(tokenizer) > model.get_input_embeddings().get_parameter("weight").shape[0]:
        model.resize_token_embeddings(len(tokenizer))
    config = PeftConfig.from_pretrained(str(source))
    if config.is_prompt_learning:
        raise _not_in_the_layers(config)
    config.inference_mode = not learns
    inject_adapter_in_model(config, model)
    load_adapter_tensors(model, load_peft_weights(str(source), device="cpu"), source)
    return model


def causal_model(model: "PreTrainedModel | PeftModel") -> PreTrainedModel:
    """The transformers model that computes: the one inside a PeftModel, or the model itself.

    Raises:
      ModelError: the adapter does more than replace layers, as prompt tuning does, or there are several.
    """
    if isinstance(model, PreTrainedModel):
        inner = model
    else:
        if model.active_peft_config.is_prompt_learning:
            raise _not_in_the_layers(model.active_peft_config)
        base = model.get_base_model()
        assert isinstance(base, PreTrainedModel)
        inner = base
    adapter_name(inner)
    return inner


def _not_in_the_layers(config: "PeftConfig") -> ModelError:
    kind = str(config.peft_type).removeprefix("PeftType.")
    return ModelError(f"Expected an adapter in the model's layers, such as LoRA, found {kind}; use one that is.")


def adapter_name(model: PreTrainedModel) -> str | None:
    """The name of the model's adapter; None for a model without one.

    Raises:
      ModelError: there are several.
    """
    names = list(getattr(model, "peft_config", None) or ())
    if len(names) > 1:
        raise ModelError(f"Expected one adapter in a model, found {', '.join(names)}; delete all but the one in use.")
    return names[0] if names else None


def adapter_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The adapter's tensors, which share their memory with the model, by the names that peft saves them under."""
    from peft import get_peft_model_state_dict

    name = adapter_name(model)
    assert name is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # peft says each time that it takes embeddings of a new size along
        found = get_peft_model_state_dict(model, adapter_name=name)
    return {ADAPTER_PREFIX + name: tensor for name, tensor in found.items()}


def load_adapter_tensors(model: PreTrainedModel, tensors: dict[str, Tensor], source: str | Path) -> None:
    """Put an adapter's tensors, named as peft saves them, in place of those of the model's adapter.

    Raises:
      ModelError: some tensor finds no place, some place no tensor; `source` names the file in the error.
    """
    from peft import set_peft_model_state_dict

    name, own = adapter_name(model), {key.removeprefix(ADAPTER_PREFIX): tensor for key, tensor in tensors.items()}
    assert name is not None
    places = {key: tensor.data_ptr() for key, tensor in adapter_tensors(model).items()}
    filled = {place for key, place in places.items() if key in tensors}  # also under the other name of a tied tensor
    awaiting = set(places.values()) - filled
    try:
        result: Any = set_peft_model_state_dict(model, own, adapter_name=name)
    except (RuntimeError, KeyError) as error:
        wrong = str(error).strip().splitlines()[-1].strip().rstrip(".")
        raise ModelError(f"Expected the adapter of the model in {source}, found {wrong}; give its own.") from error
    state = model.state_dict()
    empty = [key for key in result.missing_keys if key in state and state[key].data_ptr() in awaiting]
    odd = [*(f"nothing for {key}" for key in empty), *(f"{key} without a place" for key in result.unexpected_keys)]
    if odd:
        raise ModelError(f"Expected the adapter of the model in {source}, found {odd[0]}; give its own.")


def frozen(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, without gradients and without dropout."""
    model.eval()  # type: ignore[no-untyped-call]
    model.requires_grad_(False)
    return model


@contextmanager
def modes_kept(*models: nn.Module) -> Iterator[None]:
    """Afterwards dropout is on or off in every module as it was before."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def default_device() -> torch.device:
    """The accelerator of this machine, else the CPU; what torch was built for need not be there."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def learning_names(model: nn.Module) -> list[str]:
    """Names of the parameters that learn, each once, in a fixed order."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def copied(model: AnyModule, own: Collection[str]) -> AnyModule:
    """A deep copy with buffers and the named parameters of its own; all other parameters are the original's."""
    shared = {id(parameter): parameter for name, parameter in model.named_parameters() if name not in own}
    return copy.deepcopy(model, dict[int, object](shared))


def hold_equal_parameters_once(model: nn.Module, other: nn.Module) -> None:
    """Let `other` hold the parameters of `model` in place of its own, wherever they are equal to the bit.

    Names tell which belong together, whatever an adapter has put between: a base model and an adapter on it come to
    hold the base once. Neither may learn afterwards.
    """
    twins = {_plain_name(name): twin for name, twin in model.named_parameters(remove_duplicate=False)}
    for name, own in list(other.named_parameters(remove_duplicate=False)):
        twin = twins.get(_plain_name(name))
        if twin is not None and twin.dtype == own.dtype and torch.equal(twin, own.to(twin.device)):
            place, _, leaf = name.rpartition(".")
            setattr(other.get_submodule(place), leaf, twin)


def _plain_name(name: str) -> str:
    """The name of a parameter as it was before an adapter was put around its layer."""
    return ".".join(part for part in name.split(".") if part not in ("base_layer", "original_module"))


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
        self.head = head.requires_grad_(True)
        self.eval()

    def forward(self, sequences: Tensor, attention_mask: Tensor, response_time: int) -> Tensor:
        """[batch, prompt + time] tokens -> [batch, time] values, float32 (float64 for a float64 trunk)."""
        arguments = forward_arguments(self.trunk, sequences, attention_mask)
        hidden = self.trunk(**arguments, use_cache=False).last_hidden_state[:, -response_time - 1 : -1]
        values: Tensor = self.head(hidden.to(self.head.weight.dtype)).squeeze(-1)
        return values if values.dtype == torch.float64 else values.float()


def value_model_from_policy(policy: PreTrainedModel) -> ValueModel:
    """A value model on a copy of the policy's trunk, with a head of zeros: every value starts at 0.

    What learns in the policy's trunk learns in it too. What does not, such as the base of an adapter, they share.
    """
    output: nn.Module | None = policy.get_output_embeddings()  # type: ignore[no-untyped-call]
    if output is None:
        raise ModelError(f"Expected a policy with output embeddings, found {type(policy).__name__} without any.")
    trunk = copied(policy.base_model, learning_names(policy.base_model))
    weight = output.get_parameter("weight")
    head = nn.Linear(weight.shape[1], 1, bias=False, dtype=weight.dtype)
    nn.init.zeros_(head.weight)
    return ValueModel(trunk, head)


def value_model_from_reward(reward_model: PreTrainedModel) -> ValueModel:
    """A value model that starts as a copy of a reward model with a linear `score` head."""
    head = copy.deepcopy(reward_model.get_submodule("score"))
    assert isinstance(head, nn.Linear)
    return ValueModel(copy.deepcopy(reward_model.base_model).requires_grad_(True), head)


def trainable_parameters(*models: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that an optimizer should hold, in a fixed order."""
    for model in models:
        yield from (parameter for parameter in model.parameters() if parameter.requires_grad)


def shared_vocabulary(policy: PreTrainedModel, reference: PreTrainedModel) -> int:
    """How many tokens both models have a logit for; what one of them has beyond is padding."""
    return min(int(model.config.get_text_config().vocab_size) for model in (policy, reference))


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
