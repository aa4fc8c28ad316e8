"""One step without its end: the real loss of a micro-batch, its ratio, its gradients; nothing moves."""

import torch
from torch import Tensor, nn

from kleash.batch import micro_batch_of
from kleash.config import RunConfig
from kleash.kl_form import FORMS
from kleash.language_model import Models
from kleash.masking import one_process
from kleash.parts import Parts
from kleash.ppo import LOSSES, StepSums, micro_batch_sums, summed_loss
from kleash.preflight.check import Check, failed, passed, warned
from kleash.preflight.sample import Sample
from kleash.preflight.tokens import scoring_models
from kleash.scoring import Scored
from kleash.targets import targets_of


def step_checks(
    parts: Parts, config: RunConfig, models: Models, sample: Sample, scored: Scored, scores: Tensor | None
) -> list[Check]:
    """The ratio and the gradients of the first micro-batch of the sample; the caller clears the gradients.

    Without scores, as of a reward that failed, scores of 1 and 0 stand in: they move the policy as others would.
    """
    rows = torch.arange(config.ppo.micro_batch or len(sample.prompts))[: len(sample.prompts)]
    beta = 1.0 if config.leash.beta == "auto" else config.leash.beta
    given = (torch.arange(len(sample.prompts)) + 1) % 2.0 if scores is None else scores
    aim = targets_of(
        sample.rollout,
        scored,
        given.to(scored.values.device),
        config.ppo,
        form=FORMS[config.kl],
        beta=beta,
        reduce=one_process,
    )
    part = micro_batch_of(sample.rollout, rows)
    sums = micro_batch_sums(models, part, aim.targets, config.ppo, temperature=config.rollout.temperature)
    loss = summed_loss(sums, config.ppo) / sums.tokens
    loss.backward()  # type: ignore[no-untyped-call]
    if not bool(loss.isfinite()):
        return [_ratio_1(sums), _infinite_loss(sums)]
    stand_in = "; from scores 1 and 0, as the reward gave none" if scores is None else ""
    return [_ratio_1(sums), _gradients_arrive(parts, stand_in)]


def _ratio_1(sums: StepSums) -> Check:
    name, tokens = "ratio 1", int(sums.tokens)
    mean, largest = float(sums.ratio) / tokens, float(sums.ratio_max)
    if mean == 1 and largest == 1:
        return passed(name, f"new / old policy exactly 1 on {tokens} tokens, before any step")
    said = f"new / old policy {mean:.6g} on average and at most {largest:.6g} before any step"
    if max(abs(mean - 1), largest - 1) < 1e-3:
        return warned(name, f"{said}: rounding, but not the same bits", "compare the kernels with and without gradient")
    return failed(name, said, "score and train with the same model, temperature and micro-batches, dropout off")


def _infinite_loss(sums: StepSums) -> Check:
    parts = ", ".join(f"{name} {getattr(sums, name).item():g}" for name in LOSSES)
    return failed("gradients arrive", f"the loss is not finite ({parts})", "scale the scores down, or look for -inf")


def _gradients_arrive(parts: Parts, stand_in: str) -> Check:
    """Whether the gradients are where they belong; a PASS ends with what stood in for the scores."""
    name = "gradients arrive"
    frozen: dict[str, nn.Module] = {"reference": parts.reference}
    if parts.first_reference is not None:
        frozen["first reference"] = parts.first_reference
    frozen |= {f"{role} model": scorer.model for role, scorer in scoring_models(parts)}
    for role, model in frozen.items():
        loose = [key for key, own in model.named_parameters() if own.requires_grad or own.grad is not None]
        if loose:
            return failed(
                name, f"{loose[0]} of the {role}, which must stay, takes gradients", "freeze it: requires_grad_(False)"
            )
    learning, zeros = 0, 0
    for role, model in (("policy", parts.policy), ("value model", parts.value)):
        for key, parameter in model.named_parameters():
            if not parameter.requires_grad:
                if parameter.grad is not None:
                    return failed(name, f"{key} of the {role} is frozen and has a gradient", "look for what sets it")
                continue
            learning += 1
            if parameter.grad is None:
                return failed(
                    name,
                    f"no gradient reaches {key} of the {role}, which is to learn",
                    "freeze it, or look for a detach or no_grad between it and the logits",
                )
            if not bool(parameter.grad.isfinite().all()):
                return failed(
                    name, f"the gradient of {key} of the {role} is not finite", "look for -inf or NaN in the logits"
                )
            zeros += not bool(parameter.grad.any())
    said = f"; {zeros} start at 0, as below a head of zeros" if zeros else ""
    return passed(name, f"finite, at all {learning} tensors that learn and no frozen one{said}{stand_in}")
