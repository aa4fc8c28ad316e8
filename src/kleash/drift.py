"""The record of an update: one flat line of figures, each with its formula, unit and healthy range."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kleash.batch import Rollout
from kleash.estimators import (
    Interval,
    kl_policy_ref_per_token_k1,
    kl_policy_ref_per_token_k3,
    mean_with_interval,
    per_sequence,
)
from kleash.masking import Reduce, masked, masked_moments, one_process
from kleash.ppo import UpdateStats
from kleash.rewards import missing_eos_penalised
from kleash.scoring import Scored

Record = dict[str, float | int | None]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What a figure in a record means."""

    meaning: str
    unit: str
    healthy: str


GLOSSARY: dict[str, Metric] = {
    "update": Metric(meaning="Number of the update; figures are measured before its steps", unit="-", healthy="-"),
    "score_mean": Metric(meaning="Mean score of the responses", unit="score", healthy="rises"),
    "score_low": Metric(meaning="Lower end of its 95 % interval over sequences", unit="score", healthy="-"),
    "score_high": Metric(meaning="Upper end of its 95 % interval over sequences", unit="score", healthy="-"),
    "score_std": Metric(meaning="Standard deviation of the scores over sequences", unit="score", healthy="above 0"),
    "eval_score_mean": Metric(
        meaning="Mean score by the held-out judge, which trains nothing", unit="score", healthy="rises with the score"
    ),
    "eval_score_low": Metric(meaning="Lower end of its 95 % interval", unit="score", healthy="-"),
    "eval_score_high": Metric(meaning="Upper end of its 95 % interval", unit="score", healthy="-"),
    "kl_policy_ref_per_sequence": Metric(
        meaning="Exact KL(policy || reference): sum over response tokens of sum_v pi (log pi - log rho), mean",
        unit="nats per sequence",
        healthy="0 at update 1, then below the budget",
    ),
    "kl_policy_ref_per_sequence_low": Metric(
        meaning="Lower end of its 95 % interval over sequences", unit="nats per sequence", healthy="-"
    ),
    "kl_policy_ref_per_sequence_high": Metric(
        meaning="Upper end of its 95 % interval over sequences", unit="nats per sequence", healthy="-"
    ),
    "kl_policy_ref_per_sequence_k1": Metric(
        meaning="One-token estimate: sum over response tokens of log pi(y) - log rho(y), mean",
        unit="nats per sequence",
        healthy="within its interval of the exact one; negative by chance only",
    ),
    "kl_policy_ref_per_sequence_k1_low": Metric(
        meaning="Lower end of its 95 % interval over sequences", unit="nats per sequence", healthy="-"
    ),
    "kl_policy_ref_per_sequence_k1_high": Metric(
        meaning="Upper end of its 95 % interval over sequences", unit="nats per sequence", healthy="-"
    ),
    "kl_policy_ref_per_sequence_k3": Metric(
        meaning="One-token estimate: sum over response tokens of expm1(-d) + d, d = log pi(y) - log rho(y), mean",
        unit="nats per sequence",
        healthy="near the exact one",
    ),
    "kl_policy_ref_per_token": Metric(
        meaning="Exact KL(policy || reference), sum over all response tokens / their number",
        unit="nats per token",
        healthy="well below 1",
    ),
    "beta": Metric(meaning="KL coefficient of this update", unit="score per nat", healthy="-"),
    "rewards_per_sequence_mean": Metric(
        meaning="score - beta * exact KL(policy || reference) per sequence, less the penalty for a missing EOS, mean",
        unit="score",
        healthy="rises",
    ),
    "entropy_per_token": Metric(
        meaning="Entropy of the policy, -sum_v pi log pi, mean over response tokens",
        unit="nats per token",
        healthy="falls slowly; near 0 means collapse",
    ),
    "response_length_mean": Metric(
        meaning="Response tokens per sequence, EOS included", unit="tokens", healthy="steady"
    ),
    "eos_share": Metric(meaning="Share of responses that closed with EOS", unit="share", healthy="steady, near 1"),
    "kl_rollout_policy_per_token_k3": Metric(
        meaning="Mismatch of sampler and scorer: k3 estimate of KL(rollout || policy) on unchanged weights",
        unit="nats per token",
        healthy="below 1e-6 in float32, below 1e-2 in bfloat16",
    ),
    "logprob_mismatch_max": Metric(
        meaning="Largest |log-prob at sampling - log-prob at scoring| of a token",
        unit="nats",
        healthy="below 1e-3 in float32",
    ),
    "policy_loss": Metric(meaning="max(-A r, -A clip(r)), mean over tokens and steps", unit="-", healthy="near 0"),
    "leash_loss": Metric(
        meaning="KL in the loss: (1 - share_of_k1) beta / advantage_std * KL(policy || reference), mean over tokens "
        "and steps; its estimate for k2_in_loss and k3_in_loss",
        unit="-",
        healthy="0 with k1; small beside 1",
    ),
    "value_loss": Metric(
        meaning="Clipped squared error of the value / 2, mean over tokens and steps", unit="score^2", healthy="falls"
    ),
    "clip_share": Metric(
        meaning="Share of tokens whose ratio left 1 +- clip_range", unit="share", healthy="0.01 to 0.3"
    ),
    "value_clip_share": Metric(
        meaning="Share of tokens whose value moved beyond value_clip_range", unit="share", healthy="below 0.5"
    ),
    "ratio_mean": Metric(meaning="Mean of r = pi_new(y) / pi_old(y)", unit="-", healthy="near 1"),
    "ratio_max": Metric(meaning="Largest ratio of the update", unit="-", healthy="below 10"),
    "ratio_max_first_step": Metric(
        meaning="Largest ratio before the first step of the update", unit="-", healthy="exactly 1"
    ),
    "kl_old_policy_per_token_k3": Metric(
        meaning="k3 estimate of KL(old policy || policy), mean over the tokens of all steps",
        unit="nats per token",
        healthy="below 0.02",
    ),
    "gradient_norm": Metric(
        meaning="Norm of the gradient of policy and value before clipping, mean over steps", unit="-", healthy="steady"
    ),
    "learning_rate": Metric(meaning="Learning rate of this update", unit="-", healthy="-"),
    "explained_variance": Metric(
        meaning="1 - var(returns - values) / var(returns) over response tokens", unit="share", healthy="rises to 1"
    ),
    "advantage_std": Metric(
        meaning="What the advantages were divided by (1 without whitening)", unit="score", healthy="above 0"
    ),
    "share_of_k1": Metric(
        meaning="kl: blend; how much of the leash is k1's, the rest is exact, mean over responses; 0 for other forms",
        unit="share",
        healthy="0 at first, rises towards 1 near the optimum",
    ),
}


@dataclass(frozen=True, kw_only=True)
class SequenceFigures:
    """One number per sequence of the whole update, all processes together; each [batch], on the CPU.

    kl_policy_ref is exact, _k1 and _k3 are estimates, in nats per sequence; the mismatch columns compare the
    log-probs at sampling time with those at scoring time.
    """

    scores: Tensor
    eval_scores: Tensor | None
    kl_policy_ref: Tensor
    kl_policy_ref_k1: Tensor
    kl_policy_ref_k3: Tensor
    entropy: Tensor
    length: Tensor
    finished: Tensor
    kl_rollout_policy_k3: Tensor
    logprob_mismatch: Tensor

    @property
    def kl_interval(self) -> Interval:
        """Exact KL(policy || reference) per sequence with its 95 % interval, nats."""
        return mean_with_interval(self.kl_policy_ref)


def sequence_figures(rollout: Rollout, scored: Scored, scores: Tensor, eval_scores: Tensor | None) -> dict[str, Tensor]:
    """The columns of SequenceFigures for this process's share; the caller gathers them."""
    mask = rollout.response_mask
    k1 = kl_policy_ref_per_token_k1(scored.policy_logprobs, scored.ref_logprobs, mask)
    k3 = kl_policy_ref_per_token_k3(scored.policy_logprobs, scored.ref_logprobs, mask)
    mismatch = kl_policy_ref_per_token_k3(rollout.rollout_logprobs, scored.policy_logprobs, mask)
    apart = masked(rollout.rollout_logprobs - scored.policy_logprobs, mask).abs()
    columns = {
        "scores": scores,
        "kl_policy_ref": per_sequence(scored.kl_policy_ref_per_token, mask),
        "kl_policy_ref_k1": per_sequence(k1, mask),
        "kl_policy_ref_k3": per_sequence(k3, mask),
        "entropy": per_sequence(scored.policy_entropy, mask),
        "length": mask.sum(-1),
        "finished": rollout.finished,
        "kl_rollout_policy_k3": per_sequence(mismatch, mask),
        "logprob_mismatch": apart.amax(-1),
    }
    if eval_scores is not None:
        columns["eval_scores"] = eval_scores
    return {name: column.to(mask.device, torch.float64) for name, column in columns.items()}


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor, *, reduce: Reduce = one_process) -> float | None:
    """1 - var(returns - values) / var(returns) over the mask, all processes; None where returns do not vary.

    >>> returns = torch.tensor([[1.0, 3.0]])
    >>> explained_variance(returns, returns, torch.tensor([[True, True]]))
    1.0
    """
    variance = float(masked_moments(returns.double(), mask, reduce=reduce).variance)
    residual = float(masked_moments((returns - values).double(), mask, reduce=reduce).variance)
    return 1 - residual / variance if variance else None


def record_of(
    update: int,
    figures: SequenceFigures,
    stats: UpdateStats,
    *,
    missing_eos_penalty: float,
    beta: float,
    learning_rate: float,
    advantage_std: float,
    share_of_k1: float,
    explained: float | None,
) -> Record:
    """The line that records.jsonl gets for an update: every key of GLOSSARY, None where a figure is not finite."""
    tokens = float(figures.length.sum())
    penalised = missing_eos_penalised(figures.scores, figures.finished.bool(), penalty=missing_eos_penalty)
    score, eval_score = mean_with_interval(figures.scores), _interval(figures.eval_scores)
    kl, k1 = figures.kl_interval, mean_with_interval(figures.kl_policy_ref_k1)
    record: Record = {
        "update": update,
        "score_mean": score.mean,
        "score_low": score.low,
        "score_high": score.high,
        "score_std": float(figures.scores.std(correction=0)),
        "eval_score_mean": eval_score.mean,
        "eval_score_low": eval_score.low,
        "eval_score_high": eval_score.high,
        "kl_policy_ref_per_sequence": kl.mean,
        "kl_policy_ref_per_sequence_low": kl.low,
        "kl_policy_ref_per_sequence_high": kl.high,
        "kl_policy_ref_per_sequence_k1": k1.mean,
        "kl_policy_ref_per_sequence_k1_low": k1.low,
        "kl_policy_ref_per_sequence_k1_high": k1.high,
        "kl_policy_ref_per_sequence_k3": float(figures.kl_policy_ref_k3.mean()),
        "kl_policy_ref_per_token": float(figures.kl_policy_ref.sum()) / tokens,
        "beta": beta,
        "rewards_per_sequence_mean": float((penalised - beta * figures.kl_policy_ref).mean()),
        "entropy_per_token": float(figures.entropy.sum()) / tokens,
        "response_length_mean": float(figures.length.mean()),
        "eos_share": float(figures.finished.mean()),
        "kl_rollout_policy_per_token_k3": float(figures.kl_rollout_policy_k3.sum()) / tokens,
        "logprob_mismatch_max": float(figures.logprob_mismatch.max()),
        "policy_loss": stats.policy_loss,
        "leash_loss": stats.leash_loss,
        "value_loss": stats.value_loss,
        "clip_share": stats.clip_share,
        "value_clip_share": stats.value_clip_share,
        "ratio_mean": stats.ratio_mean,
        "ratio_max": stats.ratio_max,
        "ratio_max_first_step": stats.ratio_max_first_step,
        "kl_old_policy_per_token_k3": stats.kl_old_policy_per_token_k3,
        "gradient_norm": stats.gradient_norm,
        "learning_rate": learning_rate,
        "explained_variance": explained,
        "advantage_std": advantage_std,
        "share_of_k1": share_of_k1,
    }
    return {name: value if value is not None and math.isfinite(value) else None for name, value in record.items()}


def _interval(values: Tensor | None) -> Interval:
    """The interval of the values; without any, one that a record shows as missing."""
    return Interval(mean=math.nan, low=math.nan, high=math.nan, n=0) if values is None else mean_with_interval(values)
