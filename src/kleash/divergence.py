"""Exact divergences between distributions given by their full log-probs; the sum is over the vocabulary.

Every log-prob tensor is [..., vocab] in nats and normalised (logsumexp over the last dimension is 0).
The order in a name is the order in the formula: KL(p || q) weighs by p.
"""

import math

import torch
from torch import Tensor

from kleash.checks import require_mask, require_rank, require_same_shape
from kleash.errors import ShapeError
from kleash.masking import masked


def _weighted_by_p(log_p: Tensor, terms: Tensor) -> Tensor:
    """sum_v p(v) * terms(v), where p(v) = 0 contributes exactly 0, also to the gradient."""
    possible = log_p != -math.inf  # NaN counts as possible, so that it shows
    p = torch.where(possible, log_p, torch.zeros_like(log_p)).exp()
    terms = torch.where(possible, terms, torch.zeros_like(terms))
    weighted = torch.where(terms == math.inf, terms, p * terms)  # infinite also where p underflows to 0
    return torch.where(possible, weighted, 0.0).sum(-1)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Exact KL(p || q), in nats.

    KL(p || q) = sum_v p(v) (log p(v) - log q(v))  >= 0, and 0 only for equal distributions.
    +inf where q forbids a token that p allows; a token that p forbids contributes 0.

    Args:
      log_p: [..., vocab] normalised log-probs of p, nats.
      log_q: [..., vocab] normalised log-probs of q, nats.

    Returns:
      [...] nats, differentiable in both arguments.

    Raises:
      ShapeError: the two shapes differ.

    Source: Kullback and Leibler 1951.

    >>> a, b = torch.tensor([0.7, 0.3]).log(), torch.tensor([0.5, 0.5]).log()
    >>> kl_divergence(a, b), kl_divergence(b, a)
    (tensor(0.0823), tensor(0.0872))
    """
    require_same_shape(log_p=log_p, log_q=log_q)
    possible = log_p != -math.inf
    log_ratio = torch.where(possible, log_p, 0.0) - torch.where(possible, log_q, 0.0)
    return _weighted_by_p(log_p, log_ratio)


def entropy(log_p: Tensor) -> Tensor:
    """Entropy H(p) = -sum_v p(v) log p(v), in nats; a forbidden token contributes 0.

    Args:
      log_p: [..., vocab] normalised log-probs, nats.

    Returns:
      [...] nats, between 0 and log(vocab).

    >>> entropy(torch.tensor([0.5, 0.5]).log())
    tensor(0.6931)
    """
    return _weighted_by_p(log_p, -log_p)


def js_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Jensen-Shannon divergence, in nats: (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2.

    Symmetric and between 0 and log 2, also where one of the two forbids a token.

    Args:
      log_p: [..., vocab] normalised log-probs, nats.
      log_q: [..., vocab] normalised log-probs, nats.

    Returns:
      [...] nats.

    Raises:
      ShapeError: the two shapes differ.

    Source: Lin 1991.

    >>> js_divergence(torch.tensor([1.0, 0.0]).log(), torch.tensor([0.0, 1.0]).log())
    tensor(0.6931)
    """
    require_same_shape(log_p=log_p, log_q=log_q)
    impossible = (log_p == -math.inf) & (log_q == -math.inf)
    log_p_finite = torch.where(impossible, 0.0, log_p)
    log_q_finite = torch.where(impossible, 0.0, log_q)
    log_m = torch.where(impossible, -math.inf, torch.logaddexp(log_p_finite, log_q_finite) - math.log(2))
    return (kl_divergence(log_p, log_m) + kl_divergence(log_q, log_m)) / 2


def kl_policy_ref_per_token(policy_log_probs: Tensor, ref_log_probs: Tensor, response_mask: Tensor) -> Tensor:
    """Exact KL(policy || reference) at every response position, in nats per token.

    KL_t = sum_v pi(v | s_t) (log pi(v | s_t) - log rho(v | s_t)).
    Its sum over a response that the policy sampled is an unbiased estimate of the sequence KL, with
    far less variance than any one-token estimate. It says nothing about responses of another model.

    Args:
      policy_log_probs: [batch, time, vocab] full normalised log-probs, nats.
      ref_log_probs: [batch, time, vocab] the same positions under the reference, nats.
      response_mask: [batch, time] bool, True on response tokens.

    Returns:
      [batch, time] nats per token, exactly 0 off the mask; never clamped.

    Raises:
      ShapeError: the shapes differ, or response_mask is not bool.

    Source: Amini, Vieira and Cotterell 2025 (Rao-Blackwellised estimate of the KL).

    >>> policy = torch.tensor([[[0.7, 0.3], [0.5, 0.5]]]).log()
    >>> ref = torch.tensor([[[0.5, 0.5], [0.5, 0.5]]]).log()
    >>> kl_policy_ref_per_token(policy, ref, torch.tensor([[True, False]]))
    tensor([[0.0823, 0.0000]])
    """
    require_rank(3, "[batch, time, vocab]", policy_log_probs=policy_log_probs)
    require_mask(response_mask)
    if policy_log_probs.shape[:2] != response_mask.shape:
        raise ShapeError(
            f"Expected response_mask {list(policy_log_probs.shape[:2])} like the log-probs, "
            f"found {list(response_mask.shape)}; align them first."
        )
    require_same_shape(policy_log_probs=policy_log_probs, ref_log_probs=ref_log_probs)
    counted = response_mask.unsqueeze(-1)
    policy_log_probs = torch.where(counted, policy_log_probs, 0.0)
    ref_log_probs = torch.where(counted, ref_log_probs, 0.0)
    return masked(kl_divergence(policy_log_probs, ref_log_probs), response_mask)
