"""Dropout, the KL at step 0, sampler and scorer, padding: where two ways to one number have to meet."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kleash.batch import micro_batch_of
from kleash.config import RunConfig
from kleash.estimators import kl_policy_ref_per_token_k3
from kleash.language_model import Models
from kleash.models import adapter_name, response_logits
from kleash.parts import Parts
from kleash.preflight.check import Check, failed, passed, warned
from kleash.preflight.sample import Sample
from kleash.preflight.tokens import scoring_models
from kleash.reference import without_adapter
from kleash.scoring import Scored

STATISTICS = {"policy_logprobs": "policy log-probs", "ref_logprobs": "reference log-probs", "values": "values"}
STEPS = range(-4, 5)  # of a search for the temperature of a sampler that is not the scorer


@dataclass(frozen=True, kw_only=True)
class Precision:
    """What rounding explains.

    logprob: difference of one token's log-prob, nats; mismatch: KL(rollout || policy), nats per token; kl_per_token:
    exact KL of a model to its copy, nats; relative: difference of two scores, as a share of the larger one.
    """

    logprob: float
    mismatch: float
    kl_per_token: float
    relative: float


def precision_of(parts: Parts) -> Precision:
    """Of the forward passes here: that of float32, or of the 16 bits of autocast or of the models themselves."""
    device = parts.policy.device.type
    if torch.is_autocast_enabled(device) or parts.policy.dtype.itemsize < 4:
        return Precision(logprob=0.5, mismatch=0.02, kl_per_token=1e-4, relative=0.05)
    return Precision(logprob=1e-3, mismatch=1e-4, kl_per_token=1e-7, relative=1e-3)


def dropout_off(parts: Parts, first: Scored, second: Scored) -> Check:
    """Whether no module drops anything, and two passes over one text give the same bits."""
    name = "dropout off"
    models = {"policy": parts.policy, "reference": parts.reference, "value model": parts.value}
    models |= {f"{role} model": scorer.model for role, scorer in scoring_models(parts)}
    for role, model in models.items():
        on = [module for module, part in model.named_modules() if part.training and _drops(part)]
        if on:
            return failed(
                name,
                f"{on[0] or 'the model'} of the {role} is in training mode and drops part of what passes",
                "call eval() on it, and look for what calls train()",
            )
    for column, words in STATISTICS.items():
        one, other = getattr(first, column), getattr(second, column)
        if not torch.equal(one, other):
            return failed(
                name,
                f"two passes over one text give {words} up to {_largest(one, other):.3g} apart",
                "look for dropout or noise that does not heed eval(), and set its rate to 0 in the model's config",
            )
    return passed(name, "two passes give the same bits, no module drops anything")


def _drops(module: nn.Module) -> bool:
    """Whether a module has a dropout rate above 0, its own or one that it hands to attention."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    return any("drop" in key and isinstance(value, float) and value > 0 for key, value in vars(module).items())


def kl_zero_at_step_0(parts: Parts, config: RunConfig, sample: Sample, scored: Scored) -> Check:
    """Whether the exact KL of a policy that has not moved is 0, and what stands against it where it is not."""
    name, mask = "KL 0 at step 0", sample.rollout.response_mask
    per_token = scored.kl_policy_ref_per_token
    kl, largest = float(per_token.double().sum(1).mean()), float(per_token.abs().max())
    said = f"KL(policy || reference) {kl:.3g} nats per response"
    over = f"{len(mask)} responses, {int(mask.sum())} tokens"
    if largest == 0:
        return passed(name, f"KL(policy || reference) exactly 0 on {over}")
    base = adapter_name(parts.policy) is not None and _is_the_base(parts, sample)
    who = "the reference is the base model under the policy's adapter" if base else "the reference is another model"
    if config.reference.kind == "adapter_off" or config.reference.path is not None:
        return warned(
            name,
            f"{said} on {over}: the KL is above 0 before the first update, since {who}, not the policy's start",
            "keep it if the drift from there is what the leash should hold; the reference copy measures from the "
            "policy's start",
        )
    if largest <= precision_of(parts).kl_per_token:
        return warned(
            name, f"{said} on {over}: rounding, but not the same bits", "compare both models' dtypes and kernels"
        )
    return failed(
        name, f"{said} on {over}: {who}", "take the reference copy of the policy as it starts, its adapter included"
    )


@torch.no_grad()
def _is_the_base(parts: Parts, sample: Sample) -> bool:
    part = micro_batch_of(sample.rollout, torch.tensor([0]))
    inputs = (part.sequences, part.attention_mask, part.time)
    own, other = (response_logits(model, *inputs) for model in (without_adapter(parts.policy), parts.reference))
    return own.shape == other.shape and _largest(own, other) <= precision_of(parts).logprob


@torch.no_grad()
def sampler_is_scorer(parts: Parts, config: RunConfig, models: Models, sample: Sample, scored: Scored) -> Check:
    """Whether the log-probs at sampling time are those that training will compute for the same tokens."""
    name, mask, rollout = "sampler is scorer", sample.rollout.response_mask, sample.rollout
    precision, temperature = precision_of(parts), config.rollout.temperature
    difference = (rollout.rollout_logprobs - scored.policy_logprobs)[mask]
    largest = float(difference.abs().max())
    kl = float(kl_policy_ref_per_token_k3(rollout.rollout_logprobs, scored.policy_logprobs, mask)[mask].mean())
    said = f"KL(rollout || policy) {kl:.2g} nats per token (k3), log-probs up to {largest:.2g} apart"
    if largest <= precision.logprob and kl <= precision.mismatch:
        return passed(name, f"log-probs agree to {largest:.1g} nats, temperature {temperature:g} in both")
    other, left = _temperature_that_explains(models, sample)
    if left < 0.2 * largest:
        return failed(
            name,
            f"{said}: sampled at about temperature {other:.2g}, scored at {temperature:g}",
            "give sampler and scorer one temperature",
        )
    cut = bool((difference >= -precision.logprob).all())
    why = ": no token is less likely when sampled, so the sampler cuts off the rest (top-k, top-p)" if cut else ""
    return failed(name, f"{said}{why}", "sample from the whole softmax, with the model and precision that score")


def _temperature_that_explains(models: Models, sample: Sample) -> tuple[float, float]:
    """The temperature from 0.1 to 10 that comes closest to the sampler's log-probs, and how far it stays off, nats."""
    part = micro_batch_of(sample.rollout, torch.arange(len(sample.prompts)))
    seen, best, errors = part.own(sample.rollout.rollout_logprobs), 1.0, dict[float, float]()
    for step in (10**0.25, 10**0.0625, 10**0.015625):
        for temperature in (best * step**number for number in STEPS):
            said = models.policy(part, None, temperature=temperature).policy_logprobs
            errors[temperature] = _largest(said, seen)
        best = min(errors, key=lambda tried: errors[tried])
    return best, errors[best]


@torch.no_grad()
def padding_invisible(parts: Parts, config: RunConfig, models: Models, sample: Sample, scored: Scored) -> Check:
    """Whether a response has the same log-probs and values in the padded batch as alone."""
    name, worst, allowed = "padding invisible", 0.0, precision_of(parts).logprob
    for row in sample.rows_alone:
        _, alone = sample.alone(row)
        own = sample.rollout.response_mask[row]
        part = micro_batch_of(alone, torch.tensor([0]))
        stats = models.policy(part, models.reference.ref_states(part), temperature=config.rollout.temperature)
        found = {
            "policy_logprobs": stats.policy_logprobs,
            "ref_logprobs": stats.ref_logprobs,
            "values": models.value(part.sequences, part.attention_mask, part.time),
        }
        for column, values in found.items():
            padded = getattr(scored, column)[row][own]
            difference = _largest(values[0], padded)
            if not difference <= allowed * max(1.0, float(padded.abs().max()) if column == "values" else 1.0):
                place = int((values[0] - padded).abs().argmax())
                return failed(
                    name,
                    f"{STATISTICS[column]} of response {row + 1} differ by up to {difference:.3g} between the padded "
                    f"batch and the response alone (largest at response token {place})",
                    "pad prompts on the left, and take a model that heeds attention_mask and position_ids",
                )
            worst = max(worst, difference)
    lengths = sample.rollout.attention_mask.sum(1)
    return passed(
        name,
        f"alone as in the batch of {int(lengths.min())} to {int(lengths.max())} tokens, to {worst:.1g} nats "
        f"(allowed {allowed:g})",
    )


def _largest(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).abs().max())
