"""What the exact KL from hidden states costs, next to everything else that could be done with the same tensors.

    python benchmarks/kl_cost.py
    python benchmarks/kl_cost.py --shapes 256 2048 128256 --dtypes bfloat16 --no-backward --memory

For each shape (tokens, hidden, vocab): all contenders take turns in one process. Printed are the median seconds of
each, the median over the rounds of `ours / it` (below 1: ours is faster), the rate of the head products that had to be
done, and the largest |error| of log-probs and KL against float64. The reference is a copy of the head, at hidden states
moved a little; logits have a standard deviation of 3.
"""

import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

from kleash.fused.head import Head
from kleash.fused.stats import logprobs_of, token_stats
from kleash.fused.tiles import Buffers, token_chunks, vocab_tiles

try:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
except ImportError:
    ChunkedDivergenceFunction = ChunkedLogProbFunction = None
try:
    from liger_kernel.ops import LigerFusedLinearJSDFunction
except ImportError:
    LigerFusedLinearJSDFunction = None

Shape = tuple[int, int, int]
Statistics = tuple[Tensor, Tensor | None]
SHAPES: tuple[Shape, ...] = ((1024, 768, 50257), (256, 2048, 128256), (2048, 256, 512))
CUDA_SHAPES: tuple[Shape, ...] = ((16384, 4096, 128256), (16384, 896, 151936))
TRL_VOCAB_CHUNK = 32768  # as trl.trainer.utils passes it
JUDGED_ROWS = 256
MEMORY_SHAPE: Shape = (256, 2048, 128256)
FROZEN = "with backward: ours, head frozen"


@dataclass(frozen=True)
class Options:
    """What to measure."""

    shapes: tuple[Shape, ...] = SHAPES
    """Tokens, hidden width and vocabulary, three numbers a shape. On CUDA two large ones follow, in bfloat16."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    threads: int = 2
    repeats: int = 5
    backward: bool = True
    """Also forward and backward, through the policy's hidden states and head."""
    memory: bool = False
    """Also peak memory, each contender in a process of its own."""
    device: Literal["cpu", "cuda"] = "cpu"
    clock: Literal["wall", "processor"] = "wall"
    """Processor seconds of all threads: what to read on a busy machine, with one thread."""
    alone: str | None = None
    """Print only the extra memory of the contender of this name, at the first shape and type: `memory` does so."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """The tensors that every contender gets, and the upstream gradients of log-probs and KL."""

    hidden: Tensor
    head: Tensor
    ref_hidden: Tensor
    ref_head: Tensor
    tokens: Tensor
    upstream: tuple[Tensor, Tensor]

    @property
    def gigaflop_of_product(self) -> float:
        """Of one head product."""
        return 2e-9 * len(self.hidden) * self.head.numel()


@dataclass(frozen=True)
class Contender:
    """A way to the numbers; products counts what had to be multiplied at least."""

    name: str
    run: Callable[[Case], Any]
    judged: Callable[[Case], Statistics] | None = None
    products: int = 2


def random_case(shape: Shape, dtype: torch.dtype, device: str) -> Case:
    """Two models of one shape with random weights."""
    tokens, width, vocab = shape
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=rng)
    head = (torch.randn(vocab, width, generator=rng).mul_(3 / width**0.5)).to(device, dtype)
    moved = hidden + 0.3 * torch.randn(tokens, width, generator=rng)
    return Case(
        hidden=hidden.to(device, dtype),
        head=head,
        ref_hidden=moved.to(device, dtype),
        ref_head=head.clone(),
        tokens=torch.randint(vocab, (tokens,), generator=rng).to(device),
        upstream=(torch.randn(tokens, generator=rng).to(device), torch.randn(tokens, generator=rng).to(device)),
    )


# --- contenders


def ours(case: Case) -> Statistics:
    """Log-probs, KL and entropy in one sweep."""
    stats = token_stats(case.hidden, case.head, case.ref_hidden, case.ref_head, case.tokens)
    return stats.policy_logprobs, stats.kl_policy_ref_per_token


def ours_with_ref_entropy(case: Case) -> Statistics:
    """The same and the reference's entropy, as a measurement wants them."""
    stats = token_stats(case.hidden, case.head, case.ref_hidden, case.ref_head, case.tokens, ref_entropy=True)
    return stats.policy_logprobs, stats.kl_policy_ref_per_token


def our_logprobs(case: Case) -> Statistics:
    """Each model by itself; each also folds its entropy, a leaner pass does not exist."""
    logprobs, _ = logprobs_of(case.hidden, Head(weight=case.head), case.tokens)
    logprobs_of(case.ref_hidden, Head(weight=case.ref_head), case.tokens)
    return logprobs, None


def full_logits(hidden: Tensor, head: Tensor) -> Tensor:
    """[tokens, vocab] in the model's type, then float32: what a trainer gets from a model."""
    return (hidden @ head.T).float()


def plain_logprobs(case: Case) -> Statistics:
    """(a) Sampled log-probs of both models from full logits."""

    def of(hidden: Tensor, head: Tensor) -> Tensor:
        logits = full_logits(hidden, head)
        return logits.gather(1, case.tokens[:, None])[:, 0] - logits.logsumexp(-1)

    logprobs = of(case.hidden, case.head)
    of(case.ref_hidden, case.ref_head)
    return logprobs, None


def plain_kl(case: Case) -> Statistics:
    """(b) The three-line exact KL from two full log-softmaxes."""
    log_pi = full_logits(case.hidden, case.head).log_softmax(-1)
    log_rho = full_logits(case.ref_hidden, case.ref_head).log_softmax(-1)
    kl = (log_pi.exp() * (log_pi - log_rho)).sum(-1)
    return log_pi.gather(1, case.tokens[:, None])[:, 0], kl


def trl_chunked(case: Case) -> Statistics:
    """(c) KL and entropy from one of its functions, the policy's log-probs from the other; no reference log-probs."""
    models = (case.hidden, case.head, None, case.ref_hidden, case.ref_head, None)
    kl, _ = ChunkedDivergenceFunction.apply(*models, 1.0, 1.0)
    logprobs, *_ = ChunkedLogProbFunction.apply(
        case.hidden, case.head, None, case.tokens, 1.0, TRL_VOCAB_CHUNK, None, 1.0, ("log_probs",)
    )
    return logprobs, kl


def liger_jsd(case: Case) -> Tensor:
    """Mean reverse KL; its forward pass makes the gradients too."""
    loss: Tensor = LigerFusedLinearJSDFunction.apply(
        *(case.hidden, case.head, case.ref_hidden, case.ref_head, None), 1.0, -100, 1.0
    )
    return loss


def full_products(case: Case) -> None:
    """(d) The two head products and nothing else, in full."""
    _ = case.hidden @ case.head.T
    _ = case.ref_hidden @ case.ref_head.T


def tile_products(case: Case) -> None:
    """(d) The same, tile by tile into memory that is used again, in the model's type."""
    buffers, device = Buffers(case.hidden.device, case.hidden.dtype), case.hidden.device
    for chunk in token_chunks(len(case.hidden), device):
        rows = chunk.stop - chunk.start
        for columns in vocab_tiles(rows, len(case.head), device):
            width = columns.stop - columns.start
            torch.mm(case.hidden[chunk], case.head[columns].T, out=buffers.tile("policy", rows, width))
            torch.mm(case.ref_hidden[chunk], case.ref_head[columns].T, out=buffers.tile("ref", rows, width))


def four_products(case: Case) -> tuple[Tensor, ...]:
    """(d) with backward: both logits, then hidden states' and head's gradient; logits stand for their gradient."""
    logits = case.hidden @ case.head.T
    _ = case.ref_hidden @ case.ref_head.T
    return logits @ case.head, logits.T @ case.hidden


def trained(run: Callable[[Case], Statistics]) -> Callable[[Case], tuple[Tensor, ...]]:
    """Forward and backward of a way to the numbers; returns both gradients."""

    def there_and_back(case: Case) -> tuple[Tensor, ...]:
        leaves = case.hidden.detach().requires_grad_(), case.head.detach().requires_grad_()
        logprobs, kl = run(replace(case, hidden=leaves[0], head=leaves[1]))
        return torch.autograd.grad([logprobs, kl], leaves, case.upstream)  # type: ignore[list-item]

    return there_and_back


def liger_trained(case: Case) -> tuple[Tensor, ...]:
    """Its forward and backward; it cannot take the log-probs along."""
    leaves = case.hidden.detach().requires_grad_(), case.head.detach().requires_grad_()
    return torch.autograd.grad(liger_jsd(replace(case, hidden=leaves[0], head=leaves[1])), leaves)


def contenders(device: str) -> tuple[list[Contender], list[Contender]]:
    """Forward, and forward with backward; ours comes first."""
    forward = [
        Contender("ours: log-probs, KL, entropy", ours, judged=ours),
        Contender("ours: and the reference's entropy", ours_with_ref_entropy, judged=ours_with_ref_entropy),
        Contender("ours: log-probs of each model", our_logprobs),
        Contender("(a) log-probs, full logits", plain_logprobs),
        Contender("(b) KL, two log-softmaxes", plain_kl, judged=plain_kl),
        Contender("(d) two products, full", full_products),
        Contender("(d) two products, tiles", tile_products),
    ]
    both = [
        Contender("ours", trained(ours), products=4),
        Contender("(b) autograd", trained(plain_kl), products=4),
        Contender("(d) four products, full", four_products, products=4),
    ]
    if ChunkedDivergenceFunction is not None:
        forward.insert(4, Contender("(c) TRL, chunked", trl_chunked, judged=trl_chunked))
        both.insert(2, Contender("(c) TRL, chunked", trained(trl_chunked), products=4))
    if LigerFusedLinearJSDFunction is not None and device == "cuda":
        both.append(Contender("Liger fused JSD (KL alone)", liger_trained, products=4))
    return forward, both


# --- measurements


def seconds_of(run: Callable[[], Any], options: Options) -> float:
    """Of one call, the results thrown away."""
    clock = time.process_time if options.clock == "processor" else time.perf_counter
    _wait(options.device)
    start = clock()
    run()
    _wait(options.device)
    return clock() - start


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def interleaved(group: list[Contender], case: Case, options: Options) -> list[list[float]]:
    """[contender][round] seconds; every round begins with another contender, and one round warms up."""
    seconds: list[list[float]] = [[] for _ in group]
    for number in range(options.repeats + 1):
        for place in range(len(group)):
            index = (place + number) % len(group)
            taken = seconds_of(lambda index=index: group[index].run(case), options)  # type: ignore[misc]
            if number:
                seconds[index].append(taken)
    return seconds


def truth_of(case: Case) -> tuple[Tensor, Tensor]:
    """Log-probs and KL of the first rows in float64."""
    rows = slice(JUDGED_ROWS)
    exact = replace(
        case,
        hidden=case.hidden[rows].double(),
        head=case.head.double(),
        ref_hidden=case.ref_hidden[rows].double(),
        ref_head=case.ref_head.double(),
        tokens=case.tokens[rows],
    )
    stats = token_stats(exact.hidden, exact.head, exact.ref_hidden, exact.ref_head, exact.tokens)
    return stats.policy_logprobs, stats.kl_policy_ref_per_token


def errors_of(contender: Contender, case: Case, truth: tuple[Tensor, Tensor]) -> str:
    """Largest |error| of log-probs and KL, in nats."""
    if contender.judged is None:
        return ""
    found = contender.judged(case)
    return " ".join(
        f"{(own[:JUDGED_ROWS].double() - true).abs().max().item():10.1e}"
        for own, true in zip(found, truth, strict=True)
        if own is not None
    )


def print_group(title: str, group: list[Contender], case: Case, options: Options, *, judge: bool) -> None:
    """One table."""
    seconds = interleaved(group, case, options)
    truth = truth_of(case) if judge else None
    print(
        f"{title:<46}{'seconds':>9}{'ours / it':>11}{'GFLOP/s':>9}" + (f"{'error: log-prob, KL':>22}" if judge else "")
    )
    for contender, own in zip(group, seconds, strict=True):
        median = statistics.median(own)
        ratio = statistics.median(ours / its for ours, its in zip(seconds[0], own, strict=True))
        rate = contender.products * case.gigaflop_of_product / median
        judged = "" if truth is None else errors_of(contender, case, truth)
        print(f"  {contender.name:<44}{median:9.4f}{ratio:11.2f}{rate:9.0f} {judged}".rstrip(), flush=True)


# --- memory


def resident(field: str) -> float:
    """MiB that this process holds (VmRSS) or held at most (VmHWM)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"Expected {field} in /proc/self/status, found none; memory is measured on Linux only.")


def extra_memory(contender: Contender, case: Case, device: str) -> float:
    """MiB at the peak beyond what was there before, and beyond what the call returns."""
    small = random_case((64, 32, 256), case.hidden.dtype, device)
    contender.run(small)  # libraries and threads take their own memory once
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before, peak = torch.cuda.memory_allocated() / 2**20, torch.cuda.max_memory_allocated
        found = contender.run(case)
        return peak() / 2**20 - before - _mebibytes(found)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the peak so far
    before = resident("VmRSS")
    found = contender.run(case)
    return resident("VmHWM") - before - _mebibytes(found)


def _mebibytes(found: Any) -> float:
    return sum(tensor.untyped_storage().nbytes() for tensor in found or () if isinstance(tensor, Tensor)) / 2**20


def print_memory(title: str, names: list[str], shape: Shape, options: Options, dtype: str) -> None:
    """Extra memory of some contenders, each in a process of its own."""
    print(title)
    for name in names:
        command = [sys.executable, __file__, "--shapes", *map(str, shape), "--dtypes", dtype, "--alone", name]
        command += ["--threads", str(options.threads), "--device", options.device]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        print(f"  {name:<44}{float(done.stdout):9.1f} MiB", flush=True)


def frozen_head(case: Case) -> tuple[Tensor, ...]:
    """Ours, forward and backward, where only the hidden states are trained."""
    leaf = case.hidden.detach().requires_grad_()
    logprobs, kl = ours(replace(case, hidden=leaf))
    return torch.autograd.grad([logprobs, kl], [leaf], case.upstream)  # type: ignore[list-item]


def named(device: str) -> dict[str, Contender]:
    """Every contender by the name that the table of memory gives it."""
    forward, both = contenders(device)
    found = {contender.name: contender for contender in forward}
    found |= {f"with backward: {contender.name}": contender for contender in both}
    return found | {FROZEN: Contender(FROZEN, frozen_head)}


def main(options: Options) -> None:
    """Print the tables."""
    torch.set_num_threads(options.threads)
    if options.alone is not None:
        case = random_case(options.shapes[0], getattr(torch, options.dtypes[0]), options.device)
        print(extra_memory(named(options.device)[options.alone], case, options.device))
        return
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.machine()} CPU"
    print(
        f"torch {torch.__version__}, {device}, {options.threads} threads, {options.clock} clock, "
        f"medians of {options.repeats}"
    )
    if ChunkedDivergenceFunction is None:
        print("(c) left out: TRL with chunked_divergence is not installed")
    work = [(shape, dtype) for shape in options.shapes for dtype in options.dtypes]
    work += [(shape, "bfloat16") for shape in CUDA_SHAPES if options.device == "cuda"]
    forward, both = contenders(options.device)
    for shape, dtype in work:
        case = random_case(shape, getattr(torch, dtype), options.device)
        with torch.no_grad():
            print_group(f"forward {shape} {dtype}", forward, case, options, judge=True)
        if options.backward:
            print_group(f"forward and backward {shape} {dtype}", both, case, options, judge=False)
        del case
    if options.memory:
        print_memory(
            f"extra memory at the peak, {MEMORY_SHAPE} float32",
            list(named(options.device)),
            MEMORY_SHAPE,
            options,
            "float32",
        )
        for vocab in (32768, 65536, 131072):
            print_memory(
                f"the same, vocabulary {vocab}",
                ["ours: log-probs, KL, entropy", FROZEN],
                (*MEMORY_SHAPE[:2], vocab),
                options,
                "float32",
            )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
