"""Ask for a drift in nats and nothing else; the leash finds the beta that holds it.

    python examples/hold_a_budget.py

The policy starts with random weights and a vocabulary of a dozen words; the reward counts one of them.
"""

import json
import tempfile
from pathlib import Path
from statistics import mean

import torch
from train_with_a_function import WORDS, share_of_blue, small_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

import kleash

BUDGET = 3.0


def main() -> None:
    torch.manual_seed(0)
    shape = GPT2Config(
        vocab_size=len(WORDS), n_layer=2, n_embd=32, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=1
    )
    with tempfile.TemporaryDirectory() as directory:
        result = kleash.train(
            policy=GPT2LMHeadModel(shape),
            tokenizer=small_tokenizer(),
            reward=share_of_blue,
            prompts=["tell me about the sea", "about the waves", "tell me", "the salt", "the calm sea", "about"],
            out=Path(directory) / "run",
            leash=kleash.LeashConfig(target_kl_per_sequence=BUDGET, max_kl_per_sequence=3 * BUDGET),
            rollout=kleash.RolloutConfig(prompts_per_update=32, max_new_tokens=8),
            ppo=kleash.PPOConfig(learning_rate=2e-3, epochs=2, minibatches=2),
            updates=60,
            quiet=True,
        )
        records = [json.loads(line) for line in (result.out / "records.jsonl").read_text().splitlines()]
    second_half = records[len(records) // 2 :]
    print(f"budget {BUDGET:.2f} nats per response")
    print(f"KL(policy || reference), second half {mean(r['kl_policy_ref_per_sequence'] for r in second_half):.2f}")
    print(f"beta {records[0]['beta']:.3f} -> {records[-1]['beta']:.3f}")
    print(f"score {records[0]['score_mean']:.2f} -> {records[-1]['score_mean']:.2f}")


if __name__ == "__main__":
    main()
