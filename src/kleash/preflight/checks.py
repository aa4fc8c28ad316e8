"""Every check of the self-test, in the order of the loop; what a fault leaves without meaning is not tried."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from kleash.config import RunConfig
from kleash.errors import ModelError, NonFiniteError, first_line
from kleash.generators import untouched_generators
from kleash.language_model import Models
from kleash.parts import Parts
from kleash.preflight.agreement import (
    dropout_off,
    kl_zero_at_step_0,
    padding_invisible,
    precision_of,
    sampler_is_scorer,
)
from kleash.preflight.check import Check, failed_with, passed
from kleash.preflight.memory import enough_memory
from kleash.preflight.reward import reward_checks, score_position
from kleash.preflight.sample import Sample, sample_of, scored_sample
from kleash.preflight.step import step_checks
from kleash.preflight.template import template_once
from kleash.preflight.tokens import generation_config, pad_and_eos, tokenizers_match, vocabulary_fits
from kleash.scoring import Scored

Context = Callable[[], AbstractContextManager[object]]


def preflight(
    parts: Parts, models: Models, config: RunConfig, *, autocast: Context = nullcontext, processes: int = 1
) -> list[Check]:
    """Try every promise of the loop on a few real responses; takes seconds and leaves no trace.

    Args:
      parts: loaded, on their device.
      models: policy, value model and references of these parts, unwrapped.
      config: of the run.
      autocast: what the run's forward passes stand in; entered afresh for those with gradient, which must not be
        served by weights that were cast without.
      processes: that will share the work.
    """
    with _without_a_trace(parts):
        checks = [
            everything_loads(parts),
            tokenizers_match(parts),
            vocabulary_fits(parts),
            template_once(parts, config),
            pad_and_eos(parts),
            generation_config(parts, config),
        ]
        if checks[2].status == "FAIL":  # a token without an embedding would stop the very first forward pass
            return checks
        tried = _sampled_and_scored(parts, models, config, autocast)
        if isinstance(tried, Check):
            return [*checks, tried]
        checks += _on_a_sample(parts, models, config, *tried, autocast)
        _clear_gradients(parts)
        with autocast():
            return [*checks, enough_memory(parts, config, models, processes=processes)]


def everything_loads(parts: Parts) -> Check:
    """What was loaded."""
    learning = sum(own.numel() for own in parts.policy.parameters() if own.requires_grad)
    every = sum(own.numel() for own in parts.policy.parameters())
    tokens = [len(tokens) for tokens in parts.prompts.tokens]
    return passed(
        "everything loads",
        f"{type(parts.policy).__name__}, {_count(learning)} of {_count(every)} parameters learn; {len(tokens)} prompts "
        f"of {min(tokens)} to {max(tokens)} tokens",
    )


def _count(number: int) -> str:
    """
    >>> _count(950), _count(1_234_567), _count(7_615_616_512)
    ('950', '1.2M', '7.6B')
    """
    if number < 100_000:
        return f"{number}"
    return f"{number / 1e6:.1f}M" if number < 1e9 else f"{number / 1e9:.1f}B"


def _sampled_and_scored(
    parts: Parts, models: Models, config: RunConfig, autocast: Context
) -> tuple[Sample, Scored] | Check:
    """The sample and what the models say of it; a FAIL where they say nothing."""
    try:
        with autocast():
            sample = sample_of(parts, config)
            return sample, scored_sample(sample, models, config)
    except NonFiniteError as error:
        return failed_with("numbers finite", error)
    except Exception as error:  # a model may do anything
        unable = ModelError(
            "Expected models that answer a prompt and read the answer, found "
            f"{type(error).__name__}: {first_line(error).rstrip('.')}; choose another policy or reward, or find the "
            "place with kleash train --debug."
        )
        unable.__cause__ = error
        return failed_with("models run", unable)


def _on_a_sample(
    parts: Parts, models: Models, config: RunConfig, sample: Sample, scored: Scored, autocast: Context
) -> list[Check]:
    with autocast():
        dropout = dropout_off(parts, scored, scored_sample(sample, models, config))
        noisy = dropout.status == "FAIL"
        checks = [dropout]
        if not noisy:  # two ways to one number can only meet if one way does
            checks += [
                kl_zero_at_step_0(parts, config, sample, scored),
                sampler_is_scorer(parts, config, models, sample, scored),
                padding_invisible(parts, config, models, sample, scored),
            ]
        of_reward, scores = reward_checks("reward", parts.scorer, sample, precision_of(parts))
        of_judge: list[Check] = []
        if parts.eval_scorer is not None:
            of_judge, _ = reward_checks("judge", parts.eval_scorer, sample, precision_of(parts))
        position = score_position(parts, config, sample, scores)
    with autocast():
        ratio, gradients = step_checks(parts, config, models, sample, scored, scores)
    return [*checks, *([] if noisy else [ratio]), gradients, *of_reward, position, *of_judge]


@contextmanager
def _without_a_trace(parts: Parts) -> Iterator[None]:
    """Within, gradients and random numbers may be used, also by a reward; afterwards both are as they were."""
    kept = [(parameter, parameter.grad) for model in parts.every_model for parameter in model.parameters()]
    _clear_gradients(parts)
    try:
        with untouched_generators(*(parameter.device for parameter, _ in kept)):
            yield
    finally:
        for parameter, gradient in kept:
            parameter.grad = gradient


def _clear_gradients(parts: Parts) -> None:
    for model in parts.every_model:
        model.zero_grad(set_to_none=True)
