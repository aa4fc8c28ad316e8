"""The smallest real models: built from configs and seeds, saved to disk, loaded like any other."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from kleash.batch import Prompts, Rollout
from kleash.language_model import Models, language_models
from kleash.models import value_model_from_policy
from kleash.prompts import tokenized_prompts
from kleash.reference import frozen_copy
from kleash.rollout import RolloutConfig, rollout_of

WORDS = ["<pad>", "<eos>", "<unk>", "what", "is", "a", "cat", "dog", "it", "runs", "sleeps", "."]
PROMPTS = ["what is a cat", "what is a dog", "a cat", "it runs", "is it a dog", "a dog sleeps", "what", "is a cat it"]

LIVELY = {"initializer_range": 0.3}  # weights so large that attention and positions really matter


def tiny_tokenizer(*, pad_token: str | None = "<pad>", words: list[str] | None = None) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of a dozen words."""
    vocabulary = {word: index for index, word in enumerate(words or WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad_token, eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def tiny_config(
    architecture: str = "gpt2", *, vocab: int = len(WORDS), dropout: float = 0.0, **extra: object
) -> PreTrainedConfig:
    """Two layers of width 16; dropout on request, to see that it is switched off."""
    common = {"vocab_size": vocab, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1, **extra}
    if architecture == "gpt2":
        drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
        return GPT2Config(n_layer=2, n_embd=16, n_head=2, n_positions=64, **drops, **common)
    return LlamaConfig(
        num_hidden_layers=2,
        hidden_size=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        max_position_embeddings=64,
        attention_dropout=dropout,
        **common,
    )


def tiny_policy(seed: int = 0, *, scale: float = 1.0, **config: object) -> torch.nn.Module:
    """A causal model with random weights; `scale` sharpens its distributions."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(**config))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(scale)
    return model.eval()


def tiny_reward_model(seed: int = 1, *, labels: int = 1, **config: object) -> torch.nn.Module:
    """A sequence-classification model with random weights."""
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_config(tiny_config(num_labels=labels, **config)).eval()


def tiny_prompts(texts: list[str] | None = None) -> Prompts:
    """Prompts of mixed lengths, tokenized."""
    return tokenized_prompts([{"prompt": text} for text in texts or PROMPTS], tiny_tokenizer())


def tiny_rollout(
    policy: torch.nn.Module,
    *,
    seed: int = 0,
    prompts: Prompts | None = None,
    eos: tuple[int, ...] = (1,),
    **config: object,
) -> Rollout:
    """What the policy answers to the tiny prompts: responses of up to 6 tokens, unless the config says otherwise."""
    prompts = prompts or tiny_prompts()
    rollout_config = RolloutConfig(**{"max_new_tokens": 6, **config})
    shape = (len(prompts), rollout_config.max_new_tokens)
    return rollout_of(
        policy,
        prompts,
        tiny_tokenizer(),
        uniforms=torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)),
        config=rollout_config,
        eos_token_ids=list(eos),
        device=torch.device("cpu"),
    )


def tiny_models(policy: torch.nn.Module, *, reference: torch.nn.Module | None = None) -> Models:
    """The policy with a value model whose head is not 0, and a frozen copy of it as the reference."""
    value = value_model_from_policy(policy)
    torch.nn.init.normal_(value.head.weight, std=0.3, generator=torch.Generator().manual_seed(5))
    vocab = policy.config.vocab_size
    policy, reference = language_models(policy, reference or frozen_copy(policy), vocab=vocab)
    return Models(policy=policy, value=value, reference=reference)


def save_tiny_world(directory: Path, **policy: object) -> dict[str, str]:
    """Policy, reward model and prompts on disk, each where a config can name it."""
    paths = {name: directory / name for name in ("policy", "reward")}
    tiny_policy(**policy).save_pretrained(paths["policy"])
    tiny_reward_model().save_pretrained(paths["reward"])
    for path in paths.values():
        tiny_tokenizer().save_pretrained(path)
    prompts = directory / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    return {**{name: str(path) for name, path in paths.items()}, "prompts": str(prompts)}


def tiny_run(world: dict[str, str], out: Path, **changes: object) -> dict[str, object]:
    """The content of a run.yaml over the tiny world: four updates of eight prompts."""
    return {
        "policy": world["policy"],
        "reward": world["reward"],
        "prompts": world["prompts"],
        "out": str(out),
        "leash": {"beta": 0.1},
        "rollout": {"prompts_per_update": 8, "max_new_tokens": 6},
        "ppo": {"epochs": 2, "minibatches": 2, "learning_rate": 1.0e-3},
        "updates": 4,
        "checkpoint": {"every": 2},
        **changes,
    }


def write_run(world: dict[str, str], out: Path, **changes: object) -> Path:
    """A run.yaml beside `out`, ready for the command line."""
    path = out.with_suffix(".yaml")
    path.write_text(json.dumps(tiny_run(world, out, **changes)))  # every JSON is YAML
    return path


def tree(directory: Path) -> dict[str, bytes | None]:
    """Every file below a directory with its bytes, and every directory with None: equal trees, nothing touched."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in sorted(directory.rglob("*"))
    }
