"""Checkpoints: everything a run needs to go on as if it had never stopped, in safetensors and JSON.

    checkpoints/000010/
      policy/                 from_pretrained-loadable, with the tokenizer; of a policy with an adapter, the adapter
      value.safetensors       value model: what learns in it, and its buffers
      reference.safetensors   what moved of a reference that follows the policy
      optimizer.safetensors   AdamW's moments, by parameter number
      state.json              update, leash, schedule, optimizer groups, seed, fingerprints
      manifest.json           size and SHA-256 of every file above

A checkpoint appears under its name only when it is whole. Random numbers and the place in the data follow
from the seed and the update's number, so those two are all that is kept of them.
"""

import copy
import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kleash.errors import CheckpointError
from kleash.models import adapter_name, adapter_tensors, learning_names, load_adapter_tensors
from kleash.run_directory import remove_partial

FORMAT = 2


@dataclass(frozen=True, kw_only=True)
class CheckpointState:
    """The small part of a checkpoint: numbers and fingerprints."""

    update: int
    seed: int
    leash: dict[str, float]
    scheduler: dict[str, Any]
    reference_fingerprint: str
    prompts_fingerprint: str
    roll_backs: int = 0
    format: int = FORMAT


@dataclass(frozen=True, kw_only=True)
class Learners:
    """The parts of a run that change: unwrapped models and their optimizer; the reference if it follows the policy."""

    policy: PreTrainedModel
    value: nn.Module
    optimizer: torch.optim.Optimizer
    moving_reference: PreTrainedModel | None = None


def save_checkpoint(
    directory: Path, learners: Learners, tokenizer: PreTrainedTokenizerBase, state: CheckpointState, *, keep: int
) -> Path:
    """Write checkpoints/<update>, then remove the oldest beyond `keep`.

    Args:
      directory: the run's checkpoints directory.
      learners: policy, value model and optimizer, and a reference that moves.
      tokenizer: saved beside the policy.
      state: numbers and fingerprints.
      keep: how many of the newest stay.
    """
    directory.mkdir(exist_ok=True)
    clear_up(directory)
    name = f"{state.update:06d}"
    partial = directory / f".{name}.partial"
    _save_policy(learners.policy, partial / "policy")
    tokenizer.save_pretrained(partial / "policy")
    _save_tensors(_what_learns(learners.value), partial / "value.safetensors")
    if learners.moving_reference is not None:
        _save_tensors(_what_moved(learners.moving_reference, learners.policy), partial / "reference.safetensors")
    optimizer = learners.optimizer.state_dict()
    tensors = {
        f"{number}.{key}": value.contiguous()
        for number, entry in optimizer["state"].items()
        for key, value in entry.items()
    }
    save_file(tensors, partial / "optimizer.safetensors")
    text = json.dumps({**asdict(state), "optimizer_groups": optimizer["param_groups"]}, indent=1)
    (partial / "state.json").write_text(text, encoding="utf-8")
    manifest = {
        str(file.relative_to(partial)): _described(file) for file in sorted(partial.rglob("*")) if file.is_file()
    }
    (partial / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    final = directory / name
    if final.exists():
        os.replace(final, directory / f".{name}.replaced")
    os.replace(partial, final)
    clear_up(directory)
    for old in checkpoints_in(directory)[:-keep]:
        remove_checkpoint(old)
    return final


def clear_up(directory: Path) -> None:
    """After a crash: remove what was half-written, and put back a checkpoint that was about to be replaced."""
    remove_partial(directory)
    for replaced in directory.glob(".*.replaced"):
        final = directory / replaced.name.removeprefix(".").removesuffix(".replaced")
        shutil.rmtree(replaced) if final.exists() else os.replace(replaced, final)


def remove_checkpoint(checkpoint: Path) -> None:
    """Remove a checkpoint so that a crash leaves it whole or gone."""
    gone = checkpoint.with_name(f".{checkpoint.name}.partial")
    os.replace(checkpoint, gone)
    shutil.rmtree(gone)


def checkpoints_in(directory: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    if not directory.is_dir():
        return []
    whole = (path for path in directory.iterdir() if path.is_dir() and path.name.isdigit())
    return sorted(whole, key=lambda path: int(path.name))


def _described(file: Path) -> dict[str, Any]:
    with file.open("rb") as content:
        return {"size": file.stat().st_size, "sha256": hashlib.file_digest(content, "sha256").hexdigest()}


def read_checkpoint_state(checkpoint: Path) -> CheckpointState:
    """Verify every file of a checkpoint against its manifest and read its numbers.

    Raises:
      CheckpointError: a file is missing, cut short or changed, or another version wrote the checkpoint.
    """
    remedy = f"remove {checkpoint} to resume from the one before it"
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"Expected a whole checkpoint, found no manifest in {checkpoint}; {remedy}.") from error
    for name, expected in manifest.items():
        file = checkpoint / name
        size = file.stat().st_size if file.is_file() else 0
        if size != expected["size"]:
            raise CheckpointError(
                f"Expected {expected['size']} bytes in {file}, found {size}: the checkpoint was cut short; {remedy}."
            )
        if _described(file) != expected:
            raise CheckpointError(f"Expected {file} as it was written, found it changed; {remedy}.")
    content = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    if content["format"] != FORMAT:
        raise CheckpointError(
            f"Expected a checkpoint of format {FORMAT}, found {content['format']} in {checkpoint}; "
            "resume with the version that wrote it."
        )
    return CheckpointState(**{key: content[key] for key in CheckpointState.__dataclass_fields__})


def load_learners(checkpoint: Path, learners: Learners) -> None:
    """Put everything that changes back to what it was; the checkpoint has been verified before.

    Raises:
      CheckpointError, ModelError: it holds a model with other parameters.
    """
    _load_policy(checkpoint / "policy", learners.policy)
    _load_tensors(checkpoint / "value.safetensors", _what_learns(learners.value))
    if learners.moving_reference is not None:
        moved = _what_moved(learners.moving_reference, learners.policy)
        _load_tensors(checkpoint / "reference.safetensors", moved)
    entries: dict[int, dict[str, Any]] = {}
    for name, tensor in load_file(checkpoint / "optimizer.safetensors").items():
        number, _, key = name.partition(".")
        entries.setdefault(int(number), {})[key] = tensor
    groups = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["optimizer_groups"]
    learners.optimizer.load_state_dict({"state": entries, "param_groups": groups})


def require_same_run(state: CheckpointState, *, reference_fingerprint: str, prompts_fingerprint: str) -> None:
    """Raise CheckpointError when the checkpoint was made with another reference or other prompts.

    A reference that moves with every resume would hand out a fresh drift budget each time.
    """
    for what, saved, found in (
        ("reference", state.reference_fingerprint, reference_fingerprint),
        ("prompts", state.prompts_fingerprint, prompts_fingerprint),
    ):
        if saved != found:
            raise CheckpointError(
                f"Expected the {what} that the run started with (SHA-256 {saved}), found another ({found}); "
                f"give the same {what}, or start a new run."
            )


def _save_policy(policy: PreTrainedModel, directory: Path) -> None:
    """What save_pretrained writes, for the adapter alone if there is one, in bytes that follow from the policy."""
    name = adapter_name(policy)
    if name is None:
        policy.save_pretrained(directory)
        return
    directory.mkdir(parents=True)
    _save_tensors(adapter_tensors(policy), directory / "adapter_model.safetensors")
    config: Any = copy.copy(policy.peft_config[name])
    config.inference_mode = True
    for key, value in vars(config).items():
        if isinstance(value, set):
            setattr(config, key, sorted(value))  # the order of a set is another one in every process
    kind = {"base_model_class": type(policy).__name__, "parent_library": type(policy).__module__}
    config.save_pretrained(str(directory), auto_mapping_dict=None if config.task_type else kind)


def _load_policy(directory: Path, policy: PreTrainedModel) -> None:
    if adapter_name(policy) is None:
        saved: PreTrainedModel = type(policy).from_pretrained(directory, dtype=policy.dtype)
        policy.load_state_dict(saved.state_dict())
        return
    file = directory / "adapter_model.safetensors"
    load_adapter_tensors(policy, load_file(file), file)


def _what_learns(model: nn.Module) -> dict[str, Tensor]:
    """The model's state without its frozen parameters, and without second names of the same tensor."""
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}
    first = {tensor.data_ptr(): name for name, tensor in reversed(state.items())}
    return {name: tensor for name, tensor in state.items() if first[tensor.data_ptr()] == name}


def _what_moved(reference: PreTrainedModel, policy: PreTrainedModel) -> dict[str, Tensor]:
    """Those parameters of a moving reference that learn in the policy."""
    return {name: reference.get_parameter(name).detach() for name in learning_names(policy)}


def _save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})


def _load_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """Copy a file's tensors into those of the same name."""
    saved = load_file(file)
    _require_names(file, saved, tensors)
    for name, tensor in tensors.items():
        tensor.copy_(saved[name])


def _require_names(file: Path, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    theirs, ours = ({f"{name} {list(t.shape)}" for name, t in tensors.items()} for tensors in (found, expected))
    odd = sorted(theirs ^ ours)
    if odd:
        raise CheckpointError(
            f"Expected the tensors of the run's models in {file}, found {odd[0]} only "
            f"{'there' if odd[0] in theirs else 'in the model'}; resume with the models that the run started with."
        )
