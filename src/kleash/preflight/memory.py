"""Whether the memory is enough for one step at its largest: measured, not guessed."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from kleash.batch import Rollout, micro_batch_of
from kleash.config import RunConfig
from kleash.kl_form import FORMS
from kleash.language_model import Models
from kleash.models import trainable_parameters
from kleash.parts import Parts
from kleash.ppo import Targets, micro_batch_sums, summed_loss
from kleash.preflight.check import Check, failed, passed, warned

NAME = "memory"
COMFORTABLE = 0.8  # of what is available
GIB = 2**30
REMEDY = "lower ppo.micro_batch or rollout.max_new_tokens, or drop the longest prompts"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Bytes that a step took at its peak on top of what was there, and how many were to be had; None = unknown."""

    peak: int | None
    available: int | None


def enough_memory(parts: Parts, config: RunConfig, models: Models, *, processes: int) -> Check:
    """Forward and backward pass of one micro-batch of the longest prompt with the longest response, and AdamW's state.

    Args:
      parts: on their device.
      config: sizes of micro-batch and response.
      models: the same models as training sees them.
      processes: that share the prompts, and on a CPU the memory.
    """
    rows = config.ppo.micro_batch or max(config.rollout.prompts_per_update // config.ppo.minibatches // processes, 1)
    length = max(map(len, parts.prompts.tokens))
    size = f"{rows} x ({length} + {config.rollout.max_new_tokens}) tokens"
    state = 2 * sum(own.numel() * own.element_size() for own in trainable_parameters(parts.policy, parts.value))
    device = parts.policy.device
    try:
        found = _measured(device, lambda: _one_step(parts, config, models, rows), sharing=processes)
    except torch.OutOfMemoryError:
        return failed(NAME, f"one step over {size} ran out of memory on {device}", REMEDY)
    if found.peak is None or found.available is None:
        return passed(NAME, f"one step over {size} ran; peak not measured on this system")
    need = found.peak + state
    said = (
        f"{_size(need)} of {_size(found.available)} on {device} for a step over {size} ({_size(found.peak)} measured, "
        f"{_size(state)} AdamW)"
    )
    if need > found.available:
        return failed(NAME, said, REMEDY)
    if need > COMFORTABLE * found.available:
        return warned(NAME, said, REMEDY)
    return passed(NAME, said)


def _one_step(parts: Parts, config: RunConfig, models: Models, rows: int) -> None:
    """Forward and backward pass of the largest micro-batch, on made-up responses; gradients stay for the caller."""
    rollout = _largest_rollout(parts, config, rows)
    made_up = torch.zeros_like(rollout.rollout_logprobs)
    form = FORMS[config.kl]
    in_loss = form.in_loss if config.leash.beta else None
    targets = Targets(
        old_logprobs=made_up,
        old_values=made_up,
        advantages=made_up,
        returns=made_up,
        kl_weight=made_up,
        kl_in_loss=in_loss,
        ref_logprobs=made_up,
    )
    part = micro_batch_of(rollout, torch.arange(rows))
    sums = micro_batch_sums(models, part, targets, config.ppo, temperature=config.rollout.temperature)
    (summed_loss(sums, config.ppo) / sums.tokens).backward()  # type: ignore[no-untyped-call]


def _largest_rollout(parts: Parts, config: RunConfig, rows: int) -> Rollout:
    """The longest prompt, answered at full length by its own tokens over and over."""
    prompt, time = max(parts.prompts.tokens, key=len), config.rollout.max_new_tokens
    written = (prompt * (time // len(prompt) + 1))[:time]
    sequences = torch.tensor([prompt + written], device=parts.policy.device).repeat(rows, 1)
    mask = torch.ones(rows, time, dtype=torch.bool, device=sequences.device)
    return Rollout(
        sequences=sequences,
        attention_mask=torch.ones_like(sequences, dtype=torch.bool),
        response_mask=mask,
        rollout_logprobs=torch.zeros(rows, time, device=sequences.device),
        finished=mask[:, 0],
        completions=[""] * rows,
    )


def _measured(device: torch.device, step: Callable[[], None], *, sharing: int) -> Measured:
    """Peak memory of a step: allocated on a GPU, resident on Linux; elsewhere unknown."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        available, before = torch.cuda.mem_get_info(device)[0] + kept, torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return Measured(peak=torch.cuda.max_memory_allocated(device) - before, available=available)
    status = Path("/proc/self/status")
    if device.type != "cpu" or not status.exists():
        step()
        return Measured(peak=None, available=None)
    available = _available_to_a_process() // int(os.environ.get("LOCAL_WORLD_SIZE", sharing))
    counted = _peak_counted_from_here()
    before = _kib(status, "VmRSS")
    step()
    if not counted:
        return Measured(peak=None, available=available)
    return Measured(peak=max(_kib(status, "VmHWM") - before, 0), available=available)


def _peak_counted_from_here() -> bool:
    """Whether the kernel lets this process forget its peak of resident memory so far."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _available_to_a_process() -> int:
    """Bytes that the machine, or the control group that this process is confined to, still has."""
    available = _kib(Path("/proc/meminfo"), "MemAvailable")
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and limit.read_text().strip() != "max":
        available = min(available, int(limit.read_text()) - int(used.read_text()))
    return available


def _kib(file: Path, key: str) -> int:
    """Bytes of a `key: number kB` line."""
    line = next(line for line in file.read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def _size(count: int) -> str:
    """
    >>> _size(3 * 2**20), _size(5 * 2**30)
    ('3 MiB', '5.0 GiB')
    """
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.0f} MiB"
