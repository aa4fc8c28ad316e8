"""Tiles of logits: how large they are, and the product that fills one.

A tile is small enough to stay in the last-level cache while it is folded away, and large enough for the matrix
product to run at its full rate: some hundred tokens times about a thousand entries of the vocabulary.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from kleash.fused.head import Head

CPU_TOKENS, CPU_CELLS = 512, 512 * 1024
GPU_TOKENS, GPU_CELLS = 4096, 4096 * 4096
ALIGNED = 64


def token_chunks(tokens: int, device: torch.device) -> Iterator[slice]:
    """Consecutive slices of the tokens, each one tile high; one empty slice where there are none."""
    height = CPU_TOKENS if device.type == "cpu" else GPU_TOKENS
    return (slice(start, min(start + height, tokens)) for start in range(0, max(tokens, 1), height))


def vocab_tiles(tokens: int, vocab: int, device: torch.device) -> Iterator[slice]:
    """Consecutive slices of the vocabulary, each one tile wide, for a chunk of so many tokens."""
    cells = CPU_CELLS if device.type == "cpu" else GPU_CELLS
    width = max(ALIGNED, cells // max(tokens, ALIGNED) // ALIGNED * ALIGNED)
    return (slice(start, min(start + width, vocab)) for start in range(0, vocab, width))


def accumulated_dtype(dtype: torch.dtype) -> torch.dtype:
    """What logits and sums are held in: float64 stays, everything else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Buffers:
    """Memory for tiles, allocated once: fresh pages cost more than what is computed in them."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self.dtype = device, dtype
        self._flat: dict[str, Tensor] = {}

    def tile(self, name: str, rows: int, columns: int) -> Tensor:
        """[rows, columns] of uninitialised memory; the same name gives the same memory."""
        flat = self._flat.get(name)
        if flat is None or flat.numel() < rows * columns:
            flat = self._flat[name] = torch.empty(rows * columns, device=self._device, dtype=self.dtype)
        return flat[: rows * columns].view(rows, columns)


class Product:
    """hidden @ weight.T for tiles of one head, rounded once, in the accumulator's precision.

    bfloat16 factors are multiplied as bfloat16 and added up in float32. On a CPU with bfloat16 instructions that
    is done by lifting both to float32 and letting oneDNN round them back, which loses nothing.
    """

    def __init__(self, hidden: Tensor, head: Head, buffers: Buffers, name: str) -> None:
        self._accumulated, self._given = buffers.dtype, hidden
        halves = hidden.dtype in (torch.bfloat16, torch.float16)
        self._native = hidden.is_cuda and halves and self._accumulated == torch.float32
        self._hidden = hidden if self._native else hidden.to(self._accumulated)
        self._head, self._buffers, self._name = head, buffers, name

    @property
    def hidden(self) -> Tensor:
        """[tokens, hidden] as the products use it."""
        return self._hidden

    def weight(self, columns: slice) -> Tensor:
        """[columns, hidden] rows of the head, as the products use them."""
        return self._head.weight[columns] if self._native else self._head.weight[columns].to(self._accumulated)

    def logits(self, columns: slice, *, temperature: float) -> Tensor:
        """[tokens, columns] logits / temperature, in memory that the next tile takes over."""
        tile = self._buffers.tile(self._name, len(self._hidden), columns.stop - columns.start)
        if self._native:
            torch.mm(self._hidden, self.weight(columns).T, out_dtype=torch.float32, out=tile)
        else:
            with bfloat16_products(self._given):
                torch.mm(self._hidden, self.weight(columns).T, out=tile)
        head = self._head
        if head.bias is not None:
            tile.add_(head.bias[columns])
        factor = head.scale if head.softcap is not None else head.scale / temperature
        if factor != 1.0:
            tile.mul_(factor)
        if head.softcap is not None:
            tile.div_(head.softcap).tanh_().mul_(head.softcap / temperature)
        return tile

    def cast(self, gradient: Tensor) -> Tensor:
        """A gradient tile in the type that the products take."""
        return gradient.to(self._hidden.dtype)


def slope_of_logits(head: Head, logits: Tensor, *, temperature: float) -> Tensor | float:
    """d (logits / temperature) / d (hidden @ weight.T), from the tempered logits themselves."""
    if head.softcap is None:
        return head.scale / temperature
    return (1 - (logits * (temperature / head.softcap)).square()) * (head.scale / temperature)


def bfloat16_products(hidden: Tensor) -> AbstractContextManager[None]:
    """Within, float32 products on a CPU may round their factors to bfloat16: exact where they came from it."""
    return _rounded_factors() if hidden.device.type == "cpu" and hidden.dtype == torch.bfloat16 else nullcontext()


@contextmanager
def _rounded_factors() -> Iterator[None]:
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
