"""Log-probs of sampled tokens from logits, the plain way: the truth that any faster code is held to.

The policy is the distribution that is sampled from, so the temperature belongs to it: every log-prob of
policy and reference is that of softmax(logits / temperature). Logits are raised to float32 first, since
rounding them to bfloat16 costs about 1.6e-2 nats per token.
"""

import torch
from torch import Tensor

from kleash.checks import require_between
from kleash.errors import ShapeError


def full_log_probs(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) over the last dimension, at least float32, in nats.

    Args:
      logits: [..., vocab]; -inf forbids a token.
      temperature: above 0.

    Returns:
      [..., vocab] normalised log-probs; float64 stays float64, everything else becomes float32.

    Raises:
      ValueRangeError: temperature is not positive and finite.

    >>> full_log_probs(torch.tensor([0.0, 0.0]))
    tensor([-0.6931, -0.6931])
    """
    require_between(1e-6, 1e6, temperature=temperature)
    precise = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(precise if temperature == 1.0 else precise / temperature, dim=-1)


def token_logprobs(logits: Tensor, tokens: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Log-probs of the given tokens, in nats: log softmax(logits / temperature)[token].

    Row t of the logits is the distribution that token t was drawn from: shift before calling.

    Args:
      logits: [..., vocab].
      tokens: [...] int64 in [0, vocab).
      temperature: above 0, the one that the tokens were sampled with.

    Returns:
      [...] nats, float32 (float64 for float64 logits).

    Raises:
      ShapeError: tokens do not have the shape of the logits without their last dimension.
      ValueRangeError: temperature is not positive and finite.

    >>> token_logprobs(torch.tensor([[0.0, 1.0986]]), torch.tensor([1]))
    tensor([-0.2877])
    """
    if logits.shape[:-1] != tokens.shape:
        raise ShapeError(
            f"Expected tokens {list(logits.shape[:-1])} to go with logits {list(logits.shape)}, "
            f"found {list(tokens.shape)}; give one token per row of logits."
        )
    log_probs = full_log_probs(logits, temperature=temperature)
    return log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
