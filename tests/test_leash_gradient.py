"""The gradient of the whole PPO loss at step 0, against the true one of E[score] - beta * KL.

Every response of a world goes once through kleash's own scoring, rewards, advantages and steps. What flows back
from a response is weighed by its probability, so the gradient is the expectation itself, not a sample of it.
"""

from itertools import product

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

    def __init__(
        self, world: World, which: Tensor, logits: Tensor, *, weights: Tensor | None = None, linear: bool = True
    ) -> None:
        nn.Module.__init__(self)
        self.logits, self.rows, self.weights = nn.Parameter(logits.clone()), world.states[which], weights
        self.linear, self.vocab, self.model = Identity() if linear else None, world.vocab, self

    def states(self, part: MicroBatch) -> Tensor:
        return self.logits[self.rows[part.rows, : part.time]][part.response_mask]

    def forward(self, part: MicroBatch, *others: object, temperature: float) -> PositionStats:
        stats = super().forward(part, *others, temperature=temperature)
        for column in (stats.policy_logprobs, stats.kl_policy_ref_per_token):
            if column is not None and column.requires_grad:
                column.register_hook(lambda g: g * self.weights[part.rows].unsqueeze(1))
        return stats


class Values(nn.Module):
    """A value for each state, out of thin air: any baseline leaves the gradient as it is."""

    def __init__(self, world: World, which: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(world.rows, dtype=torch.float64, generator=generator(3)))
        self.states, self.row = world.states[which], 0

    def forward(self, sequences: Tensor, attention_mask: Tensor, time: int) -> Tensor:
        rows = slice(self.row, self.row + len(sequences))
        self.row = (self.row + len(sequences)) % len(self.states)
        return self.table[self.states[rows, :time]]


def these_responses(world: World, which: Tensor) -> Rollout:
    """Some responses as one rollout; the prompts, of different lengths, are padded on the left."""
    number, responses, mask = world.prompt_of[which], world.responses[which], world.response_mask[which]
    asked = torch.stack([number > 0, torch.ones_like(number, dtype=torch.bool)], 1)
    return Rollout(
        sequences=torch.cat([torch.stack([number, number], 1), responses], 1),
        attention_mask=torch.cat([asked, mask], 1),
        response_mask=mask,
        rollout_logprobs=torch.zeros(mask.shape),
        finished=torch.ones(len(which), dtype=torch.bool),
        completions=[""] * len(which),
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

    def found_gradient(self, form: str, **options: object) -> Tensor:
        """The expectation of the first step's gradient over every response, by its probability."""
        weights = self.world.sequence_logprobs(self.policy).exp() / self.world.prompts
        return self.gradient_of(torch.arange(len(weights)), form, weights=weights, **options)

    def gradient_of(
        self, which: Tensor, form: str, *, weights: Tensor, linear: bool = True, parts: int = 1, **changes: object
    ) -> Tensor:
        """The gradient uphill that the first step on these responses takes, times what its mean was divided by."""
        world = self.world
        config = PPOConfig(
            epochs=1, minibatches=1, gae_lambda=1.0, value_coefficient=0.1, max_gradient_norm=1e12, **changes
        )
        policy = Table(world, which, self.policy, weights=weights, linear=linear)
        reference = Table(world, which, self.ref, linear=linear).requires_grad_(False)
        models = Models(policy=policy, value=Values(world, which), reference=reference)
        rollout, rows = these_responses(world, which), torch.arange(len(which)).chunk(parts)
        kept = FORMS[form].in_loss == "exact" and linear
        scored = score_rollout(models, rollout, list(rows), temperature=1.0, keep_ref_states=kept)
        assert (scored.ref_states is not None) == kept
        aim = targets_of(
            rollout, scored, self.scores[which], config, form=FORMS[form], beta=self.beta, reduce=one_process
        )
        accelerator = Accelerator()
        optimizer = accelerator.prepare(torch.optim.SGD(policy.parameters(), lr=0.0))
        stats = ppo_update(
            models, rollout, aim.targets, iter([[list(rows)]]), config,
            temperature=1.0, optimizer=optimizer, accelerator=accelerator,
        )  # fmt: skip
        assert stats.ratio_max == 1.0
        divisor = int(rollout.response_mask.sum()) if config.reduction == "token_mean" else len(which)
        assert policy.logits.grad is not None
        return -policy.logits.grad * divisor * aim.scale


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


@pytest.mark.parametrize("whiten", [True, False])
def test_any_share_of_the_control_variate_leaves_the_gradient_as_it_is(
    oracle: Oracle, whiten: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    share = torch.tensor(0.3, dtype=torch.float64)
    monkeypatch.setattr("kleash.targets.control_shares", lambda a, *_, **__: share.expand(len(a)))
    found = oracle.found_gradient("blend", whiten_advantages=whiten)
    torch.testing.assert_close(found, oracle.true_gradient(), atol=1e-9, rtol=0)


def test_fitted_on_the_other_responses_of_a_batch_the_shares_leave_it_too() -> None:
    """The expectation over every batch of two that can be drawn, shares and all."""
    oracle = Oracle(World(vocab=3, length=2, eos=0))
    weights = oracle.world.sequence_logprobs(oracle.policy).exp()
    expected = torch.zeros_like(oracle.policy)
    for pair in product(range(len(weights)), repeat=2):
        which = torch.tensor(pair)
        even = torch.full((2,), 0.5, dtype=torch.float64)  # each response is half of the mean
        one = oracle.gradient_of(which, "blend", weights=even, whiten_advantages=False, reduction="sequence_sum")
        expected += weights[which].prod() * one
    torch.testing.assert_close(expected, oracle.true_gradient(), atol=1e-9, rtol=0)


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
    assert wrong.pop("blend")[1] > 0.99  # its shares are fitted to responses as if they were equally likely
    assert wrong["k1"] == pytest.approx((1, 1), abs=1e-9)
    assert wrong["exact_in_loss"] == pytest.approx((0.82, 0.952), abs=5e-3)
    torch.testing.assert_close(found["k2_in_loss"], found["exact_in_loss"], atol=1e-12, rtol=0)
    assert wrong["k3_in_loss"] == pytest.approx((0.79, 0.933), abs=5e-3)
    assert wrong["k3_in_reward"] == pytest.approx((0.39, 0.680), abs=5e-3)
