"""What the exact KL from hidden states costs, next to everything else that could be done with the same tensors.

    python benchmarks/kl_cost.py
    python benchmarks/kl_cost.py --shapes 256 2048 128256 --dtypes bfloat16 --no-backward --memory

For each shape (tokens, hidden, vocab): all contenders take turns in one process. Printed are the median seconds of
each, the median over the rounds of `ours / it` (below 1: ours is faster), the rate of the head products that had to be
done, and the largest |error| of log-probs and KL against float64. The reference is a copy of the head, at hidden states
moved a little; logits have a standard deviation of 3.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
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
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction
except ImportError:
    LigerFusedLinearJSDFunction = None

Shape = tuple[int, int, int]
Statistics = tuple[Tensor, Tensor | None]
SHAPES: tuple[Shape, ...] = ((1024, 768, 50257), (256, 2048, 128256), (2048, 256, 512))
CUDA_SHAPES: tuple[Shape, ...] = ((16384, 4096, 128256), (16384, 896, 151936))
TRL_VOCAB_CHUNK = 32768  # as trl.trainer.utils passes it
JUDGED_ROWS = 256


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
    alone: tyro.conf.Suppress[str | None] = None
    """Name of the one contender whose memory this process measures."""


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


@dataclass
class Row:
    """What was measured of one contender."""

    seconds: list[float] = field(default_factory=list)
    errors: str = ""


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
        *(case.hidden, case.head, case.ref_hidden, case.ref_head, case.tokens), None, None, 0.0, 1.0, 1.0
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


def four_products(case: Case) -> tuple[Tensor, Tensor]:
    """(d) with backward: both logits, the hidden states' gradient and the head's."""
    full_products(case)
    logits = case.hidden.detach() @ case.head.detach().T if LOGITS_GRADIENT is None else LOGITS_GRADIENT
    return logits @ case.head.detach(), logits.T @ case.hidden.detach()


LOGITS_GRADIENT: Tensor | None = None
