"""Best of n: its probabilities, its KL by enumeration, by its bound and from samples, and what it scores."""

import itertools
import math

import pytest
import torch
from exact import generator
from hypothesis import given
from hypothesis import strategies as st

from kleash.best_of_n import (
    best_of_n_from_samples,
    best_of_n_kl,
    best_of_n_kl_bound,
    best_of_n_kl_estimate,
    best_of_n_logprobs,
    best_of_n_weights,
)
from kleash.divergence import kl_divergence
from kleash.errors import ShapeError, ValueRangeError

THREE_WAY = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
ASCENDING = torch.tensor([0.0, 1.0, 2.0])


def enumerated(rho: list[float], scores: list[float], n: int) -> list[float]:
    """pi_n by writing down every tuple of n draws, ties split evenly among the drawn."""
    found = [0.0] * len(rho)
    for draws in itertools.product(range(len(rho)), repeat=n):
        probability = math.prod(rho[i] for i in draws)
        best = max(scores[i] for i in draws)
        winners = [i for i in draws if scores[i] == best]
        for i in winners:
            found[i] += probability / len(winners)
    return found


@pytest.mark.parametrize(("n", "bound"), [(1, 0.0), (4, 0.6363), (16, 1.8351), (128, 3.8598), (1000, 5.9088)])
def test_the_bound_has_its_known_values(n: int, bound: float) -> None:
    assert best_of_n_kl_bound(n) == pytest.approx(bound, abs=5e-5)


@pytest.mark.parametrize(("n", "kl"), [(1, 0.0), (4, 0.559751), (16, 1.469645)])
def test_the_exact_kl_of_three_responses_has_its_known_values(n: int, kl: float) -> None:
    assert best_of_n_kl(THREE_WAY, ASCENDING, n=n) == pytest.approx(kl, abs=1e-6)


@pytest.mark.parametrize("scores", [[0.0, 1.0, 2.0, 3.0], [2.0, 1.0, 2.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_the_probabilities_are_those_of_every_tuple_of_draws(scores: list[float], n: int) -> None:
    rho = [0.1, 0.4, 0.2, 0.3]
    logprobs = torch.tensor(rho, dtype=torch.float64).log()
    expected = torch.tensor(enumerated(rho, scores, n), dtype=torch.float64)
    best = best_of_n_logprobs(logprobs, torch.tensor(scores), n=n)
    torch.testing.assert_close(best.exp(), expected)
    assert best_of_n_kl(logprobs, torch.tensor(scores), n=n) == pytest.approx(float(kl_divergence(best, logprobs)))


def test_a_response_that_never_comes_is_never_the_best() -> None:
    logprobs = torch.tensor([0.5, 0.5, 0.0, 0.0], dtype=torch.float64).log()
    best = best_of_n_logprobs(logprobs, torch.tensor([0.0, 1.0, 2.0, -1.0]), n=3)
    torch.testing.assert_close(best.exp(), torch.tensor([0.125, 0.875, 0.0, 0.0], dtype=torch.float64))
    assert math.isfinite(best_of_n_kl(logprobs, torch.tensor([0.0, 1.0, 2.0, -1.0]), n=3))


worlds = st.lists(st.tuples(st.floats(0.01, 1.0), st.integers(0, 3)), min_size=1, max_size=6)


@given(worlds, st.integers(1, 1000))
def test_the_kl_lies_between_0_and_its_bound(world: list[tuple[float, int]], n: int) -> None:
    weights, scores = (torch.tensor(column, dtype=torch.float64) for column in zip(*world, strict=True))
    kl = best_of_n_kl((weights / weights.sum()).log(), scores, n=n)
    assert -1e-9 <= kl <= best_of_n_kl_bound(n) + 1e-9


# the estimate from samples


@given(worlds, st.integers(1, 64))
def test_the_estimate_is_exact_once_every_response_was_drawn(world: list[tuple[float, int]], n: int) -> None:
    weights, scores = (torch.tensor(column, dtype=torch.float64) for column in zip(*world, strict=True))
    logprobs = (weights / weights.sum()).log()
    drawn = torch.arange(len(world)).repeat(2)
    estimate = best_of_n_kl_estimate(scores[drawn], logprobs[drawn], drawn, n=n)
    assert estimate == pytest.approx(best_of_n_kl(logprobs, scores, n=n), abs=1e-9)


@given(st.integers(1, 30), st.integers(1, 64))
def test_the_estimate_is_the_bound_where_all_are_different_and_improbable(draws: int, n: int) -> None:
    scores = torch.rand(draws, generator=generator(0), dtype=torch.float64)
    estimate = best_of_n_kl_estimate(scores, torch.full((draws,), -100.0), torch.arange(draws), n=n)
    assert estimate == pytest.approx(best_of_n_kl_bound(n), abs=1e-9)


def test_one_probable_response_above_improbable_ones_gives_the_formula_of_beirami() -> None:
    n, p = 8, 0.3
    scores = torch.tensor([5.0, 5.0, 1.0, 2.0, 3.0])
    logprobs = torch.tensor([math.log(p), math.log(p), -90.0, -90.0, -90.0], dtype=torch.float64)
    top = 1 - (1 - p) ** n
    rest = (1 - p) ** n * (math.log(n) + (n - 1) * math.log(1 - p) - (n - 1) / n)
    estimate = best_of_n_kl_estimate(scores, logprobs, torch.tensor([0, 0, 1, 2, 3]), n=n)
    assert estimate == pytest.approx(rest + top * math.log(top / p), abs=1e-9)


@pytest.mark.parametrize(("responses", "shape"), [(3, 0.0), (20, 1.0), (400, 1.5), (5000, 0.5)])
@pytest.mark.parametrize("n", [2, 16])
def test_on_average_the_estimate_is_near_the_enumerated_kl(responses: int, shape: float, n: int) -> None:
    logprobs = (-shape * torch.arange(1, responses + 1, dtype=torch.float64).log()).log_softmax(0)
    scores = torch.randn(responses, generator=generator(1), dtype=torch.float64)
    draws = torch.multinomial(logprobs.exp(), 200 * 16, replacement=True, generator=generator(2)).reshape(200, 16)
    estimates = [best_of_n_kl_estimate(scores[row], logprobs[row], row, n=n) for row in draws]
    exact = best_of_n_kl(logprobs, scores, n=n)
    assert math.fsum(estimates) / 200 == pytest.approx(exact, abs=0.04)


def test_scores_that_many_responses_share_count_as_few_outcomes() -> None:
    """10^5 responses of four scores: the KL of four outcomes, a third below the bound, is found from 256 draws."""
    scores = torch.randint(4, (100_000,), generator=generator(3)).double()
    logprobs = torch.full((100_000,), -math.log(100_000), dtype=torch.float64)
    draws = torch.randint(100_000, (20, 256), generator=generator(4))
    mean = math.fsum(best_of_n_kl_estimate(scores[row], logprobs[row], row, n=16) for row in draws) / 20
    assert mean == pytest.approx(best_of_n_kl(logprobs, scores, n=16), abs=0.05)
    assert mean < best_of_n_kl_bound(16) - 0.4


def test_draws_of_one_response_that_were_scored_apart_by_rounding_stay_one_outcome() -> None:
    drawn = torch.tensor([0, 1, 2, 0, 1, 2])
    scores = ASCENDING.double()[drawn] + torch.tensor([0, 0, 0, 1e-7, -1e-7, 1e-7], dtype=torch.float64)
    assert best_of_n_kl_estimate(scores, THREE_WAY[drawn], drawn, n=4) == pytest.approx(0.559751, abs=1e-6)


@pytest.mark.parametrize("n", [1, 3])
def test_best_of_1_is_the_reference_and_one_draw_is_enough_for_an_answer(n: int) -> None:
    estimate = best_of_n_kl_estimate(torch.zeros(1), torch.tensor([-2.0]), torch.zeros(1, dtype=torch.int64), n=n)
    assert 0 <= estimate <= best_of_n_kl_bound(n) + 1e-12


# scores of the best


@pytest.mark.parametrize("row", [[0.3, 0.1, 0.2, 0.9, 0.5], [1.0, 1.0, 0.0, 1.0, 0.0], [2.0] * 5])
@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_the_weights_count_every_subset(row: list[float], n: int) -> None:
    expected = [0.0] * len(row)
    subsets = list(itertools.combinations(range(len(row)), n))
    for subset in subsets:
        winners = [i for i in subset if row[i] == max(row[j] for j in subset)]
        for i in winners:
            expected[i] += 1 / len(winners) / len(subsets)
    weights = best_of_n_weights(torch.tensor([row, row[::-1]]), n=n)
    torch.testing.assert_close(weights, torch.tensor([expected, expected[::-1]], dtype=torch.float64))


def test_from_samples_gives_the_mean_score_of_the_enumerated_best() -> None:
    """The held-out score goes down as the score goes up, and the best is chosen by the score alone."""
    drawn = torch.multinomial(THREE_WAY.exp(), 4000 * 6, replacement=True, generator=generator(0)).reshape(4000, 6)
    found = best_of_n_from_samples(ASCENDING[drawn], -ASCENDING[drawn], THREE_WAY[drawn], drawn, n=4)
    best = best_of_n_logprobs(THREE_WAY, ASCENDING, n=4).exp()
    expected = float((best * ASCENDING).sum())
    assert found.score.mean == pytest.approx(expected, abs=0.03)
    assert found.score.low < expected < found.score.high
    assert found.eval_score is not None
    assert found.eval_score.mean == pytest.approx(-found.score.mean)
    assert found.kl_policy_ref_per_sequence.mean == pytest.approx(0.559751, abs=0.04)
    assert (found.n, found.score.n, found.kl_bound) == (4, 4000, best_of_n_kl_bound(4))


def test_the_interval_is_over_prompts_and_not_over_draws() -> None:
    scores = torch.tensor([[1.0, 1.0, 1.0], [3.0, 3.0, 3.0]])
    drawn = torch.zeros(2, 3, dtype=torch.int64)
    found = best_of_n_from_samples(scores, None, torch.zeros(2, 3), drawn, n=2)
    assert (found.score.mean, found.score.n, found.eval_score) == (2.0, 2, None)
    assert found.score.high - found.score.mean == pytest.approx(12.706, abs=1e-3)  # t(1) of two observations


# what it refuses


def test_wrong_numbers_are_refused_in_one_sentence() -> None:
    two = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueRangeError, match="Expected n between 1 and inf, found 0"):
        best_of_n_kl_bound(0)
    with pytest.raises(ValueRangeError, match="Expected n between 1 and 3, found 4"):
        best_of_n_weights(torch.zeros(1, 3), n=4)
    with pytest.raises(ValueRangeError, match="Expected sum_of_probabilities between"):
        best_of_n_kl(torch.tensor([-1.0, -1.0]), torch.tensor([0.0, 1.0]), n=2)
    with pytest.raises(ValueRangeError, match=r"together at most probability 1, found 1\.2;"):
        best_of_n_kl_estimate(torch.zeros(2), torch.tensor([0.6, 0.6]).log(), torch.tensor([0, 1]), n=2)
    with pytest.raises(ValueRangeError, match=r"together at most probability 1, found 2\.7"):
        best_of_n_kl_estimate(torch.zeros(2), torch.ones(2), two, n=2)
    with pytest.raises(ShapeError, match="Expected at least one draw, found none"):
        best_of_n_kl_estimate(torch.zeros(0), torch.zeros(0), two[:0], n=2)
    with pytest.raises(ShapeError, match="Expected tensors of one shape"):
        best_of_n_kl_estimate(torch.zeros(2), torch.zeros(3), two, n=2)
