"""The Triton fold, held to float64 and to the torch fold; in Triton's interpreter, where there is no GPU.

Triton decides with its first import whether it interprets, so the interpreter has a process of its own: the checks
below run there, and on a GPU in gpu/test_triton_fold_gpu.py.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from exact import generator
from test_fused import (
    DIVERGENCES,
    NAMES,
    Case,
    assert_same,
    errors,
    forbidding,
    gradients,
    random_case,
    random_upstream,
    tiny_tiles,
    true_gradients,
)
from torch import Tensor

from kleash.fused import backward, sweep, tiles, triton_fold
from kleash.fused.head import Head
from kleash.fused.stats import TokenStats, logprobs_of

pytestmark = pytest.mark.slow  # the interpreter is

CPU = torch.device("cpu")
Check = Callable[..., None]


def bent_case() -> Case:
    """Every knob of a head, another vocabulary and another width for each model."""
    rng = generator(3)
    weight, bias = (torch.randn(*shape, generator=rng, dtype=torch.float64) for shape in ((13, 3), (13,)))
    ref_weight, ref_bias = (torch.randn(*shape, generator=rng, dtype=torch.float64) for shape in ((11, 5), (11,)))
    return Case(
        hidden=torch.randn(6, 3, generator=rng, dtype=torch.float64),
        head=Head(weight=2 * weight, bias=bias, scale=0.5, softcap=3.0),
        ref_hidden=torch.randn(6, 5, generator=rng, dtype=torch.float64),
        ref_head=Head(weight=2 * ref_weight, bias=ref_bias, scale=0.7),
        tokens=torch.randint(11, (6,), generator=rng),
        temperature=0.7,
    )


def small_case() -> Case:
    return random_case(4, tokens=6, vocab=9, width=3)


CASES: dict[str, Callable[[], Case]] = {
    "two blocks in a row": partial(random_case, 0, tokens=41, vocab=1271, width=7),
    "one token of one": partial(random_case, 0, tokens=1, vocab=1, width=1),
    "no token": partial(random_case, 0, tokens=0, vocab=5, width=2),
    "several tiles": partial(random_case, 1, tokens=9, vocab=19, width=4),
    "softcap, temperature, two vocabularies": bent_case,
    "both forbid": lambda: forbidding(small_case(), policy=[0, 5], ref=[0, 5]),
    "the policy forbids whole tiles": lambda: forbidding(small_case(), policy=[0, 1, 2, 3, 4, 5], ref=[]),
    "the reference forbids": lambda: forbidding(small_case(), policy=[], ref=[6, 7, 8]),
    "each forbids another": lambda: forbidding(small_case(), policy=[2], ref=[3]),
}


def on(case: Case, device: torch.device) -> Case:
    """The same numbers there."""

    def moved(head: Head) -> Head:
        return replace(head, weight=head.weight.to(device), bias=None if head.bias is None else head.bias.to(device))

    return replace(
        case,
        hidden=case.hidden.to(device),
        head=moved(case.head),
        ref_hidden=case.ref_hidden.to(device),
        ref_head=moved(case.ref_head),
        tokens=case.tokens.to(device),
    )


def tiles_of(case: Case) -> AbstractContextManager[None]:
    """Many tiny tiles for a small vocabulary, one of the usual size for a large one."""
    return tiny_tiles() if case.counted < 100 else nullcontext()


@contextmanager
def folded_in(*, triton: bool) -> Iterator[None]:
    """Within, every device folds with Triton, or none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_fold, "usable", lambda device: triton)
        yield


# --- checks, for the interpreter and for a GPU


def check_values(name: str, device: torch.device) -> None:
    case = on(CASES[name](), device)
    with tiles_of(case), folded_in(triton=True):
        found = case.fused()
    with folded_in(triton=False):
        plain_fold = case.fused()
    assert_same(found, case.plain())
    assert_same(found, plain_fold)


def check_gradients(name: str, device: torch.device) -> None:
    """Of each statistic alone and of all together."""
    case = on(CASES[name](), device).with_gradients()
    with tiles_of(case), folded_in(triton=True):
        found = case.fused()
        upstream = drawn_upstream(found)
        total = [torch.zeros_like(leaf) for leaf in case.trained()]
        for statistic, incoming in upstream.items():
            truth = true_gradients(case, statistic, incoming)
            total = [so_far + own for so_far, own in zip(total, truth, strict=True)]
            alone = gradients([getattr(found, statistic)], case, [incoming])
            for own, true in zip(alone, truth, strict=True):
                torch.testing.assert_close(own, true, atol=1e-10, rtol=1e-10, msg=statistic)
        together = gradients([getattr(found, statistic) for statistic in upstream], case, list(upstream.values()))
    for own, true in zip(together, total, strict=True):
        torch.testing.assert_close(own, true, atol=1e-10, rtol=1e-10)


def drawn_upstream(stats: TokenStats) -> dict[str, Tensor]:
    """`random_upstream` beside the statistics."""
    on_cpu = TokenStats(**{name: getattr(stats, name).detach().cpu() for name in NAMES})
    return {name: drawn.to(stats.policy_entropy) for name, drawn in random_upstream(on_cpu, 0).items()}


def check_policy_alone(device: torch.device) -> None:
    """Log-probs, entropy and their gradients without a reference, to the bit."""
    for name, make in CASES.items():
        case = on(make(), device).with_gradients()
        case = replace(case, vocab=case.counted)
        with folded_in(triton=True):
            both = case.fused()
            alone = logprobs_of(case.hidden, case.head, case.tokens, temperature=case.temperature, vocab=case.counted)
            given = [both.policy_logprobs, both.policy_entropy]
            upstream = [torch.randn(len(case.tokens), generator=generator(i)).to(both.policy_entropy) for i in (0, 1)]
            expected = gradients(given, case, upstream)
            found = gradients(list(alone), case, upstream)
        for own, other in zip([*alone, *found], [*given, *expected], strict=True):
            assert torch.equal(own, other), name


def check_less(device: torch.device) -> None:
    """Without the other direction or the reference's entropy everything else is the same, to the bit."""
    case = on(CASES["several tiles"](), device)
    everything = {"both_ways": True, "ref_entropy": True}
    for left_out, name in (("both_ways", "kl_ref_policy_per_token"), ("ref_entropy", "ref_entropy")):
        with tiny_tiles(), folded_in(triton=True):
            request = sweep.Request(
                tokens=case.tokens,
                ref=(case.ref_hidden, case.ref_head),
                temperature=1.0,
                vocab=19,
                **{**everything, left_out: False},
            )
            less, whole = sweep.swept(request, case.hidden, case.head), case.fused()
        assert less.keys() == set(NAMES) - {name}
        for statistic, column in less.items():
            assert torch.equal(column, getattr(whole, statistic)), statistic


def check_itself(dtype: torch.dtype, device: torch.device) -> None:
    """A model is exactly 0 away from itself, both ways."""
    case = on(random_case(9, tokens=41, vocab=1271, width=7, dtype=dtype), device)
    bias = torch.zeros(1271, dtype=dtype, device=device)
    bias[3] = -torch.inf
    for head in (case.head, replace(case.head, bias=bias)):
        same = replace(case, head=head, ref_hidden=case.hidden.clone(), ref_head=replace(head), temperature=0.7)
        with folded_in(triton=True):
            stats = same.fused()
        zero = torch.zeros_like(stats.policy_entropy)
        assert torch.equal(stats.kl_policy_ref_per_token, zero)
        assert torch.equal(stats.kl_ref_policy_per_token, zero)
        assert torch.equal(stats.policy_logprobs, stats.ref_logprobs)
        assert torch.equal(stats.policy_entropy, stats.ref_entropy)


def check_precision(dtype: torch.dtype, device: torch.device, shape: tuple[int, int, int]) -> None:
    """The error against float64 is not above the torch fold's, and half as much again."""
    tokens, vocab, width = shape
    for seed, away in ((0, 1e-3), (1, 0.1), (2, 1.0)):
        case = on(random_case(seed, tokens=tokens, vocab=vocab, width=width, away=away, dtype=dtype), device)
        truth = case.to(torch.float64).plain()
        own, allowed = (errors(stats_by(case, triton=triton), truth) for triton in (True, False))
        for name in NAMES:
            assert own[name].mean() <= 1.5 * allowed[name].mean() + 1e-7, (name, away)
            assert own[name].max() <= 1.5 * allowed[name].max() + 1e-6, (name, away)


def stats_by(case: Case, *, triton: bool) -> TokenStats:
    with folded_in(triton=triton):
        return case.fused()


def check_precision_of_gradients(device: torch.device, shape: tuple[int, int, int]) -> None:
    tokens, vocab, width = shape
    case = on(random_case(0, tokens=tokens, vocab=vocab, width=width, away=0.3, dtype=torch.float32), device)
    exact, single = case.to(torch.float64).with_gradients(), case.with_gradients()
    for name, incoming in drawn_upstream(exact.plain()).items():
        truth = gradients([getattr(exact.plain(), name)], exact, [incoming])
        own, allowed = (gradients_by(single, name, incoming.float(), triton=triton) for triton in (True, False))
        for a, b, true in zip(own, allowed, truth, strict=True):
            error, torch_error = ((found.double() - true).norm() / true.norm() for found in (a, b))
            assert error <= 1.5 * torch_error + 1e-7, name


def gradients_by(case: Case, name: str, upstream: Tensor, *, triton: bool) -> list[Tensor]:
    with folded_in(triton=triton):
        return gradients([getattr(case.fused(), name)], case, [upstream])


def check_left_out_infinity(device: torch.device) -> None:
    """An infinite KL that the loss leaves out spoils nothing."""
    case = on(CASES["each forbids another"](), device).with_gradients()
    with folded_in(triton=True):
        stats = case.fused()
        for name in DIVERGENCES:
            assert (getattr(stats, name) == torch.inf).all()
            found = gradients([getattr(stats, name)], case, [torch.zeros_like(stats.policy_entropy)])
            assert all(torch.equal(own, torch.zeros_like(own)) for own in found), name


def check_extremes(device: torch.device) -> None:
    """Logits far apart do not overflow, and what is not a number shows in its own row only."""
    hidden, tokens = torch.ones(2, 1), torch.tensor([0, 1])
    heads = [Head(weight=torch.tensor(rows)) for rows in ([[3e4], [0.0], [-3e4]], [[0.0], [0.0], [0.0]])]
    case = Case(hidden=hidden, head=heads[0], ref_hidden=hidden, ref_head=heads[1], tokens=tokens)
    assert_same(stats_by(on(case, device), triton=True), on(case, device).plain(), atol=1e-2)
    broken = replace(case, hidden=torch.tensor([[torch.nan], [1.0]]))
    found = stats_by(on(broken, device), triton=True)
    for name in ("policy_logprobs", "kl_policy_ref_per_token", "policy_entropy"):
        assert getattr(found, name).isnan().tolist() == [True, False], name
    bias = torch.tensor([0.0, torch.nan, 0.0])
    found = stats_by(on(replace(case, ref_head=replace(heads[1], bias=bias)), device), triton=True)
    assert found.policy_entropy.isfinite().all()
    assert found.ref_logprobs.isnan().all()
    assert found.kl_policy_ref_per_token.isnan().all()


def check_exp(device: torch.device) -> None:
    """exp(z - lse) in float32 is right to 4e-7 of its value: a third of what Triton's own exp is off by at -20.

    Where only the log-prob of a token outside the tile enters the loss, with -1, its gradient is pi itself.
    """
    exponents = torch.linspace(-80, 0, 4001, device=device).unsqueeze(0)
    column = torch.zeros(1, 1, device=device)
    found = triton_fold.logits_gradient(
        *(exponents.clone(), None),
        start=0,
        places=torch.full((1, 1), -1, device=device),
        log_normaliser=column,
        ref_log_normaliser=None,
        kl=None,
        entropy=column,
        of_logprobs=column - 1,
        of_kl=None,
        of_entropy=None,
        of_reverse_kl=None,
    )
    torch.testing.assert_close(found.double(), exponents.double().exp(), atol=0, rtol=4e-7)


def check_nothing_is_done_twice(device: torch.device) -> None:
    """The torch fold rests, nobody looks for -inf, and infinite results are no reason for a second sweep."""

    def unwanted(*_: Any, **__: Any) -> None:
        raise AssertionError("the torch fold was asked")

    case = on(CASES["the reference forbids"](), device).with_gradients()
    shapes = []
    with tiny_tiles(), folded_in(triton=True), pytest.MonkeyPatch.context() as patch:
        for module, name in ((sweep, "fold_pair"), (sweep, "fold_one"), (sweep, "_forbids")):
            patch.setattr(module, name, unwanted)
        patch.setattr(backward, "_constant_factor", unwanted)
        fold = triton_fold._fold
        patch.setattr(triton_fold, "_fold", lambda *args, **named: (shapes.append(args[1].shape), fold(*args, **named)))
        stats = case.fused()
        (stats.policy_logprobs + stats.policy_entropy).sum().backward()
        heights = [chunk.stop - chunk.start for chunk in tiles.token_chunks(6, device)]
        once = [(h, own.stop - own.start) for h in heights for own in tiles.vocab_tiles(h, 9, device)]
    assert (stats.kl_policy_ref_per_token == torch.inf).all()
    assert case.hidden.grad.abs().sum() > 0
    assert shapes == once


# --- in the interpreter


def begin_interpreting() -> None:
    import numpy

    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    numpy.seterr(invalid="ignore")  # -inf - -inf of a lane that is not used


@contextmanager
def own_process(begin: Callable[..., None], *args: Any) -> Iterator[Callable[..., Any]]:
    """Within, calls run one after the other in another process, and fail here as they failed there."""
    with ProcessPoolExecutor(1, get_context("spawn"), begin, args) as pool:
        yield lambda call, *arguments: pool.submit(call, *arguments).result()


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Check]:
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    with own_process(begin_interpreting) as run:
        yield run


@pytest.mark.parametrize("name", CASES)
def test_every_statistic_is_that_of_the_full_logits_and_of_the_torch_fold(name, interpreted):
    interpreted(check_values, name, CPU)


@pytest.mark.parametrize("name", CASES)
def test_every_gradient_is_that_of_the_full_logits(name, interpreted):
    interpreted(check_gradients, name, CPU)


def test_the_policy_alone_says_the_same_bits_and_leads_back_the_same_way(interpreted):
    interpreted(check_policy_alone, CPU)


def test_who_asks_for_less_gets_the_same_bits(interpreted):
    interpreted(check_less, CPU)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_model_is_exactly_zero_away_from_itself(dtype, interpreted):
    interpreted(check_itself, dtype, CPU)


def test_the_error_is_that_of_the_torch_fold(interpreted):
    interpreted(check_precision, torch.float32, CPU, (41, 1271, 16))


def test_the_error_of_the_gradient_is_that_of_the_torch_formula(interpreted):
    interpreted(check_precision_of_gradients, CPU, (41, 1271, 16))


def test_the_exponential_is_right_to_a_few_units_in_the_last_place(interpreted):
    if tuple(int(part) for part in version("triton").split(".")[:2]) < (3, 9):
        pytest.skip("before 3.9 the interpreter rounds fma twice; a GPU does not")
    interpreted(check_exp, CPU)


def test_an_infinite_divergence_that_the_loss_leaves_out_spoils_nothing(interpreted):
    interpreted(check_left_out_infinity, CPU)


def test_extreme_logits_do_not_overflow_and_what_is_not_a_number_shows(interpreted):
    interpreted(check_extremes, CPU)


def test_nothing_is_done_twice(interpreted):
    interpreted(check_nothing_is_done_twice, CPU)


# --- for a GPU that is not here


ABSENT_REF = (
    "ref_logits",
    "cross",
    "reaches_forbidden",
    "ref_shift",
    "ref_total",
    "ref_energy",
    "ref_cross",
    "ref_reaches_forbidden",
)
ABSENT_KL = ("ref_logits", "ref_log_normaliser", "kl", "of_kl", "of_reverse_kl")


def begin_compiling(cache: Path) -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = str(cache)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Check]:
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    with own_process(begin_compiling, tmp_path_factory.mktemp("triton")) as run:
        yield run


def compile_kernel(name: str, absent: tuple[str, ...], number: str, capability: int) -> None:
    """Make machine code for a GPU of that capability, as the first launch there does."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kleash.fused import triton_kernels

    kernel = getattr(triton_kernels, name)
    constants = {"both_ways": not absent, "block": triton_fold.BLOCK, **dict.fromkeys(absent)}
    kinds = {
        "reaches_forbidden": "*u8",
        "ref_reaches_forbidden": "*u8",
        "places": "*i64",
        "start": "i32",
        "width": "i32",
    }
    signature = {
        argument: "constexpr" if argument in constants else kinds.get(argument, f"*{number}")
        for argument in kernel.arg_names
    }
    constexprs = {argument: value for argument, value in constants.items() if argument in signature}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs)
    target = GPUTarget("cuda", capability, 32)
    assert triton.compile(source, target=target, options={"enable_fp_fusion": False}).asm["cubin"]


@pytest.mark.parametrize(("number", "capability"), [("fp32", 80), ("fp32", 90), ("fp32", 120), ("fp64", 90)])
@pytest.mark.parametrize(
    ("name", "absent"),
    [
        ("fold_kernel", ()),
        ("fold_kernel", ("ref_energy",)),
        ("fold_kernel", ABSENT_REF),
        ("gradient_kernel", ()),
        ("gradient_kernel", ABSENT_KL),
    ],
    ids=["fold of a pair", "fold of a pair without the reference's entropy", "fold of one", "gradient", "of one"],
)
def test_the_kernels_compile(name, absent, number, capability, compiled):
    compiled(compile_kernel, name, absent, number, capability)


# --- the choice


class Triton:
    """Stands in for the library: builds its kernels, or does not."""

    def __init__(self, error: Exception | None = None) -> None:
        self.runtime = self.driver = self.active = self
        self._error = error

    def get_current_target(self) -> str:
        if self._error is not None:
            raise self._error
        return "a GPU"


def test_triton_folds_on_a_gpu_and_nowhere_else(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", Triton())
    monkeypatch.setattr(triton_fold, "find_spec", lambda name: name)
    usable = triton_fold.usable.__wrapped__  # what it says is kept for the next call
    assert [usable(torch.device(kind)) for kind in ("cuda", "cpu", "mps", "xpu")] == [True, False, False, False]


def test_without_triton_a_gpu_folds_in_torch(monkeypatch):
    monkeypatch.setattr(triton_fold, "find_spec", lambda name: None)
    assert not triton_fold.usable.__wrapped__(torch.device("cuda"))


def test_a_triton_that_cannot_build_steps_aside_and_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", Triton(RuntimeError("Failed to find C compiler.")))
    monkeypatch.setattr(triton_fold, "find_spec", lambda name: name)
    with pytest.warns(UserWarning, match=r"found RuntimeError: Failed to find C compiler\.; .* in more passes"):
        assert not triton_fold.usable.__wrapped__(torch.device("cuda"))


def test_on_a_cpu_triton_is_never_imported():
    lines = (
        "import sys, torch, kleash",
        "hidden, head = torch.ones(2, 3, requires_grad=True), torch.ones(5, 3)",
        "stats = kleash.token_stats(hidden, head, hidden, head, torch.tensor([0, 1]))",
        "stats.policy_entropy.sum().backward()",
        "print([name for name in sys.modules if name == 'triton' or name.endswith('triton_kernels')])",
    )
    done = subprocess.run([sys.executable, "-c", "; ".join(lines)], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
