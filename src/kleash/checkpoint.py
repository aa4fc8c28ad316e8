"""Checkpoints: everything a run needs to go on as if it had never stopped, in safetensors and JSON.

    checkpoints/000010/
      policy/                 from_pretrained-loadable, with the tokenizer
      value.safetensors       value model
      optimizer.safetensors   AdamW's moments, by parameter number
      state.json              update, leash, schedule, optimizer groups, seed, fingerprints
      manifest.json           size and SHA-256 of every file above

A checkpoint appears under its name only when it is whole. Random numbers and the place in the data follow
from the seed and the update's number, so those two are all that is kept of them.
"""

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kleash.errors import CheckpointError
from kleash.run_directory import remove_partial

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class CheckpointState:
    """The small part of a checkpoint: numbers and fingerprints."""

    update: int
    seed: int
    leash: dict[str, float]
    scheduler: dict[str, Any]
    reference_fingerprint: str
    prompts_fingerprint: str
    format: int = FORMAT


@dataclass(frozen=True, kw_only=True)
class Learners:
    """The parts of a run that learn: unwrapped models and their optimizer."""

    policy: PreTrainedModel
    value: nn.Module
    optimizer: torch.optim.Optimizer


def save_checkpoint(
    directory: Path, learners: Learners, tokenizer: PreTrainedTokenizerBase, state: CheckpointState, *, keep: int
) -> Path:
    """Write checkpoints/<update>, then remove the oldest beyond `keep`.

    Args:
      directory: the run's checkpoints directory.
      learners: policy, value model and optimizer.
      tokenizer: saved beside the policy.
      state: numbers and fingerprints.
      keep: how many of the newest stay.
    """
    directory.mkdir(exist_ok=True)
    remove_partial(directory)
    name = f"{state.update:06d}"
    partial = directory / f".{name}.partial"
    learners.policy.save_pretrained(partial / "policy")
    tokenizer.save_pretrained(partial / "policy")
    save_model(learners.value, str(partial / "value.safetensors"))
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
        shutil.rmtree(final)
    os.replace(partial, final)
    for old in checkpoints_in(directory)[:-keep]:
        shutil.rmtree(old)
    return final


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
    """Put policy, value model and optimizer back to what they were; the checkpoint has been verified before."""
    policy: PreTrainedModel = type(learners.policy).from_pretrained(checkpoint / "policy", dtype=learners.policy.dtype)
    learners.policy.load_state_dict(policy.state_dict())
    load_model(learners.value, checkpoint / "value.safetensors")
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
