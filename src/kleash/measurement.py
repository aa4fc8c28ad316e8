"""How far a policy has drifted from a reference: two checkpoints, some prompts, no training.

prompts -> rollout -> log-probs (policy, reference) -> KL -> drift -> report
"""

import os
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from transformers import PreTrainedTokenizerBase

from kleash.batch import Prompts
from kleash.doubts import doubts_of
from kleash.errors import ConfigError, DoubtWarning
from kleash.given_responses import load_responses, tokenized_responses
from kleash.measured import MeasuredDrift, measured_drift
from kleash.measuring import Measuring, given_batches, sampled_batches
from kleash.pair import ModelOrPath, load_pair, name_of, training_modes_kept
from kleash.plan import Plan
from kleash.precision import Precision, precision_from
from kleash.progress import MeasureProgress, silent_libraries
from kleash.prompts import as_rows, load_prompts, require_prompts, tokenized_prompts
from kleash.rollout import RolloutConfig
from kleash.version import VERSION

SAMPLES, FEWEST, MOST = 512, 64, 65536
NEW_TOKENS = 128


class MeasureConfig(BaseModel):
    """How a drift is measured."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    samples: int | None = Field(None, ge=1)
    """Responses; more than prompts: rounded up to as many for each. Null = 512; with `until`, which asks from then on
    whether the interval is narrow enough, 64."""
    until: str | None = None
    """Sample until the 95 % interval of the exact KL is that narrow: ±0.05 nats per sequence, or 5% of the KL."""
    at_most: int | None = Field(None, ge=1)
    """Responses at which `until` gives up. Null = 65536."""
    max_new_tokens: int | None = Field(None, ge=1)
    """A response is cut there. Null = 128, or what the models' context leaves after the longest prompt."""
    temperature: float = Field(1.0, ge=1e-3, le=1e3)
    """Of policy and reference."""
    written_by_policy: bool = False
    """Says of given responses that the policy sampled them, at this temperature and without truncation."""
    batch: int = Field(64, ge=1)
    """Most responses at once; long ones are fewer at once."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights; sums are float32 in any case."""
    seed: int = Field(0, ge=0)
    """What all randomness follows from, whatever the batches are."""


def measure(
    policy: ModelOrPath,
    reference: ModelOrPath,
    *,
    prompts: list[str] | list[dict[str, Any]] | str | Path | None = None,
    responses: str | Path | None = None,
    config: MeasureConfig | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    pad_token: str | None = None,
    mapped: int = 0,
    quiet: bool = True,
) -> MeasuredDrift:
    """Exact KL(policy || reference) with a 95 % interval, k1 beside it, and where the drift lies.

    The policy answers the prompts, the reference scores the same tokens; at each response position the KL is the sum
    over the whole vocabulary. Responses are dealt out evenly: at most one to each prompt, or as many to each. With
    several to each, the interval is about these prompts; with one, it also covers their choice. Memory does not grow
    with tokens times vocabulary, nor with the number of responses but for a few numbers of each.

    Args:
      policy, reference: causal models, perhaps with an adapter, or where to load them.
      prompts: strings, rows with a key `prompt`, a file, or a data set's name.
      responses: in place of prompts, a file with `prompt` and `response` (or `completion`): these are scored, and
        nothing is sampled. Unless the policy wrote them, no figure is an estimate of KL(policy || reference) then.
      config: None = its defaults.
      tokenizer: of the policy; None = loaded from where the policy came from.
      pad_token: an existing token to pad with, for a tokenizer that has none.
      mapped: how many responses, the first ones, are kept token by token.
      quiet: no progress on stderr.

    Returns:
      MeasuredDrift.

    Warns:
      DoubtWarning: the exact KL of the responses is too skewed for their number, so that the interval is too short; or
        sampler and scorer are far apart, as in a narrow dtype; or the policy did not write what it is said to have
        written. The figures hold the sentence too.

    Raises:
      InputError: something given cannot be used; found before the first response.
      NonFiniteError: a log-prob or KL is not finite, as where the reference forbids what the policy says.
    """
    config = config or MeasureConfig()
    _require_one_source(prompts, responses, config)
    precision = None if config.until is None else precision_from(config.until)
    rows, given = (_rows(prompts), None) if responses is None else load_responses(responses)
    modes = training_modes_kept(policy, reference)
    with silent_libraries(), modes, MeasureProgress(quiet=quiet) as progress:
        dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
        pair = load_pair(policy, reference, tokenizer=tokenizer, pad_token=pad_token, dtype=dtype)
        state = Measuring(
            pair=pair,
            prompts=tokenized_prompts(rows, pair.tokenizer),
            plan=_plan(config, precision, prompts=len(rows), given=given is not None),
            temperature=config.temperature,
            sampled=given is None,
            written_by_policy=given is None or config.written_by_policy,
            mapped=mapped,
        )
        if given is None:
            limit = config.max_new_tokens or _room(state.prompts, pair.context)
            rollout = RolloutConfig(max_new_tokens=limit, temperature=config.temperature)
            batches = sampled_batches(state, rollout, seed=config.seed)
        else:
            limit = None
            batches = given_batches(state, tokenized_responses(given, pair.tokenizer, eos_token_ids=pair.eos_token_ids))
        for numbers, answers in batches:
            state.add(numbers, answers)
            interval = state.interval
            expected = state.plan.expected(interval)
            progress.show(state.tally.responses, interval if state.is_even else None, expected=expected)
    narrow_enough = state.plan.is_met(state.interval)
    settings = {
        "version": VERSION,
        "policy": name_of(policy),
        "reference": name_of(reference),
        "prompts": "given as a list" if isinstance(prompts, list) else str(prompts or responses),
        "responses": None if responses is None else str(responses),
        "written_by_policy": state.written_by_policy,
        "max_new_tokens": limit,
        **config.model_dump(include={"temperature", "until", "seed", "dtype"}),
        "until_reached": None if config.until is None else narrow_enough,
        "device": str(pair.device),
    }
    found = measured_drift(
        state.tally,
        state.prompts,
        settings,
        sampled=state.sampled,
        token_maps=state.maps,
        narrow_enough=narrow_enough,
    )
    for doubt in doubts_of(found.figures):
        warnings.warn(doubt, DoubtWarning, stacklevel=2)
    return found


def _plan(config: MeasureConfig, precision: Precision | None, *, prompts: int, given: bool) -> Plan:
    """When to stop: after all that was given, or as configured."""
    usual = SAMPLES if precision is None else FEWEST
    return Plan(
        prompts=prompts,
        samples=prompts if given else config.samples or usual,
        at_most=config.at_most or MOST,
        width=config.batch,
        precision=precision,
    )


def _require_one_source(prompts: object, responses: object, config: MeasureConfig) -> None:
    """Raise ConfigError unless there are prompts or responses, and only what belongs to them."""
    if (prompts is None) == (responses is None):
        found = "neither" if prompts is None else "both"
        raise ConfigError(f"Expected prompts to answer or responses to score, found {found}; give one of them.")
    if responses is None and config.written_by_policy:
        raise ConfigError(
            "Expected written_by_policy with given responses, found none; leave it out: sampled ones are."
        )
    for name in ("samples", "until", "max_new_tokens"):
        if responses is not None and getattr(config, name) is not None:
            raise ConfigError(f"Expected {name} with prompts to answer, found given responses; leave it out.")
    if config.at_most is not None and config.until is None:
        raise ConfigError("Expected at_most with until, found it alone; say samples for a number of responses.")


def require_one_process() -> None:
    """Raise ConfigError under a launcher of several processes, each of which would measure the same."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("Expected one process, found several; measure without a launcher.")


def _room(prompts: Prompts, context: int | None) -> int:
    """The usual limit of a response, or what the models' context leaves after the longest prompt."""
    return NEW_TOKENS if context is None else max(1, min(NEW_TOKENS, context - max(map(len, prompts.tokens))))


def _rows(prompts: list[str] | list[dict[str, Any]] | str | Path | None) -> list[dict[str, Any]]:
    if not isinstance(prompts, list):
        return load_prompts(prompts or "")
    rows = as_rows(prompts)
    require_prompts(rows, "the prompts")
    return rows
