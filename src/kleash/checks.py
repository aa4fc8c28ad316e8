"""Contracts on tensors, checked in the first lines of every public function: shape, mask, range."""

import math

import torch
from torch import Tensor

from kleash.errors import ShapeError, ValueRangeError


def require_same_shape(**tensors: Tensor) -> None:
    """Raise ShapeError unless all tensors have one shape.

    >>> require_same_shape(a=torch.zeros(2, 3), b=torch.zeros(2, 3))
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        found = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise ShapeError(f"Expected tensors of one shape, found {found}; align them first.")


def require_rank(rank: int, layout: str, **tensors: Tensor) -> None:
    """Raise ShapeError unless every tensor has `rank` dimensions, called `layout` in the message."""
    for name, tensor in tensors.items():
        if tensor.ndim != rank:
            raise ShapeError(f"Expected {name} as {layout}, found shape {list(tensor.shape)}; reshape it.")


def require_mask(response_mask: Tensor) -> None:
    """Raise ShapeError unless response_mask is a bool tensor [batch, time]."""
    if response_mask.dtype != torch.bool:
        raise ShapeError(
            f"Expected response_mask of dtype torch.bool, found {response_mask.dtype}; convert it with .bool()."
        )
    require_rank(2, "[batch, time]", response_mask=response_mask)


def require_between(low: float, high: float, **numbers: float) -> None:
    """Raise ValueRangeError unless low <= number <= high; NaN is never between.

    >>> require_between(0, 1, gamma=1.0)
    """
    for name, number in numbers.items():
        if not low <= number <= high:
            raise ValueRangeError(
                f"Expected {name} between {low:g} and {high:g}, found {number:g}; choose a value inside."
            )


def require_beta(beta: float) -> None:
    """Raise ValueRangeError unless beta is finite and not negative."""
    if not (math.isfinite(beta) and beta >= 0):
        raise ValueRangeError(f"Expected beta finite and >= 0, found {beta:g}; 0 turns the leash off.")
