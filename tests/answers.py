"""Responses with random figures, as a batch of a measurement has them."""

import torch
from exact import generator
from tiny import WORDS

from kleash.batch import Rollout
from kleash.drift import TokenFigures, token_figures
from kleash.reading import Reading

EOS, SPECIAL = [1], [0, 1, 2]


def some_answers(seed: int, lengths: list[int], *, prompt: int = 3) -> tuple[Rollout, Reading, TokenFigures]:
    """Responses of these lengths to prompts of `prompt` tokens; the reading is random, positive where a KL is."""
    draw, time = generator(seed), max(lengths)
    mask = torch.arange(time) < torch.tensor(lengths).unsqueeze(1)
    tokens = torch.randint(3, len(WORDS), (len(lengths), prompt + time), generator=draw)
    tokens[:, prompt:] = torch.where(mask, tokens[:, prompt:], 0)
    finished = torch.tensor([length < time for length in lengths])
    tokens[finished, prompt + torch.tensor(lengths)[finished] - 1] = EOS[0]

    def figures(largest: float) -> torch.Tensor:
        return largest * torch.rand(mask.shape, generator=draw) * mask

    rollout = Rollout(
        sequences=tokens,
        attention_mask=torch.cat([torch.ones(len(lengths), prompt, dtype=torch.bool), mask], 1),
        response_mask=mask,
        rollout_logprobs=torch.zeros(mask.shape),
        finished=finished,
        completions=[""] * len(lengths),
    )
    reading = Reading(
        policy_logprobs=-figures(3.0),
        ref_logprobs=-figures(4.0),
        kl_policy_ref_per_token=figures(1.0) ** 4,
        policy_entropy=figures(2.0),
        ref_entropy=figures(2.0),
        alternatives=None,
    )
    columns = token_figures(rollout, reading, time=time, eos_token_ids=EOS, special_token_ids=SPECIAL)
    return rollout, reading, TokenFigures(**columns)
