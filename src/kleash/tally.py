"""Sums over batches of responses, from which the figures of a measurement follow; what it keeps does not grow with the
responses but for a few numbers of each."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kleash.batch import Rollout
from kleash.drift import TokenFigures, mismatch_columns, mismatch_figures
from kleash.drift_map import LISTED, TypeSums, drifted_tokens, joined_type_sums, rounded, top_tokens, type_sums
from kleash.estimators import Interval, kl_policy_ref_per_token_k1, mean_with_interval, per_sequence, student_quantile
from kleash.reading import Reading
from kleash.token_class import TOKEN_CLASSES

CONVERGENCE_POINTS = 40
KL, K1, LOG_RATIO = "kl_policy_ref_per_sequence", "kl_policy_ref_per_sequence_k1", "log_ratio_per_sequence"


@dataclass(kw_only=True)
class Tally:
    """What has been measured so far.

    columns:     one number per response, in the order of sampling: prompt, exact KL, k1, entropies, length, finished,
                 and how far sampler and scorer are apart.
    by_position: [3, positions] responses that reach it, sum of the KL there, sum of its square.
    by_class:    [2, classes] tokens, sum of their KL.
    """

    tokenizer: PreTrainedTokenizerBase
    columns: dict[str, list[Tensor]] = field(default_factory=dict)
    by_position: Tensor = field(default_factory=lambda: torch.zeros(3, 0, dtype=torch.float64))
    by_class: Tensor = field(default_factory=lambda: torch.zeros(2, len(TOKEN_CLASSES), dtype=torch.float64))
    types: TypeSums | None = None
    places: list[dict[str, Any]] = field(default_factory=list)

    @property
    def responses(self) -> int:
        """How many were added."""
        return sum(map(len, self.columns.get("prompt", [])))

    def column(self, name: str) -> Tensor:
        """[responses] a number of each response, float64 (int64 for `prompt`)."""
        return torch.cat(self.columns[name])

    @property
    def strata(self) -> Tensor | None:
        """The prompt of each response where every prompt has several, as many as any other; else None."""
        return even_strata(self.column("prompt"))

    def add(self, prompts: Tensor, rollout: Rollout, reading: Reading, tokens: TokenFigures) -> None:
        """Add a batch of responses.

        Args:
          prompts: [batch] int64, the number of the prompt that each answers.
          rollout, reading: the responses, and what the models say of them.
          tokens: the same on the CPU.
        """
        mask = rollout.response_mask
        for place in top_tokens(tokens, self.tokenizer):
            self.places.append({**place, "sequence": place["sequence"] + self.responses})
        largest: dict[int, dict[str, Any]] = {}
        for place in sorted(self.places, key=_largest_first):
            largest.setdefault(place["token_id"], place)
        self.places = list(largest.values())[:LISTED]
        k1 = kl_policy_ref_per_token_k1(reading.policy_logprobs, reading.ref_logprobs, mask)
        numbers = {
            "kl_policy_ref": per_sequence(reading.kl_policy_ref_per_token.double(), mask),
            "kl_policy_ref_k1": per_sequence(k1.double(), mask),
            "policy_entropy": per_sequence(reading.policy_entropy.double(), mask),
            "ref_entropy": per_sequence(reading.ref_entropy.double(), mask),
            "length": mask.sum(-1),
            "finished": rollout.finished,
            **mismatch_columns(rollout, reading.policy_logprobs),
        }
        self.columns.setdefault("prompt", []).append(prompts)
        for name, values in numbers.items():
            self.columns.setdefault(name, []).append(values.cpu().double())
        self._add_tokens(tokens)

    def _add_tokens(self, tokens: TokenFigures) -> None:
        kl, mask = tokens.kl_policy_ref.double(), tokens.response_mask
        here = torch.stack([mask.double().sum(0), kl.sum(0), kl.square().sum(0)])
        positions = max(here.shape[1], self.by_position.shape[1])
        padded = [torch.nn.functional.pad(sums, (0, positions - sums.shape[1])) for sums in (self.by_position, here)]
        self.by_position = padded[0] + padded[1]
        classes, sums = tokens.classes[mask], torch.zeros_like(self.by_class)
        sums[0].index_add_(0, classes, torch.ones(len(classes), dtype=torch.float64))
        sums[1].index_add_(0, classes, kl[mask])
        self.by_class = self.by_class + sums
        own = type_sums(tokens)
        self.types = own if self.types is None else joined_type_sums([self.types, own])

    def interval(self, name: str, *, per_token: bool = False, strata: Tensor | None = None) -> Interval:
        """Mean of a number over responses (over tokens where asked) with its 95 % interval."""
        return mean_with_interval(self.column(name), self.column("length") if per_token else None, strata=strata)

    def mismatch(self) -> dict[str, float | None]:
        """How far apart sampler and scorer are, by the names that a run's records have for it, nats."""
        columns = (self.column(name) for name in ("kl_rollout_policy_k3", "logprob_mismatch", "length"))
        return {name: rounded(value) for name, value in mismatch_figures(*columns).items()}

    def of_response(self, place: int, *, written_by_policy: bool) -> dict[str, float | None]:
        """The drift of one of the last batch's responses, counted from the first; nats per sequence."""
        last = len(self.columns["prompt"][-1])
        row = place - (self.responses - last)
        columns = columns_by_name(written_by_policy=written_by_policy)
        return {name: rounded(float(self.columns[column][-1][row])) for name, column in columns.items()}

    def positions(self) -> list[dict[str, Any]]:
        """For each position: responses that reach it, its part of the drift, its mean among them with an interval."""
        return [
            {
                "position": position,
                "sequences": int(count),
                "kl_policy_ref_per_sequence": rounded(kl / self.responses),
                **_at_position(int(count), kl, squares),
            }
            for position, (count, kl, squares) in enumerate(self.by_position.T.tolist())
            if count
        ]

    def classes(self) -> dict[str, dict[str, Any]]:
        """For each class of tokens: how many, their part of the drift, their mean."""
        return {
            name: {
                "tokens": int(count),
                "kl_policy_ref_per_sequence": rounded(kl / self.responses),
                "kl_policy_ref_per_token": rounded(kl / count) if count else None,
            }
            for name, (count, kl) in zip(TOKEN_CLASSES, self.by_class.T.tolist(), strict=True)
        }

    def drifted_tokens(self) -> list[dict[str, Any]]:
        """The tokens that carry most of the drift: see drift_map."""
        return [] if self.types is None else drifted_tokens(self.types, self.responses, self.tokenizer)

    def convergence(self, *, written_by_policy: bool) -> list[dict[str, Any]]:
        """The exact figure and the log-ratio after so many responses, evenly spaced in the logarithm of their number.

        Where every prompt has several responses, the numbers are whole passes over the prompts beyond the first one.
        """
        n, strata = self.responses, self.strata
        names = columns_by_name(written_by_policy=written_by_policy)
        columns = {name: self.column(column) for name, column in names.items()}
        steps = range(CONVERGENCE_POINTS)
        counts = {max(2, round(2 * (n / 2) ** (step / (CONVERGENCE_POINTS - 1)))) for step in steps}
        if strata is not None:
            each_pass = len(torch.unique(strata))
            counts = {count if count <= each_pass else count // each_pass * each_pass for count in counts}
        return [
            {"n": count, **{name: _after(count, x, strata) for name, x in columns.items()}}
            for count in sorted(counts)
            if count <= n
        ]


def columns_by_name(*, written_by_policy: bool) -> dict[str, str]:
    """Under which names a response's exact KL and its log policy - log reference go, and their columns."""
    return {KL: "kl_policy_ref", K1 if written_by_policy else LOG_RATIO: "kl_policy_ref_k1"}


def _after(count: int, values: Tensor, strata: Tensor | None) -> dict[str, Any]:
    """The mean of the first values, with the interval that they have."""
    known = None if strata is None else even_strata(strata[:count])
    return as_json(mean_with_interval(values[:count], strata=known), n=False)


def even_strata(prompts: Tensor) -> Tensor | None:
    """[responses] the prompts themselves if each stands equally often and at least twice; else None.

    >>> even_strata(torch.tensor([3, 1, 1, 3])), even_strata(torch.tensor([3, 1, 1])), even_strata(torch.tensor([3, 1]))
    (tensor([3, 1, 1, 3]), None, None)
    """
    counts = torch.unique(prompts, return_counts=True)[1]
    fewest, most = int(counts.min()), int(counts.max())
    return prompts if fewest == most and fewest > 1 else None


def _largest_first(place: dict[str, Any]) -> tuple[float, int, int]:
    """The order of places by their KL; of equal ones the first response comes first."""
    return -float(place["kl_policy_ref"]), place["sequence"], place["position"]


def _at_position(count: int, total: float, squares: float) -> dict[str, float | None]:
    """Mean of the KL among the responses that reach a position, with its 95 % interval, nats per token."""
    mean = total / count
    if count < 2:
        return {"kl_policy_ref_per_token": rounded(mean), "low": None, "high": None}
    variance = max(0.0, squares - count * mean**2) / (count - 1)  # rounding alone could leave it below 0
    half_width = student_quantile(0.975, degrees_of_freedom=count - 1) * math.sqrt(variance / count)
    return {
        "kl_policy_ref_per_token": rounded(mean),
        "low": rounded(mean - half_width),
        "high": rounded(mean + half_width),
    }


def as_json(interval: Interval, *, n: bool = True) -> dict[str, Any]:
    """An interval as JSON; null for an end that is infinite."""
    ends = {name: rounded(getattr(interval, name)) for name in ("mean", "low", "high")}
    return {**ends, "n": interval.n} if n else ends
