"""Figures that need several modules at once, each of them an enumerated sum put through kleash's own functions."""

import math

import pytest
import torch
from exact import World, cosine, generator, gradient, one_token
from hypothesis import given
from hypothesis import strategies as st

from kleash.advantages import generalized_advantages
from kleash.divergence import kl_divergence, kl_policy_ref_per_token
from kleash.estimators import (
    kl_policy_ref_per_token_k1,
    kl_policy_ref_per_token_k2,
    kl_policy_ref_per_token_k3,
    per_sequence,
)
from kleash.masking import masked, whiten
from kleash.rewards import adjusted_rewards

# --- gradients over sequences


class Run:
    """A world with a policy, a reference and scores, and every gradient that one could take there."""

    def __init__(self, world: World, *, drift: float = 0.5, beta: float = 0.7) -> None:
        self.world, self.beta, self.mask = world, beta, world.response_mask
        self.ref = world.random_logits(0)
        self.policy = self.ref + world.random_logits(1, scale=drift)
        self.scores = torch.randn(len(self.mask), dtype=torch.float64, generator=generator(2))
        self.values = torch.randn(world.rows, dtype=torch.float64, generator=generator(3))[world.states]

    def exact_kl(self, logits):
        return kl_policy_ref_per_token(self.world.log_probs(logits), self.world.log_probs(self.ref), self.mask)

    def estimated_kl(self, estimator, logits):
        return estimator(self.world.token_logprobs(logits), self.world.token_logprobs(self.ref), self.mask)

    def true_gradient(self):
        """Of E[score] - beta * KL, each a sum over every response."""

        def objective(logits):
            kl = self.world.sequence_kl(logits, self.ref)
            return self.world.expectation(logits, self.scores) - self.beta * kl

        return gradient(objective, self.policy)

    def true_kl_gradient(self):
        return gradient(lambda logits: self.world.sequence_kl(logits, self.ref), self.policy)

    def in_the_reward(self, weights_per_token):
        """Exact expectation, over the policy's responses, of sum_t weight_t * grad log pi(y_t)."""

        def surrogate(logits):
            return per_sequence(weights_per_token * self.world.token_logprobs(logits), self.mask)

        return gradient(lambda logits: self.world.expectation(self.policy, surrogate(logits)), self.policy)

    def in_the_loss(self, kl_of):
        """Exact expectation, over the policy's responses, of sum_t grad KL_t."""
        return gradient(
            lambda logits: self.world.expectation(self.policy, per_sequence(kl_of(logits), self.mask)), self.policy
        )

    def advantages(self, rewards):
        advantages, _ = generalized_advantages(rewards, self.values, self.mask, gamma=1.0, gae_lambda=1.0)
        return advantages

    def future_kl(self):
        """KL of the next position at each one: what a token answers for beside its own step."""
        return torch.nn.functional.pad(self.exact_kl(self.policy)[:, 1:], (0, 1))


WORLDS = {
    "4 tokens, 6 steps": World(vocab=4, length=6),
    "3 tokens, EOS within 4": World(vocab=3, length=4, eos=0),
    "2 prompts": World(vocab=3, length=3, eos=2, prompts=2),
    "one step": World(vocab=5, length=1),
    "Markov": World(vocab=3, length=4, markov=True),
}


@pytest.fixture(params=WORLDS.values(), ids=WORLDS.keys())
def run(request):
    return Run(request.param)


@pytest.fixture
def long_run():
    return Run(WORLDS["4 tokens, 6 steps"])


def test_k1_in_the_reward_gives_the_true_gradient_of_score_less_beta_kl(run):
    k1 = run.estimated_kl(kl_policy_ref_per_token_k1, run.policy)
    rewards = adjusted_rewards(run.scores, k1, run.mask, beta=run.beta)
    found = run.in_the_reward(run.advantages(rewards))
    torch.testing.assert_close(found, run.true_gradient(), atol=1e-13, rtol=1e-10)


def test_the_exact_kl_of_later_steps_in_the_reward_and_of_its_own_in_the_loss_gives_the_true_gradient(run):
    rewards = adjusted_rewards(run.scores, run.future_kl(), run.mask, beta=run.beta)
    found = run.in_the_reward(run.advantages(rewards)) - run.beta * run.in_the_loss(run.exact_kl)
    torch.testing.assert_close(found, run.true_gradient(), atol=1e-13, rtol=1e-10)


def test_whitened_the_two_parts_still_pull_along_the_true_gradient_if_both_are_divided_by_the_scale(long_run):
    run = long_run
    rewards = adjusted_rewards(run.scores, run.future_kl(), run.mask, beta=run.beta)
    whitened, scale = whiten(run.advantages(rewards), run.mask)
    in_the_reward, in_the_loss = run.in_the_reward(whitened), run.beta * run.in_the_loss(run.exact_kl)
    torch.testing.assert_close(in_the_reward - in_the_loss / scale, run.true_gradient() / scale, atol=1e-13, rtol=1e-10)
    assert scale > 1.2
    assert cosine(in_the_reward - in_the_loss, run.true_gradient()) < 0.999


def test_the_exact_kl_as_a_detached_reward_is_no_leash(long_run):
    run = long_run
    rewards = adjusted_rewards(0 * run.scores, run.exact_kl(run.policy), run.mask, beta=1.0)
    found, true = -run.in_the_reward(run.advantages(rewards)), run.true_kl_gradient()
    assert found.norm() < 0.4 * true.norm()
    assert cosine(found, true) < 0.8
    own_step_in_the_loss = run.in_the_loss(run.exact_kl)
    torch.testing.assert_close(found + own_step_in_the_loss, true, atol=1e-13, rtol=1e-10)


def test_on_one_step_the_exact_kl_as_a_detached_reward_pulls_nowhere_at_all():
    run = Run(WORLDS["one step"])
    rewards = adjusted_rewards(0 * run.scores, run.exact_kl(run.policy), run.mask, beta=1.0)
    assert run.in_the_reward(run.advantages(rewards)).norm() < 1e-15
    assert run.true_kl_gradient().norm() > 0.01


def test_in_the_loss_only_k2_and_the_exact_kl_agree_and_miss_the_later_steps(long_run):
    run = long_run
    exact = run.in_the_loss(run.exact_kl)
    k2 = run.in_the_loss(lambda logits: run.estimated_kl(kl_policy_ref_per_token_k2, logits))
    true = run.true_kl_gradient()
    torch.testing.assert_close(k2, exact, atol=1e-14, rtol=1e-11)
    assert 1e-3 < float((exact - true).norm() / true.norm()) < 0.4
    assert 0.9 < cosine(exact, true) < 0.9999


def test_k1_in_the_loss_pulls_nowhere(run):
    found = run.in_the_loss(lambda logits: run.estimated_kl(kl_policy_ref_per_token_k1, logits))
    assert found.norm() < 1e-14


def test_k3_in_the_loss_or_in_the_reward_is_the_gradient_of_something_else(long_run):
    run, true = long_run, long_run.true_kl_gradient()
    in_the_loss = run.in_the_loss(lambda logits: run.estimated_kl(kl_policy_ref_per_token_k3, logits))
    k3 = run.estimated_kl(kl_policy_ref_per_token_k3, run.policy)
    in_the_reward = -run.in_the_reward(run.advantages(adjusted_rewards(0 * run.scores, k3, run.mask, beta=1.0)))

    def reverse_kl_on_the_policys_text(logits):
        return masked(kl_divergence(run.world.log_probs(run.ref), run.world.log_probs(logits)), run.mask)

    torch.testing.assert_close(in_the_loss, run.in_the_loss(reverse_kl_on_the_policys_text), atol=1e-14, rtol=1e-11)
    assert cosine(in_the_loss, true) < 0.99
    assert cosine(in_the_reward, true) < 0.7
    assert in_the_reward.norm() < 0.7 * true.norm()


def test_drift_is_paid_for_and_never_rewarded(run):
    step = 1e-3 * run.true_kl_gradient()
    assert run.world.sequence_kl(run.policy - step, run.ref) < run.world.sequence_kl(run.policy, run.ref)
    k1 = run.estimated_kl(kl_policy_ref_per_token_k1, run.policy)
    rewards = adjusted_rewards(0 * run.scores, k1, run.mask, beta=1.0)
    uphill = 1e-3 * run.in_the_reward(run.advantages(rewards))
    assert run.world.sequence_kl(run.policy + uphill, run.ref) < run.world.sequence_kl(run.policy, run.ref)


# --- the closed-form optimum of score - beta * KL

THREE = World(vocab=3, length=1)
RHO = one_token([0.5, 0.3, 0.2])
SCORES = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("beta", "probabilities", "kl", "score", "objective"),
    [
        (1.0, [0.179000, 0.291944, 0.529056], 0.322834, 1.350056, 1.027222),
        (0.5, [0.036667, 0.162559, 0.800774], 0.915475, 1.764107, 1.306369),
    ],
)
def test_the_optimum_of_three_answers(beta, probabilities, kl, score, objective):
    optimum = THREE.optimum(RHO.unsqueeze(0), SCORES, beta)
    log_pi = optimum.sequence_logprobs
    assert log_pi.exp().tolist() == pytest.approx(probabilities, abs=5e-7)
    assert float(kl_divergence(log_pi, RHO)) == pytest.approx(kl, abs=5e-7)
    assert float(kl_divergence(log_pi, RHO)) == pytest.approx(float(optimum.kl_policy_ref), abs=1e-14)
    mask = torch.ones(3, 1, dtype=torch.bool)
    k1 = kl_policy_ref_per_token_k1(log_pi.unsqueeze(1), RHO.unsqueeze(1), mask)
    rewards = adjusted_rewards(SCORES, k1, mask, beta=beta).sum(1)
    assert float((log_pi.exp() * SCORES).sum()) == pytest.approx(score, abs=5e-7)
    assert float((log_pi.exp() * rewards).sum()) == pytest.approx(objective, abs=5e-7)


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_the_kl_of_the_optimum_falls_with_beta_as_the_variance_of_the_score_says(beta):
    def kl_of_the_optimum(at):
        return kl_divergence(THREE.optimum(RHO.unsqueeze(0), SCORES, at).sequence_logprobs, RHO)

    slope = gradient(kl_of_the_optimum, torch.tensor(beta, dtype=torch.float64))
    best = THREE.optimum(RHO.unsqueeze(0), SCORES, beta).sequence_logprobs.exp()
    variance = (best * SCORES**2).sum() - (best * SCORES).sum() ** 2
    torch.testing.assert_close(slope, -variance / beta**3)


@pytest.mark.parametrize("name", ["3 tokens, EOS within 4", "2 prompts", "4 tokens, 6 steps"])
def test_at_the_optimum_every_response_is_worth_the_same_and_no_gradient_is_left(name):
    run = Run(WORLDS[name])
    world, optimum = run.world, run.world.optimum(run.ref, run.scores, run.beta)
    run.policy = world.logits_of(optimum.sequence_logprobs)
    torch.testing.assert_close(world.sequence_logprobs(run.policy), optimum.sequence_logprobs)
    k1 = run.estimated_kl(kl_policy_ref_per_token_k1, run.policy)
    rewards = adjusted_rewards(run.scores, k1, run.mask, beta=run.beta)
    worth = per_sequence(rewards, run.mask).reshape(world.prompts, -1)
    torch.testing.assert_close(worth, worth[:, :1].expand_as(worth), atol=1e-11, rtol=0)
    assert float(worth[:, 0].mean()) == pytest.approx(float(optimum.objective), abs=1e-11)
    assert run.in_the_reward(run.advantages(rewards)).norm() < 1e-11
    kl = world.expectation(run.policy, per_sequence(run.exact_kl(run.policy), run.mask))
    assert float(kl) == pytest.approx(float(optimum.kl_policy_ref), abs=1e-11)


@given(st.integers(0, 10**6), st.floats(0.1, 5))
def test_no_policy_beats_the_optimum(seed, beta):
    run = Run(WORLDS["2 prompts"])
    world, other = run.world, run.world.random_logits(seed)
    kl = world.expectation(other, per_sequence(run.exact_kl(other), run.mask))
    best = world.optimum(run.ref, run.scores, beta)
    assert world.expectation(other, run.scores) - beta * kl <= best.objective + 1e-12


# --- Gaussian rewards, best of n, over-optimisation


@pytest.fixture(scope="module")
def gaussian():
    """Scores on a fine grid and the log-probs of a reference under which they are normal with mean 0, std 1."""
    scores = torch.linspace(-40, 40, 8001, dtype=torch.float64)
    return scores, torch.log_softmax(-scores.square() / 2, 0)


@pytest.mark.parametrize(("budget", "beta"), [(6, 0.28868), (10, 0.22361)])
@pytest.mark.parametrize("sigma", [1.0, 2.5])
def test_gaussian_rewards_name_the_beta_of_a_budget(gaussian, sigma, budget, beta):
    z, log_rho = gaussian
    scores, beta = sigma * z, sigma * beta
    log_pi = torch.log_softmax(log_rho + scores / beta, 0)
    assert float(kl_divergence(log_pi, log_rho)) == pytest.approx(budget, rel=1e-4)
    assert float((log_pi.exp() * scores).sum()) == pytest.approx(sigma**2 / beta, rel=1e-6)


def best_of(n, log_rho):
    """Log-probs of the best of n draws, the outcomes standing in ascending order of their score."""
    below = torch.nn.functional.pad(log_rho.exp().cumsum(0), (1, 0))
    return (below[1:] ** n - below[:-1] ** n).log()


@pytest.mark.parametrize(("n", "kl"), [(1, 0.0), (4, 0.559751), (16, 1.469645)])
def test_best_of_n_of_three_answers_drifts_less_than_the_bound(n, kl):
    found = float(kl_divergence(best_of(n, RHO), RHO))
    assert found == pytest.approx(kl, abs=5e-7)
    assert found <= math.log(n) - (n - 1) / n + 1e-12


@pytest.mark.parametrize(("n", "bound"), [(4, 0.6363), (16, 1.8351), (128, 3.8598), (1000, 5.9088)])
def test_with_very_many_answers_best_of_n_drifts_as_far_as_the_bound(n, bound):
    many = torch.full((400_000,), -math.log(400_000), dtype=torch.float64)
    ties = best_of(n, many)
    assert float(kl_divergence(ties, many)) == pytest.approx(bound, abs=1e-4)


def test_over_optimised_the_gold_reward_peaks_where_gaos_law_says(gaussian):
    z, log_rho = gaussian
    betas = torch.linspace(0.04, 0.12, 161, dtype=torch.float64)
    log_pi = torch.log_softmax(log_rho + z / betas.unsqueeze(1), -1)
    distance = kl_divergence(log_pi, log_rho.expand_as(log_pi)).sqrt()
    gold = distance * (1 - 0.3 * distance.log())
    peak = gold.argmax()
    assert float(distance[peak]) == pytest.approx(10.3123, rel=0.01)
    assert float(gold[peak]) == pytest.approx(3.0937, rel=1e-4)
    assert float(betas[peak]) == pytest.approx(1 / (10.3123 * math.sqrt(2)), rel=0.01)
