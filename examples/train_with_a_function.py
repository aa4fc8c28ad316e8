"""Train a small model against a reward that is a Python function, and read what the leash did.

    python examples/train_with_a_function.py

The policy starts with random weights and a vocabulary of a dozen words; the reward counts one of them.
"""

import json
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import kleash

WORDS = ["<pad>", "<eos>", "<unk>", "tell", "me", "about", "the", "sea", "waves", "salt", "blue", "calm"]


def small_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def share_of_blue(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """The reward: how much of a response is the word "blue"."""
    return [text.split().count("blue") / max(len(text.split()), 1) for text in completions]


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
            leash=kleash.LeashConfig(beta=0.05),
            rollout=kleash.RolloutConfig(prompts_per_update=32, max_new_tokens=8),
            ppo=kleash.PPOConfig(learning_rate=2e-3, epochs=2, minibatches=2),
            updates=20,
            quiet=True,
        )
        records = [json.loads(line) for line in (result.out / "records.jsonl").read_text().splitlines()]
    for record in (records[0], records[-1]):
        kl = record["kl_policy_ref_per_sequence"]
        print(f"update {record['update']:>2}: score {record['score_mean']:.2f}, KL(policy || reference) {kl:.2f} nats")


if __name__ == "__main__":
    main()
