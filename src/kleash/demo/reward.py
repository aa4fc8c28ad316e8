"""The demo's reward model: the fine-tuned trunk with one score on top, trained on preference pairs."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from datasets import Dataset
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast, set_seed
from transformers.trainer_callback import PrinterCallback
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer

from kleash.demo.policy import MAX_POSITIONS, plain_training
from kleash.demo.preferences import Pair


def train_reward_model(
    trunk: Path,
    tokenizer: PreTrainedTokenizerFast,
    pairs: Sequence[Pair],
    *,
    epochs: float,
    seed: int,
) -> LlamaForSequenceClassification:
    """A reward model (one label) started from the policy saved at `trunk`.

    The score's own weights start at zero, so that the untrained model likes everything alike.
    """
    set_seed(seed)
    model: LlamaForSequenceClassification = LlamaForSequenceClassification.from_pretrained(trunk, num_labels=1)
    torch.nn.init.zeros_(model.score.weight)
    rows = [{"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected} for pair in pairs]
    with TemporaryDirectory() as scratch:
        config = RewardConfig(
            output_dir=scratch,
            num_train_epochs=epochs,
            per_device_train_batch_size=16,
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            warmup_steps=5,
            max_length=MAX_POSITIONS,
            center_rewards_coefficient=0.01,
            seed=seed,
            **plain_training(),
        )
        trainer = RewardTrainer(
            model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.train(False)
    return model


@torch.no_grad()
def reward_scores(
    model: LlamaForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    answers: Sequence[str],
    *,
    batch: int = 256,
) -> list[float]:
    """The reward model's score of each answer, closed by <eos> as in its training."""
    scores: list[float] = []
    texts = [prompt + answer + str(tokenizer.eos_token) for prompt, answer in zip(prompts, answers, strict=True)]
    for start in range(0, len(texts), batch):
        inputs = tokenizer(texts[start : start + batch], return_tensors="pt", padding=True, padding_side="right")
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        scores += logits[:, 0].tolist()
    return scores


def accuracy(model: LlamaForSequenceClassification, tokenizer: PreTrainedTokenizerFast, pairs: Sequence[Pair]) -> float:
    """Share of pairs whose chosen answer scores higher than the rejected one."""
    prompts = [pair.prompt for pair in pairs]
    chosen = reward_scores(model, tokenizer, prompts, [pair.chosen for pair in pairs])
    rejected = reward_scores(model, tokenizer, prompts, [pair.rejected for pair in pairs])
    return sum(one > other for one, other in zip(chosen, rejected, strict=True)) / len(pairs)
