"""Gradients of the statistics with respect to the policy's hidden states and head, tile by tile.

With z the policy's logits, w the reference's, and lse their log-normalisers:

    d log pi(y) / d z_v      = [v = y] - pi_v
    d KL(pi || rho) / d z_v  = pi_v (log pi_v - log rho_v - KL),   log pi = z - lse_z,  log rho = w - lse_w
    d H / d z_v              = -pi_v (log pi_v + H)
    d KL(rho || pi) / d z_v  = pi_v - rho_v
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kleash.fused import triton_fold
from kleash.fused.fold import exp_
from kleash.fused.head import Head
from kleash.fused.tiles import Buffers, Product, bfloat16_products, slope_of_logits, token_chunks, vocab_tiles


@dataclass(frozen=True, kw_only=True)
class Upstream:
    """Gradients of the loss with respect to each statistic, [tokens, 1] or None where it does not depend on it."""

    logprobs: Tensor | None
    kl: Tensor | None
    entropy: Tensor | None
    reverse_kl: Tensor | None

    @property
    def needs_ref(self) -> bool:
        """Whether the reference's logits are needed again."""
        return self.kl is not None or self.reverse_kl is not None

    def rows(self, chunk: slice) -> "Upstream":
        """The same for some of the tokens."""
        return Upstream(**_rows_of(self, chunk))


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What the forward pass knows of each position, [tokens, 1]."""

    places: Tensor
    log_normaliser: Tensor
    ref_log_normaliser: Tensor | None
    kl: Tensor | None
    entropy: Tensor

    def rows(self, chunk: slice) -> "Saved":
        """The same for some of the tokens."""
        return Saved(**_rows_of(self, chunk))


def _rows_of(columns: Upstream | Saved, chunk: slice) -> dict[str, Any]:
    return {name: None if column is None else column[chunk] for name, column in vars(columns).items()}


@dataclass(frozen=True, kw_only=True)
class HeadGradients:
    """Gradients of the loss; None where nobody asked."""

    hidden: Tensor
    weight: Tensor | None
    bias: Tensor | None


def head_gradients(
    policy: tuple[Tensor, Head],
    ref: tuple[Tensor, Head] | None,
    saved: Saved,
    upstream: Upstream,
    *,
    vocab: int,
    temperature: float,
    some_forbidden: bool,
    weight_wanted: bool,
    bias_wanted: bool,
) -> HeadGradients:
    """Walk over the tiles again and add up the gradients in the accumulator's precision.

    Args:
      policy, ref: hidden states [tokens, hidden] and head; ref only where the upstream needs it.
      saved: from the forward pass.
      upstream: from the loss.
      vocab: how many entries of the heads count.
      temperature: of the forward pass.
      some_forbidden: as in the forward pass.
      weight_wanted, bias_wanted: a frozen head saves its product.
    """
    hidden, head = policy
    dtype, device = saved.log_normaliser.dtype, hidden.device
    buffers = Buffers(device, dtype)
    hidden_gradient = torch.empty(hidden.shape, device=device, dtype=dtype)
    weight_gradient = torch.empty(head.weight.shape, device=device, dtype=dtype) if weight_wanted else None
    if weight_gradient is not None:
        weight_gradient[vocab:] = 0
    bias_gradient = torch.zeros(head.vocab, device=device, dtype=dtype) if bias_wanted else None
    for chunk in token_chunks(len(hidden), device):
        own = Product(hidden[chunk], head, buffers, "policy")
        other = None if ref is None else Product(ref[0][chunk], ref[1], buffers, "ref")
        known, incoming = saved.rows(chunk), upstream.rows(chunk)
        for columns in vocab_tiles(chunk.stop - chunk.start, vocab, device):
            logits = own.logits(columns, temperature=temperature)
            ref_logits = None if other is None else other.logits(columns, temperature=temperature)
            slope = slope_of_logits(head, logits, temperature=temperature)
            tile = _logits_gradient(
                logits, ref_logits, known, incoming, buffers, start=columns.start, some_forbidden=some_forbidden
            )
            if isinstance(slope, Tensor) or slope != 1.0:
                tile.mul_(slope)
            cast, weight = own.cast(tile), own.weight(columns)
            with bfloat16_products(hidden):
                _add_product(hidden_gradient[chunk], cast, weight, first=columns.start == 0)
                if weight_gradient is not None:
                    _add_product(weight_gradient[columns], cast.T, own.hidden, first=chunk.start == 0)
            if bias_gradient is not None:
                bias_gradient[columns] += tile.sum(0)
    return HeadGradients(hidden=hidden_gradient, weight=weight_gradient, bias=bias_gradient)


def _logits_gradient(
    logits: Tensor,
    ref_logits: Tensor | None,
    saved: Saved,
    upstream: Upstream,
    buffers: Buffers,
    *,
    start: int,
    some_forbidden: bool,
) -> Tensor:
    """d loss / d logits of one tile, [tokens, width]; takes over the memory of the logits."""
    if triton_fold.usable(logits.device):
        return triton_fold.logits_gradient(
            *(logits, ref_logits),
            start=start,
            places=saved.places,
            log_normaliser=saved.log_normaliser,
            ref_log_normaliser=saved.ref_log_normaliser,
            kl=saved.kl,
            entropy=saved.entropy,
            of_logprobs=upstream.logprobs,
            of_kl=upstream.kl,
            of_entropy=upstream.entropy,
            of_reverse_kl=upstream.reverse_kl,
        )
    logprobs = logits.sub_(saved.log_normaliser)
    forbidden = (logprobs == -math.inf) if some_forbidden else None
    factor: Tensor = _constant_factor(saved, upstream)
    ref_weights = None
    if ref_logits is not None and saved.ref_log_normaliser is not None:
        ref_logprobs = ref_logits.sub_(saved.ref_log_normaliser)
        if upstream.reverse_kl is not None:
            ref_weights = exp_(ref_logprobs, buffers.tile("ref weights", *logits.shape)).mul_(upstream.reverse_kl)
        if upstream.kl is not None:
            difference = torch.sub(logprobs, ref_logprobs, out=ref_logprobs)
            if forbidden is not None:
                difference.masked_fill_(~difference.isfinite(), 0.0)
            factor = torch.addcmul(factor, difference, upstream.kl, out=difference)
    if upstream.entropy is not None:
        energies = logprobs if forbidden is None else logprobs.masked_fill(forbidden, 0.0)
        factor = torch.addcmul(factor, energies, upstream.entropy, value=-1)
    gradient = exp_(logprobs, logprobs).mul_(factor)
    if ref_weights is not None:
        gradient.sub_(ref_weights)
    if upstream.logprobs is not None:
        places = saved.places - start
        rows = ((places >= 0) & (places < logits.shape[1])).nonzero()[:, 0]
        gradient[rows, places[rows, 0]] += upstream.logprobs[rows, 0]
    return gradient


def _constant_factor(saved: Saved, upstream: Upstream) -> Tensor:
    """The part of d loss / d logits, divided by pi, that is the same over the vocabulary: [tokens, 1]."""
    factor = torch.zeros_like(saved.log_normaliser)
    if upstream.logprobs is not None:
        factor = factor - upstream.logprobs
    if upstream.kl is not None and saved.kl is not None:
        factor = factor - torch.where(upstream.kl == 0, 0.0, upstream.kl * saved.kl)
    if upstream.entropy is not None:
        factor = factor - upstream.entropy * saved.entropy
    if upstream.reverse_kl is not None:
        factor = factor + upstream.reverse_kl
    return factor


def _add_product(total: Tensor, left: Tensor, right: Tensor, *, first: bool) -> None:
    """total += left @ right, added up in the precision of the total; the first one finds it uninitialised."""
    if total.dtype == right.dtype:
        total.addmm_(left, right, beta=0 if first else 1)
    elif first:
        torch.mm(left, right, out_dtype=total.dtype, out=total)
    else:
        total += torch.mm(left, right, out_dtype=total.dtype)
