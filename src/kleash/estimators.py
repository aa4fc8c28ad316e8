"""One-token estimates of KL(policy || reference), sums per sequence, and intervals that respect sequences.

With d = log pi(y_t) - log rho(y_t) of a token y_t that the policy sampled:

    k1 = d                unbiased, often negative, large variance
    k2 = d^2 / 2          biased, never negative
    k3 = expm1(-d) + d    unbiased, never negative

Source: Schulman 2020, http://joschu.net/blog/kl-approx.html (his q is the policy, his p the reference).
"""

import math
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import torch
from torch import Tensor

from kleash.checks import require_between, require_mask, require_rank, require_same_shape
from kleash.errors import ShapeError
from kleash.masking import masked

ROUNDING = 1e-6  # of a number of degrees of freedom; of a spread in units of the mean
CLOSED_FORM_UP_TO = 1000  # degrees of freedom; its cost grows with them


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
    values_per_sequence: Tensor,
    lengths: Tensor | None = None,
    *,
    confidence: float = 0.95,
    strata: Tensor | None = None,
) -> Interval:
    """Mean over sequences with Student's confidence interval, clustered by sequence.

    Without `lengths`:  mean = sum x_i / n,  variance of the mean = sum (x_i - mean)^2 / (n (n - 1)).
    With `lengths` (response tokens of each sequence) the mean is per token, a ratio of sums:
    mean = sum x_i / sum l_i, its variance from the residuals x_i - mean * l_i. The sequence stays the
    observation in both: tokens of one response are not independent.

    With `strata` (the prompt that each response answers) the prompts are given and only the responses are left to
    chance: variance of the mean = sum_s s_s^2 / (S^2 m), s_s^2 the variance within a stratum, S strata of m sequences
    each, with Satterthwaite's degrees of freedom. Without, the interval also covers the choice of prompts.

    Args:
      values_per_sequence: [batch], at least one; one value has an interval from -inf to inf.
      lengths: [batch] token counts, with a positive sum; None for a mean per sequence.
      confidence: between 0 and 1, both excluded.
      strata: [batch] int64, each number standing equally often and at least twice; None = one stratum.

    Returns:
      Interval in the unit of the values (per sequence, or per token with `lengths`).

    Raises:
      ShapeError: values are not [batch], are empty, lengths or strata have another shape, or strata are uneven.
      ValueRangeError: confidence outside (0, 1), or lengths without a single token.

    Source: Student 1908; Satterthwaite 1946; Cochran 1977, ratio estimator and stratified sampling.

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
    by_stratum = None if strata is None else _sequences_by_stratum(values, strata)
    mean = float(values.sum() / weights.sum())
    if n == 1:
        return Interval(mean=mean, low=-math.inf, high=math.inf, n=n)
    residuals = (values - mean * weights) / weights.mean()
    if by_stratum is None:
        standard_error, degrees_of_freedom = float((residuals.square().sum() / (n * (n - 1))).sqrt()), n - 1
    else:
        standard_error, degrees_of_freedom = _within_strata(residuals[by_stratum])
    half_width = student_quantile((1 + confidence) / 2, degrees_of_freedom=degrees_of_freedom) * standard_error
    return Interval(mean=mean, low=mean - half_width, high=mean + half_width, n=n)


def _sequences_by_stratum(values: Tensor, strata: Tensor) -> Tensor:
    """[strata, sequences in each] places of the sequences."""
    require_same_shape(values_per_sequence=values, strata=strata)
    counts = torch.unique(strata, return_counts=True)[1]
    fewest, most = int(counts.min()), int(counts.max())
    if fewest != most or fewest < 2:
        raise ShapeError(
            f"Expected strata of one size, at least 2 sequences each, found {fewest} to {most}; draw as many responses "
            "to every prompt, or leave strata out."
        )
    return torch.argsort(strata, stable=True).view(len(counts), fewest)


def _within_strata(residuals: Tensor) -> tuple[float, int]:
    """Standard error of the mean of [strata, sequences] and its degrees of freedom, from the spread within strata."""
    strata, sequences = residuals.shape
    variances = residuals.var(1)
    total = variances.sum()
    standard_error = float((total / sequences).sqrt() / strata)
    spread = variances.square().sum() / (sequences - 1)
    freedom = float(total.square() / spread) if spread > 0 else 1.0
    return standard_error, max(1, math.floor(freedom + ROUNDING))  # equal strata have a whole number of them


def skewness(values_per_sequence: Tensor, *, strata: Tensor | None = None) -> float | None:
    """Skewness of the values about the mean of their stratum, from the k-statistics: k3 / k2^1.5.

    The mean of n of them has this skewness over sqrt(n), and Student's interval is the less to be trusted for it.

    Args:
      values_per_sequence: [batch].
      strata: as for mean_with_interval; k2 and k3 are then means over strata.

    Returns:
      A number without a unit; None of fewer than three to a stratum, or where nothing but rounding spreads them.

    Raises:
      ShapeError: as mean_with_interval.

    Source: Fisher 1930, k-statistics; Johnson 1978, Student's interval of skewed values.

    >>> round(skewness(torch.tensor([0.0, 0.0, 3.0])), 3)
    1.732
    """
    require_rank(1, "[batch]", values_per_sequence=values_per_sequence)
    values = values_per_sequence.detach().double()
    by_stratum = values.unsqueeze(0) if strata is None else values[_sequences_by_stratum(values, strata)]
    m = by_stratum.shape[1]
    if m < 3:
        return None
    residuals = by_stratum - by_stratum.mean(1, keepdim=True)
    k2 = float(residuals.square().sum(1).mean()) / (m - 1)
    k3 = float(residuals.pow(3).sum(1).mean()) * m / ((m - 1) * (m - 2))
    return None if math.sqrt(k2) <= ROUNDING * float(values.abs().mean()) else k3 / k2**1.5


@cache
def student_quantile(probability: float, *, degrees_of_freedom: int) -> float:
    """The value that a Student-t variable stays below with the given probability (at least one half).

    Bisection on the closed form of the distribution for whole degrees of freedom; beyond 1000 of them the expansion
    around the normal quantile x, whose next term is of the order of x^11 / degrees_of_freedom^5.

    Source: Abramowitz and Stegun 1964, 26.7.3 and 26.7.4; 26.7.5.

    >>> round(student_quantile(0.975, degrees_of_freedom=2), 4)
    4.3027
    """
    require_between(0.5, 1 - 1e-9, probability=probability)
    require_between(1, math.inf, degrees_of_freedom=degrees_of_freedom)
    if degrees_of_freedom > CLOSED_FORM_UP_TO:
        return _nearly_normal_quantile(NormalDist().inv_cdf(probability), degrees_of_freedom)
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        angle = (low + high) / 2
        if (1 + _share_within(angle, degrees_of_freedom)) / 2 < probability:
            low = angle
        else:
            high = angle
    return math.sqrt(degrees_of_freedom) * math.tan(low)


def _nearly_normal_quantile(x: float, degrees_of_freedom: int) -> float:
    """Student's quantile as an expansion in 1 / degrees_of_freedom around the normal one."""
    terms = (
        (x**3 + x) / 4,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384,
        (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / 92160,
    )
    return x + math.fsum(term / degrees_of_freedom**power for power, term in enumerate(terms, 1))


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
