"""The fold and the gradient of a tile on a GPU: Triton kernels that read each logit once.

The functions stand for those of the same name in `fold` and for the torch formulas of `backward`. Triton itself is
imported with the first tile that needs it.
"""

import warnings
from functools import cache
from importlib.util import find_spec
from subprocess import SubprocessError

import torch
from torch import Tensor

from kleash.fused.fold import Normaliser
from kleash.fused.tiles import Buffers

BLOCK = 1024


@cache
def usable(device: torch.device) -> bool:
    """Whether tiles on this device go through Triton: a GPU, and a Triton that can build its kernels for it."""
    return device.type == "cuda" and find_spec("triton") is not None and _builds()


def _builds() -> bool:
    import triton

    try:
        triton.runtime.driver.active.get_current_target()
    except (RuntimeError, ImportError, OSError, SubprocessError) as error:
        warnings.warn(
            f"Expected Triton to build its kernels here, found {type(error).__name__}: {error}; the exact KL works "
            "all the same, in more passes over memory. A C compiler and Python's headers mend it.",
            stacklevel=3,
        )
        return False
    return True


def fold_pair(
    policy: Normaliser,
    ref: Normaliser,
    policy_logits: Tensor,
    ref_logits: Tensor,
    buffers: Buffers,
    *,
    both_ways: bool,
    ref_entropy: bool,
    some_forbidden: bool,
) -> None:
    """Fold one tile of both models, in place of the sums; `fold.fold_pair` says what, -inf is always handled."""
    _fold(policy, policy_logits, ref, ref_logits, both_ways=both_ways, ref_entropy=ref_entropy)


def fold_one(own: Normaliser, logits: Tensor, buffers: Buffers, *, some_forbidden: bool) -> None:
    """Fold one tile of one model, in place of the sums; `fold.fold_one` says what, -inf is always handled."""
    _fold(own, logits, None, None, both_ways=False, ref_entropy=False)


def _fold(
    own: Normaliser,
    logits: Tensor,
    other: Normaliser | None,
    other_logits: Tensor | None,
    *,
    both_ways: bool,
    ref_entropy: bool,
) -> None:
    from kleash.fused.triton_kernels import fold_kernel

    rows, width = logits.shape
    with torch.cuda.device_of(logits):  # type: ignore[no-untyped-call]
        fold_kernel[(rows,)](
            logits,
            other_logits,
            *(own.shift, own.total, own.energy, own.cross, own.reaches_forbidden.view(torch.uint8)),
            *(
                (None, None, None, None, None)
                if other is None
                else (
                    *(other.shift, other.total, other.energy if ref_entropy else None),
                    *(other.cross, other.reaches_forbidden.view(torch.uint8)),
                )
            ),
            width,
            both_ways=both_ways,
            block=BLOCK,
            enable_fp_fusion=False,
        )


def logits_gradient(
    logits: Tensor,
    ref_logits: Tensor | None,
    *,
    start: int,
    places: Tensor,
    log_normaliser: Tensor,
    ref_log_normaliser: Tensor | None,
    kl: Tensor | None,
    entropy: Tensor,
    of_logprobs: Tensor | None,
    of_kl: Tensor | None,
    of_entropy: Tensor | None,
    of_reverse_kl: Tensor | None,
) -> Tensor:
    """d loss / d logits of one tile, in place over the logits.

    Args:
      logits, ref_logits: [tokens, width].
      start: the tile's first column in the vocabulary.
      places: [tokens, 1] int64, the sampled token counted over the whole vocabulary.
      log_normaliser, ref_log_normaliser, kl, entropy: [tokens, 1] nats, from the forward pass.
      of_logprobs, of_kl, of_entropy, of_reverse_kl: [tokens, 1] d loss / d statistic, or None where it is 0.

    Returns:
      [tokens, width], the memory of the logits.
    """
    from kleash.fused.triton_kernels import gradient_kernel

    rows, width = logits.shape
    known = (places, log_normaliser, ref_log_normaliser, kl, entropy)
    upstream = (of_logprobs, of_kl, of_entropy, of_reverse_kl)
    with torch.cuda.device_of(logits):  # type: ignore[no-untyped-call]
        gradient_kernel[(rows, -(-width // BLOCK))](
            logits,
            ref_logits,
            *(None if column is None else column.contiguous() for column in known + upstream),
            start,
            width,
            block=BLOCK,
            enable_fp_fusion=False,
        )
    return logits
