"""k1 as a control variate: noise of mean 0, shares by least squares on the other responses, and what they take away."""

import pytest
import torch
from exact import World, generator
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kleash.advantages import generalized_advantages
from kleash.control import control_shares, control_variate
from kleash.errors import ShapeError, ValueRangeError
from kleash.rewards import adjusted_rewards_exact


class Drawn:
    """Responses of a world with their drift under a policy and a reference, float64."""

    def __init__(self, world: World, policy: Tensor, ref: Tensor, which: Tensor) -> None:
        self.mask = world.response_mask[which]
        self.k1 = (world.token_logprobs(policy) - world.token_logprobs(ref))[which]
        log_pi, log_rho = world.log_probs(policy), world.log_probs(ref)
        self.kl = (log_pi.exp() * (log_pi - log_rho)).sum(-1)[which]

    def control(self, *, beta: float = 0.7, gamma: float = 1.0, gae_lambda: float = 1.0) -> Tensor:
        return control_variate(self.k1, self.kl, self.mask, beta=beta, gamma=gamma, gae_lambda=gae_lambda)


WORLD = World(vocab=3, length=4, eos=0, prompts=2)
REF = WORLD.random_logits(0)
POLICY = REF + WORLD.random_logits(1, scale=0.5)
EVERY = torch.arange(len(WORLD.responses))


def test_in_every_state_the_noise_has_mean_0():
    drawn = Drawn(WORLD, POLICY, REF, EVERY)
    control = drawn.control(gamma=0.9, gae_lambda=0.8)
    weights = WORLD.sequence_logprobs(POLICY).exp()
    for t in range(WORLD.length):
        here = WORLD.response_mask[:, t]
        sums = torch.zeros(WORLD.rows, dtype=torch.float64)
        sums.index_add_(0, WORLD.states[here, t], (weights * control[:, t])[here])
        assert control[here, t].abs().max() > 0.01
        assert sums.abs().max() < 1e-15


@given(st.integers(0, 99))
def test_the_control_is_the_discounted_sum_of_the_noise_to_come(seed):
    which = torch.randint(len(EVERY), (4,), generator=generator(seed))
    drawn = Drawn(WORLD, POLICY, REF, which)
    control, noise = drawn.control(gamma=0.9, gae_lambda=0.5), -0.7 * (drawn.k1 - drawn.kl) * drawn.mask
    for row in range(4):
        for t in range(WORLD.length):
            expected = float(sum(0.45 ** (k - t) * noise[row, k] for k in range(t, WORLD.length)))
            assert float(control[row, t]) == pytest.approx(expected if drawn.mask[row, t] else 0, abs=1e-14)


@pytest.mark.parametrize(("slope", "expected"), [(-0.25, 0.25), (-1.0, 1.0), (-3.0, 1.0), (0.5, 0.0)])
def test_the_shares_are_the_least_squares_of_the_other_half_between_0_and_1(slope, expected):
    mask = torch.rand(10, 6, generator=generator(0)) < 0.7
    control = torch.randn(10, 6, dtype=torch.float64, generator=generator(1))
    exactly = control_shares(3.0 + slope * control, control, mask)
    torch.testing.assert_close(exactly, torch.full_like(exactly, expected), atol=1e-12, rtol=0)
    noisy = 3.0 + slope * control + 0.1 * torch.randn(10, 6, dtype=torch.float64, generator=generator(2))
    shares = control_shares(noisy, control, mask)
    for half in (0, 1):
        other = mask & (torch.arange(10) % 2 != half).unsqueeze(1)
        design = torch.stack([control[other], torch.ones_like(control[other])], 1)
        fitted = -torch.linalg.lstsq(design, noisy[other].unsqueeze(1)).solution[0].clamp(-1, 0)
        torch.testing.assert_close(shares[half::2], fitted.expand(5), atol=1e-10, rtol=0)


@given(st.integers(0, 7), st.floats(-9, 9))
def test_what_a_response_earned_does_not_touch_its_own_share(row, change):
    mask = torch.ones(8, 3, dtype=torch.bool)
    control = torch.randn(8, 3, dtype=torch.float64, generator=generator(2))
    advantages = torch.randn(8, 3, dtype=torch.float64, generator=generator(3)) - 0.5 * control
    before = control_shares(advantages, control, mask)[row]
    assert 0 < before < 1
    advantages[row] += change
    control[row] -= change
    assert control_shares(advantages, control, mask)[row] == before


def test_a_policy_that_has_not_moved_and_a_batch_of_one_have_no_share():
    drawn = Drawn(WORLD, REF, REF, EVERY)
    assert drawn.control().abs().max() == 0
    noise = torch.randn(drawn.mask.shape, dtype=torch.float64, generator=generator(0))
    assert control_shares(noise, drawn.control(), drawn.mask).abs().max() == 0
    assert control_shares(noise[:1, :3], -noise[:1, :3], torch.ones(1, 3, dtype=torch.bool)).tolist() == [0.0]


def test_at_the_optimum_all_of_k1_is_worth_having_and_no_noise_is_left():
    """score - beta log(pi / rho) is the same for every response; the values here know what is to come."""
    beta = 0.7
    scores = torch.randn(len(EVERY), dtype=torch.float64, generator=generator(3))
    best = WORLD.logits_of(WORLD.optimum(REF, scores, beta).sequence_logprobs)
    which = WORLD.sample(best, 400, seed=4)
    drawn = Drawn(WORLD, best, REF, which)
    rewards = adjusted_rewards_exact(scores[which], drawn.kl, drawn.mask, beta=beta)
    worth = values_of(best, scores, beta)[WORLD.states[which]]
    advantages, _ = generalized_advantages(rewards, worth, drawn.mask, gamma=1.0, gae_lambda=1.0)
    control = drawn.control(beta=beta)
    shares = control_shares(advantages, control, drawn.mask)
    torch.testing.assert_close(shares, torch.ones_like(shares), atol=1e-9, rtol=0)
    left = advantages + shares.unsqueeze(1) * control
    assert advantages[drawn.mask].std() > 0.3
    assert left[drawn.mask].abs().max() < 1e-9


def values_of(logits: Tensor, scores: Tensor, beta: float) -> Tensor:
    """[rows] what is to come in each state: E[score - beta * KL of the states after it]."""
    weights = WORLD.sequence_logprobs(logits).exp()
    kl = Drawn(WORLD, logits, REF, EVERY).kl * WORLD.response_mask
    total, mass = (torch.zeros(WORLD.rows, dtype=torch.float64) for _ in range(2))
    for t in range(WORLD.length):
        here = WORLD.response_mask[:, t]
        to_come = scores - beta * kl[:, t + 1 :].sum(1)
        total.index_add_(0, WORLD.states[here, t], (weights * to_come)[here])
        mass.index_add_(0, WORLD.states[here, t], weights[here])
    return total / mass.clamp_min(1e-300)


def test_two_processes_fit_what_one_would():
    """A process that adds up twice its own part stands for two that hold the same responses."""
    mask = torch.rand(6, 4, generator=generator(0)) < 0.8
    control, noise = torch.randn(2, 6, 4, dtype=torch.float64, generator=generator(5))
    advantages = noise - 0.5 * control
    alone = control_shares(*(torch.cat([x, x]) for x in (advantages, control, mask)))
    together = control_shares(advantages, control, mask, reduce=lambda x: 2 * x)
    assert 0 < alone[0] < 1
    torch.testing.assert_close(alone[:6], together, atol=1e-12, rtol=0)


def test_what_does_not_fit_is_refused():
    mask, kl = torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, 3)
    with pytest.raises(ValueRangeError, match="beta finite"):
        control_variate(kl, kl, mask, beta=-1.0, gamma=1.0, gae_lambda=1.0)
    with pytest.raises(ShapeError, match="tensors of one shape"):
        control_variate(kl[:1], kl, mask, beta=1.0, gamma=1.0, gae_lambda=1.0)
    with pytest.raises(ShapeError, match=r"torch\.bool"):
        control_variate(kl, kl, mask.long(), beta=1.0, gamma=1.0, gae_lambda=1.0)
