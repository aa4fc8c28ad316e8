"""What a measurement found: the drift with its intervals, and every figure that goes with it."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from kleash.batch import Prompts
from kleash.doubts import doubt_of_skewed_sums, doubt_of_the_sampler, doubt_of_the_writer
from kleash.drift_map import rounded
from kleash.estimators import Interval, mean_with_interval, skewness
from kleash.tally import K1, LOG_RATIO, Tally, as_json


@dataclass(frozen=True, kw_only=True)
class MeasuredDrift:
    """How far the policy has drifted from the reference; KL(policy || reference) in nats, intervals 95 %.

    kl_policy_ref_per_sequence:   exact: at each position the sum over the whole vocabulary, summed over the response.
    log_ratio_per_sequence:       log policy - log reference of the response. If the policy wrote it, that is k1, an
                                  estimate of the same; of responses that somebody else wrote it estimates nothing.
    kl_policy_ref_per_token:      exact, per response token.
    policy_entropy_per_token, ref_entropy_per_token: of the next-token distributions along the responses.
    response_length:              tokens.
    figures:                      everything, as `--json` writes it.
    token_maps:                   some responses, token by token, as the page shows them.
    narrow_enough:                whether the interval is as narrow as was asked; True where nothing was asked.
    """

    kl_policy_ref_per_sequence: Interval
    log_ratio_per_sequence: Interval
    kl_policy_ref_per_token: Interval
    policy_entropy_per_token: Interval
    ref_entropy_per_token: Interval
    response_length: Interval
    figures: dict[str, Any]
    token_maps: list[dict[str, Any]] = field(default_factory=list)
    narrow_enough: bool = True


def measured_drift(
    tally: Tally,
    prompts: Prompts,
    settings: dict[str, Any],
    *,
    sampled: bool,
    token_maps: list[dict[str, Any]],
    narrow_enough: bool,
) -> MeasuredDrift:
    """What the sums of a measurement say.

    Args:
      tally: over all responses.
      prompts: all that may have been answered.
      settings: what goes into the figures as it is; `written_by_policy` among it.
      sampled: whether the responses were drawn here, so that there is a sampler to hold the scorer against.
      token_maps, narrow_enough: see MeasuredDrift.
    """
    strata = tally.strata
    intervals = {
        "kl_policy_ref_per_sequence": tally.interval("kl_policy_ref", strata=strata),
        "log_ratio_per_sequence": tally.interval("kl_policy_ref_k1", strata=strata),
        "kl_policy_ref_per_token": tally.interval("kl_policy_ref", per_token=True, strata=strata),
        "policy_entropy_per_token": tally.interval("policy_entropy", per_token=True, strata=strata),
        "ref_entropy_per_token": tally.interval("ref_entropy", per_token=True, strata=strata),
        "response_length": tally.interval("length", strata=strata),
    }
    written = bool(settings["written_by_policy"])
    named = {LOG_RATIO: K1} if written else {}
    exact, k1 = intervals["kl_policy_ref_per_sequence"], intervals[LOG_RATIO]
    sums, ratios = tally.column("kl_policy_ref"), tally.column("kl_policy_ref_k1")
    skewed = skewness(sums, strata=strata)
    mismatch = {name: value if sampled else None for name, value in tally.mismatch().items()}
    figures = {
        **settings,
        "prompts_count": len(torch.unique(tally.column("prompt"))),
        "responses_count": tally.responses,
        **{named.get(name, name): as_json(interval) for name, interval in intervals.items()},
        "k1_responses_for_same_interval": k1_responses_for_same_interval(exact, k1) if written else None,
        "interval_covers": "the responses and the choice of prompts" if strata is None else "the responses",
        "kl_policy_ref_per_sequence_skewness": None if skewed is None else rounded(skewed),
        "interval_doubt": doubt_of_skewed_sums(skewed, exact.n, sampled=sampled),
        "sampler_doubt": doubt_of_the_sampler(mismatch["kl_rollout_policy_per_token_k3"]),
        "writer_doubt": doubt_of_the_writer(sums, ratios, strata=strata) if written and not sampled else None,
        "finished_share": rounded(float(tally.column("finished").mean())),
        **mismatch,
        "by_position": tally.positions(),
        "by_class": tally.classes(),
        "by_prompt": by_prompt(tally, prompts, log_ratio=named.get(LOG_RATIO, LOG_RATIO)),
        "top_tokens": tally.places,
        "drifted_tokens": tally.drifted_tokens(),
        "convergence": tally.convergence(written_by_policy=written),
    }
    return MeasuredDrift(**intervals, figures=figures, token_maps=token_maps, narrow_enough=narrow_enough)


def k1_responses_for_same_interval(exact: Interval, k1: Interval) -> float | None:
    """How many responses k1 would take to be as narrow as the exact estimate is; None where that has no width.

    >>> exact, k1 = Interval(mean=5.0, low=4.9, high=5.1, n=100), Interval(mean=5.2, low=4.2, high=6.2, n=100)
    >>> k1_responses_for_same_interval(exact, k1)
    10000.0
    """
    width = exact.high - exact.low
    if not (0 < width < math.inf):
        return None
    return rounded(k1.n * ((k1.high - k1.low) / width) ** 2)


def by_prompt(tally: Tally, prompts: Prompts, *, log_ratio: str) -> list[dict[str, Any]]:
    """For each prompt that was answered, in the file's order: its drift, its responses' length.

    Args:
      tally, prompts: see measured_drift.
      log_ratio: under which name the mean of log policy - log reference goes.
    """
    numbers = tally.column("prompt")
    order = numbers.argsort(stable=True)
    answered, counts = torch.unique(numbers, return_counts=True)
    parts = {
        name: torch.split(tally.column(name)[order], counts.tolist())
        for name in ("kl_policy_ref", "kl_policy_ref_k1", "length")
    }
    return [
        {
            "prompt": prompts.texts[number],
            "responses": len(parts["length"][i]),
            "kl_policy_ref_per_sequence": as_json(mean_with_interval(parts["kl_policy_ref"][i])),
            log_ratio: rounded(float(parts["kl_policy_ref_k1"][i].mean())),
            "response_length": rounded(float(parts["length"][i].mean())),
        }
        for i, number in enumerate(answered.tolist())
    ]
