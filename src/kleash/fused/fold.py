"""Folding tiles of logits into sums per position, by online log-sum-exp, in plain torch.

With a shift m, the largest logit so far, each position carries

    total      = sum_v exp(z_v - m)
    energy     = sum_v exp(z_v - m) (z_v - m)
    difference = sum_v exp(z_v - m) (z_v - w_v)

for policy logits z and reference logits w; a new largest logit rescales them. From the sums follow log-probs,
entropy and both divergences.

Source: Milakov and Gimelshein 2018 (online normaliser).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kleash.fused.tiles import Buffers

BELOW_EVERY_LOGIT = -1e30
LOG2_E = math.log2(math.e)


@dataclass(kw_only=True)
class Normaliser:
    """The running sums of one model over the tiles so far; each [tokens, 1].

    cross is the sum of exp(own logit - shift) (own logit - other model's logit); reaches_forbidden says where this
    model allows a token that the other one forbids.
    """

    shift: Tensor
    total: Tensor
    chosen: Tensor
    energy: Tensor
    cross: Tensor
    reaches_forbidden: Tensor

    @property
    def log_total(self) -> Tensor:
        """log sum_v exp(z_v - shift)."""
        return self.total.log()

    @property
    def log_normaliser(self) -> Tensor:
        """log sum_v exp(z_v)."""
        return self.shift + self.log_total

    @property
    def chosen_logprob(self) -> Tensor:
        """log-prob of the sampled token, nats."""
        return (self.chosen - self.shift) - self.log_total

    @property
    def entropy(self) -> Tensor:
        """-sum_v p log p, nats."""
        return self.log_total - self.energy / self.total

    def divergence_to(self, other: "Normaliser") -> Tensor:
        """KL(this model || other), nats; +inf where the other forbids what this one allows."""
        normalisers = (self.shift - other.shift) + (self.log_total - other.log_total)
        return torch.where(self.reaches_forbidden, math.inf, self.cross / self.total - normalisers)


def empty_normaliser(tokens: int, device: torch.device, dtype: torch.dtype) -> Normaliser:
    """The sums before the first tile."""

    def filled(value: float) -> Tensor:
        return torch.full((tokens, 1), value, device=device, dtype=dtype)

    return Normaliser(
        shift=filled(BELOW_EVERY_LOGIT),
        total=filled(0.0),
        chosen=filled(-math.inf),
        energy=filled(0.0),
        cross=filled(0.0),
        reaches_forbidden=torch.zeros((tokens, 1), device=device, dtype=torch.bool),
    )


def choose(own: Normaliser, logits: Tensor, places: Tensor) -> None:
    """Remember the sampled token's logit if it stands in this tile; `places` [tokens, 1] count from its start."""
    width = logits.shape[1]
    here = (places >= 0) & (places < width)
    own.chosen = torch.where(here, logits.gather(1, places.clamp(0, width - 1)), own.chosen)


def fold_pair(
    policy: Normaliser,
    ref: Normaliser,
    policy_logits: Tensor,
    ref_logits: Tensor,
    buffers: Buffers,
    *,
    both_ways: bool,
    some_forbidden: bool,
) -> None:
    """Fold one tile of both models; the logits are overwritten.

    Args:
      policy, ref: sums so far; policy.cross and policy.energy are kept, ref.cross only if both_ways.
      policy_logits, ref_logits: [tokens, width].
      buffers: memory for intermediate tiles.
      both_ways: also KL(reference || policy).
      some_forbidden: -inf may stand among the logits; without it such a tile gives NaN.
    """
    difference = torch.sub(policy_logits, ref_logits, out=buffers.tile("difference", *policy_logits.shape))
    if some_forbidden:
        policy_allows, ref_allows = policy_logits != -math.inf, ref_logits != -math.inf
        policy.reaches_forbidden |= (policy_allows & ~ref_allows).any(1, keepdim=True)
        ref.reaches_forbidden |= (ref_allows & ~policy_allows).any(1, keepdim=True)
        difference.masked_fill_(~(policy_allows & ref_allows), 0.0)
    weights = _fold(policy, policy_logits, buffers, with_energy=True, some_forbidden=some_forbidden)
    policy.cross = policy.cross + torch.linalg.vecdot(weights, difference).unsqueeze(1)
    weights = _fold(ref, ref_logits, buffers, with_energy=False, some_forbidden=some_forbidden)
    if both_ways:
        ref.cross = ref.cross - torch.linalg.vecdot(weights, difference).unsqueeze(1)


def fold_one(own: Normaliser, logits: Tensor, buffers: Buffers, *, some_forbidden: bool) -> None:
    """Fold one tile of one model; the logits are overwritten."""
    _fold(own, logits, buffers, with_energy=True, some_forbidden=some_forbidden)


def _fold(own: Normaliser, logits: Tensor, buffers: Buffers, *, with_energy: bool, some_forbidden: bool) -> Tensor:
    """Bring the sums to the new shift and add this tile's total and energy; returns exp(logits - shift)."""
    shift = torch.maximum(own.shift, logits.amax(1, keepdim=True))
    lowered = own.shift - shift
    rescale = lowered.exp()
    logits.sub_(shift)
    if with_energy:
        weights = exp_(logits, buffers.tile("weights", *logits.shape))
        if some_forbidden:
            logits.masked_fill_(logits == -math.inf, 0.0)
        own.energy = (own.energy + own.total * lowered) * rescale + torch.linalg.vecdot(weights, logits).unsqueeze(1)
    else:
        weights = exp_(logits, logits)
    own.total = own.total * rescale + weights.sum(1, keepdim=True)
    own.cross = own.cross * rescale
    own.shift = shift
    return weights


def exp_(exponents: Tensor, out: Tensor) -> Tensor:
    """exp of exponents that are not above 0, into `out`, which may be themselves.

    By way of exp2, which torch computes three times as fast on a CPU; rounding x log2(e) costs |x| exp(x) half an ulp
    at most, less than the sums lose anyway.
    """
    return torch.mul(exponents, LOG2_E, out=out).exp2_()
