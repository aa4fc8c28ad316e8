"""The gradient of the whole PPO loss at step 0, against the true one of E[score] - beta * KL.

Every response of a world goes once through kleash's own scoring, rewards, advantages and steps. What flows back
from a response is weighed by its probability, so the gradient is the expectation itself, not a sample of it.
"""

import pytest
import torch
from accelerate import Accelerator
from exact import World, cosine, generator, gradient
from torch import Tensor, nn

from kleash.batch import MicroBatch, Rollout
from kleash.fused.head import Head
from kleash.kl_form import FORMS
from kleash.language_model import LanguageModel, Models, PositionStats
from kleash.linear_head import LinearHead
from kleash.masking import one_process
from kleash.ppo import PPOConfig, ppo_update
from kleash.scoring import score_rollout
from kleash.targets import targets_of


class Identity(LinearHead):
    """The head of a table: hidden states are the logits themselves."""

    def of(self, model: nn.Module) -> Head:
        return Head(weight=torch.eye(model.vocab, dtype=torch.float64))


class Table(LanguageModel):
    """A policy that is a table of logits, one row per state; each response weighs as much as `weights` [N] says."""

    def __init__(self, world: World, logits: Tensor, *, weights: Tensor | None = None, linear: bool = True) -> None:
        nn.Module.__init__(self)
        self.logits, self.world, self.weights = nn.Parameter(logits.clone()), world, weights
        self.linear, self.vocab, self.model = Identity() if linear else None, world.vocab, self

    def states(self, part: MicroBatch) -> Tensor:
        return self.logits[self.world.states[part.rows, : part.time]][part.response_mask]

    def forward(self, part: MicroBatch, *others: object, temperature: float) -> PositionStats:
        stats = super().forward(part, *others, temperature=temperature)
        for column in (stats.policy_logprobs, stats.kl_policy_ref_per_token):
            if column is not None and column.requires_grad:
                column.register_hook(lambda g: g * self.weights[part.rows].unsqueeze(1))
        return stats


class Values(nn.Module):
    """A value for each state, out of thin air: any baseline leaves the gradient as it is."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(world.rows, dtype=torch.float64, generator=generator(3)))
        self.world, self.row = world, 0

    def forward(self, sequences: Tensor, attention_mask: Tensor, time: int) -> Tensor:
        rows = slice(self.row, self.row + len(sequences))
        self.row = (self.row + len(sequences)) % len(self.world.responses)
        return self.table[self.world.states[rows, :time]]


def every_response(world: World) -> Rollout:
    """All responses as one rollout; the prompts, of different lengths, are padded on the left."""
    prompt = torch.stack([world.prompt_of, world.prompt_of], 1)
    asked = torch.stack([world.prompt_of > 0, torch.ones_like(world.prompt_of, dtype=torch.bool)], 1)
    return Rollout(
        sequences=torch.cat([prompt, world.responses], 1),
        attention_mask=torch.cat([asked, world.response_mask], 1),
        response_mask=world.response_mask,
        rollout_logprobs=torch.zeros(world.response_mask.shape),
        finished=torch.ones(len(world.responses), dtype=torch.bool),
        completions=[""] * len(world.responses),
    )


class Oracle:
    """A drifted policy in a world, its true gradient, and the one that kleash takes."""

    def __init__(self, world: World, *, beta: float = 0.7, drift: float = 0.5, scores: bool = True) -> None:
        self.world, self.beta = world, beta
        self.ref = world.random_logits(0)
        self.policy = self.ref + world.random_logits(1, scale=drift)
        noise = torch.randn(len(world.responses), dtype=torch.float64, generator=generator(2))
        self.scores = noise if scores else torch.zeros_like(noise)

    def true_gradient(self) -> Tensor:
        def objective(logits: Tensor) -> Tensor:
            score = self.world.expectation(logits, self.scores)
            return score - self.beta * self.world.sequence_kl(logits, self.ref)

        return gradient(objective, self.policy)

    def found_gradient(self, form: str, *, linear: bool = True, parts: int = 1, **changes: object) -> Tensor:
        """The gradient uphill that the first step of an update takes, times what its mean was divided by."""
        world = self.world
        weights = world.sequence_logprobs(self.policy).exp() / world.prompts
        config = PPOConfig(
            epochs=1, minibatches=1, gae_lambda=1.0, value_coefficient=0.1, max_gradient_norm=1e12, **changes
        )
        policy = Table(world, self.policy, weights=weights, linear=linear)
        models = Models(policy=policy, value=Values(world), reference=Table(world, self.ref, linear=linear))
        models.reference.requires_grad_(False)
        rollout, rows = every_response(world), torch.arange(len(world.responses)).chunk(parts)
        kept = FORMS[form].in_loss == "exact" and linear
        scored = score_rollout(models, rollout, list(rows), temperature=1.0, keep_ref_states=kept)
        assert (scored.ref_states is not None) == kept
        targets, scale = targets_of(
            rollout, scored, self.scores, config, form=FORMS[form], beta=self.beta, reduce=one_process
        )
        accelerator = Accelerator()
        optimizer = accelerator.prepare(torch.optim.SGD(policy.parameters(), lr=0.0))
        stats = ppo_update(
            models, rollout, targets, iter([[list(rows)]]), config,
            temperature=1.0, optimizer=optimizer, accelerator=accelerator,
        )  # fmt: skip
        assert stats.ratio_max == 1.0
        per_token = config.reduction == "token_mean"
        divisor = int(world.response_mask.sum()) if per_token else len(world.responses)
        assert policy.logits.grad is not None
        return -policy.logits.grad * divisor * scale


WORLDS = {
    "4 tokens, 6 steps": World(vocab=4, length=6),
    "3 tokens, 10 steps": World(vocab=3, length=10),
    "2 prompts, EOS within 4": World(vocab=3, length=4, eos=0, prompts=2),
    "3 prompts, Markov, EOS within 5": World(vocab=4, length=5, eos=1, prompts=3, markov=True),
    "one step": World(vocab=5, length=1),
}


@pytest.fixture(params=WORLDS, ids=lambda name: name)
def oracle(request: pytest.FixtureRequest) -> Oracle:
    return Oracle(WORLDS[request.param])


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_sum"])
@pytest.mark.parametrize("whiten", [True, False])
@pytest.mark.parametrize("form", ["exact", "k1"])
def test_the_first_step_takes_the_true_gradient(oracle: Oracle, form: str, whiten: bool, reduction: str) -> None:
    truth = oracle.true_gradient()
    found = oracle.found_gradient(form, whiten_advantages=whiten, reduction=reduction)
    assert truth.norm() > 0.05
    torch.testing.assert_close(found, truth, atol=1e-9, rtol=0)


@pytest.mark.parametrize("form", ["exact", "k1"])
def test_full_logits_and_micro_batches_take_it_too(form: str) -> None:
    oracle = Oracle(WORLDS["2 prompts, EOS within 4"])
    truth = oracle.true_gradient()
    for linear, parts in ((False, 1), (True, 7), (False, 7)):
        found = oracle.found_gradient(form, linear=linear, parts=parts)
        torch.testing.assert_close(found, truth, atol=1e-9, rtol=0)


def test_discounted_the_two_forms_still_mean_the_same() -> None:
    oracle = Oracle(WORLDS["2 prompts, EOS within 4"])
    exact, k1 = (oracle.found_gradient(form, gamma=0.8) for form in ("exact", "k1"))
    torch.testing.assert_close(exact, k1, atol=1e-9, rtol=0)
    assert (exact - oracle.true_gradient()).norm() > 0.01


def test_each_biased_form_is_as_wrong_as_the_house_says() -> None:
    """The norms and cosines that kleash.kl_form states; how wrong they are is a matter of the world."""
    oracle = Oracle(WORLDS["4 tokens, 6 steps"], beta=1.0, scores=False)
    truth = oracle.true_gradient()
    found = {form: oracle.found_gradient(form, whiten_advantages=False) for form in FORMS}
    wrong = {name: (float(one.norm() / truth.norm()), cosine(one, truth)) for name, one in found.items()}
    assert wrong["exact"] == pytest.approx((1, 1), abs=1e-9)
    assert wrong["k1"] == pytest.approx((1, 1), abs=1e-9)
    assert wrong["exact_in_loss"] == pytest.approx((0.82, 0.952), abs=5e-3)
    torch.testing.assert_close(found["k2_in_loss"], found["exact_in_loss"], atol=1e-12, rtol=0)
    assert wrong["k3_in_loss"] == pytest.approx((0.79, 0.933), abs=5e-3)
    assert wrong["k3_in_reward"] == pytest.approx((0.39, 0.680), abs=5e-3)
