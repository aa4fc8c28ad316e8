"""The Triton fold on a GPU: the same checks as in the interpreter, at sizes that only a GPU is quick with."""

from collections.abc import Iterator

import pytest
import torch
from test_fused import DIFFERENTIABLE, random_case
from test_triton_fold import (
    CASES,
    check_exp,
    check_extremes,
    check_gradients,
    check_itself,
    check_left_out_infinity,
    check_less,
    check_nothing_is_done_twice,
    check_policy_alone,
    check_precision,
    check_precision_of_gradients,
    check_values,
    on,
)

from kleash.fused import triton_fold
from kleash.fused.sweep import Request, swept

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

GPU = torch.device("cuda")


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the GPU is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_a_gpu_with_triton_uses_it():
    assert triton_fold.usable(GPU)


@pytest.mark.parametrize("name", CASES)
def test_every_statistic_is_that_of_the_full_logits_and_of_the_torch_fold(name):
    check_values(name, GPU)


@pytest.mark.parametrize("name", CASES)
def test_every_gradient_is_that_of_the_full_logits(name):
    check_gradients(name, GPU)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_model_is_exactly_zero_away_from_itself(dtype):
    check_itself(dtype, GPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_is_that_of_the_torch_fold(dtype):
    check_precision(dtype, GPU, (64, 50_257, 64))


def test_the_error_of_the_gradient_is_that_of_the_torch_formula():
    check_precision_of_gradients(GPU, (32, 20_000, 32))


@pytest.mark.parametrize(
    "check",
    [
        check_policy_alone,
        check_less,
        check_exp,
        check_left_out_infinity,
        check_extremes,
        check_nothing_is_done_twice,
    ],
)
def test_what_else_holds_in_the_interpreter(check):
    check(GPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sweep_there_and_back_never_waits_for_the_gpu(dtype, request):
    case = on(random_case(0, tokens=300, vocab=70_000, width=64, dtype=dtype), GPU).with_gradients()
    asked = Request(
        tokens=case.tokens,
        ref=(case.ref_hidden, case.ref_head),
        temperature=1.0,
        vocab=70_000,
        both_ways=True,
        ref_entropy=True,
    )
    for attempt in ("compiles the kernels", "counts"):
        if attempt == "counts":
            request.getfixturevalue("no_waiting")
        stats = swept(asked, case.hidden, case.head)
        torch.stack([stats[name] for name in DIFFERENTIABLE]).sum().backward()
