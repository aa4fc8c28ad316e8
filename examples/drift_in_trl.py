"""The exact KL inside TRL's GRPOTrainer, and `kleash measure` on the model that TRL saved.

    python examples/drift_in_trl.py

The policy starts with random weights and a vocabulary of a dozen words; the reward counts one of them. It is trained
without a leash, which is TRL's default and logs no KL at all, and on one; both are measured alike.
"""

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from kleash.measurement import MeasureConfig
from train_with_a_function import WORDS, share_of_blue, small_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer

from kleash.cli import main as kleash
from kleash.integrations.trl import DriftCallback

PROMPTS = ["tell me about the sea", "about the waves", "tell me", "the salt", "the calm sea", "about"]
BETAS = (0.0, 0.5)
LENGTH, STEPS, EVERY, RESPONSES = 8, 24, 8, 120


def save_start(directory: Path) -> None:
    """The model that both runs start from, as `from_pretrained` loads it."""
    torch.manual_seed(0)
    shape = GPT2Config(
        vocab_size=len(WORDS), n_layer=2, n_embd=32, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=1
    )
    GPT2LMHeadModel(shape).save_pretrained(directory)
    small_tokenizer().save_pretrained(directory)


def trained(start: Path, out: Path, beta: float) -> list[dict[str, Any]]:
    """What the trainer logged: rows of TRL's, and between them those of the callback."""
    trainer = GRPOTrainer(
        model=str(start),
        reward_funcs=[share_of_blue],
        args=GRPOConfig(
            output_dir=str(out),
            beta=beta,
            learning_rate=4e-3,
            max_completion_length=LENGTH,
            per_device_train_batch_size=32,
            num_generations=8,
            max_steps=STEPS,
            logging_steps=1,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=small_tokenizer(),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(
        DriftCallback(
            trainer, prompts=PROMPTS, every=EVERY, config=MeasureConfig(samples=RESPONSES, max_new_tokens=LENGTH)
        )
    )
    trainer.train()
    trainer.save_model(str(out / "policy"))
    return trainer.state.log_history


def print_rows(beta: float, rows: list[dict[str, Any]]) -> None:
    """The callback's figures at each step that it measured, beside what TRL said at that step."""
    of_trl = {row["step"]: row for row in rows if "reward" in row}
    for ours in (row for row in rows if "kl_policy_ref_per_sequence" in row):
        exact, low, high = (ours[f"kl_policy_ref_per_sequence{end}"] for end in ("", "_low", "_high"))
        per_token, its = ours["kl_policy_ref_per_token"], of_trl.get(ours["step"], {})
        kl, reward = (f"{its[name]:.3f}" if name in its else "-" for name in ("kl", "reward"))
        print(f"{beta:<6}{ours['step']:<6}{exact:.2f}   {low:.2f} to {high:.2f}{per_token:>17.3f}{kl:>13}{reward:>9}")


def main() -> None:
    torch.set_num_threads(1)  # models this small gain nothing from a second
    warnings.simplefilter("ignore", FutureWarning)  # of TRL about transformers
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as directory:
        start, prompts = Path(directory) / "start", Path(directory) / "prompts.jsonl"
        save_start(start)
        prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
        print(f"KL(policy || reference) while TRL's GRPOTrainer trains, nats; responses of at most {LENGTH} tokens")
        print("beta  step  exact, per response   exact, per token   TRL's kl *   reward")
        for beta in BETAS:
            print_rows(beta, trained(start, Path(directory) / f"{beta}", beta))
        print("* k3, per token, of the 32 responses trained on, from one step before; none where beta is 0\n")
        print(f"kleash measure on what TRL saved at beta {BETAS[-1]}, which says what the last row says")
        saved = Path(directory) / f"{BETAS[-1]}" / "policy"
        same = ["--samples", str(RESPONSES), "--max-new-tokens", str(LENGTH)]
        kleash(["measure", str(saved), str(start), "--prompts", str(prompts), *same])


if __name__ == "__main__":
    main()
