"""Folding tiles of logits into sums per position, by online log-sum-exp, in plain torch.

With a shift m, the largest logit so far, each position carries

    total      = sum_v exp(z_v - m)
    energy     = sum_v exp(z_v - m) (z_v - m)
    cross      = sum_v exp(z_v - m) ((z_v - m) - (w_v - n))

for policy logits z and reference logits w with their shift n; a new largest logit rescales them. Only shifted logits
are ever compared, so a constant between the two models costs no digits. From the sums follow log-probs,
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

    cross is the sum of exp(own logit - shift) (own logit - shift - other model's logit + its shift);
    reaches_forbidden says where this model allows a token that the other one forbids.
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
        mean = self.cross / self.total
        return torch.where(self.reaches_forbidden, math.inf, mean - (self.log_total - other.log_total))


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
    ref_entropy: bool,
    some_forbidden: bool,
) -> None:
    """Fold one tile of both models; the logits are overwritten.

    Args:
      policy, ref: sums so far; policy.cross and policy.energy are kept, ref.cross only if both_ways, ref.energy only
        if ref_entropy.
      policy_logits, ref_logits: [tokens, width].
      buffers: memory for intermediate tiles.
      both_ways: also KL(reference || policy).
      ref_entropy: also the reference's entropy.
      some_forbidden: -inf may stand among the logits; without it such a tile gives NaN.
    """
    forbidden = _forbidden(policy, ref, policy_logits, ref_logits) if some_forbidden else None
    lowered, ref_lowered = _shift(policy, policy_logits), _shift(ref, ref_logits)
    difference = torch.sub(policy_logits, ref_logits, out=buffers.tile("difference", *policy_logits.shape))
    if forbidden is not None:
        difference.masked_fill_(forbidden, 0.0)
    policy.cross = policy.cross + policy.total * (lowered - ref_lowered)
    ref.cross = ref.cross + ref.total * (ref_lowered - lowered)
    weights = _add_tile(policy, policy_logits, lowered, buffers, some_forbidden=some_forbidden)
    policy.cross = policy.cross + torch.linalg.vecdot(weights, difference).unsqueeze(1)
    of_energy = buffers if ref_entropy else None
    weights = _add_tile(ref, ref_logits, ref_lowered, of_energy, some_forbidden=some_forbidden)
    if both_ways:
        ref.cross = ref.cross - torch.linalg.vecdot(weights, difference).unsqueeze(1)


def fold_one(own: Normaliser, logits: Tensor, buffers: Buffers, *, some_forbidden: bool) -> None:
    """Fold one tile of one model; the logits are overwritten."""
    _add_tile(own, logits, _shift(own, logits), buffers, some_forbidden=some_forbidden)


def _forbidden(policy: Normaliser, ref: Normaliser, policy_logits: Tensor, ref_logits: Tensor) -> Tensor:
    """[tokens, width] where either model forbids the token; remembers who reaches what the other one forbids."""
    by_policy, by_ref = policy_logits == -math.inf, ref_logits == -math.inf
    policy.reaches_forbidden |= (by_ref & ~by_policy).any(1, keepdim=True)
    ref.reaches_forbidden |= (by_policy & ~by_ref).any(1, keepdim=True)
    return by_policy | by_ref


def _shift(own: Normaliser, logits: Tensor) -> Tensor:
    """Subtract the new shift from the logits; returns the old shift less the new one, [tokens, 1]."""
    shift = torch.maximum(own.shift, logits.amax(1, keepdim=True))
    lowered = own.shift - shift
    logits.sub_(shift)
    own.shift = shift
    return lowered


def _add_tile(
    own: Normaliser, shifted: Tensor, lowered: Tensor, energy: Buffers | None, *, some_forbidden: bool
) -> Tensor:
    """Rescale the sums and add this tile's total, and its energy where there is memory for it; returns exp(shifted)."""
    rescale = lowered.exp()
    if energy is None:
        weights = exp_(shifted, shifted)
    else:
        weights = exp_(shifted, energy.tile("weights", *shifted.shape))
        if some_forbidden:
            shifted.masked_fill_(shifted == -math.inf, 0.0)
        own.energy = (own.energy + own.total * lowered) * rescale + torch.linalg.vecdot(weights, shifted).unsqueeze(1)
    own.total = own.total * rescale + weights.sum(1, keepdim=True)
    own.cross = own.cross * rescale
    return weights


def exp_(exponents: Tensor, out: Tensor) -> Tensor:
    """exp of exponents that are not above 0, into `out`, which may be themselves.

    By way of exp2, three times as fast in torch on the CPU it was measured on; rounding x log2(e) costs half an ulp of
    |x| exp(x) at most, less than the sums lose anyway.
    """
    return torch.mul(exponents, LOG2_E, out=out).exp2_()
