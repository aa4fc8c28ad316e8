"""The demo's language model: its tokenizer, its supervised fine-tuning, and sampling from it."""

import random
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from transformers.trainer_callback import PrinterCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

PAD, EOS = "<pad>", "<eos>"
MAX_NEW_TOKENS = 40
"""Room for any good answer (at most 30 words), and for some that go on too long."""

MAX_POSITIONS = 128


def train_tokenizer(texts: Sequence[str], *, vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer with a <pad> and an <eos> of its own, padding on the left."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    wrap: Any = PreTrainedTokenizerFast  # its constructor carries no types
    wrapped: PreTrainedTokenizerFast = wrap(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=EOS,
        padding_side="left",
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    return wrapped


def new_policy(tokenizer: PreTrainedTokenizerFast, *, seed: int) -> LlamaForCausalLM:
    """A fresh two-layer model of width 128 without dropout, about half a million parameters."""
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def finetune(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    corpus: Sequence[tuple[str, str]],
    *,
    epochs: float,
    seed: int,
) -> None:
    """Supervised fine-tuning in place, on (prompt, answer) pairs; the loss covers the answer and its <eos>."""
    rows = [{"prompt": prompt, "completion": answer + EOS} for prompt, answer in corpus]
    with TemporaryDirectory() as scratch:
        config = SFTConfig(
            output_dir=scratch,
            num_train_epochs=epochs,
            per_device_train_batch_size=16,
            learning_rate=5e-3,
            lr_scheduler_type="cosine",
            warmup_steps=20,
            max_length=MAX_POSITIONS,
            packing=False,
            completion_only_loss=True,
            seed=seed,
            **plain_training(),
        )
        trainer = SFTTrainer(
            model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.train(False)


def plain_training() -> dict[str, Any]:
    """The switches that both of the demo's trainers share: on the CPU, in fp32, silent, nothing kept on disk."""
    return {
        "use_cpu": True,
        "bf16": False,
        "fp16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def sample_answers(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    *,
    seed: int,
    batch: int = 256,
) -> list[str]:
    """One answer to each prompt, sampled at temperature 1 from the whole vocabulary."""
    writer: Any = model  # the types of `generate` refuse transformers' own models
    answers: list[str] = []
    # Seeding torch leaves the caller's own stream alone.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random.Random(seed).getrandbits(32))
        for start in range(0, len(prompts), batch):
            inputs = tokenizer(list(prompts[start : start + batch]), return_tensors="pt", padding=True)
            outputs = writer.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                do_sample=True,
                temperature=1.0,
                top_k=0,
                max_new_tokens=MAX_NEW_TOKENS,
            )
            responses = outputs[:, inputs["input_ids"].shape[1] :]
            answers += tokenizer.batch_decode(responses, skip_special_tokens=True)
    return answers


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    """Write model and tokenizer where `from_pretrained` finds them."""
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
