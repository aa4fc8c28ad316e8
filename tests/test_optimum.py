"""The whole loop against the closed form: PPO must find the policy that maximises E[score - beta * KL].

Every response of these worlds can be written down, so pi* and its distance are sums, not estimates:
pi* = rho exp(score / beta) / Z (Korbak et al. 2022).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from exact import Optimum, World
from tiny import tiny_policy, tiny_tokenizer
from torch import Tensor

import kleash
from kleash.rollout import left_padded

EOS = 0
WORDS = ["<eos>", "cat", "dog", "runs", "sleeps"]


@dataclass(kw_only=True)
class Game:
    """An enumerable world played by a real model: the words, the prompts, and a score for every response."""

    world: World
    prompts: list[str]
    scores: Tensor

    def __post_init__(self) -> None:
        self.tokenizer = tiny_tokenizer(pad_token="<eos>", words=WORDS[: self.world.vocab])
        texts = self.tokenizer.batch_decode(self.world.responses, skip_special_tokens=True)
        asked = [self.prompts[i] for i in self.world.prompt_of.tolist()]
        self.book = dict(zip(zip(asked, texts, strict=True), self.scores.tolist(), strict=True))
        assert len(self.book) == len(texts)  # every response has a text of its own

    def reward(self, prompts: list[str], completions: list[str]) -> list[float]:
        return [self.book[pair] for pair in zip(prompts, completions, strict=True)]

    @torch.no_grad()
    def sequence_logprobs(self, model: torch.nn.Module) -> Tensor:
        """[N] log-probs of every response, from plain forward passes over the prompt and the response."""
        tokens = [self.tokenizer(self.prompts[i])["input_ids"] for i in self.world.prompt_of.tolist()]
        total = torch.zeros(len(tokens), dtype=torch.float64)
        for row, prompt in enumerate(tokens):
            response = self.world.responses[row][self.world.response_mask[row]]
            sequence = torch.cat([torch.tensor(prompt), response]).unsqueeze(0)
            log_probs = model(input_ids=sequence).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
            total[row] = log_probs.gather(1, response.unsqueeze(1)).sum()
        return total

    def optimum(self, reference: Tensor, beta: float) -> Optimum:
        """pi* for the sequence log-probs [N] of the reference."""
        return self.world.optimum(self.world.logits_of(reference), self.scores, beta)
