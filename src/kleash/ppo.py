"""One PPO update: the clipped steps on a rollout that has been scored."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Literal

import torch
from accelerate import Accelerator
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from kleash.batch import MicroBatch, Rollout, micro_batch_of
from kleash.errors import NonFiniteError
from kleash.estimators import kl_policy_ref_per_token_k2, kl_policy_ref_per_token_k3
from kleash.language_model import Models, PositionStats, RefStates
from kleash.losses import clipped_policy_loss_per_token, clipped_value_loss_per_token, policy_ratio
from kleash.masking import Reduce, masked, whiten
from kleash.models import trainable_parameters

LOSSES = ("policy_loss", "leash_loss", "value_loss")
DecayRate = Annotated[float, Field(ge=0, lt=1)]


class PPOConfig(BaseModel):
    """The clipped policy and value steps."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(4, ge=1)
    """Passes over each rollout."""
    minibatches: int = Field(4, ge=1)
    """Optimizer steps in each epoch."""
    micro_batch: int | None = Field(None, ge=1)
    """Sequences in one forward pass on each process, gradients accumulate over them; null = the whole minibatch."""
    clip_range: float = Field(0.2, gt=0)
    """The policy's ratio earns nothing beyond 1 +- this."""
    value_clip_range: float = Field(0.2, gt=0)
    """The value may move this far from its old one before its loss is clipped, in score units."""
    value_coefficient: float = Field(0.1, ge=0, allow_inf_nan=False)
    """Weight of the value loss."""
    learning_rate: float = Field(1.0e-5, gt=0, allow_inf_nan=False)
    """Peak learning rate of AdamW, for policy and value model."""
    learning_rate_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape over the run's updates, after the warm-up."""
    warmup_updates: int = Field(0, ge=0)
    """Updates over which the learning rate rises from 0."""
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False)
    """AdamW's decoupled weight decay."""
    adam_betas: tuple[DecayRate, DecayRate] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment."""
    adam_epsilon: float = Field(1e-8, gt=0, allow_inf_nan=False)
    """AdamW's epsilon."""
    max_kl_old_policy_per_token: float | None = Field(None, gt=0, allow_inf_nan=False)
    """The update ends early, before a step on which the k3 estimate of KL(old policy || policy) lies above this, in
    nats per token; null = every step is taken."""
    max_gradient_norm: float = Field(1.0, gt=0)
    """Gradients of policy and value model together are scaled down to this norm."""
    gamma: float = Field(1.0, ge=0, le=1)
    """Discount per token."""
    gae_lambda: float = Field(0.95, ge=0, le=1)
    """Decay of generalised advantage estimation."""
    reduction: Literal["token_mean", "sequence_sum"] = "token_mean"
    """Of losses over a minibatch: mean over response tokens, or sum over each response and mean over responses."""
    whiten_advantages: bool = True
    """Advantages get mean 0 and variance 1 over the response tokens of the update."""
    missing_eos_penalty: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Taken off the score of a response that was cut by the length limit."""


def minibatches_of(rows: int, config: PPOConfig, generator: torch.Generator) -> list[list[Tensor]]:
    """A shuffled partition of the rows: minibatches (one optimizer step each) of micro-batches (one forward each)."""
    shuffled = torch.randperm(rows, generator=generator)
    per_step = rows // config.minibatches
    return [list(torch.split(step, config.micro_batch or per_step)) for step in torch.split(shuffled, per_step)]


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What the steps of an update aim at; tensors are [batch, time] without gradient: see kleash.losses.

    kl_weight stands before the KL in the loss: beta, divided by what the advantages were divided by; it and
    ref_logprobs are there if kl_in_loss is. ref_states are what the rollout's scoring kept of the reference, if
    anything.
    """

    old_logprobs: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor
    kl_weight: Tensor | None = None
    kl_in_loss: Literal["exact", "k2", "k3"] | None = None
    ref_logprobs: Tensor | None = None
    ref_states: Tensor | None = None


def whitened_advantages(
    advantages: Tensor, response_mask: Tensor, config: PPOConfig, *, reduce: Reduce
) -> tuple[Tensor, float]:
    """The advantages that the loss uses, and the number they were divided by (1 without whitening)."""
    if not config.whiten_advantages:
        return advantages, 1.0
    whitened, scale = whiten(advantages, response_mask, reduce=reduce)
    return whitened, float(scale)


@dataclass(frozen=True, kw_only=True)
class StepSums:
    """Sums over the response tokens of one micro-batch; divided by `tokens` they are means."""

    tokens: Tensor
    policy_loss: Tensor
    leash_loss: Tensor
    value_loss: Tensor
    clipped: Tensor
    value_clipped: Tensor
    ratio: Tensor
    ratio_max: Tensor
    kl_old_policy_k3: Tensor


def micro_batch_sums(
    models: Models, part: MicroBatch, targets: Targets, config: PPOConfig, *, temperature: float
) -> StepSums:
    """Losses of one forward pass with gradient, summed over its response tokens, and what to watch beside them."""
    mask = part.response_mask
    stats, leash_loss = _stats_and_leash_loss(models, part, targets, temperature=temperature)
    logprobs = stats.policy_logprobs
    old_logprobs, old_values = part.own(targets.old_logprobs), part.own(targets.old_values)
    advantages, returns = part.own(targets.advantages), part.own(targets.returns)
    ratio = policy_ratio(logprobs, old_logprobs, mask)
    values = models.value(part.sequences, part.attention_mask, part.time)
    policy_loss = clipped_policy_loss_per_token(ratio, advantages, clip_range=config.clip_range)
    value_loss = clipped_value_loss_per_token(values, old_values, returns, clip_range=config.value_clip_range)
    moved, value_moved = (ratio.detach() - 1).abs(), (values.detach() - old_values).abs()
    return StepSums(
        tokens=mask.sum(),
        policy_loss=masked(policy_loss, mask).sum(),
        leash_loss=leash_loss,
        value_loss=masked(value_loss, mask).sum(),
        clipped=((moved > config.clip_range) & mask).sum(),
        value_clipped=((value_moved > config.value_clip_range) & mask).sum(),
        ratio=masked(ratio.detach(), mask).sum(),
        ratio_max=masked(ratio.detach(), mask).max(),
        kl_old_policy_k3=kl_policy_ref_per_token_k3(old_logprobs, logprobs.detach(), mask).sum(),
    )


def _stats_and_leash_loss(
    models: Models, part: MicroBatch, targets: Targets, *, temperature: float
) -> tuple[PositionStats, Tensor]:
    """What the policy says now, and kl_weight * the sum of the KL in the loss, both with gradient."""
    mask, form = part.response_mask, targets.kl_in_loss
    if form is None or targets.kl_weight is None:
        stats = models.policy(part, None, temperature=temperature)
        return stats, stats.policy_logprobs.new_zeros(())
    weight = part.own(targets.kl_weight)
    if form == "exact":
        stats = models.policy(part, _ref_states(models, part, targets), temperature=temperature)
        return stats, (weight * stats.kl_policy_ref_per_token).sum()
    assert targets.ref_logprobs is not None
    stats = models.policy(part, None, temperature=temperature)
    estimate = {"k2": kl_policy_ref_per_token_k2, "k3": kl_policy_ref_per_token_k3}[form]
    return stats, (weight * estimate(stats.policy_logprobs, part.own(targets.ref_logprobs), mask)).sum()


@torch.no_grad()
def _ref_states(models: Models, part: MicroBatch, targets: Targets) -> RefStates:
    """The reference's states of a micro-batch: kept from the rollout, or else from another forward pass."""
    if targets.ref_states is None:
        return models.reference.ref_states(part)
    return RefStates(model=models.reference, states=part.own(targets.ref_states)[part.response_mask])


@dataclass(frozen=True, kw_only=True)
class UpdateStats:
    """Means over all optimizer steps of an update; losses per token, KL in nats per token, norms before clipping.

    optimizer_steps is how many were taken; one that was refused, since the policy had moved too far, is measured too.
    """

    policy_loss: float
    leash_loss: float
    value_loss: float
    clip_share: float
    value_clip_share: float
    ratio_mean: float
    ratio_max: float
    ratio_max_first_step: float
    kl_old_policy_per_token_k3: float
    gradient_norm: float
    optimizer_steps: int


def ppo_update(
    models: Models,
    rollout: Rollout,
    targets: Targets,
    epochs: Iterator[list[list[Tensor]]],
    config: PPOConfig,
    *,
    temperature: float,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
) -> UpdateStats:
    """Take every optimizer step of an update.

    The loss of a step is the mean over the response tokens of its minibatch (or, by config.reduction, the sum over
    each response and the mean over responses), over all processes and micro-batches together, so neither the size
    of a micro-batch nor the number of processes changes it. Policy loss, KL in the loss and value loss share it.
    Where config.max_kl_old_policy_per_token is exceeded, that step and all later ones are left out.

    Raises:
      NonFiniteError: a loss or the gradient norm is NaN or infinite; the step that showed it is not taken.
    """
    limit = math.inf if config.max_kl_old_policy_per_token is None else config.max_kl_old_policy_per_token
    rows, taken = [], 0
    for micro_batches in chain.from_iterable(epochs):
        row = _gradients_of_step(
            models, rollout, targets, micro_batches, config,
            temperature=temperature, optimizer=optimizer, accelerator=accelerator,
        )  # fmt: skip
        rows.append(row)
        if float(row[7] / row[0]) > limit:
            break
        optimizer.step()
        taken += 1
    table = torch.stack(rows)
    tokens = table[:, 0].sum()
    policy_loss, leash_loss, value_loss, clipped, value_clipped, ratio, kl = (table[:, 1:8].sum(0) / tokens).tolist()
    return UpdateStats(
        policy_loss=policy_loss,
        leash_loss=leash_loss,
        value_loss=value_loss,
        clip_share=clipped,
        value_clip_share=value_clipped,
        ratio_mean=ratio,
        ratio_max=float(table[:, 8].max()),
        ratio_max_first_step=float(table[0, 8]),
        kl_old_policy_per_token_k3=kl,
        gradient_norm=float(table[:, 9].mean()),
        optimizer_steps=taken,
    )


def _gradients_of_step(
    models: Models,
    rollout: Rollout,
    targets: Targets,
    micro_batches: list[Tensor],
    config: PPOConfig,
    *,
    temperature: float,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
) -> Tensor:
    """Clipped gradients of one step; returns the float64 row that ppo_update adds up, the same on every process."""
    parts = [micro_batch_of(rollout, rows) for rows in micro_batches]
    divisor = accelerator.reduce(_own_divisor(parts, config), "sum")
    optimizer.zero_grad()
    sums = []
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        with nullcontext() if last else _gradients_stay(accelerator, models):
            result = micro_batch_sums(models, part, targets, config, temperature=temperature)
            loss = summed_loss(result, config) / divisor
            if not bool(loss.isfinite()):
                parts_of_it = ", ".join(f"{name} {getattr(result, name).item():g}" for name in LOSSES)
                raise NonFiniteError(
                    f"Expected a finite loss, found {loss.item()} ({parts_of_it}); lower the learning rate, "
                    "or resume from the last checkpoint."
                )
            accelerator.backward(loss * accelerator.num_processes)
        sums.append(result)
    parameters = list(trainable_parameters(models.policy, models.value))
    norm = accelerator.clip_grad_norm_(parameters, config.max_gradient_norm)
    if not bool(torch.as_tensor(norm).isfinite()):
        raise NonFiniteError(
            f"Expected a finite gradient norm, found {float(norm)}; lower the learning rate, "
            "or resume from the last checkpoint."
        )
    return _reduced_row(sums, torch.as_tensor(norm), accelerator)


def summed_loss(sums: StepSums, config: PPOConfig) -> Tensor:
    """policy_loss + leash_loss + value_coefficient * value_loss, not yet divided by what the step counts."""
    return sums.policy_loss + sums.leash_loss + config.value_coefficient * sums.value_loss


def _own_divisor(parts: list[MicroBatch], config: PPOConfig) -> Tensor:
    """What this process adds to the number that a step's sums are divided by."""
    per_token = config.reduction == "token_mean"
    counted = [part.response_mask if per_token else torch.ones_like(part.rows) for part in parts]
    return torch.stack([ones.sum() for ones in counted]).sum()


def _reduced_row(sums: list[StepSums], norm: Tensor, accelerator: Accelerator) -> Tensor:
    names = ("tokens", *LOSSES, "clipped", "value_clipped", "ratio", "kl_old_policy_k3")
    own = torch.stack([torch.stack([getattr(s, name).detach().double() for s in sums]).sum() for name in names])
    largest = torch.stack([s.ratio_max for s in sums]).max().double()
    total = accelerator.reduce(own, "sum")
    over_processes = accelerator.gather(largest.unsqueeze(0)).max()
    return torch.cat([total, over_processes.unsqueeze(0), norm.double().reshape(1)]).cpu()


@contextmanager
def _gradients_stay(accelerator: Accelerator, models: Models) -> Iterator[None]:
    """Within, gradients of several processes are not yet added up: only the last micro-batch of a step does that."""
    with accelerator.no_sync(models.policy), accelerator.no_sync(models.value):
        yield
