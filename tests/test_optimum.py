"""The whole loop against the closed form: PPO must find the policy that maximises E[score - beta * KL].

Every response of these worlds can be written down, so pi* and its distance are sums, not estimates:
pi* = rho exp(score / beta) / Z (Korbak et al. 2022).
"""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from exact import Optimum, World, generator
from tiny import tiny_policy, tiny_tokenizer
from torch import Tensor, nn

import kleash

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
        """[N] log-probs of every response, from plain forward passes over the prompt and the response."""
        tokens = [self.tokenizer(self.prompts[i])["input_ids"] for i in self.world.prompt_of.tolist()]
        total = torch.zeros(len(tokens), dtype=torch.float64)
        for row, prompt in enumerate(tokens):
            response = self.world.responses[row][self.world.response_mask[row]]
            text = torch.cat([torch.tensor(prompt), response]).unsqueeze(0)
            logits = model(input_ids=text, attention_mask=torch.ones_like(text)).logits
            log_probs = logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
            total[row] = log_probs.gather(1, response.unsqueeze(1)).sum()
        return total

    def optimum(self, reference: Tensor, beta: float) -> Optimum:
        """pi* for the sequence log-probs [N] of the reference."""
        return self.world.optimum(self.world.logits_of(reference), self.scores, beta)

    def expected(self, model: nn.Module, quantity: Tensor) -> float:
        """E of `quantity` [N] when the model answers equally likely prompts."""
        return float((self.sequence_logprobs(model).exp() * quantity).sum() / self.world.prompts)

    def kl(self, model: nn.Module, other: Tensor) -> float:
        """KL(model || other) over whole responses, `other` as sequence log-probs [N]."""
        return self.expected(model, self.sequence_logprobs(model) - other)

    def train(self, policy: nn.Module, beta: float, out: Path, *, updates: int, learning_rate: float) -> list[dict]:
        """The real loop, all of it; returns its records.

        At the optimum score - beta * log(pi / rho) is the same number for every response to a prompt, so with a
        value model that knows it the gradient of *every* sample is 0: without whitening the steps die out.
        """
        kleash.train(
            policy=policy,
            tokenizer=self.tokenizer,
            reward=self.reward,
            prompts=self.prompts,
            out=out,
            leash=kleash.LeashConfig(beta=beta),
            rollout=kleash.RolloutConfig(prompts_per_update=64, max_new_tokens=self.world.length),
            ppo=kleash.PPOConfig(
                epochs=4,
                minibatches=1,
                learning_rate=learning_rate,
                learning_rate_schedule="linear",
                gae_lambda=1.0,
                value_coefficient=0.5,
                value_clip_range=10.0,
                whiten_advantages=False,
            ),
            updates=updates,
            quiet=True,
        )
        return [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]


@torch.no_grad()
def three_way_policy(game: Game, probabilities: list[float]) -> nn.Module:
    """A real model that answers the one prompt with these probabilities."""
    model = tiny_policy(0, vocab=3, tie_word_embeddings=False, **ALL_EOS)
    prompt = torch.tensor([game.tokenizer(game.prompts[0])["input_ids"]])
    hidden = model.base_model(input_ids=prompt).last_hidden_state[0, -1]
    logits = torch.tensor(probabilities).log().unsqueeze(1)
    model.get_output_embeddings().weight.copy_(logits * hidden / hidden.square().sum())
    return model


@pytest.mark.parametrize(
    ("beta", "optimum", "kl_policy_ref", "objective"),
    [
        (1.0, [0.179000, 0.291944, 0.529056], 0.322834, 1.027222),
        (0.5, [0.036667, 0.162559, 0.800774], 0.915475, 1.306369),
    ],
)
def test_ppo_finds_the_closed_form_optimum_of_the_three_way_example(tmp_path, beta, optimum, kl_policy_ref, objective):
    """rho = (.5, .3, .2), r = (0, 1, 2), one token: the published numbers, reached from rho by the real loop."""
    scores = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    game = Game(world=World(vocab=3, length=1), prompts=["cat"], scores=scores)
    policy = three_way_policy(game, [0.5, 0.3, 0.2])
    start = game.sequence_logprobs(policy)
    torch.testing.assert_close(start.exp(), torch.tensor([0.5, 0.3, 0.2]).double(), atol=1e-6, rtol=0)
    best = torch.tensor(optimum, dtype=torch.float64).log()
    assert game.kl(policy, best) > 0.3

    records = game.train(policy, beta, tmp_path / "run", updates=30, learning_rate=0.01)

    assert game.kl(policy, best) < 0.01
    drift = game.kl(policy, start)
    assert game.expected(policy, scores) - beta * drift == pytest.approx(objective, abs=0.01)
    assert drift == pytest.approx(kl_policy_ref, abs=0.1)
    # one token: the exact KL of the only position is the whole KL, without any noise of sampling
    assert records[0]["kl_policy_ref_per_sequence"] == 0.0
    assert records[-1]["kl_policy_ref_per_sequence"] == pytest.approx(drift, abs=0.01)
    assert all(record["ratio_max_first_step"] == 1.0 for record in records)


@pytest.mark.slow
@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_ppo_finds_the_closed_form_optimum_of_two_prompts_with_responses_that_end(tmp_path, beta):
    """Prompts of different lengths, responses of one or two tokens, a score for each of the 26 from thin air."""
    world = World(vocab=4, length=2, eos=0, prompts=2)
    scores = torch.randn(len(world.responses), dtype=torch.float64, generator=generator(0))
    game = Game(world=world, prompts=["cat", "dog dog"], scores=scores)
    policy = tiny_policy(0, vocab=4, initializer_range=0.3, scale=0.3, tie_word_embeddings=False, **ALL_EOS)
    start = game.sequence_logprobs(policy)
    optimum = game.optimum(start, beta)
    assert game.kl(policy, optimum.sequence_logprobs) > 0.4

    records = game.train(policy, beta, tmp_path / "run", updates=90, learning_rate=0.005)

    assert game.kl(policy, optimum.sequence_logprobs) < 0.01
    drift = game.kl(policy, start)
    assert game.expected(policy, scores) - beta * drift == pytest.approx(float(optimum.objective), abs=0.01)
    assert records[-1]["kl_policy_ref_per_sequence"] == pytest.approx(drift, rel=0.25)  # an average over 64 responses
