"""How a model's last hidden states become logits."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kleash.checks import require_between
from kleash.errors import ShapeError


@dataclass(frozen=True, kw_only=True)
class Head:
    """logits = cap(scale * (hidden @ weight.T + bias)), with cap(x) = softcap * tanh(x / softcap).

    weight:  [vocab, hidden].
    bias:    [vocab] or None; -inf forbids a token (with a softcap it becomes -softcap, as the formula says).
    scale:   multiplies the product; 1 for most models.
    softcap: None = the logits are not capped.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def vocab(self) -> int:
        """How many tokens it gives logits for."""
        return self.weight.shape[0]

    def detached(self) -> "Head":
        """The same head without gradient."""
        bias = None if self.bias is None else self.bias.detach()
        return Head(weight=self.weight.detach(), bias=bias, scale=self.scale, softcap=self.softcap)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., hidden] -> [..., vocab] logits in one piece, with gradient: what the tiles are held to."""
        product = hidden @ self.weight.T
        product = product if self.bias is None else product + self.bias
        scaled = product if self.scale == 1.0 else product * self.scale
        return scaled if self.softcap is None else torch.tanh(scaled / self.softcap) * self.softcap


def require_head(name: str, hidden: Tensor, head: Head) -> None:
    """Raise ShapeError unless the head takes these hidden states [tokens, hidden].

    Raises:
      ShapeError: hidden states or weight are no floating-point matrices of one width, or the bias is not [vocab].
      ValueRangeError: scale is not finite, or softcap not positive.
    """
    for what, tensor in (("hidden states", hidden), ("head", head.weight)):
        if not (isinstance(tensor, Tensor) and tensor.is_floating_point()):
            found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ShapeError(
                f"Expected {name} {what} as a tensor of floating-point numbers, found {found}; give the weights "
                "themselves, dequantised if need be."
            )
    if hidden.ndim != 2 or head.weight.ndim != 2 or hidden.shape[1] != head.weight.shape[1]:
        raise ShapeError(
            f"Expected {name} hidden states [tokens, hidden] and head [vocab, hidden] of one width, found "
            f"{list(hidden.shape)} and {list(head.weight.shape)}; flatten batch and time, and check the pairing."
        )
    if head.bias is not None and head.bias.shape != head.weight.shape[:1]:
        raise ShapeError(
            f"Expected {name} bias [{head.weight.shape[0]}], one number per token, found {list(head.bias.shape)}; "
            "give the bias of the same head."
        )
    require_between(-1e30, 1e30, **{f"{name} scale": head.scale})
    if head.softcap is not None:
        require_between(1e-6, 1e30, **{f"{name} softcap": head.softcap})
