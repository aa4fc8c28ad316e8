"""The steps of an update: ratio 1 at the start, the true gradient, and figures that are token means."""

import copy
import math
from collections.abc import Callable
from itertools import chain

import pytest
import torch
from accelerate import Accelerator
from exact import World
from hypothesis import given
from hypothesis import strategies as st
from tiny import LIVELY, tiny_models, tiny_policy, tiny_rollout
from torch import Tensor

from kleash.advantages import generalized_advantages
from kleash.batch import Rollout
from kleash.errors import NonFiniteError
from kleash.estimators import kl_policy_ref_per_token_k1
from kleash.language_model import Models, language_models
from kleash.masking import one_process
from kleash.models import fingerprint, frozen, response_logits, trainable_parameters, value_model_from_policy
from kleash.ppo import PPOConfig, Targets, UpdateStats, minibatches_of, ppo_update, whitened_advantages
from kleash.rewards import adjusted_rewards
from kleash.scoring import Scored, score_rollout

ARCHITECTURES = ["gpt2", "llama"]
Epochs = list[list[list[Tensor]]]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def epochs_of(config: PPOConfig, rows: int = 8) -> Epochs:
    return [minibatches_of(rows, config, generator(epoch)) for epoch in range(config.epochs)]


def random_targets(scored: Scored, mask: Tensor, *, seed: int = 0) -> Targets:
    """The scored log-probs and values, with advantages and returns out of the air."""
    advantages, returns = (torch.randn(mask.shape, generator=generator(seed + i)) for i in range(2))
    return Targets(
        old_logprobs=scored.policy_logprobs,
        old_values=scored.values,
        advantages=advantages * mask,
        returns=(scored.values + returns) * mask,
    )


def sgd(models: Models, lr: float) -> torch.optim.Optimizer:
    """Plain steps, so that the movement of the parameters is the clipped gradient itself."""
    return torch.optim.SGD(list(trainable_parameters(models.policy, models.value)), lr=lr)


def updated(
    models: Models,
    rollout: Rollout,
    targets: Targets,
    config: PPOConfig,
    *,
    epochs: Epochs | None = None,
    optimizer: Callable[[Models], torch.optim.Optimizer] = lambda models: sgd(models, 0.0),
    temperature: float = 1.0,
) -> UpdateStats:
    accelerator = Accelerator()
    return ppo_update(
        models,
        rollout,
        targets,
        iter(epochs_of(config) if epochs is None else epochs),
        config,
        temperature=temperature,
        optimizer=accelerator.prepare(optimizer(models)),
        accelerator=accelerator,
    )


def first_rows(epochs: Epochs) -> list[Tensor]:
    """The micro-batches of the first epoch: the ones that scoring walks through."""
    return list(chain.from_iterable(epochs[0]))


def parameters_of(models: Models) -> Tensor:
    return torch.cat([p.detach().flatten() for p in trainable_parameters(models.policy, models.value)])


def gradients_of(models: Models) -> Tensor:
    return torch.cat([p.grad.flatten() for p in trainable_parameters(models.policy, models.value)])


# --- step 0 ---


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("minibatches", "micro_batch"), [(1, None), (1, 3), (2, None), (2, 3), (4, 1), (8, None)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_ratio_of_the_first_step_is_exactly_1(architecture, minibatches, micro_batch, temperature):
    """Also for an epoch without movement, for every minibatch; dropout in the config is off."""
    policy = tiny_policy(2, architecture=architecture, dropout=0.5, **LIVELY)
    models, config = tiny_models(policy), PPOConfig(epochs=1, minibatches=minibatches, micro_batch=micro_batch)
    rollout, epochs = tiny_rollout(policy, eos=(1, 4), temperature=temperature), epochs_of(config)
    scored = score_rollout(models, rollout, first_rows(epochs), temperature=temperature)
    targets = random_targets(scored, rollout.response_mask)
    stats = updated(models, rollout, targets, config, epochs=epochs, temperature=temperature)
    assert stats.ratio_max_first_step == 1.0
    assert stats.ratio_max == 1.0
    assert stats.ratio_mean == 1.0
    assert stats.clip_share == stats.value_clip_share == stats.kl_old_policy_per_token_k3 == 0.0


def test_after_a_step_the_ratio_moves_and_the_first_one_stays_1():
    policy = tiny_policy(2, **LIVELY)
    models, config = tiny_models(policy), PPOConfig(epochs=3, minibatches=2)
    rollout, epochs = tiny_rollout(policy), epochs_of(config)
    scored = score_rollout(models, rollout, first_rows(epochs), temperature=1.0)
    targets = random_targets(scored, rollout.response_mask)
    stats = updated(models, rollout, targets, config, epochs=epochs, optimizer=lambda m: sgd(m, 0.3))
    assert stats.ratio_max_first_step == 1.0
    assert stats.ratio_max > 1.01
    assert stats.kl_old_policy_per_token_k3 > 0
    again = score_rollout(models, rollout, first_rows(epochs), temperature=1.0)
    assert (again.kl_policy_ref_per_token[rollout.response_mask] > 0).all()  # it left its reference


# --- the gradient ---


def enumerated(world: World, prompts: list[list[int]]) -> Rollout:
    """Every response of a world as one rollout, with the prompts padded on the left."""
    longest, mask = max(map(len, prompts)), world.response_mask
    asked = [prompts[i] for i in world.prompt_of.tolist()]
    before = torch.tensor([[0] * (longest - len(p)) + p for p in asked])
    attention = torch.tensor([[i >= longest - len(p) for i in range(longest)] for p in asked])
    return Rollout(
        sequences=torch.cat([before, world.responses], 1),
        attention_mask=torch.cat([attention, mask], 1),
        response_mask=mask,
        rollout_logprobs=torch.zeros(mask.shape),
        finished=torch.ones(len(mask), dtype=torch.bool),
        completions=[""] * len(mask),
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_step_follows_the_true_gradient_of_score_less_beta_kl(architecture):
    """Every response, weighted by its probability: the step's gradient is that of E[score] - beta * KL, summed up.

    The objective is differentiated by autograd through an enumeration that knows nothing of rewards,
    advantages or ratios.
    """
    world, beta, prompts = World(vocab=4, length=3, eos=0, prompts=2), 0.7, [[1], [2, 3]]
    scores = torch.randn(len(world.responses), dtype=torch.float64, generator=generator())
    shape = {"architecture": architecture, "vocab": 4, **LIVELY}
    policy, reference = tiny_policy(0, **shape).double(), frozen(tiny_policy(1, **shape).double())
    scored_policy, scored_reference = language_models(policy, reference, vocab=4)
    models = Models(policy=scored_policy, value=value_model_from_policy(policy), reference=scored_reference)
    rollout, mask = enumerated(world, prompts), world.response_mask
    rows = torch.arange(len(mask))

    def sequence_logprobs(model: torch.nn.Module) -> Tensor:
        chosen = []
        for prompt, which in zip(prompts, rows.chunk(2), strict=True):
            text = torch.cat([torch.tensor(prompt).expand(len(which), -1), world.responses[which]], 1)
            log_probs = model(input_ids=text, attention_mask=torch.ones_like(text)).logits.log_softmax(-1)
            tokens = world.responses[which].unsqueeze(-1)
            chosen.append(log_probs[:, len(prompt) - 1 : -1].gather(-1, tokens).squeeze(-1))
        return torch.where(mask, torch.cat(chosen), 0.0).sum(1)

    logprobs, ref_logprobs = sequence_logprobs(policy), sequence_logprobs(reference).detach()
    objective = (logprobs.exp() * (scores - beta * (logprobs - ref_logprobs))).sum() / 2
    objective.backward()
    truth = torch.cat([p.grad.flatten() for p in policy.parameters()])

    scored = score_rollout(models, rollout, [rows], temperature=1.0)
    kl = kl_policy_ref_per_token_k1(scored.policy_logprobs, scored.ref_logprobs, mask)
    rewards = adjusted_rewards(scores.float(), kl, mask, beta=beta)
    advantages, returns = generalized_advantages(rewards, scored.values, mask, gamma=1.0, gae_lambda=1.0)
    weight = logprobs.detach().exp().unsqueeze(1) / 2 * mask.sum()  # the loss takes the mean over tokens
    targets = Targets(
        old_logprobs=scored.policy_logprobs, old_values=scored.values, advantages=weight * advantages, returns=returns
    )
    config = PPOConfig(value_coefficient=0.0, max_gradient_norm=1e9)
    updated(models, rollout, targets, config, epochs=[[list(rows.split(29))]])
    found = -torch.cat([p.grad.flatten() for p in policy.parameters()])
    assert truth.norm() > 0.1
    assert (found - truth).norm() < 1e-6 * truth.norm()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_micro_batched_equals_full_batch(architecture, micro_batch):
    """Gradients to 1e-10 in float64, and the parameters after a whole update of clipped Adam steps."""
    results = []
    for size in (None, micro_batch):
        policy = tiny_policy(2, architecture=architecture, **LIVELY).double()
        models, rollout = tiny_models(policy), tiny_rollout(policy, eos=(1, 4))
        scored = score_rollout(models, rollout, [torch.arange(8)], temperature=0.8)
        targets = random_targets(scored, rollout.response_mask)
        config = PPOConfig(epochs=1, minibatches=1, micro_batch=size)
        one = updated(models, rollout, targets, config, temperature=0.8)
        gradients = gradients_of(models)
        config = PPOConfig(epochs=3, minibatches=2, micro_batch=size)
        adam = lambda m: torch.optim.AdamW(list(trainable_parameters(m.policy, m.value)), lr=0.01)  # noqa: E731
        whole = updated(models, rollout, targets, config, optimizer=adam, temperature=0.8)
        results.append((gradients, parameters_of(models), one, whole))
    (full_gradients, full_parameters, *full_stats), (gradients, parameters, *stats) = results
    assert full_gradients.norm() > 0.01
    torch.testing.assert_close(gradients, full_gradients, atol=1e-10, rtol=0)
    torch.testing.assert_close(parameters, full_parameters, atol=1e-8, rtol=0)
    for found, expected in zip(stats, full_stats, strict=True):
        for name in UpdateStats.__dataclass_fields__:
            assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-6, abs=1e-9), name


def test_a_token_with_positive_advantage_becomes_likelier_and_values_near_their_returns():
    policy = tiny_policy(2, **LIVELY)
    models, rollout = tiny_models(policy), tiny_rollout(policy)
    scored = score_rollout(models, rollout, [torch.arange(8)], temperature=1.0)
    advantages = torch.zeros(rollout.response_mask.shape)
    advantages[3, 0] = 5.0
    targets = Targets(
        old_logprobs=scored.policy_logprobs,
        old_values=scored.values,
        advantages=advantages,
        returns=(scored.values + 1) * rollout.response_mask,
    )
    config = PPOConfig(epochs=1, minibatches=1, value_clip_range=100.0)
    updated(models, rollout, targets, config, optimizer=lambda m: sgd(m, 0.05))
    after = score_rollout(models, rollout, [torch.arange(8)], temperature=1.0)
    assert after.policy_logprobs[3, 0] > scored.policy_logprobs[3, 0]
    error_before = (targets.returns - scored.values)[rollout.response_mask].square().mean()
    error_after = (targets.returns - after.values)[rollout.response_mask].square().mean()
    assert error_after < error_before


def test_the_reference_neither_moves_nor_gathers_gradients():
    policy = tiny_policy(2, **LIVELY)
    models, rollout = tiny_models(policy), tiny_rollout(policy)
    before = fingerprint(models.reference)
    scored = score_rollout(models, rollout, [torch.arange(8)], temperature=1.0)
    updated(
        models, rollout, random_targets(scored, rollout.response_mask), PPOConfig(), optimizer=lambda m: sgd(m, 1.0)
    )
    assert fingerprint(models.reference) == before
    assert all(p.grad is None and not p.requires_grad for p in models.reference.parameters())
    assert fingerprint(models.policy) != before


@pytest.mark.parametrize("share", [0.25, 4.0])
def test_gradients_are_scaled_down_to_the_norm_and_never_up(share):
    policy = tiny_policy(2, **LIVELY).double()
    models, rollout = tiny_models(policy), tiny_rollout(policy)
    scored = score_rollout(models, rollout, [torch.arange(8)], temperature=1.0)
    targets, one_step = random_targets(scored, rollout.response_mask), {"epochs": 1, "minibatches": 1}
    norm = updated(models, rollout, targets, PPOConfig(**one_step, max_gradient_norm=1e9)).gradient_norm
    assert norm == pytest.approx(gradients_of(models).norm().item(), rel=1e-12)
    before = parameters_of(models)
    config = PPOConfig(**one_step, max_gradient_norm=share * norm)
    stats = updated(models, rollout, targets, config, optimizer=lambda m: sgd(m, 1.0))
    assert stats.gradient_norm == pytest.approx(norm, rel=1e-12)  # as it was before clipping
    moved = (parameters_of(models) - before).norm().item()
    assert moved == pytest.approx(norm * min(share, 1.0), rel=1e-5)


# --- the early end of an update ---


@pytest.mark.parametrize(("limit", "steps"), [(None, 6), (1e9, 6), (1e-12, 1)])
def test_an_update_ends_before_the_step_that_finds_the_policy_too_far_away(limit, steps):
    """The first step is measured on the old policy itself, at a KL of exactly 0, so one is always taken."""
    policy = tiny_policy(2, **LIVELY)
    models, rollout = tiny_models(policy), tiny_rollout(policy)
    config = PPOConfig(epochs=3, minibatches=2, max_kl_old_policy_per_token=limit)
    epochs = epochs_of(config)
    targets = random_targets(score_rollout(models, rollout, first_rows(epochs), temperature=1.0), rollout.response_mask)
    twin = copy.deepcopy(models)
    stats = updated(models, rollout, targets, config, epochs=epochs, optimizer=lambda m: sgd(m, 0.3))
    assert stats.optimizer_steps == steps
    flat = list(chain.from_iterable(epochs))
    updated(twin, rollout, targets, PPOConfig(), epochs=[flat[:steps]], optimizer=lambda m: sgd(m, 0.3))
    assert torch.equal(parameters_of(models), parameters_of(twin))  # the refused step changed nothing


def test_the_limit_is_held_against_the_mean_over_all_tokens_of_the_step():
    """Halves of the batch with a k3 of 0 and of log 2 - 1/2: their mean lies between the two limits."""
    policy = tiny_policy(2, **LIVELY).double()
    models, rollout = tiny_models(policy), tiny_rollout(policy, eos=(1, 4))
    scored = score_rollout(models, rollout, [torch.arange(8)], temperature=1.0)
    mask, lengths = rollout.response_mask, rollout.response_mask.sum(1)
    moved = torch.arange(8).unsqueeze(1) < 4  # their old log-prob is log 2 higher: d = log old - log new = log 2
    targets = Targets(
        old_logprobs=scored.policy_logprobs + math.log(2) * (moved & mask).double(),
        old_values=scored.values,
        advantages=torch.zeros_like(scored.values),
        returns=scored.values,
    )
    mean = float((math.log(2) - 0.5) * lengths[:4].sum() / lengths.sum())
    for limit, steps in ((1.001 * mean, 1), (0.999 * mean, 0)):
        config = PPOConfig(epochs=1, minibatches=1, micro_batch=3, max_kl_old_policy_per_token=limit)
        stats = updated(models, rollout, targets, config)
        assert stats.kl_old_policy_per_token_k3 == pytest.approx(mean, rel=1e-6)
        assert stats.optimizer_steps == steps


# --- the figures ---


def test_every_figure_of_an_update_equals_its_hand_sum():
    """Nothing moves, and the old log-probs are set so that every ratio is known."""
    policy = tiny_policy(2, **LIVELY).double()
    models, rollout = tiny_models(policy), tiny_rollout(policy, eos=(1, 4))
    mask = rollout.response_mask
    tokens = int(mask.sum())
    with torch.no_grad():
        inputs = (rollout.sequences, rollout.attention_mask, rollout.response_time)
        logits, values = response_logits(policy, *inputs), models.value(*inputs)
    logprobs = logits.log_softmax(-1).gather(-1, rollout.responses.unsqueeze(-1)).squeeze(-1)
    ratio = torch.where(torch.rand(mask.shape, generator=generator(1)) < 0.3, 1.5, 0.9).double()
    advantages = torch.randn(mask.shape, generator=generator(2)).double()
    returns, old_values = values + 1.0, values - 0.5
    targets = Targets(
        old_logprobs=logprobs - ratio.log(), old_values=old_values, advantages=advantages, returns=returns
    )
    config = PPOConfig(epochs=2, minibatches=2, micro_batch=3)
    stats = updated(models, rollout, targets, config)

    def mean(per_token: Tensor) -> float:
        return per_token[mask].sum().item() / tokens

    surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    assert stats.policy_loss == pytest.approx(-mean(surrogate), rel=1e-9)
    # the value came 0.5 up on its way of 1.5; beyond 0.2 only the clipped one counts: 1.3^2 / 2
    assert stats.value_loss == pytest.approx(1.3**2 / 2, rel=1e-9)
    assert stats.value_clip_share == 1.0
    assert stats.clip_share == pytest.approx(mean((ratio > 1.2).double()), rel=1e-12)
    assert stats.ratio_mean == pytest.approx(mean(ratio), rel=1e-12)
    assert stats.ratio_max == pytest.approx(1.5, rel=1e-12)
    # k3 of KL(old || new): d = log old - log new = -log ratio
    assert stats.kl_old_policy_per_token_k3 == pytest.approx(mean(ratio - 1 - ratio.log()), rel=1e-9)


def test_figures_weigh_minibatches_by_their_tokens():
    policy = tiny_policy(2, **LIVELY)
    models, rollout = tiny_models(policy), tiny_rollout(policy, eos=(1, 4))
    lengths = rollout.response_mask.sum(1)
    order = lengths.argsort()
    epochs = [[[order[:2]], [order[2:]]]]  # few short responses, then the long ones
    scored = score_rollout(models, rollout, first_rows(epochs), temperature=1.0)
    advantages = torch.zeros(rollout.response_mask.shape)
    advantages[order[:2]] = -1.0
    targets = Targets(
        old_logprobs=scored.policy_logprobs, old_values=scored.values, advantages=advantages, returns=scored.values
    )
    stats = updated(models, rollout, targets, PPOConfig(), epochs=epochs)
    assert stats.policy_loss == pytest.approx(int(lengths[order[:2]].sum()) / int(lengths.sum()), rel=1e-6)
    assert stats.value_loss == 0.0


@given(st.integers(1, 6), st.integers(1, 6), st.none() | st.integers(1, 8), st.integers(0, 99))
def test_minibatches_are_a_shuffled_partition(per_step, minibatches, micro_batch, seed):
    rows = per_step * minibatches
    config = PPOConfig(minibatches=minibatches, micro_batch=micro_batch)
    steps = minibatches_of(rows, config, generator(seed))
    assert len(steps) == minibatches
    assert sorted(torch.cat(list(chain.from_iterable(steps))).tolist()) == list(range(rows))
    for micro_batches in steps:
        assert sum(map(len, micro_batches)) == per_step
        assert all(len(part) <= (micro_batch or per_step) for part in micro_batches)
    again = minibatches_of(rows, config, generator(seed))
    assert all(map(torch.equal, chain.from_iterable(steps), chain.from_iterable(again)))


def test_whitened_advantages_come_with_the_number_they_were_divided_by():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    advantages = torch.tensor([[1.0, 3.0, math.nan], [5.0, math.inf, 0.0]])
    whitened, scale = whitened_advantages(advantages, mask, PPOConfig(), reduce=one_process)
    assert scale == pytest.approx(math.sqrt(8 / 3), rel=1e-6)  # mean 3, squares 4 + 0 + 4 over three tokens
    expected = torch.tensor([[-2.0, 0.0, 0.0], [2.0, 0.0, 0.0]]) / math.sqrt(8 / 3)
    torch.testing.assert_close(whitened, expected)
    plain, one = whitened_advantages(advantages, mask, PPOConfig(whiten_advantages=False), reduce=one_process)
    assert plain is advantages
    assert one == 1.0


# --- what is not finite ---


@pytest.mark.parametrize("field", ["advantages", "returns", "old_logprobs"])
def test_a_target_that_is_not_finite_stops_before_the_step(field):
    policy = tiny_policy(2, **LIVELY)
    models, rollout = tiny_models(policy), tiny_rollout(policy)
    scored = score_rollout(models, rollout, [torch.arange(8)], temperature=1.0)
    targets = random_targets(scored, rollout.response_mask)
    getattr(targets, field)[5, 0] = math.nan
    before = parameters_of(models).clone()
    config = PPOConfig(epochs=1, minibatches=1, micro_batch=3)
    with pytest.raises(NonFiniteError, match=r"finite loss, found nan .*; lower the learning rate"):
        updated(models, rollout, targets, config, optimizer=lambda m: sgd(m, 1.0))
    assert torch.equal(parameters_of(models), before)


def test_nan_parameters_stop_the_update():
    policy = tiny_policy(2, **LIVELY)
    models, rollout = tiny_models(policy), tiny_rollout(policy)
    scored = score_rollout(models, rollout, [torch.arange(8)], temperature=1.0)
    with torch.no_grad():
        next(models.value.parameters())[:] = math.nan
    with pytest.raises(NonFiniteError, match=r"found nan \(policy_loss [-0-9.e]+, leash_loss 0, value_loss nan\)"):
        updated(models, rollout, random_targets(scored, rollout.response_mask), PPOConfig())


def test_a_gradient_that_is_not_finite_stops_before_the_step():
    policy = tiny_policy(2, **LIVELY)
    models, rollout = tiny_models(policy), tiny_rollout(policy)
    scored = score_rollout(models, rollout, [torch.arange(8)], temperature=1.0)
    before = copy.deepcopy(policy.state_dict())
    next(policy.parameters()).register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(NonFiniteError, match="finite gradient norm"):
        updated(
            models, rollout, random_targets(scored, rollout.response_mask), PPOConfig(), optimizer=lambda m: sgd(m, 1.0)
        )
    assert all(torch.equal(policy.state_dict()[name], tensor) for name, tensor in before.items())
