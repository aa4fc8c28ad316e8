"""Policy and reference through their hidden states: the same figures as through full logits, and fewer tensors."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import LIVELY, tiny_policy, tiny_rollout
from torch import nn

import kleash.language_model
from kleash.batch import MicroBatch, micro_batch_of
from kleash.language_model import LanguageModel, language_models
from kleash.models import frozen, response_logits

FIGURES = ["policy_logprobs", "policy_entropy", "ref_logprobs", "kl_policy_ref_per_token"]


def pair(architecture: str = "gpt2", *, linear: bool = True, **shape: object) -> tuple[LanguageModel, LanguageModel]:
    """A policy that has drifted and its reference, in float64."""
    policy, reference = (tiny_policy(seed, architecture=architecture, **LIVELY, **shape).double() for seed in (2, 3))
    models = language_models(policy, frozen(reference), vocab=policy.config.vocab_size)
    assert all(model.linear is not None for model in models)
    if linear:
        return models
    return tuple(LanguageModel(model.model, linear=None, vocab=model.vocab) for model in models)


def some_part(policy: LanguageModel, rows: int = 8) -> MicroBatch:
    rollout = tiny_rollout(policy.model, seed=3, eos=(1, 4))
    return micro_batch_of(rollout, torch.arange(rows))


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_hidden_states_and_full_logits_say_the_same_and_pull_the_same(architecture, temperature):
    results = []
    for linear in (True, False):
        policy, reference = pair(architecture, linear=linear)
        part = some_part(policy)
        with torch.no_grad():
            ref = reference.ref_states(part)
        stats = policy(part, ref, temperature=temperature)
        weights = torch.randn(3, *part.response_mask.shape, dtype=torch.float64, generator=torch.manual_seed(0))
        found = (stats.policy_logprobs, stats.policy_entropy, stats.kl_policy_ref_per_token)
        sum((weight * column).sum() for weight, column in zip(weights, found, strict=True)).backward()
        results.append((stats, [p.grad for p in policy.parameters()]))
        assert all(p.grad is None for p in reference.parameters())
    (fused, fused_gradients), (plain, plain_gradients) = results
    for name in FIGURES:
        torch.testing.assert_close(getattr(fused, name), getattr(plain, name), atol=1e-12, rtol=0)
        assert (getattr(fused, name)[~part.response_mask] == 0).all()
    for found, expected in zip(fused_gradients, plain_gradients, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-11, rtol=0)
    assert fused.kl_policy_ref_per_token[part.response_mask].min() > 0


@pytest.mark.parametrize("linear", [True, False])
def test_alone_a_policy_says_the_same_bits_as_beside_its_reference(linear):
    policy, reference = pair(linear=linear)
    part = some_part(policy)
    with torch.no_grad():
        alone = policy(part, None, temperature=0.7)
        beside = policy(part, reference.ref_states(part), temperature=0.7)
    assert alone.ref_logprobs is alone.kl_policy_ref_per_token is None
    assert torch.equal(alone.policy_logprobs, beside.policy_logprobs)
    assert torch.equal(alone.policy_entropy, beside.policy_entropy)


@pytest.mark.parametrize("linear", [True, False])
def test_entries_beyond_the_vocabulary_are_no_tokens(linear):
    """A head that is padded to a rounder size, with whatever stands in the padding."""
    policy, reference = pair(linear=linear)
    part = some_part(policy)
    with torch.no_grad():
        expected = policy(part, reference.ref_states(part), temperature=1.0)
        wide = reference.model
        wide.resize_token_embeddings(wide.config.vocab_size + 7, mean_resizing=False)
        wide.get_output_embeddings().weight[-7:] = 100.0
        padded = LanguageModel(wide, linear=reference.linear, vocab=policy.vocab)
        ref = padded.ref_states(part)
        found = policy(part, ref, temperature=1.0)
    assert ref.states.shape[1] == (wide.config.get_text_config().hidden_size if linear else policy.vocab)
    for name in FIGURES:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=1e-12, rtol=0)


def test_full_logits_are_taken_a_few_positions_at_a_time(monkeypatch):
    policy, reference = pair(linear=False)
    part = some_part(policy)
    with torch.no_grad():
        whole = policy(part, reference.ref_states(part), temperature=1.0)
        monkeypatch.setattr(kleash.language_model, "PLAIN_ROWS", 3)
        few = policy(part, reference.ref_states(part), temperature=1.0)
    for name in FIGURES:
        torch.testing.assert_close(getattr(few, name), getattr(whole, name), atol=1e-12, rtol=0)


@pytest.mark.parametrize("linear", [True, False])
def test_a_first_reference_adds_its_kl_and_changes_no_bit_of_the_rest(linear):
    policy, reference = pair(linear=linear)
    first = LanguageModel(frozen(tiny_policy(4, **LIVELY).double()), linear=reference.linear, vocab=policy.vocab)
    part = some_part(policy)
    with torch.no_grad():
        ref, first_ref = reference.ref_states(part), first.ref_states(part)
        alone = policy(part, ref, temperature=0.7)
        beside = policy(part, ref, first_ref, temperature=0.7)
        expected = policy(part, first_ref, temperature=0.7).kl_policy_ref_per_token
    assert alone.kl_policy_first_ref_per_token is None
    for name in FIGURES:
        assert torch.equal(getattr(alone, name), getattr(beside, name))
    assert torch.equal(beside.kl_policy_first_ref_per_token, expected)
    assert not torch.equal(expected, alone.kl_policy_ref_per_token)


class Doubled(nn.Module):
    """A head that is no plain product."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.head = head

    @property
    def weight(self) -> nn.Parameter:
        return self.head.weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.head(hidden) * 2


@pytest.mark.parametrize("odd", ["policy", "reference"])
def test_a_model_with_its_own_way_to_logits_is_served_by_them_with_a_warning(odd):
    models = {role: tiny_policy(seed, **LIVELY).double() for role, seed in (("policy", 2), ("reference", 3))}
    models[odd].set_output_embeddings(Doubled(models[odd].get_output_embeddings()))
    with pytest.warns(UserWarning, match=f"Expected a {odd} whose logits are a product .*full logits are used instead"):
        policy, reference = language_models(
            models["policy"], models["reference"], vocab=models["policy"].config.vocab_size
        )
    assert policy.linear is None
    assert reference.linear is None
    part = some_part(policy)
    with torch.no_grad():
        stats = policy(part, reference.ref_states(part), temperature=1.0)
        logits = models[odd](input_ids=part.sequences[:1][part.attention_mask[:1]].unsqueeze(0)).logits[0]
    written = part.responses[0][part.response_mask[0]]
    expected = logits.log_softmax(-1)[-len(written) - 1 : -1].gather(1, written.unsqueeze(1)).squeeze(1)
    column = stats.policy_logprobs if odd == "policy" else stats.ref_logprobs
    torch.testing.assert_close(column[0][part.response_mask[0]], expected, atol=1e-10, rtol=0)


def test_a_forbidden_token_of_the_reference_shows_as_an_infinite_kl():
    policy, reference = pair(linear=False)
    part = some_part(policy)
    with torch.no_grad():
        ref = reference.ref_states(part)
        ref.states[0, 2] = -math.inf
        kl = policy(part, ref, temperature=1.0).kl_policy_ref_per_token
    assert kl[0, 0] == math.inf
    assert kl[part.response_mask].isfinite().sum() == int(part.response_mask.sum()) - 1


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_likeliest_tokens_are_those_of_the_full_distribution_however_few_logits_are_made_at_once(
    linear, temperature, monkeypatch
):
    policy, _ = pair(linear=linear)
    part = some_part(policy)
    with torch.no_grad():
        states = policy.states(part)
        logits = response_logits(policy.model, part.sequences, part.attention_mask, part.time)[part.response_mask]
    expected = (logits / temperature).log_softmax(-1).topk(3)
    for at_once in (2**23, 3 * policy.vocab, 1):
        monkeypatch.setattr(kleash.language_model, "LOGITS_AT_ONCE", at_once)
        tokens, logprobs = policy.most_likely(states, count=3, temperature=temperature)
        assert torch.equal(tokens, expected.indices)
        torch.testing.assert_close(logprobs, expected.values, atol=1e-12, rtol=0)


@pytest.mark.parametrize("linear", [True, False])
def test_the_likeliest_tokens_are_tokens_and_no_more_than_there_are(linear):
    """What a head has beyond the vocabulary is padding, whatever stands in it."""
    policy, _ = pair(linear=linear)
    part = some_part(policy)
    with torch.no_grad():
        expected = policy.most_likely(policy.states(part), count=99, temperature=1.0)
        wide = policy.model
        wide.resize_token_embeddings(policy.vocab + 7, mean_resizing=False)
        wide.get_output_embeddings().weight[-7:] = 100.0
        tokens, logprobs = policy.most_likely(policy.states(part), count=99, temperature=1.0)
    assert tokens.shape == (int(part.response_mask.sum()), policy.vocab)
    assert torch.equal(tokens, expected[0])
    torch.testing.assert_close(logprobs, expected[1], atol=1e-12, rtol=0)
    torch.testing.assert_close(logprobs.exp().sum(-1), torch.ones(len(tokens)).double(), atol=1e-12, rtol=0)


PEAK = """
import sys, torch
from pathlib import Path
from kleash.language_model import LanguageModel
from kleash.linear_head import LinearHead
from tiny import tiny_policy

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field + ":")).split()[1])

torch.set_num_threads(1)
model = LanguageModel(tiny_policy(vocab=128_256), linear=LinearHead(), vocab=128_256)
states, before = torch.randn(int(sys.argv[1]), 16), status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
model.most_likely(states, count=5, temperature=1.0)
print((status("VmHWM") - before) / 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_likeliest_tokens_of_many_positions_take_the_memory_of_a_few():
    """4000 positions of 128256 tokens are 1957 MiB of logits; results that lay between them would keep them all."""
    places = [str(Path(__file__).parent), *sys.path]
    ended = subprocess.run(
        [sys.executable, "-c", PEAK, "4000"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(places)},
    )
    assert float(ended.stdout) < 400
