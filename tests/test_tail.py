"""The tail of the scores: closed forms of Pareto, Gaussian, exponential and uniform laws."""

import math

import pytest
import torch
from exact import generator
from hypothesis import given
from hypothesis import strategies as st

from kleash.errors import ShapeError
from kleash.tail import tail_gap, tail_index

LAWS = {
    "uniform": lambda u: u,
    "gaussian": lambda u: torch.special.ndtri(u),
    "exponential": lambda u: -torch.log1p(-u),
    "pareto_2": lambda u: (1 - u) ** (-1 / 2),
}


def grid(n: int) -> torch.Tensor:
    """[n] the midpoints of n equal steps of (0, 1), so that a law's quantiles there stand for the law."""
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


def with_pareto_excess(alpha: float, n: int, draw: torch.Generator) -> torch.Tensor:
    """[2n + 1] scores around the median 3: n excesses follow a Pareto law, the others mirror them."""
    excess = torch.rand(n, dtype=torch.float64, generator=draw) ** (-1 / alpha)
    return 3 + torch.cat([excess, torch.zeros(1, dtype=torch.float64), -excess])


@pytest.mark.parametrize("alpha", [0.5, 2.0, 5.0])
def test_the_index_of_a_pareto_excess_has_the_mean_alpha(alpha):
    draw, samples = generator(1), 4000
    found = torch.tensor([tail_index(with_pareto_excess(alpha, 31, draw)) for _ in range(samples)])
    # a sum of k exponential spacings: k = 8, mean alpha, standard deviation alpha / sqrt(k - 2)
    assert float(found.mean()) == pytest.approx(alpha, abs=4 * alpha / math.sqrt(6 * samples))
    assert float(found.std()) == pytest.approx(alpha / math.sqrt(6), rel=0.15)


def test_the_index_of_a_few_excesses_is_its_sum_by_hand():
    scores = torch.tensor([-8.0, -4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0, 8.0])  # 9 scores: k = 3, the fourth is 1
    assert tail_index(scores) == pytest.approx(2 / (math.log(2) + math.log(4) + math.log(8)), rel=1e-12)
    scores = torch.tensor([-16.0, -8.0, -4.0, -2.0, -1.0, 1.0, 2.0, 4.0, 8.0, 16.0])  # 10 scores: k = 4
    assert tail_index(scores) == pytest.approx(3 / (math.log(2) * (1 + 2 + 3 + 4)), rel=1e-12)


@pytest.mark.parametrize("name", LAWS)
def test_the_index_of_a_great_sample_is_the_integral_over_its_law(name):
    n = 90_000
    scores, k = LAWS[name](grid(n)), 300
    # E log(x / x_{k+1}) over the upper k / n of the law, by the midpoint rule on a grid 1000 times finer
    upper = 1 - (1 - grid(100_000)) * k / n
    excess = LAWS[name](upper) - LAWS[name](torch.tensor(0.5, dtype=torch.float64))
    threshold = LAWS[name](torch.tensor(1 - k / n, dtype=torch.float64)) - LAWS[name](
        torch.tensor(0.5, dtype=torch.float64)
    )
    expected = 1 / float((excess / threshold).log().mean())
    assert tail_index(scores) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    ("name", "gap"),
    [
        ("uniform", 0.49 / 0.25),
        ("gaussian", 2.3263478740408408 / 0.6744897501960817),
        ("exponential", math.log(50) / math.log(2)),
        ("pareto_2", (10 - math.sqrt(2)) / (2 - math.sqrt(2))),
    ],
)
def test_the_gap_of_a_great_sample_is_that_of_its_law(name, gap):
    assert tail_gap(LAWS[name](grid(200_000))) == pytest.approx(gap, rel=1e-3)


def test_the_heavier_the_tail_the_smaller_the_index_and_the_greater_the_gap():
    samples = [LAWS[name](grid(64)) for name in ("uniform", "gaussian", "exponential", "pareto_2")]
    indices, gaps = [tail_index(scores) for scores in samples], [tail_gap(scores) for scores in samples]
    assert indices == sorted(indices, reverse=True)
    assert gaps == sorted(gaps)


@given(st.floats(-1e3, 1e3), st.floats(1e-3, 1e3), st.integers(0, 99))
def test_neither_the_zero_nor_the_unit_of_the_score_counts(shift, scale, seed):
    scores = torch.randn(20, dtype=torch.float64, generator=generator(seed))
    order = torch.randperm(20, generator=generator(seed))
    for figure in (tail_index, tail_gap):
        assert figure(shift + scale * scores[order]) == pytest.approx(figure(scores), rel=1e-6)


@pytest.mark.parametrize(
    ("scores", "what"),
    [
        ([], "nothing"),
        ([1.0], "one score"),
        ([1.0, 2.0, 3.0, 4.0, 5.0], "two scores above the median where k + 1 = 4 are needed"),
        ([2.0] * 16, "equal scores"),
        ([0.0] * 8 + [1.0] * 8, "ties among the largest"),
        ([0.0] * 12 + [1.0, 2.0, 3.0, 4.0], "a median that is also the threshold"),
    ],
)
def test_an_index_without_a_value_is_missing(scores, what):
    assert tail_index(torch.tensor(scores)) is None, what


@pytest.mark.parametrize("scores", [[], [1.0], [2.0] * 16, [0.0] * 15 + [9.0]])
def test_a_gap_without_a_step_is_missing(scores):
    assert tail_gap(torch.tensor(scores)) is None


def test_scores_of_another_shape_are_refused():
    for figure in (tail_index, tail_gap):
        with pytest.raises(ShapeError, match=r"Expected scores as \[batch\], found shape \[2, 3\]"):
            figure(torch.zeros(2, 3))
