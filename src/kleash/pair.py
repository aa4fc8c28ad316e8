"""A policy and the reference that it is measured to, over one vocabulary, loaded and held against each other."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kleash.errors import ModelError
from kleash.language_model import LanguageModel, language_models
from kleash.models import (
    causal_model,
    context_length,
    default_device,
    eos_token_ids,
    frozen,
    hold_equal_parameters_once,
    load_causal_model,
    load_tokenizer,
    modes_kept,
    require_same_vocabulary,
    require_special_tokens,
    shared_vocabulary,
)

if TYPE_CHECKING:
    from peft import PeftModel

ModelOrPath: TypeAlias = "PreTrainedModel | PeftModel | str | Path"


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Both models on one device, and the policy's tokenizer; neither model learns."""

    policy: LanguageModel
    reference: LanguageModel
    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: list[int]

    @property
    def device(self) -> torch.device:
        return self.policy.model.device

    @property
    def vocab(self) -> int:
        """How many tokens both models know."""
        return self.policy.vocab

    @property
    def context(self) -> int | None:
        """The longest sequence that both have positions for; None where neither names a limit."""
        known = [context_length(one.model) for one in (self.policy, self.reference)]
        return min((length for length in known if length is not None), default=None)


def load_pair(
    policy: ModelOrPath,
    reference: ModelOrPath,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    pad_token: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Pair:
    """Load both models, or take them as they are, and check that they speak of the same tokens.

    Args:
      policy, reference: models, or where to load them: checkpoints, or adapters, whose base is loaded with them. Of two
        that are loaded, parameters that are equal, such as a common base, are held once.
      tokenizer: of the policy; None = loaded from where it came from.
      pad_token: an existing token to pad with, for a tokenizer that has none.
      dtype: of the weights that are loaded.
      device: None = an accelerator if there is one; models that were given stay where they are.

    Raises:
      ModelError: nothing loadable there, no tokenizer, or other tokens in the two, with the first that differs.
    """
    source = source_of(policy)
    if tokenizer is None and not str(source):
        raise ModelError("Expected a tokenizer for a policy in memory, found none; give one.")
    words = tokenizer or load_tokenizer(source, pad_token=pad_token)
    require_special_tokens(words)
    models = _models(policy, reference, dtype, device or default_device())
    width = models[0].config.get_text_config().vocab_size
    require_same_vocabulary(words, source_of(reference), models[1], width)
    pair = language_models(*models, vocab=shared_vocabulary(*models))
    return Pair(policy=pair[0], reference=pair[1], tokenizer=words, eos_token_ids=eos_token_ids(models[0], words))


def training_modes_kept(*models: ModelOrPath) -> AbstractContextManager[None]:
    """Afterwards dropout is on or off as it was before, in every module of the models that were given as such."""
    return modes_kept(*(model for model in models if not isinstance(model, str | Path)))


def _models(
    policy: ModelOrPath, reference: ModelOrPath, dtype: torch.dtype, device: torch.device
) -> list[PreTrainedModel]:
    """Both models with dropout off; of two that are loaded, what is equal in both is held once."""
    models: list[PreTrainedModel] = []
    loaded: list[PreTrainedModel] = []
    for role, given in (("policy", policy), ("reference", reference)):
        if isinstance(given, str | Path):
            model = frozen(load_causal_model(given, role, dtype=dtype))
            for before in loaded:
                hold_equal_parameters_once(before, model)
            model.to(device)  # type: ignore[arg-type]
            loaded.append(model)
        else:
            model = causal_model(given)
            model.eval()  # type: ignore[no-untyped-call]
        models.append(model)
    return models


def source_of(model: ModelOrPath) -> str | Path:
    """Where a model came from; empty for one that was built in memory."""
    source = model if isinstance(model, str | Path) else causal_model(model).config._name_or_path
    return source or ""


def name_of(model: ModelOrPath) -> str:
    """How figures name a model: where it came from, or its class."""
    return str(source_of(model)) or f"a {type(model).__name__} in memory"
