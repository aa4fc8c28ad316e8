"""How far apart are two models on text that the first one wrote: the exact KL beside the one-token estimate.

    python examples/exact_kl_of_two_models.py

The policy and its reference are small models with random weights. Hidden states and output embeddings are all that
`token_stats` needs, so any trainer can call it; the logits of the whole vocabulary never exist.
"""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import kleash

RESPONSES, LENGTH = 64, 24


def main() -> None:
    torch.manual_seed(0)
    shape = GPT2Config(vocab_size=5000, n_layer=2, n_embd=64, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)
    reference = GPT2LMHeadModel(shape).eval()
    policy = GPT2LMHeadModel(shape).eval()
    policy.load_state_dict(reference.state_dict())
    with torch.no_grad():
        for weight in policy.parameters():
            weight += 0.05 * torch.randn_like(weight)
        start = torch.ones(RESPONSES, 1, dtype=torch.int64)
        text = policy.generate(
            start,
            do_sample=True,
            top_k=0,
            max_new_tokens=LENGTH,
            min_new_tokens=LENGTH,
            eos_token_id=None,
            pad_token_id=0,
        )
        hidden, ref_hidden = (
            model.base_model(input_ids=text).last_hidden_state[:, :-1].flatten(0, 1) for model in (policy, reference)
        )
        stats = kleash.token_stats(
            hidden, policy.lm_head.weight, ref_hidden, reference.lm_head.weight, text[:, 1:].flatten()
        )
    exact = stats.kl_policy_ref_per_token.view(RESPONSES, LENGTH).sum(1)
    k1 = (stats.policy_logprobs - stats.ref_logprobs).view(RESPONSES, LENGTH).sum(1)
    print(f"KL(policy || reference), nats per response of {LENGTH} tokens, {RESPONSES} responses")
    for name, per_sequence in (("exact", exact), ("k1", k1)):
        found = kleash.mean_with_interval(per_sequence)
        print(f"  {name:<6}{found.mean:7.3f}   95 % interval {found.low:.3f} to {found.high:.3f}")


if __name__ == "__main__":
    main()
