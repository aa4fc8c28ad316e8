"""Pairs of real models so small that every response can be written down: what a measured drift is held to."""

import copy
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import torch
from exact import World, generator
from tiny import tiny_policy, tiny_tokenizer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

LETTERS = ["a", "b", "c", "d", "e", "f"]
FOUR = ("b", "c", "b c", "d c b")
MANY = tuple(" ".join(word) for length in (1, 2, 3) for word in product(LETTERS[1:5], repeat=length))


@dataclass(frozen=True, kw_only=True)
class EnumerablePair:
    """A reference with random weights, and a policy that has drifted from it.

    vocab, length: tokens that exist, and most of them in a response.
    eos:           whether the first token of the vocabulary closes a response; else every response is full.
    drift:         noise on each tensor of weights, in units of its spread.
    sharpness:     what the head is multiplied by: large = nearly deterministic.
    """

    architecture: str = "gpt2"
    vocab: int = 5
    length: int = 4
    eos: bool = False
    prompts: tuple[str, ...] = ("b",)
    drift: float = 0.2
    sharpness: float = 1.0
    temperature: float = 1.0
    seed: int = 0

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        if self.eos:
            return tiny_tokenizer(pad_token="<eos>", words=["<eos>", *LETTERS[1 : self.vocab]])
        return tiny_tokenizer(pad_token="a", words=LETTERS[: self.vocab])  # its EOS is a token without a logit

    @cached_property
    def reference(self) -> PreTrainedModel:
        special = 0 if self.eos else None
        marks = dict.fromkeys(("eos_token_id", "bos_token_id", "pad_token_id"), special)
        shape = {"architecture": self.architecture, "vocab": self.vocab, "initializer_range": 0.3, **marks}
        return tiny_policy(self.seed, scale=self.sharpness, **shape)

    @cached_property
    def policy(self) -> PreTrainedModel:
        model, draw = copy.deepcopy(self.reference), generator(self.seed + 1)
        with torch.no_grad():
            for weights in model.parameters():
                weights += self.drift * weights.std() * torch.randn(weights.shape, generator=draw)
        return model

    @cached_property
    def world(self) -> World:
        return World(vocab=self.vocab, length=self.length, eos=0 if self.eos else None, prompts=len(self.prompts))

    def drawn_prompts(self, count: int, *, seed: int) -> list[str]:
        """Prompts as a file may have them, drawn from all of the pair's."""
        drawn = torch.randint(len(self.prompts), (count,), generator=generator(seed))
        return [self.prompts[number] for number in drawn.tolist()]

    @torch.no_grad()
    def log_probs(self, model: PreTrainedModel) -> Tensor:
        """[N, length, vocab] what the model says at every position of every response, from plain forward passes."""
        found = []
        for number, prompt in enumerate(self.prompts):
            responses = self.world.responses[self.world.prompt_of == number]
            asked = torch.tensor(self.tokenizer(prompt)["input_ids"]).expand(len(responses), -1)
            text = torch.cat([asked, responses], 1)
            logits = model(input_ids=text, attention_mask=torch.ones_like(text)).logits
            found.append((logits[:, asked.shape[1] - 1 : -1].double() / self.temperature).log_softmax(-1))
        return torch.cat(found)

    @cached_property
    def truth(self) -> "Truth":
        """What can be said of the responses by summing over all of them."""
        policy, ref = self.log_probs(self.policy), self.log_probs(self.reference)
        mask, tokens = self.world.response_mask, self.world.responses.unsqueeze(-1)

        def summed(values: Tensor) -> Tensor:
            return torch.where(mask, values, 0.0).sum(1)

        own = policy.gather(-1, tokens).squeeze(-1)
        return Truth(
            probabilities=summed(own).exp() / len(self.prompts),
            exact=summed((policy.exp() * (policy - ref)).sum(-1)),
            k1=summed(own - ref.gather(-1, tokens).squeeze(-1)),
            policy_entropy=summed(-(policy.exp() * policy).sum(-1)),
            ref_entropy=summed(-(ref.exp() * ref).sum(-1)),
            length=mask.double().sum(1),
        )


@dataclass(frozen=True, kw_only=True)
class Truth:
    """Every response to every prompt [N]: its probability, and what is summed along it."""

    probabilities: Tensor
    exact: Tensor
    k1: Tensor
    policy_entropy: Tensor
    ref_entropy: Tensor
    length: Tensor

    def mean(self, quantity: Tensor) -> float:
        """E of a quantity when the policy answers equally likely prompts."""
        return float((self.probabilities * quantity).sum())

    @property
    def kl_policy_ref_per_sequence(self) -> float:
        """KL(policy || reference) of whole responses: E[log policy - log reference]."""
        return self.mean(self.k1)

    def per_token(self, quantity: Tensor) -> float:
        """E of a sum along the response over E of its length."""
        return self.mean(quantity) / self.mean(self.length)

    def spread(self, quantity: Tensor) -> float:
        """Standard deviation of a quantity, prompts included."""
        return self.mean((quantity - self.mean(quantity)).square()) ** 0.5

    def skewness(self, quantity: Tensor) -> float:
        """E[(x - mean)^3] / spread^3."""
        return self.mean((quantity - self.mean(quantity)) ** 3) / self.spread(quantity) ** 3
