"""Statistics from hidden states, held to the plain log-probs and divergences of the full logits, in float64."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from exact import World, generator
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kleash.divergence import entropy, kl_divergence
from kleash.errors import ShapeError, ValueRangeError
from kleash.fused import tiles
from kleash.fused.head import Head
from kleash.fused.stats import TokenStats, logprobs_of, stats_of, token_stats
from kleash.logprobs import full_log_probs, token_logprobs

NAMES = [field.name for field in fields(TokenStats)]
DIFFERENTIABLE = [name for name in NAMES if name not in ("ref_logprobs", "ref_entropy")]
DIVERGENCES = ["kl_policy_ref_per_token", "kl_ref_policy_per_token"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Hidden states and heads of two models, and everything else that `stats_of` takes."""

    hidden: Tensor
    head: Head
    ref_hidden: Tensor
    ref_head: Head
    tokens: Tensor
    temperature: float = 1.0
    vocab: int | None = None

    @property
    def counted(self) -> int:
        """How many entries of the vocabulary count."""
        return min(self.head.vocab, self.ref_head.vocab) if self.vocab is None else self.vocab

    def fused(self) -> TokenStats:
        return stats_of(
            *(self.hidden, self.head, self.ref_hidden, self.ref_head, self.tokens),
            temperature=self.temperature,
            vocab=self.vocab,
            both_ways=True,
            ref_entropy=True,
        )

    def plain(self, rows: Tensor | slice = slice(None)) -> TokenStats:
        """The truth, from the logits of all tokens in one piece; also of some rows only."""
        log_pi = self._log_probs(self.hidden[rows], self.head)
        log_rho = self._log_probs(self.ref_hidden[rows], self.ref_head).detach()
        return TokenStats(
            policy_logprobs=token_logprobs(log_pi, self.tokens[rows]),
            ref_logprobs=token_logprobs(log_rho, self.tokens[rows]),
            kl_policy_ref_per_token=kl_divergence(log_pi, log_rho),
            policy_entropy=entropy(log_pi),
            kl_ref_policy_per_token=kl_divergence(log_rho, log_pi),
            ref_entropy=entropy(log_rho),
        )

    def _log_probs(self, hidden: Tensor, head: Head) -> Tensor:
        logits = hidden @ head.weight.T
        logits = head.scale * (logits if head.bias is None else logits + head.bias)
        logits = logits if head.softcap is None else head.softcap * (logits / head.softcap).tanh()
        return full_log_probs(logits[:, : self.counted], temperature=self.temperature)

    def trained(self) -> list[Tensor]:
        """What may have a gradient."""
        bias = [] if self.head.bias is None else [self.head.bias]
        return [self.hidden, self.head.weight, *bias]

    def with_gradients(self) -> "Case":
        """The same numbers, as leaves that want a gradient."""
        leaves = [tensor.detach().clone().requires_grad_() for tensor in self.trained()]
        head = replace(self.head, weight=leaves[1], bias=leaves[2] if len(leaves) > 2 else None)
        return replace(self, hidden=leaves[0], head=head)

    def to(self, dtype: torch.dtype) -> "Case":
        """The same in another type, rounded where it must be."""
        return replace(
            self,
            hidden=self.hidden.to(dtype),
            head=cast(self.head, dtype),
            ref_hidden=self.ref_hidden.to(dtype),
            ref_head=cast(self.ref_head, dtype),
        )


def cast(head: Head, dtype: torch.dtype) -> Head:
    return replace(head, weight=head.weight.to(dtype), bias=None if head.bias is None else head.bias.to(dtype))


def random_case(
    seed: int,
    *,
    tokens: int,
    vocab: int,
    width: int,
    away: float = 1.0,
    std: float = 3.0,
    dtype: torch.dtype = torch.float64,
) -> Case:
    """Logits of standard deviation `std`; the reference has the policy's head and its hidden states moved `away`."""
    rng = generator(seed)
    hidden = torch.randn(tokens, width, generator=rng, dtype=torch.float64)
    head = Head(weight=torch.randn(vocab, width, generator=rng, dtype=torch.float64) * std / width**0.5)
    moved = hidden + away * torch.randn(tokens, width, generator=rng, dtype=torch.float64)
    drawn = torch.randint(vocab, (tokens,), generator=rng)
    return Case(hidden=hidden, head=head, ref_hidden=moved, ref_head=head, tokens=drawn).to(dtype)


@st.composite
def heads(draw: DrawFn, *, counted: int, rng: torch.Generator, may_forbid: bool) -> tuple[Head, int]:
    """A head of at least `counted` tokens, one of which at least it allows, and its width."""
    width, vocab = draw(st.integers(1, 5)), counted + draw(st.integers(0, 3))
    bias = torch.randn(vocab, generator=rng, dtype=torch.float64) if draw(st.booleans()) else None
    if bias is not None and may_forbid and draw(st.booleans()):
        allowed = draw(st.integers(0, counted - 1))
        forbidden = torch.rand(vocab, generator=rng) < draw(st.sampled_from([0.2, 0.8]))
        forbidden[allowed] = False
        bias[forbidden] = -math.inf
    head = Head(
        weight=2 * torch.randn(vocab, width, generator=rng, dtype=torch.float64),
        bias=bias,
        scale=draw(st.sampled_from([1.0, 0.5])),
        softcap=draw(st.sampled_from([None, None, 3.0])),
    )
    return head, width


@st.composite
def cases(draw: DrawFn, *, may_forbid: bool = True) -> Case:
    """Two models that need not resemble each other; either or both may forbid tokens."""
    tokens, counted = draw(st.integers(0, 9)), draw(st.integers(1, 19))
    rng = generator(draw(st.integers(0, 2**30)))
    head, width = draw(heads(counted=counted, rng=rng, may_forbid=may_forbid))
    ref_head, ref_width = draw(heads(counted=counted, rng=rng, may_forbid=may_forbid))
    return Case(
        hidden=torch.randn(tokens, width, generator=rng, dtype=torch.float64),
        head=head,
        ref_hidden=torch.randn(tokens, ref_width, generator=rng, dtype=torch.float64),
        ref_head=ref_head,
        tokens=torch.randint(counted, (tokens,), generator=rng),
        temperature=draw(st.sampled_from([1.0, 0.7, 2.0])),
        vocab=counted,
    )


@contextmanager
def tiny_tiles() -> Iterator[None]:
    """Tiles of 4 x 4, so that a few tokens and a small vocabulary make many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "CPU_TOKENS", 4)
        patch.setattr(tiles, "CPU_CELLS", 16)
        patch.setattr(tiles, "ALIGNED", 4)
        yield


class Watch(TorchDispatchMode):
    """Sees every operation: what it makes that is not an input's memory, and the products' precision meanwhile."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        self.shapes: list[tuple[int, ...]] = []
        self.largest_bytes = 0
        self.precisions: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.precisions.append((func.overloadpacket.__name__, torch.backends.mkldnn.matmul.fp32_precision))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self._known:
                self.shapes.append(tuple(tensor.shape))
                self.largest_bytes = max(self.largest_bytes, tensor.untyped_storage().nbytes())
        return made


def assert_same(found: TokenStats, truth: TokenStats, *, atol: float = 1e-12) -> None:
    """All statistics agree, infinities included; a NaN agrees with nothing."""
    for name in NAMES:
        torch.testing.assert_close(getattr(found, name), getattr(truth, name), atol=atol, rtol=1e-12, msg=name)


def gradients(outputs: list[Tensor], case: Case, upstream: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(outputs, case.trained(), grad_outputs=upstream, retain_graph=True))


def true_gradients(case: Case, name: str, upstream: Tensor) -> list[Tensor]:
    """By autograd on the full logits; rows of infinite divergence are left out, the plain path has NaN there."""
    rows = getattr(case.plain(), name).isfinite().nonzero()[:, 0] if name in DIVERGENCES else slice(None)
    return gradients([getattr(case.plain(rows), name)], case, [upstream[rows]])


def random_upstream(stats: TokenStats, seed: int) -> dict[str, Tensor]:
    """Of each statistic; exactly 0 where a divergence is infinite."""
    rng, found = generator(seed), {}
    for name in DIFFERENTIABLE:
        values = getattr(stats, name)
        drawn = torch.randn(values.shape, generator=rng, dtype=torch.float64)
        found[name] = torch.where(values == math.inf, 0.0, drawn)
    return found


def assert_same_gradients(case: Case, *, atol: float = 1e-10) -> None:
    """Of each statistic alone and of all together, with random upstream."""
    case = case.with_gradients()
    found = case.fused()
    upstream = random_upstream(found, 0)
    total = [torch.zeros_like(leaf) for leaf in case.trained()]
    for name, incoming in upstream.items():
        truth = true_gradients(case, name, incoming)
        alone = gradients([getattr(found, name)], case, [incoming])
        total = [so_far + own for so_far, own in zip(total, truth, strict=True)]
        for own, true in zip(alone, truth, strict=True):
            torch.testing.assert_close(own, true, atol=atol, rtol=1e-10, msg=name)
    together = gradients([getattr(found, name) for name in upstream], case, list(upstream.values()))
    for own, true in zip(together, total, strict=True):
        torch.testing.assert_close(own, true, atol=atol, rtol=1e-10)


# --- values


@given(cases())
def test_every_statistic_is_that_of_the_full_logits(case):
    with tiny_tiles():
        assert_same(case.fused(), case.plain())


@pytest.mark.parametrize(
    ("tokens", "vocab", "width"), [(41, 1271, 7), (513, 1300, 3), (1, 1, 1), (1, 9000, 2), (70, 9000, 2)]
)
def test_odd_shapes_and_whole_tiles(tokens, vocab, width):
    case = random_case(0, tokens=tokens, vocab=vocab, width=width)
    assert_same(case.fused(), case.plain())
    assert_same_gradients(case)


def test_the_head_in_one_piece_gives_the_same_logits():
    rng = generator(0)
    weight, bias = (torch.randn(*shape, generator=rng, dtype=torch.float64) for shape in ((5, 3), (5,)))
    hidden = torch.randn(2, 4, 3, generator=rng, dtype=torch.float64)
    for head in (
        Head(weight=weight),
        Head(weight=weight, bias=bias, scale=0.3),
        Head(weight=weight, bias=bias, scale=2.0, softcap=1.5),
    ):
        scaled = head.scale * (hidden @ weight.T + (0 if head.bias is None else bias))
        expected = scaled if head.softcap is None else 1.5 * (scaled / 1.5).tanh()
        torch.testing.assert_close(head.logits(hidden), expected)


def test_by_hand_on_two_coins():
    hidden, fair = torch.ones(1, 1, dtype=torch.float64), torch.tensor([[0.5], [0.5]], dtype=torch.float64).log()
    biased = torch.tensor([[0.7], [0.3]], dtype=torch.float64).log()
    stats = token_stats(hidden, biased, hidden, fair, torch.tensor([1]), both_ways=True)
    assert stats.kl_policy_ref_per_token.item() == pytest.approx(0.0822828785, abs=5e-11)
    assert stats.kl_ref_policy_per_token.item() == pytest.approx(0.0871766936, abs=5e-11)
    assert stats.policy_logprobs.item() == pytest.approx(math.log(0.3), abs=1e-15)
    assert stats.ref_logprobs.item() == pytest.approx(math.log(0.5), abs=1e-15)
    assert stats.policy_entropy.item() == pytest.approx(-0.7 * math.log(0.7) - 0.3 * math.log(0.3), abs=1e-15)


def test_every_keyword_reaches_its_own_model():
    case = random_case(1, tokens=5, vocab=7, width=3)
    bias, ref_bias = torch.randn(2, 7, generator=generator(2), dtype=torch.float64)
    head = replace(case.head, bias=bias, scale=0.5, softcap=4.0)
    ref_head = replace(case.ref_head, bias=ref_bias, scale=0.25, softcap=2.0)
    found = token_stats(
        *(case.hidden, head.weight, case.ref_hidden, ref_head.weight, case.tokens % 6),
        policy_bias=bias,
        ref_bias=ref_bias,
        policy_scale=0.5,
        ref_scale=0.25,
        policy_softcap=4.0,
        ref_softcap=2.0,
        temperature=0.6,
        vocab=6,
        both_ways=True,
        ref_entropy=True,
    )
    tokens = case.tokens % 6
    truth = replace(case, head=head, ref_head=ref_head, tokens=tokens, temperature=0.6, vocab=6).plain()
    assert_same(found, truth)


@pytest.mark.parametrize("asked", [{}, {"both_ways": True}, {"ref_entropy": True}])
def test_what_costs_more_only_where_it_is_asked_for_and_without_a_bit_of_change_to_the_rest(asked):
    case = random_case(1, tokens=5, vocab=7, width=3)
    found = stats_of(case.hidden, case.head, case.ref_hidden, case.ref_head, case.tokens, **asked)
    extra = {"both_ways": "kl_ref_policy_per_token", "ref_entropy": "ref_entropy"}
    absent = {name for keyword, name in extra.items() if keyword not in asked}
    assert {name for name in NAMES if getattr(found, name) is None} == absent
    for name in set(NAMES) - absent:
        assert torch.equal(getattr(found, name), getattr(case.fused(), name)), name


def test_tokens_that_only_pad_a_vocabulary_are_never_looked_at():
    case = random_case(2, tokens=6, vocab=9, width=3)
    padding = torch.full((4, 3), math.nan, dtype=torch.float64)
    padded = replace(case, head=Head(weight=torch.cat([case.head.weight, padding])))
    assert_same(padded.fused(), case.plain())
    assert_same(replace(case, ref_head=Head(weight=torch.cat([case.ref_head.weight, padding]))).fused(), case.plain())
    padded = padded.with_gradients()
    stats = padded.fused()
    (stats.policy_logprobs + stats.kl_policy_ref_per_token + stats.policy_entropy).sum().backward()
    assert torch.equal(padded.head.weight.grad[9:], torch.zeros(4, 3, dtype=torch.float64))
    assert padded.head.weight.grad.isfinite().all()
    assert padded.hidden.grad.isfinite().all()


@given(cases())
def test_one_model_alone_says_the_same_bits(case):
    with tiny_tiles():
        both = case.fused()
        alone = logprobs_of(case.hidden, case.head, case.tokens, temperature=case.temperature, vocab=case.counted)
    assert torch.equal(alone[0], both.policy_logprobs)
    assert torch.equal(alone[1], both.policy_entropy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_model_alone_says_the_same_bits_in_every_type_and_leads_back_the_same_way(dtype):
    case = random_case(3, tokens=600, vocab=3000, width=16, dtype=dtype).with_gradients()
    both = case.fused()
    alone = logprobs_of(case.hidden, case.head, case.tokens)
    assert torch.equal(alone[0], both.policy_logprobs)
    assert torch.equal(alone[1], both.policy_entropy)
    ones = [torch.ones(600)] * 2
    expected = gradients([both.policy_logprobs, both.policy_entropy], case, ones)
    for own, other in zip(gradients(list(alone), case, ones), expected, strict=True):
        assert torch.equal(own, other)


# --- forbidden tokens


def forbidding(case: Case, *, policy: list[int], ref: list[int]) -> Case:
    """The same models with some tokens forbidden."""

    def with_bias(head: Head, tokens: list[int]) -> Head:
        bias = torch.zeros(head.vocab, dtype=head.weight.dtype)
        bias[tokens] = -math.inf
        return replace(head, bias=bias)

    return replace(case, head=with_bias(case.head, policy), ref_head=with_bias(case.ref_head, ref))


@pytest.mark.parametrize(
    ("policy", "ref", "infinite"),
    [
        ([0, 5], [0, 5], []),
        ([0, 1, 2, 3, 4, 5], [], ["kl_ref_policy_per_token"]),
        ([], [6, 7, 8], ["kl_policy_ref_per_token"]),
        ([2], [3], ["kl_policy_ref_per_token", "kl_ref_policy_per_token"]),
    ],
    ids=["both forbid", "the policy forbids", "the reference forbids", "each forbids another"],
)
def test_a_divergence_is_infinite_where_the_second_model_forbids_what_the_first_allows(policy, ref, infinite):
    case = forbidding(random_case(4, tokens=6, vocab=9, width=3), policy=policy, ref=ref)
    with tiny_tiles():
        found = case.fused()
        assert_same(found, case.plain())
        assert_same_gradients(case)
    for name in DIVERGENCES:
        expected = torch.full((6,), name in infinite)
        assert torch.equal(getattr(found, name) == math.inf, expected), name


def test_a_sampled_token_that_is_forbidden_has_log_prob_minus_infinity():
    case = replace(random_case(4, tokens=3, vocab=9, width=3), tokens=torch.tensor([0, 1, 2]))
    found = forbidding(case, policy=[0], ref=[2]).fused()
    assert torch.equal(found.policy_logprobs == -math.inf, torch.tensor([True, False, False]))
    assert torch.equal(found.ref_logprobs == -math.inf, torch.tensor([False, False, True]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_forbidden_token_is_infinite_even_where_its_probability_underflows(dtype):
    hidden, tokens = torch.ones(1, 1, dtype=dtype), torch.tensor([0])
    head = torch.tensor([[0.0], [-2000.0]], dtype=dtype)
    bias = torch.tensor([0.0, -math.inf], dtype=dtype)
    stats = token_stats(hidden, head, hidden, head, tokens, ref_bias=bias, both_ways=True)
    assert stats.kl_policy_ref_per_token == math.inf
    assert stats.kl_ref_policy_per_token == 0
    assert stats.policy_entropy == 0


def test_a_probability_that_underflows_in_one_model_only_stays_finite():
    hidden, tokens = torch.ones(1, 1), torch.tensor([0])
    sharp, flat = torch.tensor([[0.0], [-1000.0]]), torch.zeros(2, 1)
    stats = token_stats(hidden, sharp, hidden, flat, tokens, both_ways=True)
    assert stats.kl_policy_ref_per_token.item() == pytest.approx(math.log(2))
    assert stats.kl_ref_policy_per_token.item() == pytest.approx(500 - math.log(2))


def test_a_logit_far_above_the_others_does_not_overflow_and_what_is_not_a_number_shows():
    hidden, tokens = torch.ones(2, 1), torch.tensor([0, 1])
    stats = token_stats(hidden, torch.tensor([[3e4], [0.0], [-3e4]]), hidden, torch.zeros(3, 1), tokens)
    assert torch.equal(stats.policy_logprobs, torch.tensor([0.0, -3e4]))
    rounding_of_logits = 3e4 * torch.finfo(torch.float32).eps
    expected = torch.full((2,), math.log(3))
    torch.testing.assert_close(stats.kl_policy_ref_per_token, expected, atol=rounding_of_logits, rtol=0)
    broken = token_stats(torch.tensor([[math.nan], [1.0]]), torch.ones(3, 1), hidden, torch.zeros(3, 1), tokens)
    for name in ("policy_logprobs", "kl_policy_ref_per_token", "policy_entropy"):
        assert torch.equal(getattr(broken, name).isnan(), torch.tensor([True, False])), name


# --- gradients


@given(cases())
def test_every_gradient_is_that_of_the_full_logits(case):
    with tiny_tiles():
        assert_same_gradients(case)


def test_the_gradients_are_those_of_finite_differences():
    case = random_case(5, tokens=3, vocab=6, width=2)
    bias = torch.randn(6, generator=generator(6), dtype=torch.float64)
    case = replace(case, head=replace(case.head, bias=bias, scale=0.7, softcap=3.0), temperature=0.8).with_gradients()

    def statistics(*leaves: Tensor) -> list[Tensor]:
        hidden, weight, bias = leaves
        stats = replace(case, hidden=hidden, head=replace(case.head, weight=weight, bias=bias)).fused()
        return [getattr(stats, name) for name in DIFFERENTIABLE]

    with tiny_tiles():
        assert torch.autograd.gradcheck(statistics, case.trained())


def test_no_gradient_ever_reaches_the_reference():
    case = random_case(5, tokens=3, vocab=6, width=2).with_gradients()
    ref_leaves = [tensor.clone().requires_grad_() for tensor in (case.ref_hidden, case.ref_head.weight)]
    stats = replace(case, ref_hidden=ref_leaves[0], ref_head=Head(weight=ref_leaves[1])).fused()
    assert not stats.ref_logprobs.requires_grad
    stats.kl_policy_ref_per_token.sum().backward()
    assert case.hidden.grad.abs().sum() > 0
    assert all(leaf.grad is None for leaf in ref_leaves)


def test_a_frozen_head_is_spared_its_product():
    vocab, width = 9, 3
    for trained in (True, False):
        case = random_case(5, tokens=6, vocab=vocab, width=width).with_gradients()
        case.head.weight.requires_grad_(trained)
        stats = case.fused()
        with Watch(case.head.weight, case.ref_head.weight) as seen:
            (stats.policy_logprobs + stats.kl_policy_ref_per_token).sum().backward()
        assert ((vocab, width) in seen.shapes) == trained
        assert (case.head.weight.grad is not None) == trained
        assert case.hidden.grad.abs().sum() > 0


def test_a_frozen_body_leaves_the_head_its_gradient():
    case = random_case(5, tokens=6, vocab=9, width=3).with_gradients()
    frozen = replace(case, hidden=case.hidden.detach())
    frozen.fused().kl_policy_ref_per_token.sum().backward()
    (expected,) = torch.autograd.grad(case.plain().kl_policy_ref_per_token.sum(), case.head.weight)
    torch.testing.assert_close(case.head.weight.grad, expected)


@pytest.mark.parametrize("bias", ["finite", "forbids", None])
def test_a_bias_may_be_trained_alone(bias):
    case = random_case(5, tokens=6, vocab=9, width=3)
    values = torch.randn(9, generator=generator(6), dtype=torch.float64)
    if bias == "forbids":
        values[4] = -math.inf
    leaf = values.requires_grad_()
    case = replace(case, head=replace(case.head, bias=leaf), ref_head=replace(case.head, bias=values.detach()))
    if bias is None:
        assert not replace(case, head=case.ref_head).fused().policy_logprobs.requires_grad
        return
    (found,) = torch.autograd.grad(case.fused().policy_entropy.sum(), leaf)
    (expected,) = torch.autograd.grad(case.plain().policy_entropy.sum(), leaf)
    torch.testing.assert_close(found, expected)


def test_an_infinite_kl_that_the_loss_leaves_out_spoils_nothing():
    case = forbidding(random_case(7, tokens=6, vocab=9, width=3), policy=[], ref=[])
    bias = case.ref_head.bias.clone()
    bias[8] = -math.inf
    case = replace(case, ref_head=replace(case.ref_head, bias=bias)).with_gradients()
    stats = case.fused()
    assert (stats.kl_policy_ref_per_token == math.inf).all()
    found = gradients([stats.kl_policy_ref_per_token], case, [torch.zeros(6, dtype=torch.float64)])
    for own in found:
        assert torch.equal(own, torch.zeros_like(own))


def test_numbers_are_the_same_without_autograd():
    case = random_case(8, tokens=6, vocab=9, width=3).with_gradients()
    with torch.no_grad():
        quiet = case.fused()
    assert not quiet.policy_logprobs.requires_grad
    assert all(torch.equal(getattr(quiet, name), getattr(case.fused(), name)) for name in NAMES)


# --- precision


def errors(found: TokenStats, truth: TokenStats) -> dict[str, Tensor]:
    return {name: (getattr(found, name).double() - getattr(truth, name)).abs() for name in NAMES}


@pytest.mark.parametrize("away", [1e-3, 0.1, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_is_not_above_that_of_plain_float32(dtype, away):
    """As Cut Cross-Entropy is judged: truth in float64, and the plain path's own error is the allowance."""
    for seed in range(3):
        case = random_case(seed, tokens=64, vocab=50_257, width=64, away=away).to(dtype)
        truth = case.to(torch.float64).plain()
        own, allowed = errors(case.fused(), truth), errors(case.to(torch.float32).plain(), truth)
        for name in NAMES:
            assert own[name].mean() <= allowed[name].mean() + 1e-7, (name, seed)
            assert own[name].max() <= allowed[name].max() + 1e-6, (name, seed)
        assert own["policy_logprobs"].max() < 1e-5
        assert own["ref_logprobs"].max() < 1e-5


def test_the_error_of_the_gradient_is_not_above_that_of_plain_float32():
    for seed in range(2):
        case = random_case(seed, tokens=32, vocab=20_000, width=32, away=0.3)
        exact, single = case.to(torch.float32).to(torch.float64).with_gradients(), case.to(torch.float32)
        single = single.with_gradients()
        for name in DIFFERENTIABLE:
            upstream = torch.randn(32, generator=generator(seed))
            truth = gradients([getattr(exact.plain(), name)], exact, [upstream.double()])
            own = gradients([getattr(single.fused(), name)], single, [upstream])
            plain = gradients([getattr(single.plain(), name)], single, [upstream])
            for a, b, true in zip(own, plain, truth, strict=True):
                error, allowed = ((found.double() - true).norm() / true.norm() for found in (a, b))
                assert error <= allowed + 1e-6, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "vocab", "width"), [(41, 1271, 7), (513, 1300, 33)])
def test_a_model_is_exactly_zero_away_from_itself(dtype, tokens, vocab, width):
    case = random_case(9, tokens=tokens, vocab=vocab, width=width, dtype=dtype)
    bias = torch.randn(vocab, generator=generator(10)).to(dtype)
    forbids = bias.clone()
    forbids[3] = -math.inf
    zero = torch.zeros(tokens, dtype=tiles.accumulated_dtype(dtype))
    for head in (
        case.head,
        replace(case.head, bias=bias, scale=0.3),
        replace(case.head, bias=forbids),
        replace(case.head, softcap=3.0),
    ):
        for temperature in (1.0, 0.7):
            copies = replace(head, weight=head.weight.clone())
            same = replace(case, head=head, ref_hidden=case.hidden.clone(), ref_head=copies, temperature=temperature)
            stats = same.fused()
            assert torch.equal(stats.kl_policy_ref_per_token, zero)
            assert torch.equal(stats.kl_ref_policy_per_token, zero)
            assert torch.equal(stats.ref_entropy, stats.policy_entropy)
            assert torch.equal(stats.policy_logprobs, stats.ref_logprobs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_sums_are_float32_and_gradients_come_back_in_the_type_of_their_leaf(dtype):
    case = random_case(9, tokens=5, vocab=7, width=3, dtype=dtype).with_gradients()
    stats = case.fused()
    assert all(getattr(stats, name).dtype == tiles.accumulated_dtype(dtype) for name in NAMES)
    stats.kl_policy_ref_per_token.sum().backward()
    assert case.hidden.grad.dtype == case.head.weight.grad.dtype == dtype


@pytest.mark.parametrize("policy", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ref", [torch.float64, torch.float32, torch.bfloat16])
def test_two_models_may_have_two_types_and_the_sums_follow_the_policy(policy, ref):
    case = random_case(9, tokens=70, vocab=1271, width=16, away=0.3)
    own, other = case.to(policy), case.to(ref)
    mixed = replace(own, ref_hidden=other.ref_hidden, ref_head=other.ref_head)
    stats = mixed.fused()
    assert stats.kl_policy_ref_per_token.dtype == tiles.accumulated_dtype(policy)
    assert_same(stats_in_double(stats), mixed.to(torch.float64).plain(), atol=1e-5)
    alone = logprobs_of(own.hidden, own.head, own.tokens)
    assert torch.equal(alone[0], stats.policy_logprobs)


def stats_in_double(stats: TokenStats) -> TokenStats:
    return TokenStats(**{name: getattr(stats, name).double() for name in NAMES})


def test_hidden_states_and_head_of_two_types_meet_in_the_wider():
    case = random_case(9, tokens=5, vocab=7, width=3, dtype=torch.float32)
    narrow = replace(case, hidden=case.hidden.bfloat16(), ref_hidden=case.ref_hidden.bfloat16())
    raised = replace(case, hidden=narrow.hidden.float(), ref_hidden=narrow.ref_hidden.float())
    assert_same(narrow.fused(), raised.fused(), atol=0)
    assert_same(stats_in_double(narrow.fused()), raised.to(torch.float64).plain(), atol=1e-5)


@pytest.fixture
def ieee() -> Iterator[Any]:
    """The global setting of float32 products, at a value that nothing here would choose."""
    matmul = torch.backends.mkldnn.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "ieee"
    yield matmul
    matmul.fp32_precision = before


def test_only_the_products_of_bfloat16_factors_may_round_and_never_the_sums(ieee):
    """Where the processor takes the permission to round, KL and entropy would be summed up from 8 bits."""
    case = random_case(9, tokens=6, vocab=9, width=3, dtype=torch.bfloat16).with_gradients()
    case = replace(case, ref_hidden=case.ref_hidden.float(), ref_head=cast(case.ref_head, torch.float32))
    products = ("mm", "addmm_")
    with Watch() as seen:
        stats = case.fused()
        (stats.policy_logprobs + stats.kl_policy_ref_per_token + stats.policy_entropy).sum().backward()
    rounding = [name for name, precision in seen.precisions if precision == "bf16" and name in products]
    exact = [name for name, precision in seen.precisions if precision == "ieee" and name in products]
    assert rounding == ["mm", "mm", "addmm_", "addmm_"]  # the policy's logits, forward and backward; its gradients
    assert exact == ["mm", "mm"]  # the reference's logits
    views = {"t", "slice", "detach", "transpose", "permute", "_to_copy"}
    assert {name for name, precision in seen.precisions if precision == "bf16"} <= {*products, *views}
    assert ieee.fp32_precision == "ieee"


def test_the_global_setting_is_put_back_after_an_error(ieee, monkeypatch):
    during = []

    def broken(*_: Any, **__: Any) -> None:
        during.append(ieee.fp32_precision)
        raise RuntimeError("no product today")

    case = random_case(9, tokens=6, vocab=9, width=3, dtype=torch.bfloat16).with_gradients()
    kl = case.fused().kl_policy_ref_per_token.sum()
    monkeypatch.setattr(torch, "mm", broken)
    for call in (case.fused, kl.backward):
        with pytest.raises(RuntimeError, match="no product today"):
            call()
        assert ieee.fp32_precision == "ieee"
    assert during == ["bf16", "bf16"]


# --- autocast


def test_under_autocast_the_factors_are_cast_and_the_sums_are_not():
    case = random_case(11, tokens=70, vocab=9000, width=16, away=0.1, dtype=torch.float32).with_gradients()
    expected = case.to(torch.bfloat16)
    expected = expected.with_gradients()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stats = case.fused()
        assert_same(stats, expected.fused(), atol=0)
        loss = (stats.policy_logprobs + stats.kl_policy_ref_per_token + stats.policy_entropy).sum()
    assert_same(stats_in_double(stats), expected.to(torch.float64).plain(), atol=2e-5)
    loss.backward()
    stats = expected.fused()
    (stats.policy_logprobs + stats.kl_policy_ref_per_token + stats.policy_entropy).sum().backward()
    for own, other in zip(case.trained(), expected.trained(), strict=True):
        assert own.grad.dtype == torch.float32
        assert torch.equal(own.grad, other.grad.float())


def test_a_backward_pass_within_autocast_gives_the_same_gradient():
    case = random_case(11, tokens=70, vocab=900, width=16, dtype=torch.float32).with_gradients()
    for within in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = case.fused().kl_policy_ref_per_token.sum()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=within):
            loss.backward()
    accumulated = case.hidden.grad.clone()
    case.hidden.grad = None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = case.fused().kl_policy_ref_per_token.sum()
    loss.backward()
    assert torch.equal(accumulated, 2 * case.hidden.grad)


def test_autocast_leaves_float64_alone_as_a_linear_layer_does():
    case = random_case(11, tokens=7, vocab=90, width=16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(case.fused(), case.plain())


# --- memory


def largest_bytes(*, tokens: int, vocab: int, width: int, trained: bool) -> int:
    """The largest piece of memory that forward and backward ask for."""
    case = random_case(12, tokens=tokens, vocab=vocab, width=width, dtype=torch.float32).with_gradients()
    case.head.weight.requires_grad_(trained)
    with Watch(*case.trained(), case.ref_hidden, case.ref_head.weight) as seen:
        stats = case.fused()
        (stats.policy_logprobs + stats.kl_policy_ref_per_token + stats.policy_entropy).sum().backward()
    return seen.largest_bytes


def test_no_tensor_holds_the_logits_of_all_tokens():
    tokens, vocab, width = 1024, 40_000, 16
    tile, gradient_of_head = 4 * tiles.CPU_CELLS, 4 * vocab * width
    assert max(tile, gradient_of_head) < 4 * tokens * vocab / 4
    assert largest_bytes(tokens=tokens, vocab=vocab, width=width, trained=True) == gradient_of_head
    for smaller in (vocab // 4, vocab):
        assert largest_bytes(tokens=tokens, vocab=smaller, width=width, trained=False) == tile


# --- what is refused

ONE, TWO = torch.zeros(4, 3), torch.zeros(5, 3)
DRAWN = torch.tensor([0, 1, 4, 2])


def alone(**changed: Any) -> Callable[[], Any]:
    given = {"hidden": ONE, "head": Head(weight=TWO), "tokens": DRAWN, **changed}
    return lambda: logprobs_of(given.pop("hidden"), given.pop("head"), given.pop("tokens"), **given)


def both(*positional: Tensor, **changed: Any) -> Callable[[], Any]:
    given = (*positional, *(ONE, TWO, ONE, TWO, DRAWN)[len(positional) :])
    return lambda: token_stats(*given, **changed)


NOT_OF_ONE_WIDTH = r"hidden states \[tokens, hidden\] and head \[vocab, hidden\] of one width, found "


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (both(ONE.unsqueeze(0)), rf"^Expected policy {NOT_OF_ONE_WIDTH}\[1, 4, 3\] and \[5, 3\]; flatten batch"),
        (both(ONE, TWO[0]), rf"policy {NOT_OF_ONE_WIDTH}\[4, 3\] and \[3\]"),
        (both(ONE, torch.zeros(5, 2)), rf"policy {NOT_OF_ONE_WIDTH}\[4, 3\] and \[5, 2\].* check the pairing\.$"),
        (both(ONE, TWO, torch.zeros(4, 2)), rf"^Expected reference {NOT_OF_ONE_WIDTH}\[4, 2\] and \[5, 3\]"),
        (both(policy_bias=torch.zeros(4)), r"^Expected policy bias \[5\], one number per token, found \[4\]; give the"),
        (both(ref_bias=torch.zeros(5, 1)), r"^Expected reference bias \[5\], .*found \[5, 1\]"),
        (both(ONE, TWO, ONE, TWO, DRAWN[:3]), r"^Expected tokens \[4\], one per position, found \[3\]; flatten"),
        (both(ONE, TWO, ONE, TWO, DRAWN.unsqueeze(0)), r"^Expected tokens \[4\], one per position, found \[1, 4\]"),
        (both(ONE, TWO, ONE[:1]), r"^Expected as many reference positions as policy positions 4, found 1; give both"),
        (alone(hidden=ONE[0]), rf"policy {NOT_OF_ONE_WIDTH}\[3\] and \[5, 3\]"),
        (alone(tokens=DRAWN[:3]), r"^Expected tokens \[4\]"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused(call, sentence):
    with pytest.raises(ShapeError, match=sentence):
        call()


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (both(temperature=0.0), r"^Expected temperature between 1e-06 and 1e\+06, found 0;"),
        (both(temperature=math.nan), r"^Expected temperature .*found nan"),
        (both(policy_scale=math.inf), r"^Expected policy scale between -1e\+30 and 1e\+30, found inf"),
        (both(ref_scale=math.nan), r"^Expected reference scale .*found nan"),
        (both(policy_softcap=0.0), r"^Expected policy softcap between 1e-06 and 1e\+30, found 0;"),
        (both(ref_softcap=-3.0), r"^Expected reference softcap .*found -3"),
        (both(vocab=0), r"^Expected vocab between 1 and the head's 5, found 0; it counts the tokens that exist\.$"),
        (both(vocab=6), r"^Expected vocab between 1 and the head's 5, found 6"),
        (both(ONE, torch.zeros(9, 3), vocab=6), r"^Expected vocab between 1 and the head's 5, found 6"),
        (both(vocab=4), r"^Expected tokens in \[0, 4\), found 4; leave out padding, and check the vocabulary\.$"),
        (both(ONE, TWO, ONE, TWO, DRAWN - 1), r"^Expected tokens in \[0, 5\), found -1"),
        (both(ONE, torch.zeros(9, 3), ONE, TWO, DRAWN + 3), r"^Expected tokens in \[0, 5\), found 7"),
        (alone(vocab=6), r"^Expected vocab between 1 and the head's 5, found 6"),
        (alone(tokens=DRAWN + 1), r"^Expected tokens in \[0, 5\), found 5"),
        (alone(temperature=-1.0), r"^Expected temperature"),
    ],
)
def test_a_number_out_of_range_is_refused(call, sentence):
    with pytest.raises(ValueRangeError, match=sentence):
        call()


# --- over sequences


@pytest.mark.parametrize(
    "world",
    [World(vocab=4, length=3), World(vocab=3, length=4, eos=0), World(vocab=3, length=3, eos=2, prompts=3)],
    ids=["cut at the limit", "ends with EOS", "several prompts"],
)
def test_summed_over_sampled_responses_the_kl_is_the_sequence_kl_without_bias(world):
    policy, ref = world.random_logits(0), world.random_logits(1)
    states, tokens = world.states[world.response_mask], world.responses[world.response_mask]
    hidden = torch.eye(world.rows, dtype=torch.float64)[states]  # one state each, which the head spells out as logits
    with tiny_tiles():
        stats = token_stats(hidden, policy.T, hidden, ref.T, tokens)

    def per_sequence(per_token: Tensor) -> Tensor:
        unpacked = torch.zeros(world.response_mask.shape, dtype=torch.float64)
        unpacked[world.response_mask] = per_token
        return unpacked.sum(1)

    expected = world.expectation(policy, per_sequence(stats.kl_policy_ref_per_token))
    torch.testing.assert_close(expected, world.sequence_kl(policy, ref), atol=1e-12, rtol=0)
    for logits, logprobs in ((policy, stats.policy_logprobs), (ref, stats.ref_logprobs)):
        torch.testing.assert_close(per_sequence(logprobs), world.sequence_logprobs(logits), atol=1e-12, rtol=0)


@pytest.mark.parametrize("offset", [10.0, 100.0, 1000.0])
def test_a_constant_between_the_two_models_costs_no_more_digits_than_the_plain_way(offset):
    """Softmax does not see it; the sums compare shifted logits, so they do not either."""
    draw = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(64, 64, generator=draw), torch.randn(5000, 64, generator=draw) * 0.35
    ref_hidden = hidden + 0.05 * torch.randn(64, 64, generator=draw)
    bias, tokens = torch.full((5000,), offset), torch.zeros(64, dtype=torch.int64)
    fused = token_stats(hidden, head, ref_hidden, head, tokens, policy_bias=bias).kl_policy_ref_per_token

    def plainly(kind):
        log_pi = full_log_probs(hidden.to(kind) @ head.to(kind).T + bias.to(kind))
        return kl_divergence(log_pi, full_log_probs(ref_hidden.to(kind) @ head.to(kind).T))

    truth = plainly(torch.float64)
    assert (fused - truth).abs().max() <= 1.25 * (plainly(torch.float32) - truth).abs().max() + 1e-7


@pytest.mark.parametrize("changed", ["tokens", "ref_hidden", "ref_head", "hidden"])
def test_whoever_changes_an_input_before_the_backward_pass_is_told(changed):
    draw = torch.Generator().manual_seed(0)
    given = {
        "hidden": torch.randn(5, 4, generator=draw).requires_grad_(),
        "head": torch.randn(9, 4, generator=draw),
        "ref_hidden": torch.randn(5, 4, generator=draw),
        "ref_head": torch.randn(9, 4, generator=draw),
        "tokens": torch.arange(5),
    }
    loss = token_stats(*given.values()).kl_policy_ref_per_token.sum()
    with torch.no_grad():
        given[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {1: torch.ones(9, 4, dtype=torch.int8)},
            "policy head as a tensor of floating-point numbers, found torch.int8",
        ),
        ({2: torch.ones(5, 4, dtype=torch.int64)}, "reference hidden states as a tensor of .*, found torch.int64"),
        ({3: torch.nn.Linear(4, 9)}, "reference head as a tensor of floating-point numbers, found Linear"),
        ({4: torch.arange(5.0)}, "tokens of dtype torch.int64, found torch.float32; convert them"),
        ({4: [0, 1, 2, 3, 4]}, r"tokens \[5\], one per position, found list"),
    ],
)
def test_what_is_no_number_of_the_right_kind_is_refused(changes, message):
    given = [torch.ones(5, 4), torch.ones(9, 4), torch.ones(5, 4), torch.ones(9, 4), torch.arange(5)]
    for place, value in changes.items():
        given[place] = value
    with pytest.raises(ShapeError, match=message):
        token_stats(*given)
