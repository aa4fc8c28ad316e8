"""An enumerable world played by a real model: what the closed-form optimum is a truth for."""

from dataclasses import dataclass

import torch
from exact import Optimum, World
from tiny import tiny_tokenizer
from torch import Tensor, nn

WORDS = ["<eos>", "cat", "dog", "runs"]  # EOS is the padding too
ALL_EOS = {"eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 0}


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
    def sequence_logprobs(self, model: nn.Module) -> Tensor:
        """[N] log-probs of every response, from plain forward passes over a prompt and all its responses."""
        found = []
        for number, prompt in enumerate(self.prompts):
            asked = torch.tensor(self.tokenizer(prompt)["input_ids"])
            rows = self.world.prompt_of == number
            responses, mask = self.world.responses[rows], self.world.response_mask[rows]
            text = torch.cat([asked.expand(len(responses), -1), responses], 1)
            logits = model(input_ids=text, attention_mask=torch.ones_like(text)).logits
            log_probs = logits[:, len(asked) - 1 : -1].double().log_softmax(-1)
            chosen = log_probs.gather(-1, responses.unsqueeze(-1)).squeeze(-1)
            found.append(torch.where(mask, chosen, 0.0).sum(1))
        return torch.cat(found)

    def optimum(self, reference: Tensor, beta: float) -> Optimum:
        """pi* for the sequence log-probs [N] of the reference."""
        return self.world.optimum(self.world.logits_of(reference), self.scores, beta)

    def expected(self, model: nn.Module, quantity: Tensor) -> float:
        """E of `quantity` [N] when the model answers equally likely prompts."""
        return float((self.sequence_logprobs(model).exp() * quantity).sum() / self.world.prompts)

    def kl(self, model: nn.Module, other: Tensor) -> float:
        """KL(model || other) over whole responses, `other` as sequence log-probs [N]."""
        return self.expected(model, self.sequence_logprobs(model) - other)
