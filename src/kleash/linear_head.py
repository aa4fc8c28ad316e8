"""Whether a causal model's logits follow linearly from its base model's last hidden states, and how.

Nothing is known here of single architectures. Two short forward passes ask the model itself: the first shows
what its head is given, the second gives the head random hidden states and shows what becomes of its product.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from math import sqrt

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kleash.errors import first_line
from kleash.fused.head import Head
from kleash.generators import untouched_generators
from kleash.models import forward_arguments, modes_kept

SCALES = (  # times it, or divided by it, before or after the head
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "output_multiplier",
    "logits_mup_width_multiplier",
)
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
ROWS, TIME = 2, 8
NORMED_ROWS = 1024
SMALLEST, LARGEST = -1.0, 4.0  # powers of ten that the products of the second pass span


@dataclass(frozen=True, kw_only=True)
class LinearHead:
    """How a causal model's logits follow from its base model's last hidden state.

    logits = cap(scale * (hidden @ weight.T + bias)), with cap(x) = softcap * tanh(x / softcap), or cap(x) = x.
    """

    scale: float = 1.0
    softcap: float | None = None

    def of(self, model: PreTrainedModel) -> Head:
        """The head on the model's own parameters: gradients flow to them, and updates are seen."""
        head = _output_embeddings(model)
        assert isinstance(head, nn.Linear)
        return Head(weight=head.weight, bias=head.bias, scale=self.scale, softcap=self.softcap)


class _NotLinearError(Exception):
    """Why a model is not linear after its base model; its text follows "found" in a sentence."""


def linear_head_of(model: PreTrainedModel) -> LinearHead | str:
    """How the model's logits follow from its base model's last hidden states, by trying it out.

    The model must hand the very bits of its last hidden states (or a constant multiple, named in the config, for
    a head without bias) to one plain torch.nn.Linear, and scale and soft-cap the product as its config says.
    Neither hooks nor gradients nor random numbers nor a changed training mode are left behind.

    Returns:
      The linear head; or what stands against one, in words that follow "found" in a sentence.
    """
    try:
        with _at_rest(model):
            return _probed(model)
    except _NotLinearError as reason:
        return str(reason)
    except Exception as error:  # a model may do anything with a probe; the plain path will tell what is wrong
        cause = f"{type(error).__name__}: {first_line(error).rstrip('.')}"
        return f"a model that cannot be tried out on a few tokens ({cause})"


def last_hidden_states(model: PreTrainedModel, sequences: Tensor, attention_mask: Tensor, response_time: int) -> Tensor:
    """Last hidden states from which each response token was drawn, from one forward pass of the base model.

    Row t belongs to response token t, as in models.response_logits.

    Args:
      model: a causal language model with a linear head, outside any wrapper.
      sequences: [batch, prompt + time] token ids, the response at the end.
      attention_mask: [batch, prompt + time] bool, True on prompt and response tokens.
      response_time: time, at least 1.

    Returns:
      [batch, time, hidden] in the dtype of the model's head.
    """
    return _base_output(model, sequences, attention_mask)[:, -response_time - 1 : -1]


def _base_output(model: PreTrainedModel, sequences: Tensor, attention_mask: Tensor) -> Tensor:
    """[batch, time, hidden] the base model's last hidden states at every position."""
    arguments = forward_arguments(model.base_model, sequences, attention_mask)
    hidden: Tensor = model.base_model(**arguments, use_cache=False).last_hidden_state
    return hidden


@contextmanager
def _at_rest(model: nn.Module) -> Iterator[None]:
    """No gradients and no dropout inside; training modes and the state of every generator as before after it."""
    devices = {tensor.device for tensor in model.parameters()}
    # no_grad and not inference_mode: tables that a model keeps from this pass must serve in training.
    with modes_kept(model), torch.no_grad(), untouched_generators(*devices):
        model.eval()
        yield


def _probed(model: PreTrainedModel) -> LinearHead:
    """The linear head; raises _NotLinearError with the first reason against it."""
    head = _plain_head(model)
    tokens = torch.arange(ROWS * TIME, device=head.weight.device).view(ROWS, TIME) % head.weight.shape[0]
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, : TIME // 4] = False  # left padding must mean the same to the base model and to the whole
    before = _scale_before(model, head, tokens, mask)
    return _linear_head_after(model, head, tokens, mask, before)


def _output_embeddings(model: PreTrainedModel) -> nn.Module | None:
    """The module that the model names as its head."""
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return head


def _plain_head(model: PreTrainedModel) -> nn.Linear:
    """The model's head, once it is a torch.nn.Linear as torch made it, and nothing trained stands around it."""
    head = _output_embeddings(model)
    if type(head) is not nn.Linear:
        raise _NotLinearError(f"a head of type {type(head).__name__}, not a plain torch.nn.Linear")
    if type(head.weight.data) is not Tensor or not head.weight.is_floating_point():
        kind = type(head.weight.data).__name__
        raise _NotLinearError(f"a head with a weight of type {kind} in {head.weight.dtype}, not a plain tensor")
    hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
    if any(hooks) or "forward" in vars(head):
        raise _NotLinearError("a head with hooks or another forward, which may change what goes in or comes out")
    if model.base_model is model:
        raise _NotLinearError("no base model apart from the model itself")
    known = {id(parameter) for part in (model.base_model, head) for parameter in part.parameters()}
    outside = [name for name, parameter in model.named_parameters() if id(parameter) not in known]
    if outside:
        raise _NotLinearError(f"{outside[0]} outside both base model and head, which may come between them")
    return head


def _scale_before(model: PreTrainedModel, head: nn.Linear, tokens: Tensor, mask: Tensor) -> float:
    """By what the model multiplies its last hidden states before the head."""
    hidden = _base_output(model, tokens, mask)
    given, _ = _head_input_and_logits(model, head, tokens, mask, replacement=None)
    if given.shape != hidden.shape or given.dtype != hidden.dtype:
        raise _NotLinearError(
            f"a head that is given {list(given.shape)} {given.dtype} where the last hidden states are "
            f"{list(hidden.shape)} {hidden.dtype}"
        )
    if not hidden[mask].isfinite().all():
        raise _NotLinearError("last hidden states that are not finite")
    if torch.equal(given[mask], hidden[mask]):
        return 1.0
    # Equal bits, and not closeness, for the scale of 1: a norm upon a norm changes next to nothing.
    best = min(_named_scales(model)[1:], key=lambda scale: _error(given[mask], hidden[mask] * scale), default=1.0)
    if best == 1.0 or not _error(given[mask], hidden[mask] * best) <= 1:
        raise _NotLinearError("something between the last hidden states and the head, or hidden states that vary")
    if "bias" in dict(head.named_parameters()):
        raise _NotLinearError("a scale before a head with a bias")
    return best


def _linear_head_after(
    model: PreTrainedModel, head: nn.Linear, tokens: Tensor, mask: Tensor, before: float
) -> LinearHead:
    """The head with the scale and soft-cap, of those that the config names, that its logits show."""
    hidden = _random_hidden_states(head)
    _, logits = _head_input_and_logits(model, head, tokens, mask, replacement=hidden)
    products = head(hidden)
    if logits.shape != products.shape:
        raise _NotLinearError(f"logits {list(logits.shape)} where its head gives {list(products.shape)}")
    pairs = list(product(_named_scales(model), [None, *_named(model, SOFTCAPS)]))
    errors = [_error(logits, _scaled_and_capped(products, scale, softcap)) for scale, softcap in pairs]
    smallest = min(errors)
    if not smallest <= 1:
        raise _NotLinearError("logits that are not the head's product, scaled and soft-capped as the config names")
    scale, softcap = pairs[errors.index(smallest)]
    return LinearHead(scale=before * scale, softcap=softcap)


def _head_input_and_logits(
    model: PreTrainedModel, head: nn.Linear, tokens: Tensor, mask: Tensor, *, replacement: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What the head is given in one forward pass of the whole model, and the logits; replaced if asked to."""
    seen: list[Tensor] = []

    def look(_: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor | None:
        seen.append(inputs[0].clone())
        return replacement

    handle = head.register_forward_pre_hook(look)
    try:
        logits: Tensor = model(**forward_arguments(model, tokens, mask), use_cache=False).logits
    finally:
        handle.remove()
    if len(seen) != 1:
        raise _NotLinearError(f"a head that is called {len(seen)} times in one forward pass")
    return seen[0], logits


def _random_hidden_states(head: nn.Linear) -> Tensor:
    """[rows, time, hidden] such that the products are of every size: soft-caps bend the large, clamps cut them."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(ROWS, TIME, head.in_features, generator=generator)
    parts = torch.split(head.weight, NORMED_ROWS)  # whole and in float64 it would be the most memory of all
    row_norm = sqrt(sum(float(part.double().square().sum()) for part in parts) / head.out_features)
    if row_norm == 0:
        raise _NotLinearError("a head of zeros, whose logits show nothing")
    sizes = torch.logspace(SMALLEST, LARGEST, ROWS * TIME).view(ROWS, TIME, 1) / row_norm
    return (noise * sizes).to(head.weight)


def _scaled_and_capped(products: Tensor, scale: float, softcap: float | None) -> Tensor:
    """What LinearHead says of the products, in their own dtype."""
    scaled = products * scale
    return scaled if softcap is None else torch.tanh(scaled / softcap) * softcap


def _error(found: Tensor, expected: Tensor) -> float:
    """The largest elementwise difference, in multiples of what rounding explains; NaN where NaN is found.

    Scaling and capping round four times, each time by half an eps; other programs may round another way.
    """
    eps = max(torch.finfo(found.dtype).eps, torch.finfo(expected.dtype).eps)
    allowed = 4 * eps * expected.double().abs()
    errors = (found.double() - expected.double()).abs() / allowed
    return float(torch.where(found == expected, 0.0, errors).max())


def _named_scales(model: PreTrainedModel) -> list[float]:
    """1, and what the config names as a scale of the logits, as a factor and as a divisor."""
    return [1.0, *(factor for value in _named(model, SCALES) for factor in (value, 1 / value))]


def _named(model: PreTrainedModel, names: tuple[str, ...]) -> list[float]:
    """The numbers that the config has under these names, without 0."""
    values = [getattr(model.config.get_text_config(), name, None) for name in names]
    return [float(value) for value in values if isinstance(value, int | float) and value]
