"""Sums, means and whitening over the True positions of a mask; nothing else is ever counted.

Values are selected with `where`, never by a product with the mask, so NaN or infinity at a
masked position cannot leak. A `reduce` argument adds a tensor over processes (the identity when
there is one), which is all that these statistics need to hold over the whole batch of a
distributed run.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kleash.checks import require_mask, require_same_shape

Reduce = Callable[[Tensor], Tensor]


def one_process(tensor: Tensor) -> Tensor:
    """The reduction of a run with one process: the tensor itself."""
    return tensor


def masked(values: Tensor, mask: Tensor) -> Tensor:
    """`values` where the mask is True and exactly 0 elsewhere.

    >>> masked(torch.tensor([[1.0, float("nan")]]), torch.tensor([[True, False]]))
    tensor([[1., 0.]])
    """
    require_mask(mask)
    require_same_shape(values=values, mask=mask)
    return torch.where(mask, values, torch.zeros_like(values))


def unpacked(values: Tensor, mask: Tensor) -> Tensor:
    """Values of the True positions, row by row, in their places and exactly 0 elsewhere; undoes values[mask].

    [positions, ...] and [batch, time] -> [batch, time, ...]

    >>> unpacked(torch.tensor([1.0, 2.0]), torch.tensor([[True, False], [False, True]]))
    tensor([[1., 0.],
            [0., 2.]])
    """
    require_mask(mask)
    places = mask.reshape(*mask.shape, *[1] * (values.ndim - 1))
    return values.new_zeros(mask.shape + values.shape[1:]).masked_scatter(places, values)


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Count, mean and biased variance (divided by the count) of masked values; all 0-dim tensors."""

    count: Tensor
    mean: Tensor
    variance: Tensor


def masked_moments(values: Tensor, mask: Tensor, *, reduce: Reduce = one_process) -> Moments:
    """Moments of `values` [batch, time] over the True positions of `mask`, of all processes together.

    mean = sum x / n;  variance = sum (x - mean)^2 / n, in two passes so that a large mean costs no digits.
    An empty mask gives mean 0 and variance 0.
    """
    count = reduce(mask.sum().to(values.dtype))
    divisor = count.clamp_min(1)
    mean = reduce(masked(values, mask).sum()) / divisor
    variance = reduce(masked(values - mean, mask).square().sum()) / divisor
    return Moments(count=count, mean=mean, variance=variance)


def masked_mean(values: Tensor, mask: Tensor, *, reduce: Reduce = one_process) -> Tensor:
    """Mean of `values` [batch, time] over the True positions of `mask`; 0 when there are none.

    >>> masked_mean(torch.tensor([[1.0, 3.0, 99.0]]), torch.tensor([[True, True, False]]))
    tensor(2.)
    """
    return masked_moments(values, mask, reduce=reduce).mean


def whiten(
    values: Tensor,
    mask: Tensor,
    *,
    keep_mean: bool = False,
    epsilon: float = 1e-8,
    reduce: Reduce = one_process,
) -> tuple[Tensor, Tensor]:
    """Values scaled to variance 1 (and mean 0) over the mask, and the scale they were divided by.

    scale = sqrt(variance + epsilon), biased variance;  (x - mean) / scale, plus the mean if `keep_mean`.
    Whoever adds a term to a loss of whitened values divides that term by the same scale.

    Args:
      values: [batch, time].
      mask: [batch, time] bool; statistics cover its True positions only, over all processes.
      keep_mean: add the mean back after scaling.
      epsilon: added to the variance.
      reduce: adds a tensor over processes.

    Returns:
      ([batch, time] whitened values, exactly 0 off the mask; the 0-dim scale).

    Raises:
      ShapeError: the shapes differ, or the mask is not bool.

    >>> x = torch.tensor([[1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0]])
    >>> whiten(x, torch.ones(3, 3, dtype=torch.bool), keep_mean=True)[0][0]
    tensor([0.0508, 0.4381, 0.8254])
    """
    moments = masked_moments(values, mask, reduce=reduce)
    scale = (moments.variance + epsilon).sqrt()
    shift = moments.mean if keep_mean else torch.zeros_like(moments.mean)
    return masked((masked(values, mask) - moments.mean) / scale + shift, mask), scale


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions that start at 0 on the first real token of each row: [batch, time] bool -> int64.

    With left padding, a model that is not told these numbers counts the padding too.

    >>> position_ids(torch.tensor([[False, True, True]]))
    tensor([[0, 0, 1]])
    """
    require_mask(attention_mask)
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
