"""The reference of another trainer's run: the policy's start, or a model that was given; it never moves."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from kleash.errors import CheckpointError, ModelError
from kleash.integrations.drift_record import ADVICE, DriftRecord
from kleash.integrations.view import view_of
from kleash.models import frozen, learning_names, load_causal_model
from kleash.pair import ModelOrPath
from kleash.reference import frozen_copy


@torch.no_grad()
def start_again(policy: PreTrainedModel, record: DriftRecord) -> PreTrainedModel:
    """The start of a run that was resumed: a frozen copy of its policy, with what learns put back.

    Raises:
      CheckpointError: the record kept no start, or that of another model.
    """
    kept, reference = record.kept(), frozen_copy(policy)
    found = {name: list(tensor.shape) for name, tensor in kept.items()}
    expected = {name: list(reference.get_parameter(name).shape) for name in learning_names(policy)}
    if found != expected:
        odd = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))[0]
        raise CheckpointError(
            f"Expected in {record.reference_file} what learns in the policy, found another {odd}; {ADVICE}"
        )
    for name, tensor in kept.items():
        reference.get_parameter(name).copy_(tensor)
    return reference


def given_reference(given: ModelOrPath, policy: PreTrainedModel) -> PreTrainedModel:
    """The model that was given, or the one at a path, loaded beside the policy and in its precision.

    Raises:
      ModelError: nothing loadable there, or a model that moves with the policy.
    """
    if isinstance(given, str | Path):
        loaded = frozen(load_causal_model(given, "reference", dtype=policy.dtype))
        loaded.to(policy.device)  # type: ignore[arg-type]
        return loaded
    view = view_of(given)
    theirs = {id(weight) for weight in view.parameters()}
    if any(id(weight) in theirs for weight in policy.parameters() if weight.requires_grad):
        raise ModelError(
            "Expected a reference that stays, found one with the policy's own weights; leave it out for a copy of the "
            "start."
        )
    return view
