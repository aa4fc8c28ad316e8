"""A policy with an adapter: its reference is the start it came with, adapter on, and not the base model."""

import pytest
import torch
from tiny import tiny_policy

from kleash.models import fingerprint, frozen_copy, response_logits, trainable_parameters

peft = pytest.importorskip("peft")


def policy_with_an_adapter() -> torch.nn.Module:
    policy = tiny_policy(architecture="llama")
    policy.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    return policy.eval()


def test_the_reference_of_an_adapter_policy_is_its_start_and_not_the_base_model() -> None:
    policy = policy_with_an_adapter()
    reference = frozen_copy(policy)
    sequences = torch.tensor([[3, 4, 5, 6, 7, 8]])
    inputs = (sequences, torch.ones_like(sequences, dtype=torch.bool), 3)
    with torch.no_grad():
        start = response_logits(policy, *inputs)
        assert torch.equal(response_logits(reference, *inputs), start)
        policy.disable_adapters()
        assert not torch.allclose(response_logits(policy, *inputs), start, atol=1e-4)
        assert torch.equal(response_logits(reference, *inputs), start)


def test_training_an_adapter_leaves_its_reference_alone() -> None:
    policy = policy_with_an_adapter()
    reference = frozen_copy(policy)
    before = fingerprint(reference)
    with torch.no_grad():
        for parameter in trainable_parameters(policy):
            parameter.add_(1.0)
    assert list(trainable_parameters(policy))
    assert all("lora" in name for name, p in policy.named_parameters() if p.requires_grad)
    assert fingerprint(reference) == before != fingerprint(policy)
    assert not list(trainable_parameters(reference))
