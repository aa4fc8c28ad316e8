"""The whole loop against the closed form: PPO must find the policy that maximises E[score - beta * KL].

Every response of these worlds can be written down, so pi* and its distance are sums, not estimates:
pi* = rho exp(score / beta) / Z (Korbak et al. 2022).
"""

import json
from pathlib import Path

import pytest
import torch
from exact import World, generator
from game import ALL_EOS, Game
from tiny import tiny_policy
from torch import nn

import kleash


def train(
    game: Game, policy: nn.Module, beta: float, out: Path, *, updates: int, learning_rate: float, kl: str
) -> list[dict]:
    """The real loop, all of it; returns its records.

    At the optimum score - beta * log(pi / rho) is the same number for every response to a prompt, so with a
    value model that knows it the gradient of *every* sample is 0: without whitening the steps die out.
    """
    kleash.train(
        policy=policy,
        tokenizer=game.tokenizer,
        reward=game.reward,
        prompts=game.prompts,
        out=out,
        kl=kl,
        leash=kleash.LeashConfig(beta=beta),
        rollout=kleash.RolloutConfig(prompts_per_update=64, max_new_tokens=game.world.length),
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
        preflight=False,  # a world of four tokens has none to pad with, and its tokenizer names one all the same
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


FORMS = {"k1": 1.0, "blend": 1.0, "exact": 2.0}  # near the optimum only k1's noise cancels the score's: see LOG.md


@pytest.mark.parametrize("kl", FORMS)
@pytest.mark.parametrize(
    ("beta", "optimum", "kl_policy_ref", "objective"),
    [
        (1.0, [0.179000, 0.291944, 0.529056], 0.322834, 1.027222),
        (0.5, [0.036667, 0.162559, 0.800774], 0.915475, 1.306369),
    ],
)
def test_ppo_finds_the_closed_form_optimum_of_the_three_way_example(
    tmp_path, kl, beta, optimum, kl_policy_ref, objective
):
    """rho = (.5, .3, .2), r = (0, 1, 2), one token: the published numbers, reached from rho by the real loop."""
    scores = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    game = Game(world=World(vocab=3, length=1), prompts=["cat"], scores=scores)
    policy = three_way_policy(game, [0.5, 0.3, 0.2])
    start = game.sequence_logprobs(policy)
    torch.testing.assert_close(start.exp(), torch.tensor([0.5, 0.3, 0.2]).double(), atol=1e-6, rtol=0)
    best = torch.tensor(optimum, dtype=torch.float64).log()
    assert game.kl(policy, best) > 0.3

    records = train(game, policy, beta, tmp_path / "run", updates=30, learning_rate=0.01, kl=kl)

    assert game.kl(policy, best) < 0.01 * FORMS[kl]
    drift = game.kl(policy, start)
    assert game.expected(policy, scores) - beta * drift == pytest.approx(objective, abs=0.01 * FORMS[kl])
    assert drift == pytest.approx(kl_policy_ref, abs=0.1 * FORMS[kl])
    # one token: the exact KL of the only position is the whole KL, without any noise of sampling
    assert records[0]["kl_policy_ref_per_sequence"] == 0.0
    assert records[-1]["kl_policy_ref_per_sequence"] == pytest.approx(drift, abs=0.01)
    assert all(record["ratio_max_first_step"] == 1.0 for record in records)


@pytest.mark.slow
@pytest.mark.parametrize("kl", FORMS)
@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_ppo_finds_the_closed_form_optimum_of_two_prompts_with_responses_that_end(tmp_path, kl, beta):
    """Prompts of different lengths, responses of one or two tokens, a score for each of the 26 from thin air."""
    world = World(vocab=4, length=2, eos=0, prompts=2)
    scores = torch.randn(len(world.responses), dtype=torch.float64, generator=generator(0))
    game = Game(world=world, prompts=["cat", "dog dog"], scores=scores)
    policy = tiny_policy(0, vocab=4, initializer_range=0.3, scale=0.3, tie_word_embeddings=False, **ALL_EOS)
    start = game.sequence_logprobs(policy)
    optimum = game.optimum(start, beta)
    assert game.kl(policy, optimum.sequence_logprobs) > 0.4

    records = train(game, policy, beta, tmp_path / "run", updates=90, learning_rate=0.005, kl=kl)

    assert game.kl(policy, optimum.sequence_logprobs) < 0.01 * FORMS[kl]
    drift = game.kl(policy, start)
    assert game.expected(policy, scores) - beta * drift == pytest.approx(float(optimum.objective), abs=0.01 * FORMS[kl])
    assert records[-1]["kl_policy_ref_per_sequence"] == pytest.approx(drift, rel=0.25)  # an average over 64 responses
