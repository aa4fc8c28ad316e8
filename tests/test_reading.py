"""What both models say of a rollout: against a plain forward pass of each response alone, in float64."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import LIVELY, tiny_policy, tiny_rollout

from kleash.errors import NonFiniteError
from kleash.language_model import LanguageModel, language_models
from kleash.models import frozen
from kleash.reading import ALTERNATIVES, largest_of, reading_of

FIGURES = ["policy_logprobs", "ref_logprobs", "kl_policy_ref_per_token", "policy_entropy", "ref_entropy"]


def pair(architecture: str = "gpt2", *, linear: bool = True) -> tuple[LanguageModel, LanguageModel]:
    policy, reference = (frozen(tiny_policy(seed, architecture=architecture, **LIVELY).double()) for seed in (2, 3))
    models = language_models(policy, reference, vocab=policy.config.vocab_size)
    assert all(model.linear is not None for model in models)
    return models if linear else tuple(LanguageModel(one.model, linear=None, vocab=one.vocab) for one in models)


def read_plainly(models, rollout, row: int, *, temperature: float) -> dict[str, torch.Tensor]:
    """The figures of one response and the full log-probs behind them: alone, unpadded, the sums written out."""
    text = rollout.sequences[row][rollout.attention_mask[row]]
    written = rollout.responses[row][rollout.response_mask[row]]
    at = slice(len(text) - len(written) - 1, len(text) - 1)
    with torch.no_grad():
        log_pi, log_rho = (
            (one.model(input_ids=text.unsqueeze(0), use_cache=False).logits[0, at] / temperature).log_softmax(-1)
            for one in models
        )
    chosen = (torch.arange(len(written)), written)
    return {
        "policy_logprobs": log_pi[chosen],
        "ref_logprobs": log_rho[chosen],
        "kl_policy_ref_per_token": (log_pi.exp() * (log_pi - log_rho)).sum(-1),
        "policy_entropy": -(log_pi.exp() * log_pi).sum(-1),
        "ref_entropy": -(log_rho.exp() * log_rho).sum(-1),
        "policy": log_pi,
        "ref": log_rho,
    }


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_every_figure_and_every_alternative_is_that_of_the_response_alone(architecture, temperature, linear):
    models = pair(architecture, linear=linear)
    rollout = tiny_rollout(models[0].model, seed=3, eos=(1, 4))
    assert len(set(rollout.response_mask.sum(1).tolist())) > 2
    found = reading_of(*models, rollout, temperature=temperature, alternatives_at_most=1000)
    for row, mask in enumerate(rollout.response_mask):
        expected = read_plainly(models, rollout, row, temperature=temperature)
        for name in FIGURES:
            torch.testing.assert_close(getattr(found, name)[row][mask], expected[name], atol=1e-11, rtol=0)
            assert (getattr(found, name)[row][~mask] == 0).all()
        for name in ("policy", "ref"):
            likeliest = getattr(found.alternatives, name)
            top = expected[name].topk(ALTERNATIVES)
            assert torch.equal(likeliest.tokens[row][mask], top.indices)
            torch.testing.assert_close(likeliest.logprobs[row][mask], top.values, atol=1e-11, rtol=0)
    assert torch.equal(found.alternatives.kept, rollout.response_mask)


def test_alternatives_are_looked_for_where_the_kl_is_largest():
    models = pair()
    rollout = tiny_rollout(models[0].model, seed=3)
    every = reading_of(*models, rollout, temperature=1.0, alternatives_at_most=1000)
    few = reading_of(*models, rollout, temperature=1.0, alternatives_at_most=7)
    kl = every.kl_policy_ref_per_token
    assert int(few.alternatives.kept.sum()) == 7
    assert kl[few.alternatives.kept].min() >= kl[rollout.response_mask & ~few.alternatives.kept].max()
    for name in ("policy", "ref"):
        kept, all_of_them = getattr(few.alternatives, name), getattr(every.alternatives, name)
        assert torch.equal(kept.tokens[few.alternatives.kept], all_of_them.tokens[few.alternatives.kept])
        assert (kept.tokens[~few.alternatives.kept] == 0).all()


def test_nobody_asks_for_alternatives_unless_told_so():
    models = pair()
    assert reading_of(*models, tiny_rollout(models[0].model), temperature=1.0).alternatives is None


def test_a_model_is_exactly_0_from_itself():
    policy, _ = pair()
    rollout = tiny_rollout(policy.model)
    found = reading_of(policy, policy, rollout, temperature=0.7)
    assert (found.kl_policy_ref_per_token == 0).all()
    assert torch.equal(found.policy_logprobs, found.ref_logprobs)
    assert torch.equal(found.policy_entropy, found.ref_entropy)


def test_the_graph_of_nothing_is_kept():
    models = pair()
    models[0].model.requires_grad_(True)
    found = reading_of(*models, tiny_rollout(models[0].model), temperature=1.0)
    assert not any(getattr(found, name).requires_grad for name in FIGURES)


def test_a_token_that_the_reference_forbids_stops_with_its_place():
    policy, reference = pair(linear=False)
    rollout = tiny_rollout(policy.model, seed=3)
    head = reference.model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.clone(), requires_grad=False)
    head.weight[5] = -math.inf
    with pytest.raises(NonFiniteError, match=r"Expected finite .* at sequence 0, response token 0"):
        reading_of(policy, reference, rollout, temperature=1.0)


def test_a_nan_of_the_policy_stops_with_its_place():
    policy, reference = pair()
    rollout = tiny_rollout(policy.model, seed=3)
    with torch.no_grad():
        policy.model.transformer.wte.weight[rollout.responses[2, 1]] = math.nan
        policy.model.lm_head.weight = torch.nn.Parameter(reference.model.lm_head.weight.clone())
    with pytest.raises(NonFiniteError, match="Expected finite policy_logprobs, found nan at sequence"):
        reading_of(policy, reference, replace(rollout), temperature=1.0)


@given(st.lists(st.sampled_from([0.0, 1.0, 2.0, -1.0]), min_size=6, max_size=6), st.integers(0, 8))
def test_the_largest_values_on_the_mask_are_found_and_of_equal_ones_the_first(values, count):
    mask = torch.tensor([[True, True, False], [True, True, True]])
    found = largest_of(torch.tensor(values).view(2, 3), mask, count)
    places = [place for place in range(6) if bool(mask.flatten()[place])]
    expected = sorted(places, key=lambda place: (-values[place], place))[:count]
    assert found.flatten().nonzero().flatten().tolist() == sorted(expected)
