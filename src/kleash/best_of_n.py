"""Best of n: draw n responses from the reference, keep the one with the highest score. No training.

For every n it is one more policy, pi_n, whose drift from the reference rho is known: what a trained policy should beat
at the same drift. Responses are grouped by score, ties are split evenly; p_g is the probability that a response of the
reference falls into group g, F_g that its score is at most g's, F_g- that it is below:

    pi_n(y) = rho(y) / p_g (F_g^n - F_g-^n)    for every response y of group g
    KL(pi_n || rho) = sum_g (F_g^n - F_g-^n) log((F_g^n - F_g-^n) / p_g)    in nats
                   <= log n - (n - 1) / n    reached where no score has a probability of its own

Sources: Stiennon et al. 2020, appendix G.3 (the bound); Beirami et al. 2024, arXiv 2401.01879 (it is a bound, and an
estimate from the probabilities of what was drawn); Nakano et al. 2021, arXiv 2112.09332, appendix I (unbiased means).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kleash.checks import require_between, require_rank, require_same_shape
from kleash.errors import ShapeError, ValueRangeError
from kleash.estimators import Interval, mean_with_interval

MOST_MASS = 1.001  # rounding of log-probs over a long response, no more


@dataclass(frozen=True, kw_only=True)
class BestOfN:
    """Best of n from the reference; means over prompts with 95 % intervals clustered by prompt.

    kl_bound and kl_policy_ref_per_sequence are KL(best of n || reference) in nats: the bound, and the estimate.
    """

    n: int
    kl_bound: float
    kl_policy_ref_per_sequence: Interval
    score: Interval
    eval_score: Interval | None


def best_of_n_kl_bound(n: int) -> float:
    """log n - (n - 1) / n, in nats: what KL(best of n || reference) never exceeds, for one prompt or on average.

    Raises:
      ValueRangeError: n below 1.

    >>> [round(best_of_n_kl_bound(n), 4) for n in (1, 4, 16, 128, 1000)]
    [0.0, 0.6363, 1.8351, 3.8598, 5.9088]
    """
    require_between(1, math.inf, n=n)
    return math.log(n) - (n - 1) / n


def best_of_n_logprobs(ref_logprobs: Tensor, scores: Tensor, *, n: int) -> Tensor:
    """log pi_n(y) of every response when all of them can be written down; ties are split evenly.

    Args:
      ref_logprobs: [responses] normalised log-probs of the reference, nats; -inf = never.
      scores: [responses].
      n: how many are drawn.

    Returns:
      [responses] float64, nats.

    Raises:
      ShapeError: the shapes differ or are not [responses].
      ValueRangeError: n below 1, or probabilities that do not sum to 1.

    >>> rho, scores = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.0, 1.0, 2.0])
    >>> best_of_n_logprobs(rho.log(), scores, n=4).exp()
    tensor([0.0625, 0.3471, 0.5904], dtype=torch.float64)
    """
    require_between(1, math.inf, n=n)
    require_rank(1, "[responses]", scores=scores)
    require_same_shape(ref_logprobs=ref_logprobs, scores=scores)
    logprobs = ref_logprobs.double()
    require_between(2 - MOST_MASS, MOST_MASS, sum_of_probabilities=float(logprobs.exp().sum()))
    group, _ = _groups(scores)
    p = torch.zeros(int(group.max()) + 1, dtype=torch.float64).index_add(0, group, logprobs.softmax(0))
    return logprobs.log_softmax(0) + torch.where(p > 0, _log_mass(p.cumsum(0), p, n=n) - p.log(), 0.0)[group]


def best_of_n_kl(ref_logprobs: Tensor, scores: Tensor, *, n: int) -> float:
    """Exact KL(best of n || reference), in nats, when all responses can be written down.

    Args, Raises: see best_of_n_logprobs.

    >>> rho, scores = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.0, 1.0, 2.0])
    >>> round(best_of_n_kl(rho.log(), scores, n=4), 4)
    0.5598
    """
    best = best_of_n_logprobs(ref_logprobs, scores, n=n)
    possible = best > -math.inf
    return float((best[possible].exp() * (best[possible] - ref_logprobs.double()[possible])).sum())


def best_of_n_kl_estimate(scores: Tensor, ref_sequence_logprobs: Tensor, responses: Tensor, *, n: int) -> float:
    """Estimate of KL(best of n || reference) for one prompt, in nats, from responses that the reference drew.

    The probability axis [0, 1], in the order of the scores, is filled with what is known and what is not:

    - a response that was drawn lies there with its own probability rho(y), exactly;
    - what no drawn response accounts for, 1 - sum rho(y), is shared by the responses drawn once: where new
      responses turned up, further ones are waiting (Good 1953).

    A score that several responses share is one block of its probability; the share of a response whose score nobody
    else has is spread around it, half below and half above, as outcomes too rare to count. A block from a to b adds
    (b^n - a^n) log((b^n - a^n) / (b - a)), a spread from a to b adds C(b) - C(a) with

        C(u) = u^n (log n + (n - 1) log u - (n - 1) / n) = integral of n v^(n-1) log(n v^(n-1)) from 0 to u.

    So it is the exact KL once every response has been drawn, and the bound where all of them are different and
    improbable. One rare response at the top gives the estimate of Beirami et al.

    Args:
      scores: [draws]; a response drawn several times has the score of its first draw.
      ref_sequence_logprobs: [draws] log rho(response | prompt), the sum over its tokens, nats.
      responses: [draws] int64, equal for equal responses.
      n: how many are kept the best of; may exceed the number of draws.

    Raises:
      ShapeError: the shapes differ, or there is no draw.
      ValueRangeError: n below 1, a positive log-prob, or distinct responses more probable than 1 together.

    Source: Beirami et al. 2024, arXiv 2401.01879, section 4, for the idea of using the known probabilities.
    """
    require_between(1, math.inf, n=n)
    require_rank(1, "[draws]", scores=scores)
    require_same_shape(scores=scores, ref_sequence_logprobs=ref_sequence_logprobs, responses=responses)
    if scores.numel() == 0:
        raise ShapeError("Expected at least one draw, found none; sample some responses first.")
    known, waiting, group, alone = _masses(scores, ref_sequence_logprobs, responses)
    if n == 1:
        return 0.0  # the reference itself, not its rounding
    groups = int(group.max()) + 1
    block = torch.zeros(groups, dtype=torch.float64).index_add(0, group, torch.where(alone, known, known + waiting))
    spread = torch.zeros(groups, dtype=torch.float64).index_add(0, group, torch.where(alone, waiting, 0.0))
    ends = torch.stack([spread / 2, block, spread / 2], 1).flatten().cumsum(0).reshape(groups, 3)
    low, high, end = ends.unbind(1)
    start = torch.cat([torch.zeros(1, dtype=torch.float64), end[:-1]])
    log_mass = _log_mass(high, block, n=n)
    blocks = torch.where(block > 0, log_mass.exp() * (log_mass - block.log()), 0.0)
    spreads = _spread_kl(low, n) - _spread_kl(start, n) + _spread_kl(end, n) - _spread_kl(high, n)
    return float((blocks + spreads).sum())


def _groups(values: Tensor) -> tuple[Tensor, Tensor]:
    """Which group of equal values each belongs to, lowest first, and the sizes of the groups."""
    _, group, sizes = torch.unique(values, return_inverse=True, return_counts=True)
    return group, sizes


def _masses(scores: Tensor, logprobs: Tensor, responses: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each distinct response: its probability, its share of what was not drawn, its group, whether alone in it."""
    which, draws = _groups(responses)
    first = torch.full_like(draws, len(which)).scatter_reduce(0, which, torch.arange(len(which)), "amin")
    known = logprobs[first].double().exp()
    total = float(known.sum())
    if not (bool((logprobs <= 0).all()) and total <= MOST_MASS):
        raise ValueRangeError(
            f"Expected log-probs of responses to one prompt, together at most probability 1, found {total:g}; "
            "sum the log-probs over each response, and give equal responses the same number."
        )
    known = known / max(1.0, total)
    singles = (draws == 1).double()
    weights = singles if bool(singles.any()) else draws.double()
    waiting = (1 - known.sum()) * weights / weights.sum()
    group, sharing = _groups(scores[first])
    return known, waiting, group, (sharing[group] == 1) & (draws == 1)


def _log_mass(high: Tensor, width: Tensor, *, n: int) -> Tensor:
    """log(F^n - F_-^n), the log-probability under best of n of a block of the width p = F - F_- that ends at F.

    As n log F + log(1 - (1 - p / F)^n), which stays exact for the smallest p; -inf for a block of width 0.
    """
    share = torch.where(width < high, width / high, 1.0)
    return n * high.log() + torch.log(-torch.expm1(n * torch.log1p(-share)))


def _spread_kl(u: Tensor, n: int) -> Tensor:
    """C(u): what outcomes without probability of their own below u add to the KL; C(0) = 0."""
    positive = torch.where(u > 0, u, 1.0)
    value = positive**n * (math.log(n) + (n - 1) * positive.log() - (n - 1) / n)
    return torch.where(u > 0, value, 0.0)


def best_of_n_weights(scores: Tensor, *, n: int) -> Tensor:
    """How often each of the drawn responses is the best of n, over all subsets of n draws.

    Of N draws, the one of rank i (1 = lowest) is the best of C(i - 1, n - 1) of the C(N, n) subsets; ties share
    evenly. The weighted sum of any quantity is an unbiased estimate of its mean under best of n.

    Args:
      scores: [prompts, draws].
      n: at most the number of draws.

    Returns:
      [prompts, draws] float64, each row summing to 1.

    Raises:
      ShapeError: scores are not [prompts, draws].
      ValueRangeError: n below 1 or above the number of draws.

    Source: Nakano et al. 2021, arXiv 2112.09332, appendix I.

    >>> best_of_n_weights(torch.tensor([[0.3, 0.1, 0.2]]), n=2)
    tensor([[0.6667, 0.0000, 0.3333]], dtype=torch.float64)
    """
    require_rank(2, "[prompts, draws]", scores=scores)
    draws = scores.shape[1]
    require_between(1, draws, n=n)
    subsets = math.comb(draws, n)
    by_rank = torch.tensor([math.comb(rank, n - 1) / subsets for rank in range(draws)], dtype=torch.float64)
    rows = []
    for row in scores:
        group, sizes = _groups(row)
        of_group = torch.zeros(len(sizes), dtype=torch.float64).index_add(0, group.sort().values, by_rank)
        rows.append((of_group / sizes)[group])
    return torch.stack(rows) if rows else scores.double()


def best_of_n_from_samples(
    scores: Tensor,
    eval_scores: Tensor | None,
    ref_sequence_logprobs: Tensor,
    responses: Tensor,
    *,
    n: int,
) -> BestOfN:
    """Best of n from N >= n responses of the reference to each prompt: score, held-out score, KL.

    Args:
      scores: [prompts, draws] by which the best is chosen.
      eval_scores: [prompts, draws] of the held-out judge, which chooses nothing; or None.
      ref_sequence_logprobs: [prompts, draws] log rho(response | prompt), nats.
      responses: [prompts, draws] int64, equal for equal responses to one prompt.
      n: at most the number of draws.

    Raises:
      ShapeError, ValueRangeError: see best_of_n_weights and best_of_n_kl_estimate.
    """
    weights = best_of_n_weights(scores, n=n)
    columns = zip(scores, ref_sequence_logprobs, responses, strict=True)
    kl = torch.tensor([best_of_n_kl_estimate(*column, n=n) for column in columns], dtype=torch.float64)
    return BestOfN(
        n=n,
        kl_bound=best_of_n_kl_bound(n),
        kl_policy_ref_per_sequence=mean_with_interval(kl),
        score=mean_with_interval((weights * scores.double()).sum(1)),
        eval_score=None if eval_scores is None else mean_with_interval((weights * eval_scores.double()).sum(1)),
    )
