"""What a model's weights have to be before anything is done with them: all of them loaded, all of them finite."""

import math
from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from kleash.errors import InputError, ModelError


def unloaded_weight(model: nn.Module, missing: Collection[str], mismatched: Iterable[Any]) -> str | None:
    """The first parameter that loading left as it was made, in words that follow "found"; None if there is none.

    A weight that is tied to one that was loaded is there, and so is a buffer, which nobody draws at random.

    Args:
      model: the one that was loaded.
      missing: names that the checkpoint does not hold.
      mismatched: (name, shape in the checkpoint, shape in the model) of what was left out for its shape.
    """
    for name, saved, own in sorted(mismatched):
        return f"{name} of shape {list(saved)} where the model's config says {list(own)}"
    parameters = dict(model.named_parameters(remove_duplicate=False))
    loaded = {id(parameter) for name, parameter in parameters.items() if name not in missing}
    absent = (name for name, parameter in parameters.items() if name in missing and id(parameter) not in loaded)
    name = next(absent, None)
    return None if name is None else f"a checkpoint without {name}"


def require_finite(model: nn.Module, role: str, *, error: type[InputError] = ModelError) -> None:
    """Raise the error, naming role and parameter, where a weight is NaN or infinite; takes no memory to speak of.

    The bias of the output head may be -inf: it forbids a token.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    forbids = getattr(head, "bias", None)
    for name, parameter in model.named_parameters():
        own = parameter.detach()
        if own.is_meta or not own.numel() or not own.is_floating_point() or own.element_size() < 2:  # quantised
            continue
        if parameter is forbids:
            own = own[own != -math.inf]
        if own.numel() and not all(bound.isfinite() for bound in own.aminmax()):  # which hands NaN on
            raise error(
                f"Expected finite weights in the {role}, found NaN or infinity in {name}; "
                "give a model from before it broke."
            )
