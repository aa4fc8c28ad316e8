"""A second model on the weights of one in training: it can be read from without touching the first.

Trainers put things on their model that a reading must not meet, and a copy must not keep: wrappers for several
processes, autocast around the forward pass, a fused head in place of it, a second adapter. A forward pass that was
replaced may even compute with the model that it was made for, whatever it is called on: a deep copy of a model with
one says what the original says, for ever.
"""

import functools
from types import MethodType

from peft import PeftModel
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from kleash.errors import ModelError
from kleash.models import causal_model, copied, unwrapped


def view_of(model: nn.Module) -> PreTrainedModel:
    """The causal model that computes, on the very parameters of the given one, in evaluation mode.

    Modules, buffers, hooks, modes and config are copies, so what is done to the view is not done to the model. Its
    forward pass is that of its class, without autocast: what `from_pretrained` gives once the weights are saved.

    Args:
      model: a transformers or peft model, perhaps compiled or inside a data-parallel wrapper.

    Raises:
      ModelError: no causal model, an adapter outside the layers, several adapters of which none is the active one, or
        a layer whose forward pass was replaced by one that is not its own.
    """
    whole = unwrapped(model)
    whole = getattr(whole, "_orig_mod", whole)  # torch.compile's wrapper
    if not isinstance(whole, PreTrainedModel | PeftModel):
        raise ModelError(f"Expected a transformers or peft model, found a {type(whole).__name__}; give one of these.")
    view = copied(whole, ())
    if isinstance(view, PeftModel):
        for name in [name for name in view.peft_config if name not in view.active_adapters]:
            view.delete_adapter(name)
    inner = causal_model(view)
    vars(inner).pop("forward", None)
    _require_own_forwards(inner)
    inner.eval()  # type: ignore[no-untyped-call]
    return inner


def _require_own_forwards(model: nn.Module) -> None:
    """Raise ModelError where a layer's forward pass was replaced by one that may compute with another layer."""
    for name, module in model.named_modules():
        forward = vars(module).get("forward")
        plain = forward.__func__ if isinstance(forward, MethodType) and forward.__self__ is module else forward
        if not isinstance(plain, functools.partial | None) and (plain is forward or plain.__closure__):
            raise ModelError(
                f"Expected layers that compute as their classes say, found another forward pass on {name}, as "
                "cast_lm_head_to_fp32 makes it; switch that off, or measure what was saved by kleash measure."
            )


def is_sharded(model: nn.Module) -> bool:
    """Whether a parameter lies in pieces on several processes, as FSDP, ZeRO-3 and tensor parallelism leave it."""
    return any(isinstance(weight, DTensor) or hasattr(weight, "ds_id") for weight in model.parameters())
