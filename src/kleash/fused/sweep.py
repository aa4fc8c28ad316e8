"""The sweep over tiles of both heads, and its place in autograd."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kleash.fused import triton_fold
from kleash.fused.backward import Saved, Upstream, head_gradients
from kleash.fused.fold import Normaliser, choose, empty_normaliser, fold_one, fold_pair
from kleash.fused.head import Head
from kleash.fused.tiles import Buffers, Product, accumulated_dtype, token_chunks, vocab_tiles

Factors = tuple[Tensor, Head]

STATISTICS: dict[str, Callable[[Normaliser, Normaliser], Tensor]] = {
    "policy_logprobs": lambda policy, ref: policy.chosen_logprob,
    "policy_entropy": lambda policy, ref: policy.entropy,
    "kl_policy_ref_per_token": lambda policy, ref: policy.divergence_to(ref),
    "ref_logprobs": lambda policy, ref: ref.chosen_logprob,
    "kl_ref_policy_per_token": lambda policy, ref: ref.divergence_to(policy),
    "ref_entropy": lambda policy, ref: ref.entropy,
}
OF_THE_REFERENCE = {"ref_logprobs", "ref_entropy"}


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a sweep is asked for, beside the policy.

    tokens:      [N] the token at each position.
    ref:         hidden states [N, hidden] and head of the reference, without gradient; None = the policy alone.
    temperature: of both distributions.
    vocab:       how many entries of the heads count.
    both_ways:   also KL(reference || policy).
    ref_entropy: also the reference's entropy.
    """

    tokens: Tensor
    ref: Factors | None
    temperature: float
    vocab: int
    both_ways: bool = False
    ref_entropy: bool = False

    @property
    def statistics(self) -> list[str]:
        """The names of what is asked for."""
        if self.ref is None:
            return ["policy_logprobs", "policy_entropy"]
        asked_for = {"kl_ref_policy_per_token": self.both_ways, "ref_entropy": self.ref_entropy}
        return [name for name in STATISTICS if asked_for.get(name, True)]


def factors(hidden: Tensor, head: Head) -> Factors:
    """Hidden states and head in one type: autocast's where it is on, else the wider of the two."""
    kind = hidden.device.type
    wider = torch.promote_types(hidden.dtype, head.weight.dtype)
    lowered = torch.is_autocast_enabled(kind) and wider != torch.float64
    dtype = torch.get_autocast_dtype(kind) if lowered else wider
    return hidden.to(dtype), replace(head, weight=head.weight.to(dtype))


def swept(request: Request, hidden: Tensor, head: Head) -> dict[str, Tensor]:
    """The statistics that are asked for, under the names of TokenStats; each [N] nats."""
    hidden, head = factors(hidden, head)
    arguments = (request, hidden, head.weight, head.bias, head.scale, head.softcap)
    results: tuple[Tensor, ...] = _Sweep.apply(*arguments)  # type: ignore[no-untyped-call]
    return dict(zip(request.statistics, results, strict=True))


class _Sweep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        request: Request,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: float,
        softcap: float | None,
    ) -> tuple[Tensor, ...]:
        head = Head(weight=weight, bias=bias, scale=scale, softcap=softcap)
        some_forbidden = (
            triton_fold.usable(hidden.device)  # costs nothing there
            or _forbids(head)
            or (request.ref is not None and _forbids(request.ref[1]))
        )
        policy, ref = _sums(request, hidden, head, some_forbidden=some_forbidden)
        columns = _columns(request, policy, ref)
        if not some_forbidden and not bool(torch.stack([c.isfinite().all() for c in columns.values()]).all()):
            some_forbidden = True
            policy, ref = _sums(request, hidden, head, some_forbidden=True)
            columns = _columns(request, policy, ref)
        ctx.set_materialize_grads(False)
        ctx.vocab, ctx.temperature, ctx.some_forbidden = request.vocab, request.temperature, some_forbidden
        ctx.statistics = request.statistics
        ref_log_normaliser = ref.log_normaliser if request.ref is not None else None
        ctx.caps = (scale, softcap)
        of_ref: tuple[Tensor | None, ...] = (None, None, None)
        if request.ref is not None:
            ref_hidden, ref_head = request.ref
            ctx.ref_caps, of_ref = (ref_head.scale, ref_head.softcap), (ref_hidden, ref_head.weight, ref_head.bias)
        kl, entropy = columns.get("kl_policy_ref_per_token"), columns["policy_entropy"]
        known = (policy.log_normaliser, ref_log_normaliser, kl, entropy)
        ctx.save_for_backward(hidden, weight, bias, request.tokens, *known, *of_ref)  # torch sees who changes them
        results = {name: column.squeeze(1) for name, column in columns.items()}
        ctx.mark_non_differentiable(*(results[name] for name in OF_THE_REFERENCE & results.keys()))
        return tuple(results.values())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, tokens, log_normaliser, ref_log_normaliser, kl, entropy, *of_ref = ctx.saved_tensors
        given = {
            name: None if gradient is None else gradient.unsqueeze(1)
            for name, gradient in zip(ctx.statistics, gradients, strict=True)
        }
        upstream = Upstream(
            logprobs=given["policy_logprobs"],
            kl=given.get("kl_policy_ref_per_token"),
            entropy=given["policy_entropy"],
            reverse_kl=given.get("kl_ref_policy_per_token"),
        )
        found = head_gradients(
            (hidden, _head(weight, bias, ctx.caps)),
            (of_ref[0], _head(of_ref[1], of_ref[2], ctx.ref_caps)) if upstream.needs_ref else None,
            Saved(
                places=tokens.unsqueeze(1),
                log_normaliser=log_normaliser,
                ref_log_normaliser=ref_log_normaliser,
                kl=kl,
                entropy=entropy,
            ),
            upstream,
            vocab=ctx.vocab,
            temperature=ctx.temperature,
            some_forbidden=ctx.some_forbidden,
            weight_wanted=ctx.needs_input_grad[2],
            bias_wanted=ctx.needs_input_grad[3],
        )
        weight_gradient = None if found.weight is None else found.weight.to(weight.dtype)
        bias_gradient = None if found.bias is None else found.bias.to(bias.dtype)
        return None, found.hidden.to(hidden.dtype), weight_gradient, bias_gradient, None, None


def _head(weight: Tensor, bias: Tensor | None, caps: tuple[float, float | None]) -> Head:
    """A head of saved tensors with its (scale, softcap)."""
    return Head(weight=weight, bias=bias, scale=caps[0], softcap=caps[1])


def _forbids(head: Head) -> bool:
    """Whether the head's bias forbids a token."""
    return head.bias is not None and bool((head.bias == -math.inf).any())


def _sums(request: Request, hidden: Tensor, head: Head, *, some_forbidden: bool) -> tuple[Normaliser, Normaliser]:
    """The running sums of both models after the whole vocabulary; those of no reference stay empty."""
    buffers = Buffers(hidden.device, accumulated_dtype(hidden.dtype))
    with torch.autocast(hidden.device.type, enabled=False):  # it would round the sums
        parts = [
            _sums_of_chunk(request, hidden, head, chunk, buffers, some_forbidden=some_forbidden)
            for chunk in token_chunks(len(hidden), hidden.device)
        ]
    return _joined([policy for policy, _ in parts]), _joined([ref for _, ref in parts])


def _sums_of_chunk(
    request: Request, hidden: Tensor, head: Head, chunk: slice, buffers: Buffers, *, some_forbidden: bool
) -> tuple[Normaliser, Normaliser]:
    policy_product = Product(hidden[chunk], head, buffers, "policy")
    ref_product = None if request.ref is None else Product(request.ref[0][chunk], request.ref[1], buffers, "ref")
    places = request.tokens[chunk].unsqueeze(1)
    on_triton = triton_fold.usable(hidden.device)
    one, pair = (triton_fold.fold_one, triton_fold.fold_pair) if on_triton else (fold_one, fold_pair)
    policy, ref = (empty_normaliser(len(places), hidden.device, accumulated_dtype(hidden.dtype)) for _ in range(2))
    wanted = {"both_ways": request.both_ways, "ref_entropy": request.ref_entropy}
    for columns in vocab_tiles(len(places), request.vocab, hidden.device):
        logits = policy_product.logits(columns, temperature=request.temperature)
        choose(policy, logits, places - columns.start)
        if ref_product is None:
            one(policy, logits, buffers, some_forbidden=some_forbidden)
            continue
        ref_logits = ref_product.logits(columns, temperature=request.temperature)
        choose(ref, ref_logits, places - columns.start)
        pair(policy, ref, logits, ref_logits, buffers, **wanted, some_forbidden=some_forbidden)
    return policy, ref


def _joined(parts: list[Normaliser]) -> Normaliser:
    """The chunks' sums below each other."""
    return Normaliser(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Normaliser)})


def _columns(request: Request, policy: Normaliser, ref: Normaliser) -> dict[str, Tensor]:
    """What `swept` returns, as [N, 1]."""
    return {name: STATISTICS[name](policy, ref) for name in request.statistics}
