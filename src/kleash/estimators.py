"""One-token estimates of KL(policy || reference), sums per sequence, and intervals that respect sequences.

With d = log pi(y_t) - log rho(y_t) of a token y_t that the policy sampled:

    k1 = d                unbiased, often negative, large variance
    k2 = d^2 / 2          biased, never negative
    k3 = expm1(-d) + d    unbiased, never negative

Source: Schulman 2020, http://joschu.net/blog/kl-approx.html (his q is the policy, his p the reference).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kleash.checks import require_between, require_mask, require_rank, require_same_shape
from kleash.errors import ShapeError
from kleash.masking import masked


def _masked_log_ratio(policy_logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor) -> Tensor:
    """d = policy_logprobs - ref_logprobs on the mask and 0 off it, so that no later exp sees padding."""
    require_mask(response_mask)
    require_same_shape(policy_logprobs=policy_logprobs, ref_logprobs=ref_logprobs, response_mask=response_mask)
    return masked(policy_logprobs, response_mask) - masked(ref_logprobs, response_mask)


def kl_policy_ref_per_token_k1(policy_logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor) -> Tensor:
    """Per-token k1 estimate of KL(policy || reference), in nats.

    k1 = policy_logprobs - ref_logprobs. Unbiased only for tokens sampled from the policy itself: under
    top-k, top-p or greedy sampling it can be negative for ever. As a loss its expected gradient is 0.

    Args:
      policy_logprobs: [batch, time] log-probs of the sampled tokens, nats.
      ref_logprobs: [batch, time] the same tokens under the reference, nats.
      response_mask: [batch, time] bool, True on response tokens.

    Returns:
      [batch, time] nats per token, exactly 0 off the mask; may be negative, never clamped.

    Raises:
      ShapeError: the three shapes differ, or response_mask is not bool.

    Source: Schulman 2020 (his q is the policy).

    >>> policy, ref = torch.tensor([[0.25]]).log(), torch.tensor([[0.05]]).log()
    >>> kl_policy_ref_per_token_k1(policy, ref, torch.tensor([[True]]))
    tensor([[1.6094]])
    """
    return _masked_log_ratio(policy_logprobs, ref_logprobs, response_mask)


def kl_policy_ref_per_token_k2(policy_logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor) -> Tensor:
    """Per-token k2 estimate of KL(policy || reference), in nats.

    With d = policy_logprobs - ref_logprobs:  k2 = d^2 / 2  >= 0.
    Biased as a value (small when the drift is small); as a loss on one step its gradient is that of the KL.

    Args:
      policy_logprobs: [batch, time] log-probs of the sampled tokens, nats.
      ref_logprobs: [batch, time] the same tokens under the reference, nats.
      response_mask: [batch, time] bool, True on response tokens.

    Returns:
      [batch, time] nats per token, exactly 0 off the mask; never clamped.

    Raises:
      ShapeError: the three shapes differ, or response_mask is not bool.

    Source: Schulman 2020 (his q is the policy).

    >>> policy, ref = torch.tensor([[-1.0]]), torch.tensor([[-1.5]])
    >>> kl_policy_ref_per_token_k2(policy, ref, torch.tensor([[True]]))
    tensor([[0.1250]])
    """
    return _masked_log_ratio(policy_logprobs, ref_logprobs, response_mask).square() / 2


def kl_policy_ref_per_token_k3(policy_logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor) -> Tensor:
    """Per-token k3 estimate of KL(policy || reference), in nats.

    With d = policy_logprobs - ref_logprobs:  k3 = expm1(-d) + d  >= 0.
    Unbiased only for tokens sampled from the policy; as a loss its gradient is that of KL(reference || policy).
    Where the reference finds a token vastly likelier than the policy, exp(-d) overflows to +inf: reported, not hidden.

    Args:
      policy_logprobs: [batch, time] log-probs of the sampled tokens, nats.
      ref_logprobs: [batch, time] the same tokens under the reference, nats.
      response_mask: [batch, time] bool, True on response tokens.

    Returns:
      [batch, time] nats per token, exactly 0 off the mask; never clamped.

    Raises:
      ShapeError: the three shapes differ, or response_mask is not bool.

    Source: Schulman 2020 (his q is the policy).

    >>> policy, ref = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -9.0]])
    >>> kl_policy_ref_per_token_k3(policy, ref, torch.tensor([[True, False]]))
    tensor([[0.1065, 0.0000]])
    """
    log_ratio = _masked_log_ratio(policy_logprobs, ref_logprobs, response_mask)
    estimate = torch.expm1(-log_ratio) + log_ratio
    return torch.where(log_ratio.isinf(), log_ratio.abs(), estimate)  # inf - inf would read NaN


def per_sequence(values_per_token: Tensor, response_mask: Tensor) -> Tensor:
    """Sum over the response tokens of each sequence: [batch, time] -> [batch].

    An empty response sums to 0.

    Raises:
      ShapeError: the shapes differ, or response_mask is not bool.

    >>> per_sequence(torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[True, True, False]]))
    tensor([3.])
    """
    return masked(values_per_token, response_mask).sum(-1)


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean and its confidence interval from n independent observations; plain floats."""

    mean: float
    low: float
    high: float
    n: int


def mean_with_interval(
    values_per_sequence: Tensor, lengths: Tensor | None = None, *, confidence: float = 0.95
) -> Interval:
    """Mean over sequences with Student's confidence interval, clustered by sequence.

    Without `lengths`:  mean = sum x_i / n,  variance of the mean = sum (x_i - mean)^2 / (n (n - 1)).
    With `lengths` (response tokens of each sequence) the mean is per token, a ratio of sums:
    mean = sum x_i / sum l_i, its variance from the residuals x_i - mean * l_i. The sequence stays the
    observation in both: tokens of one response are not independent.

    Args:
      values_per_sequence: [batch], at least one; one value has an interval from -inf to inf.
      lengths: [batch] token counts, with a positive sum; None for a mean per sequence.
      confidence: between 0 and 1, both excluded.

    Returns:
      Interval in the unit of the values (per sequence, or per token with `lengths`).

    Raises:
      ShapeError: values are not [batch], are empty, or lengths have another shape.
      ValueRangeError: confidence outside (0, 1), or lengths without a single token.

    Source: Student 1908; Cochran 1977, ratio estimator.

    >>> interval = mean_with_interval(torch.tensor([1.0, 2.0, 3.0]))
    >>> f"{interval.mean:.2f} [{interval.low:.2f}, {interval.high:.2f}] of {interval.n}"
    '2.00 [-0.48, 4.48] of 3'
    """
    require_rank(1, "[batch]", values_per_sequence=values_per_sequence)
    require_between(1e-6, 1 - 1e-6, confidence=confidence)
    n = values_per_sequence.numel()
    if n == 0:
        raise ShapeError("Expected at least one sequence, found none; a mean of nothing has no value.")
    values = values_per_sequence.detach().double()
    weights = torch.ones_like(values) if lengths is None else lengths.detach().double()
    require_same_shape(values_per_sequence=values, lengths=weights)
    require_between(1, math.inf, sum_of_lengths=float(weights.sum()))
    mean = float(values.sum() / weights.sum())
    if n == 1:
        return Interval(mean=mean, low=-math.inf, high=math.inf, n=n)
    residuals = (values - mean * weights) / weights.mean()
    standard_error = float((residuals.square().sum() / (n * (n - 1))).sqrt())
    half_width = student_quantile((1 + confidence) / 2, degrees_of_freedom=n - 1) * standard_error
    return Interval(mean=mean, low=mean - half_width, high=mean + half_width, n=n)


def student_quantile(probability: float, *, degrees_of_freedom: int) -> float:
    """The value that a Student-t variable stays below with the given probability (at least one half).

    Bisection on the closed form of the distribution for whole degrees of freedom.

    Source: Abramowitz and Stegun 1964, 26.7.3 and 26.7.4.

    >>> round(student_quantile(0.975, degrees_of_freedom=2), 4)
    4.3027
    """
    require_between(0.5, 1 - 1e-9, probability=probability)
    require_between(1, math.inf, degrees_of_freedom=degrees_of_freedom)
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        angle = (low + high) / 2
        if (1 + _share_within(angle, degrees_of_freedom)) / 2 < probability:
            low = angle
        else:
            high = angle
    return math.sqrt(degrees_of_freedom) * math.tan(low)


def _share_within(angle: float, degrees_of_freedom: int) -> float:
    """P(|T| <= sqrt(dof) * tan(angle)) of Student's T, as a finite trigonometric series."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees_of_freedom % 2
    term = cosine if odd else 1.0
    series = term if degrees_of_freedom > 1 else 0.0
    for step in range(2 + odd, degrees_of_freedom - 1, 2):
        term *= cosine**2 * (step - 1) / step
        series += term
    return 2 / math.pi * (angle + sine * series) if odd else sine * series
