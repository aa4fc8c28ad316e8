"""The reference of a run: a frozen copy of the policy's start, the base under an adapter, or one that follows.

A reference that follows the policy forgives drift: the KL to it falls while the policy goes on moving away from its
start. So a run with such a one measures the KL to its first reference as well.

    moving average   ref <- decay * ref + (1 - decay) * policy, after every update (Rame et al. 2024, WARP)
    periodic         ref <- policy, after every so many updates
"""

from collections.abc import Collection

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kleash.errors import ModelError
from kleash.models import adapter_name, copied, frozen, learning_names


def frozen_copy(model: PreTrainedModel, *, own: Collection[str] | None = None) -> PreTrainedModel:
    """A copy that training never touches: the reference of a run that names none.

    Parameters that do not learn are shared with the original, so a policy with an adapter and its reference keep one
    base model between them.

    Args:
      model: the model at its start.
      own: names of the parameters to copy; None = those that learn in the model.
    """
    return frozen(copied(model, learning_names(model) if own is None else own))


def without_adapter(policy: PreTrainedModel) -> PreTrainedModel:
    """The base model under the policy's adapter, frozen; what does not learn in the policy is shared with it.

    Raises:
      ModelError: the policy has no adapter.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if adapter_name(policy) is None:
        raise ModelError(
            "Expected a policy with an adapter for the reference adapter_off, found one without; "
            "choose the reference copy, or give an adapter."
        )
    base = frozen_copy(policy)
    for name, module in list(base.named_modules()):
        if isinstance(module, BaseTunerLayer):
            base.set_submodule(name, module.get_base_layer())
        elif isinstance(module, AuxiliaryTrainingWrapper):
            base.set_submodule(name, module.original_module)
    del base.peft_config
    return base


def require_movable(reference: PreTrainedModel, policy: PreTrainedModel, *, averaged: bool) -> None:
    """Raise ModelError unless the reference can follow the policy: it may differ in what learns, and in nothing else.

    Args:
      reference: where it starts.
      policy: where it is drawn to.
      averaged: whether it moves by parts of the way, for which the parameters need digits.
    """
    ours, theirs = dict(policy.named_parameters()), dict(reference.named_parameters())
    shapes, their_shapes = ({name: p.shape for name, p in found.items()} for found in (ours, theirs))
    if shapes != their_shapes:
        odd = sorted(dict(shapes.items() ^ their_shapes.items()))[0]
        raise ModelError(
            f"Expected a moving reference with the policy's parameters, found {odd} {_shape(theirs.get(odd))} in the "
            f"reference and {_shape(ours.get(odd))} in the policy; start it from a model of the same architecture."
        )
    learning = learning_names(policy)
    fixed = [(name, ours[name], theirs[name]) for name in ours if name not in learning]
    buffers = zip(policy.named_buffers(), reference.buffers(), strict=True)
    for name, own, other in fixed + [(name, own, other) for (name, own), other in buffers]:
        if own is not other and not torch.equal(own, other):
            raise ModelError(
                f"Expected a moving reference that differs from the policy in what learns alone, found another {name}; "
                "start it from a model on the same base."
            )
    narrow = [name for name in learning if averaged and ours[name].dtype.itemsize < 4]
    if narrow:
        raise ModelError(
            f"Expected a moving average over float32 parameters, found {narrow[0]} in {ours[narrow[0]].dtype}, where "
            "small steps are rounded away; load the policy in float32, or choose the kind periodic."
        )


def _shape(parameter: Tensor | None) -> str:
    return "missing" if parameter is None else str(list(parameter.shape))


@torch.no_grad()
def move_towards(reference: PreTrainedModel, policy: PreTrainedModel, share: float) -> None:
    """reference <- reference + share * (policy - reference), in place, on the parameters that learn in the policy.

    A share of 1 copies the very bits. Buffers stay as they are: none of them learns.

    Args:
      reference: held against the policy by require_movable before.
      policy: where it is drawn to.
      share: 0 to 1; 1 - decay for a moving average.
    """
    for name in learning_names(policy):
        own, goal = reference.get_parameter(name), policy.get_parameter(name)
        if share == 1:
            own.copy_(goal)
        else:
            own.lerp_(goal, share)
