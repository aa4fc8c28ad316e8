"""The record of an update: one flat line of figures, each with its formula, unit and healthy range."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from kleash.batch import Rollout
from kleash.checks import require_between
from kleash.estimators import (
    Interval,
    kl_policy_ref_per_token_k1,
    kl_policy_ref_per_token_k3,
    mean_with_interval,
    per_sequence,
)
from kleash.masking import Reduce, masked, masked_moments, one_process
from kleash.ppo import UpdateStats
from kleash.repetition import distinct_n_over_batch, distinct_n_per_sequence
from kleash.rewards import missing_eos_penalised
from kleash.scoring import Scored
from kleash.tail import tail_gap, tail_index
from kleash.token_class import TOKEN_CLASSES, token_classes

Record = dict[str, float | int | None]

CONTEXT = 8  # tokens of the prompt that are kept, to show what stood before the first tokens of a response


@dataclass(frozen=True, kw_only=True)
class SequenceFigures:
    """One number per sequence of the whole update, all processes together; each [batch], on the CPU.

    kl_policy_ref and kl_policy_first_ref are exact, _k1 and _k3 are estimates, in nats per sequence; the mismatch
    columns compare the log-probs at sampling time with those at scoring time.
    """

    scores: Tensor
    eval_scores: Tensor | None
    kl_policy_ref: Tensor
    kl_policy_first_ref: Tensor
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

    @property
    def first_kl_interval(self) -> Interval:
        """Exact KL(policy || first reference) per sequence with its 95 % interval, nats."""
        return mean_with_interval(self.kl_policy_first_ref)


def sequence_figures(rollout: Rollout, scored: Scored, scores: Tensor, eval_scores: Tensor | None) -> dict[str, Tensor]:
    """The columns of SequenceFigures for this process's share; the caller gathers them."""
    mask = rollout.response_mask
    k1 = kl_policy_ref_per_token_k1(scored.policy_logprobs, scored.ref_logprobs, mask)
    k3 = kl_policy_ref_per_token_k3(scored.policy_logprobs, scored.ref_logprobs, mask)
    columns = {
        "scores": scores,
        "kl_policy_ref": per_sequence(scored.kl_policy_ref_per_token, mask),
        "kl_policy_first_ref": per_sequence(scored.kl_policy_first_ref_per_token, mask),
        "kl_policy_ref_k1": per_sequence(k1, mask),
        "kl_policy_ref_k3": per_sequence(k3, mask),
        "entropy": per_sequence(scored.policy_entropy, mask),
        "length": mask.sum(-1),
        "finished": rollout.finished,
        **mismatch_columns(rollout, scored.policy_logprobs),
    }
    if eval_scores is not None:
        columns["eval_scores"] = eval_scores
    return {name: column.to(mask.device, torch.float64) for name, column in columns.items()}


def mismatch_columns(rollout: Rollout, policy_logprobs: Tensor) -> dict[str, Tensor]:
    """Each [batch]: how far apart the log-probs of sampler and scorer are, as a KL and at the worst token, nats."""
    mask = rollout.response_mask
    apart = masked(rollout.rollout_logprobs - policy_logprobs, mask).abs()
    return {
        "kl_rollout_policy_k3": per_sequence(
            kl_policy_ref_per_token_k3(rollout.rollout_logprobs, policy_logprobs, mask), mask
        ),
        "logprob_mismatch": apart.amax(-1),
    }


@dataclass(frozen=True, kw_only=True)
class TokenFigures:
    """One number per response token of the whole update, all processes together; each on the CPU.

    tokens, response_mask, policy_logprobs, ref_logprobs, kl_policy_ref [batch, time]: ids, the mask, nats; the KL is
    exact. classes [batch, time] are places in TOKEN_CLASSES, NO_CLASS off the mask. prompt_ends and prompt_ends_mask
    [batch, CONTEXT] are the last tokens of the prompts, padded on the left.
    """

    tokens: Tensor
    response_mask: Tensor
    policy_logprobs: Tensor
    ref_logprobs: Tensor
    kl_policy_ref: Tensor
    classes: Tensor
    prompt_ends: Tensor
    prompt_ends_mask: Tensor

    def of_class(self, name: str) -> Tensor:
        """[batch, time] bool, True on the response tokens of that class."""
        return self.classes == TOKEN_CLASSES.index(name)


class SaidOfTokens(Protocol):
    """What both models say of response tokens, each [batch, time] nats: see kleash.scoring and kleash.reading."""

    @property
    def policy_logprobs(self) -> Tensor: ...
    @property
    def ref_logprobs(self) -> Tensor: ...
    @property
    def kl_policy_ref_per_token(self) -> Tensor: ...


def token_figures(
    rollout: Rollout, said: SaidOfTokens, *, time: int, eos_token_ids: Sequence[int], special_token_ids: Sequence[int]
) -> dict[str, Tensor]:
    """The columns of TokenFigures for this process's share, padded to `time` so that all processes agree.

    Args:
      rollout, said: what was sampled, and what the models say of it.
      time: the length limit of the rollout.
      eos_token_ids, special_token_ids: see token_classes.

    Raises:
      ValueRangeError: a response is longer than `time`.
    """
    require_between(rollout.response_time, math.inf, time=time)
    prompt = rollout.sequences.shape[1] - rollout.response_time
    tokens, mask = _widened(rollout.responses, time), _widened(rollout.response_mask, time)
    return {
        "tokens": tokens,
        "response_mask": mask,
        "policy_logprobs": _widened(said.policy_logprobs, time),
        "ref_logprobs": _widened(said.ref_logprobs, time),
        "kl_policy_ref": _widened(said.kl_policy_ref_per_token, time),
        "classes": token_classes(tokens, mask, eos_token_ids=eos_token_ids, special_token_ids=special_token_ids),
        "prompt_ends": _last(rollout.sequences[:, :prompt], CONTEXT),
        "prompt_ends_mask": _last(rollout.attention_mask[:, :prompt], CONTEXT),
    }


def _widened(values: Tensor, time: int) -> Tensor:
    """[batch, shorter] -> [batch, time], padded with 0 (False) on the right."""
    return nn.functional.pad(values, (0, time - values.shape[1]))


def _last(values: Tensor, width: int) -> Tensor:
    """The last columns, [batch, any] -> [batch, width], padded with 0 (False) on the left where there are fewer."""
    return nn.functional.pad(values[:, -width:], (max(width - values.shape[1], 0), 0))


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
    tokens: TokenFigures,
    stats: UpdateStats,
    *,
    missing_eos_penalty: float,
    beta: float,
    learning_rate: float,
    advantage_std: float,
    share_of_k1: float,
    explained: float | None,
) -> Record:
    """The line of an update in records.jsonl: every key of kleash.glossary, None where a figure is not finite."""
    penalised = missing_eos_penalised(figures.scores, figures.finished.bool(), penalty=missing_eos_penalty)
    record: Record = {
        "update": update,
        **_score_figures(figures),
        **_kl_figures(figures),
        **_kl_by_class(tokens),
        "beta": beta,
        "rewards_per_sequence_mean": float((penalised - beta * figures.kl_policy_ref).mean()),
        **_response_figures(figures),
        **_repetition_figures(tokens),
        **mismatch_figures(figures.kl_rollout_policy_k3, figures.logprob_mismatch, figures.length),
        **vars(stats),
        "learning_rate": learning_rate,
        "explained_variance": explained,
        "advantage_std": advantage_std,
        "share_of_k1": share_of_k1,
    }
    return {name: value if value is not None and math.isfinite(value) else None for name, value in record.items()}


def _score_figures(figures: SequenceFigures) -> Record:
    score, eval_score = mean_with_interval(figures.scores), _interval(figures.eval_scores)
    return {
        "score_mean": score.mean,
        "score_low": score.low,
        "score_high": score.high,
        "score_std": float(figures.scores.std(correction=0)),
        "score_tail_index": tail_index(figures.scores),
        "score_tail_gap": tail_gap(figures.scores),
        "eval_score_mean": eval_score.mean,
        "eval_score_low": eval_score.low,
        "eval_score_high": eval_score.high,
    }


def _kl_figures(figures: SequenceFigures) -> Record:
    kl, first_kl = figures.kl_interval, figures.first_kl_interval
    k1 = mean_with_interval(figures.kl_policy_ref_k1)
    return {
        "kl_policy_ref_per_sequence": kl.mean,
        "kl_policy_ref_per_sequence_low": kl.low,
        "kl_policy_ref_per_sequence_high": kl.high,
        "kl_policy_first_ref_per_sequence": first_kl.mean,
        "kl_policy_first_ref_per_sequence_low": first_kl.low,
        "kl_policy_first_ref_per_sequence_high": first_kl.high,
        "kl_policy_ref_per_sequence_k1": k1.mean,
        "kl_policy_ref_per_sequence_k1_low": k1.low,
        "kl_policy_ref_per_sequence_k1_high": k1.high,
        "kl_policy_ref_per_sequence_k3": float(figures.kl_policy_ref_k3.mean()),
        "kl_policy_ref_per_token": float(figures.kl_policy_ref.sum() / figures.length.sum()),
    }


def _kl_by_class(tokens: TokenFigures) -> Record:
    kl = tokens.kl_policy_ref.double()
    return {
        f"kl_policy_ref_per_sequence_{name}": float(per_sequence(kl, tokens.of_class(name)).mean())
        for name in TOKEN_CLASSES
    }


def _response_figures(figures: SequenceFigures) -> Record:
    return {
        "entropy_per_token": float(figures.entropy.sum() / figures.length.sum()),
        "response_length_mean": float(figures.length.mean()),
        "eos_share": float(figures.finished.mean()),
        "truncated_share": float((1 - figures.finished).mean()),
    }


def _repetition_figures(tokens: TokenFigures) -> Record:
    ids, mask = tokens.tokens, tokens.response_mask
    return {
        "distinct_1_per_sequence": distinct_n_per_sequence(ids, mask, n=1),
        "distinct_2_per_sequence": distinct_n_per_sequence(ids, mask, n=2),
        "distinct_2_over_batch": distinct_n_over_batch(ids, mask, n=2),
    }


def mismatch_figures(kl_rollout_policy_k3: Tensor, logprob_mismatch: Tensor, length: Tensor) -> dict[str, float]:
    """The columns of mismatch_columns over all sequences, which are so long."""
    return {
        "kl_rollout_policy_per_token_k3": float(kl_rollout_policy_k3.sum() / length.sum()),
        "logprob_mismatch_max": float(logprob_mismatch.max()),
    }


def _interval(values: Tensor | None) -> Interval:
    """The interval of the values; without any, one that a record shows as missing."""
    return Interval(mean=math.nan, low=math.nan, high=math.nan, n=0) if values is None else mean_with_interval(values)
