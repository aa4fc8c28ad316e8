"""Seconds by phase, and peak memory, of one PPO update on random weights of a given shape.

    python benchmarks/ppo_step.py --vocab 8192 --layers 4 --width 256

Medians over the updates after the warm-up. The default is the middle one of three standard workloads: (vocab,
layers, width) = (512, 2, 128), (8192, 4, 256), (50257, 4, 256); prompts of 16 tokens, 32 new ones, 64 sequences an
update, 4 epochs of 4 minibatches. Policy, reference, value model and reward model all have the same shape.
"""

import json
import platform
import resource
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from kleash.config import LeashConfig, RunConfig
from kleash.parts import Given
from kleash.ppo import PPOConfig
from kleash.rollout import RolloutConfig
from kleash.run import run_from
from kleash.scorers import model_scorer
from kleash.training import update

PHASES = ("sampling", "rewarding", "scoring", "optimising", "total")


@dataclass(frozen=True)
class Workload:
    """Shape of the models and of an update."""

    architecture: Literal["gpt2", "llama"] = "gpt2"
    vocab: int = 8192
    layers: int = 4
    width: int = 256
    heads: int = 4
    prompt_length: int = 16
    response_length: int = 32
    batch: int = 64
    epochs: int = 4
    minibatches: int = 4
    micro_batch: int | None = None
    updates: int = 6
    warmup: int = 1
    threads: int = 2
    seed: int = 0
    json: Path | None = None
    """Append the result to this file, one JSON object a line."""


def model_config(work: Workload, **extra: int) -> PreTrainedConfig:
    """The configuration that all four models share."""
    positions = 2 * (work.prompt_length + work.response_length) + 64
    common = {"vocab_size": work.vocab, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1, **extra}
    if work.architecture == "gpt2":
        drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        return GPT2Config(
            n_layer=work.layers, n_embd=work.width, n_head=work.heads, n_positions=positions, **drops, **common
        )
    return LlamaConfig(
        num_hidden_layers=work.layers,
        hidden_size=work.width,
        num_attention_heads=work.heads,
        num_key_value_heads=work.heads,
        intermediate_size=(work.width * 8 // 3 + 63) // 64 * 64,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        **common,
    )


def word_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """A word-level tokenizer with `vocab` entries."""
    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(vocab - 3))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def measured(work: Workload, out: Path) -> dict[str, float]:
    """Median seconds of every phase, samples per second, and peak resident memory."""
    torch.manual_seed(work.seed)
    tokenizer = word_tokenizer(work.vocab)
    policy = AutoModelForCausalLM.from_config(model_config(work)).eval()
    reward = AutoModelForSequenceClassification.from_config(model_config(work, num_labels=1)).eval()
    draw = torch.randint(3, work.vocab, (512, work.prompt_length), generator=torch.Generator().manual_seed(work.seed))
    rows = [{"prompt": " ".join(f"w{token - 3}" for token in row)} for row in draw.tolist()]
    config = RunConfig(
        policy="random weights",
        reward="random weights",
        prompts="random words",
        out=str(out),
        leash=LeashConfig(beta=0.05),
        rollout=RolloutConfig(prompts_per_update=work.batch, max_new_tokens=work.response_length),
        ppo=PPOConfig(
            epochs=work.epochs, minibatches=work.minibatches, micro_batch=work.micro_batch, learning_rate=1e-4
        ),
        updates=work.updates,
    )
    given = Given(policy=policy, tokenizer=tokenizer, scorer=model_scorer(reward, "reward", tokenizer), rows=rows)
    run = run_from(config, given, resume=False)
    timings = [update(run, number)[1] for number in range(1, work.updates + 1)][work.warmup :]
    seconds = {phase: statistics.median(row[f"seconds_{phase}"] for row in timings) for phase in PHASES}
    peak_gpu = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0
    return {
        **seconds,
        "samples_per_second": work.batch / seconds["total"],
        "peak_memory_MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "peak_gpu_memory_MiB": peak_gpu,
    }


def main(work: Workload) -> None:
    """Print the table of one workload."""
    torch.set_num_threads(work.threads)
    with tempfile.TemporaryDirectory() as directory:
        result = measured(work, Path(directory) / "run")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    print(
        f"{work.architecture} V={work.vocab} L={work.layers} H={work.width} B={work.batch} P={work.prompt_length} "
        f"T={work.response_length} epochs={work.epochs} minibatches={work.minibatches} | torch {torch.__version__}, "
        f"{device}, {work.threads} threads, medians of {work.updates - work.warmup}"
    )
    for phase in PHASES:
        print(f"  {phase:<12}{result[phase]:8.3f} s {result[phase] / result['total']:6.1%}")
    print(f"  samples/s {result['samples_per_second']:.2f}   peak memory {result['peak_memory_MiB']:.0f} MiB")
    if work.json:
        with work.json.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"workload": work.__dict__ | {"json": None}, **result}) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Workload, description=__doc__))
