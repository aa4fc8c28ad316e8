"""Exact KL, entropy and sampled log-probs of positions, from hidden states, in one sweep over the vocabulary."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kleash.checks import require_between
from kleash.errors import ShapeError, ValueRangeError
from kleash.fused.head import Head, require_head
from kleash.fused.sweep import Request, factors, swept


@dataclass(frozen=True, kw_only=True)
class TokenStats:
    """What both models say at each position; every field float32 [N] (float64 for float64 inputs), nats."""

    policy_logprobs: Tensor
    ref_logprobs: Tensor
    kl_policy_ref_per_token: Tensor
    policy_entropy: Tensor
    kl_ref_policy_per_token: Tensor | None = None
    ref_entropy: Tensor | None = None


def token_stats(
    policy_hidden: Tensor,
    policy_head: Tensor,
    ref_hidden: Tensor,
    ref_head: Tensor,
    tokens: Tensor,
    *,
    policy_bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    policy_scale: float = 1.0,
    ref_scale: float = 1.0,
    policy_softcap: float | None = None,
    ref_softcap: float | None = None,
    temperature: float = 1.0,
    vocab: int | None = None,
    both_ways: bool = False,
    ref_entropy: bool = False,
) -> TokenStats:
    """Exact KL(policy || reference), entropy and sampled log-probs at N positions, without a tensor [N, vocab].

    With z = cap(scale * (hidden @ head.T + bias)) / temperature, cap(x) = softcap * tanh(x / softcap), and
    log pi = log softmax(z), log rho the same for the reference:

        policy_logprobs          log pi(y)            ref_logprobs     log rho(y)
        kl_policy_ref_per_token  sum_v pi(v) (log pi(v) - log rho(v))
        policy_entropy           -sum_v pi(v) log pi(v)

    One sweep over tiles of the vocabulary; the backward pass makes the tiles once more. Differentiable through
    policy_hidden, policy_head and policy_bias, in all statistics together; the reference never has a gradient.
    Under autocast the factors are cast as a linear layer would cast them; sums are float32 all the same.

    Args:
      policy_hidden: [N, hidden] the policy's last hidden states, each at the position before its token.
      policy_head: [vocab, hidden] weight of its output embeddings.
      ref_hidden: [N, ref hidden] of the reference at the same positions.
      ref_head: [ref vocab, ref hidden].
      tokens: [N] int64, the token that stands at each position.
      policy_bias, ref_bias: [vocab], [ref vocab]; -inf forbids a token.
      policy_scale, ref_scale: of the logits.
      policy_softcap, ref_softcap: of the logits; None = none.
      temperature: the one that the policy was sampled at, above 0.
      vocab: only the first so many tokens exist; None = as many as the smaller head has, so a vocabulary that one
        model pads to a rounder size is cut to the other's.
      both_ways: also kl_ref_policy_per_token = KL(reference || policy).
      ref_entropy: also ref_entropy = -sum_v rho(v) log rho(v).

    Returns:
      TokenStats, each [N] in nats, float32 (float64 for float64 inputs). A KL is +inf where the second model
      forbids a token that the first allows, exactly 0 between a model and itself, and never clamped: rounding may
      leave one of the order of 1e-7 below 0. Differentiable once.

    Raises:
      ShapeError: a shape does not fit the others.
      ValueRangeError: a token outside the vocabulary, or a number out of range.

    Source: the sum is Amini, Vieira and Cotterell 2025; the online sums Milakov and Gimelshein 2018.

    >>> hidden, head, ref_head = torch.eye(1), torch.tensor([[0.7], [0.3]]).log(), torch.tensor([[0.5], [0.5]]).log()
    >>> token_stats(hidden, head, hidden, ref_head, torch.tensor([0])).kl_policy_ref_per_token
    tensor([0.0823])
    """
    return stats_of(
        policy_hidden,
        Head(weight=policy_head, bias=policy_bias, scale=policy_scale, softcap=policy_softcap),
        ref_hidden,
        Head(weight=ref_head, bias=ref_bias, scale=ref_scale, softcap=ref_softcap),
        tokens,
        temperature=temperature,
        vocab=vocab,
        both_ways=both_ways,
        ref_entropy=ref_entropy,
    )


def stats_of(
    policy_hidden: Tensor,
    policy_head: Head,
    ref_hidden: Tensor,
    ref_head: Head,
    tokens: Tensor,
    *,
    temperature: float = 1.0,
    vocab: int | None = None,
    both_ways: bool = False,
    ref_entropy: bool = False,
) -> TokenStats:
    """`token_stats` with each head in one piece."""
    require_head("policy", policy_hidden, policy_head)
    require_head("reference", ref_hidden, ref_head)
    counted = min(policy_head.vocab, ref_head.vocab) if vocab is None else vocab
    _require_inputs(policy_hidden, policy_head, tokens, temperature=temperature, vocab=counted)
    _require_vocab(ref_head, counted)
    if len(ref_hidden) != len(policy_hidden):
        raise ShapeError(
            f"Expected as many reference positions as policy positions {len(policy_hidden)}, found {len(ref_hidden)}; "
            "give both models the same text."
        )
    request = Request(
        tokens=tokens,
        ref=factors(ref_hidden.detach(), ref_head.detached()),
        temperature=temperature,
        vocab=counted,
        both_ways=both_ways,
        ref_entropy=ref_entropy,
    )
    return TokenStats(**swept(request, policy_hidden, policy_head))


def logprobs_of(
    hidden: Tensor, head: Head, tokens: Tensor, *, temperature: float = 1.0, vocab: int | None = None
) -> tuple[Tensor, Tensor]:
    """(log-probs of the tokens, entropy) of one model, each [N] nats: the same bits that `token_stats` gives.

    Args and errors as there.
    """
    require_head("policy", hidden, head)
    counted = head.vocab if vocab is None else vocab
    _require_inputs(hidden, head, tokens, temperature=temperature, vocab=counted)
    request = Request(tokens=tokens, ref=None, temperature=temperature, vocab=counted)
    stats = swept(request, hidden, head)
    return stats["policy_logprobs"], stats["policy_entropy"]


def _require_inputs(hidden: Tensor, head: Head, tokens: Tensor, *, temperature: float, vocab: int) -> None:
    require_between(1e-6, 1e6, temperature=temperature)
    _require_vocab(head, vocab)
    if not isinstance(tokens, Tensor) or tokens.shape != hidden.shape[:1]:
        found = list(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ShapeError(f"Expected tokens [{len(hidden)}], one per position, found {found}; flatten batch and time.")
    if tokens.dtype not in (torch.int32, torch.int64):
        raise ShapeError(f"Expected tokens of dtype torch.int64, found {tokens.dtype}; convert them with .long().")
    outside = (tokens < 0) | (tokens >= vocab)
    if bool(outside.any()):
        raise ValueRangeError(
            f"Expected tokens in [0, {vocab}), found {int(tokens[outside][0])}; leave out padding, "
            "and check the vocabulary."
        )


def _require_vocab(head: Head, vocab: int) -> None:
    if not 1 <= vocab <= head.vocab:
        raise ValueRangeError(
            f"Expected vocab between 1 and the head's {head.vocab}, found {vocab}; it counts the tokens that exist."
        )
