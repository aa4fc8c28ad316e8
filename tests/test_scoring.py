"""Scoring a rollout: exactly 0 at step 0, blind to padding, and equal to the plain float64 sums."""

import math

import pytest
import torch
from tiny import LIVELY, tiny_models, tiny_policy, tiny_rollout
from torch import nn

import kleash.language_model
from kleash.batch import Rollout
from kleash.errors import NonFiniteError
from kleash.language_model import Models
from kleash.models import frozen, load_causal_model
from kleash.scoring import Scored, require_finite_per_token, score_rollout

ARCHITECTURES = ["gpt2", "llama"]
FIGURES = ["policy_logprobs", "ref_logprobs", "values", "kl_policy_ref_per_token", "policy_entropy"]
ALL = [torch.arange(8)]


def two_models(architecture: str = "gpt2") -> Models:
    """A policy that has drifted: its reference is another model."""
    policy = tiny_policy(2, architecture=architecture, **LIVELY)
    return tiny_models(policy, reference=frozen(tiny_policy(3, architecture=architecture, **LIVELY)))


@torch.no_grad()
def scored_plainly(models: Models, rollout: Rollout, row: int, *, temperature: float) -> dict[str, torch.Tensor]:
    """The figures of one response: alone, without padding, the sums written out in float64."""
    text = rollout.sequences[row][rollout.attention_mask[row]]
    written = rollout.responses[row][rollout.response_mask[row]]
    at = slice(len(text) - len(written) - 1, len(text) - 1)
    log_pi, log_rho = (
        (model.model(input_ids=text.unsqueeze(0), use_cache=False).logits[0, at].double() / temperature).log_softmax(-1)
        for model in (models.policy, models.reference)
    )
    hidden = models.value.trunk(input_ids=text.unsqueeze(0), use_cache=False).last_hidden_state[0, at]
    chosen = (torch.arange(len(written)), written)
    return {
        "policy_logprobs": log_pi[chosen],
        "ref_logprobs": log_rho[chosen],
        "values": (hidden @ models.value.head.weight[0]).double(),
        "kl_policy_ref_per_token": (log_pi.exp() * (log_pi - log_rho)).sum(-1),
        "policy_entropy": -(log_pi.exp() * log_pi).sum(-1),
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_every_figure_is_that_of_the_response_alone(architecture, temperature):
    """Batched with left padding against alone without: padding moves nothing beyond float error."""
    models = two_models(architecture)
    rollout = tiny_rollout(models.policy.model, seed=3, temperature=temperature, eos=(1, 4))
    assert len(set(rollout.response_mask.sum(1).tolist())) > 2
    assert len(set(rollout.attention_mask.long().argmax(1).tolist())) > 2
    scored = score_rollout(models, rollout, ALL, temperature=temperature)
    for row, mask in enumerate(rollout.response_mask):
        for name, expected in scored_plainly(models, rollout, row, temperature=temperature).items():
            found = getattr(scored, name)[row]
            torch.testing.assert_close(
                found[mask].double(), expected, atol=2e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
            )
            assert (found[~mask] == 0).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("seed", range(4))
def test_at_step_0_the_kl_is_exactly_0(architecture, rows, seed):
    """A frozen copy says the very same bits, whatever the micro-batches; dropout in the config is off."""
    policy = tiny_policy(seed, architecture=architecture, dropout=0.5, **LIVELY)
    rollout = tiny_rollout(policy, seed=seed)
    micro_batches = list(torch.randperm(8, generator=torch.Generator().manual_seed(1)).split(rows))
    scored = score_rollout(tiny_models(policy), rollout, micro_batches, temperature=0.9)
    assert (scored.kl_policy_ref_per_token == 0).all()
    assert torch.equal(scored.policy_logprobs, scored.ref_logprobs)
    assert (scored.policy_entropy[rollout.response_mask] > 0).all()


def test_at_step_0_the_kl_to_a_reference_loaded_from_disk_is_exactly_0(tmp_path):
    tiny_policy(2, dropout=0.5, **LIVELY).save_pretrained(tmp_path)
    policy, reference = load_causal_model(tmp_path, "policy"), load_causal_model(tmp_path, "reference")
    scored = score_rollout(tiny_models(policy, reference=frozen(reference)), tiny_rollout(policy), ALL, temperature=1.0)
    assert (scored.kl_policy_ref_per_token == 0).all()


def test_micro_batches_change_no_figure():
    models = two_models()
    rollout = tiny_rollout(models.policy.model, eos=(1, 4))
    whole = score_rollout(models, rollout, ALL, temperature=1.0)
    parts = score_rollout(
        models, rollout, [torch.tensor([6, 2, 0]), torch.tensor([1]), torch.tensor([7, 3, 4, 5])], temperature=1.0
    )
    for name in FIGURES:
        torch.testing.assert_close(getattr(whole, name), getattr(parts, name), atol=1e-5, rtol=0)


def test_long_micro_batches_are_scored_a_few_positions_at_a_time(monkeypatch):
    models = two_models()
    rollout = tiny_rollout(models.policy.model, eos=(1, 4))
    whole = score_rollout(models, rollout, ALL, temperature=1.0)
    monkeypatch.setattr(kleash.language_model, "PLAIN_ROWS", 3)
    few = score_rollout(models, rollout, ALL, temperature=1.0)
    for name in FIGURES:
        torch.testing.assert_close(getattr(whole, name), getattr(few, name), atol=1e-6, rtol=0)


def test_the_exact_kl_of_a_drifted_policy_is_positive_and_averages_to_its_estimate():
    """On responses of the policy itself, the mean of k1 and that of the exact sum estimate the same number."""
    models = two_models()
    rollouts = [tiny_rollout(models.policy.model, seed=seed, max_new_tokens=4) for seed in range(40)]
    scored = [score_rollout(models, rollout, ALL, temperature=1.0) for rollout in rollouts]
    exact = torch.cat([s.kl_policy_ref_per_token.sum(1) for s in scored])
    k1 = torch.cat([(s.policy_logprobs - s.ref_logprobs).sum(1) for s in scored])
    assert (exact > 0).all()
    difference = (k1 - exact).double()
    assert abs(difference.mean()) < 4 * difference.std() / math.sqrt(len(difference))
    assert exact.std() < k1.std()


def test_scoring_leaves_no_gradient_behind():
    models = two_models()
    scored = score_rollout(models, tiny_rollout(models.policy.model), ALL, temperature=1.0)
    assert isinstance(scored, Scored)
    for name in FIGURES:
        assert not getattr(scored, name).requires_grad
    assert all(p.grad is None for model in (models.policy, models.value) for p in model.parameters())


def test_the_first_value_that_is_not_finite_is_named_with_its_place():
    values = torch.zeros(3, 4)
    require_finite_per_token("values", values)
    values[1, 2], values[2, 0] = math.inf, math.nan
    with pytest.raises(NonFiniteError, match="finite values, found inf at sequence 1, response token 2"):
        require_finite_per_token("values", values)


@pytest.mark.parametrize("broken", ["policy", "reference", "value"])
def test_a_model_with_nan_weights_stops_the_run_by_name(broken):
    models = two_models()
    rollout = tiny_rollout(models.policy.model)
    part: nn.Module = getattr(models, broken)
    with torch.no_grad():
        next(part.parameters())[:] = math.nan
    name = {"policy": "policy_logprobs", "reference": "ref_logprobs", "value": "values"}[broken]
    with pytest.raises(NonFiniteError, match=f"finite {name}, found nan at sequence 0, response token 0"):
        score_rollout(models, rollout, ALL, temperature=1.0)


@pytest.mark.parametrize("name", ["ref_logprobs", "kl_policy_ref_per_token", "kl_policy_first_ref_per_token"])
def test_what_is_infinite_because_of_the_reference_says_so(name):
    values = torch.zeros(2, 2)
    values[1, 0] = math.inf
    with pytest.raises(NonFiniteError, match="sequence 1, response token 0; the reference forbids a token that the"):
        require_finite_per_token(name, values)
