"""What kind of token each response token is, since the KL gathers on first, end and template tokens.

Every response token has exactly one class; the first rule that fits decides:

    eos           closes the response
    special       a special or template token that closes nothing
    first_token   stands at position 0
    other         everything else
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kleash.checks import require_mask, require_same_shape

TOKEN_CLASSES = ("first_token", "eos", "special", "other")
FIRST_TOKEN, EOS, SPECIAL, OTHER = range(len(TOKEN_CLASSES))
NO_CLASS = -1


def token_classes(
    tokens: Tensor, response_mask: Tensor, *, eos_token_ids: Sequence[int], special_token_ids: Sequence[int]
) -> Tensor:
    """The class of every response token, as a place in TOKEN_CLASSES; NO_CLASS off the mask.

    Args:
      tokens: [batch, time] int64 token ids; position 0 is the first of the response.
      response_mask: [batch, time] bool, True on response tokens.
      eos_token_ids: every token that closes a response.
      special_token_ids: special and template tokens; may hold EOS tokens, which stay `eos`.

    Returns:
      [batch, time] int64.

    Raises:
      ShapeError: the shapes differ, or response_mask is not bool.

    >>> mask = torch.tensor([[True, True, True, True, False]])
    >>> token_classes(torch.tensor([[7, 9, 8, 1, 0]]), mask, eos_token_ids=[1], special_token_ids=[0, 1, 9])
    tensor([[ 0,  2,  3,  1, -1]])
    """
    require_mask(response_mask)
    require_same_shape(tokens=tokens, response_mask=response_mask)
    classes = torch.full_like(tokens, OTHER)
    classes[:, :1] = FIRST_TOKEN
    classes[_among(tokens, special_token_ids)] = SPECIAL
    classes[_among(tokens, eos_token_ids)] = EOS
    return torch.where(response_mask, classes, NO_CLASS)


def _among(tokens: Tensor, ids: Sequence[int]) -> Tensor:
    return torch.isin(tokens, torch.tensor(ids, dtype=tokens.dtype, device=tokens.device))
