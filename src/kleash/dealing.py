"""Which prompt each response answers, and with which random numbers: fixed by the seed, whatever the batches are.

Responses are dealt in passes over the prompts, each in an order of its own. They may stop within the first pass or at
the end of any later one: so either every response answers another prompt, or every prompt has as many responses.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kleash.batch import Prompts
from kleash.seeds import generator_for

PURPOSE = "measure"


@dataclass(frozen=True, kw_only=True)
class Deal:
    """What to sample together: the numbers of the prompts [batch] and their random numbers [batch, time] in [0, 1)."""

    prompts: Tensor
    uniforms: Tensor


def is_even(responses: int, prompts: int) -> bool:
    """Whether so many responses may be all.

    >>> [is_even(responses, 3) for responses in (1, 3, 4, 6)]
    [True, True, False, True]
    """
    return responses <= prompts or responses % prompts == 0


def rounded_up(responses: int, prompts: int) -> int:
    """The smallest even number of responses that is not smaller.

    >>> [rounded_up(responses, 3) for responses in (1, 3, 4, 6)]
    [1, 3, 6, 6]
    """
    return responses if is_even(responses, prompts) else -(-responses // prompts) * prompts


def dealt(
    prompts: Prompts, first: int, *, most: int, tokens_at_once: int, max_new_tokens: int, seed: int, width: int
) -> Deal:
    """The responses from number `first` on that are sampled together.

    Args:
      prompts: all of them.
      first: how many responses there are already.
      most: so many more are wanted.
      tokens_at_once: largest size of the padded batch; one response is always dealt.
      max_new_tokens: limit of a response.
      seed: what all follows from.
      width: most responses at once.
    """
    numbers: list[int] = []
    uniforms: list[Tensor] = []
    longest = 0
    while len(numbers) < min(most, width):
        turn, place = divmod(first + len(numbers), len(prompts))
        if not numbers or place == 0:
            order = _order(turn, len(prompts), seed)
        longest = max(longest, len(prompts.tokens[order[place]]))
        if numbers and (len(numbers) + 1) * (longest + max_new_tokens) > tokens_at_once:
            break
        numbers.append(order[place])
        generator = generator_for(seed, f"{PURPOSE} sampling", first + len(uniforms))
        uniforms.append(torch.rand(max_new_tokens, dtype=torch.float64, generator=generator))
    return Deal(prompts=torch.tensor(numbers), uniforms=torch.stack(uniforms))


def _order(turn: int, prompts: int, seed: int) -> list[int]:
    """The numbers of the prompts in the order of a pass."""
    order: list[int] = torch.randperm(prompts, generator=generator_for(seed, f"{PURPOSE} order", turn)).tolist()
    return order


def next_stop(responses: int, prompts: int, *, width: int) -> int:
    """The next even number of responses, about a batch of `width` further on.

    >>> next_stop(0, 100, width=64), next_stop(64, 100, width=64), next_stop(100, 100, width=64)
    (64, 100, 200)
    >>> next_stop(0, 10, width=64), next_stop(10, 10, width=64)
    (10, 70)
    """
    if responses < prompts:
        return min(responses + width, prompts)
    return responses + max(1, width // prompts) * prompts
