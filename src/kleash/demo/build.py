"""Build the demo's world on disk: prompts, a fine-tuned policy, and a reward model that people might have trained.

    corpus -> tokenizer -> supervised fine-tuning -> pairs sampled from it -> noisy labels -> reward model

Everything is made from the seed; nothing is downloaded.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean

from kleash.demo.corpus import split_prompts, write_corpus
from kleash.demo.gold import gold_judge
from kleash.demo.policy import finetune, new_policy, sample_answers, save, train_tokenizer
from kleash.demo.preferences import label_pairs
from kleash.demo.quiet import one_thread, quiet
from kleash.demo.reward import accuracy, train_reward_model

HELD_OUT_SHARE = 0.15


@dataclass(frozen=True)
class WorldSize:
    """How much of everything is made; the defaults are the demo's.

    Attributes:
      answers: human-like answers in the fine-tuning corpus.
      epochs: passes over them.
      pairs: labelled pairs that train the reward model.
      held_out_pairs: labelled pairs, on held-out prompts, that measure it.
      reward_epochs: passes over the pairs.
      vocabulary: tokens, at most.
    """

    answers: int = 12000
    epochs: float = 1.0
    pairs: int = 2400
    held_out_pairs: int = 400
    reward_epochs: float = 2.0
    vocabulary: int = 900


@dataclass(frozen=True)
class DemoWorld:
    """Where the world lies, and what it is like.

    Attributes:
      policy: directory of the fine-tuned policy and its tokenizer.
      reward: directory of the reward model (one label) and the same tokenizer.
      prompts: jsonl, column `prompt`: the training prompts.
      heldout_prompts: jsonl, column `prompt`: prompts whose questions no training prompt asks.
      reward_model_accuracy: share of held-out labelled pairs that the reward model orders as the labeller did.
      labeller_accuracy: share of the same pairs that the gold judge orders so: what a perfect model would reach.
      gold_start: mean gold score of the policy's answers to held-out prompts.
      seconds: time taken, by phase.
    """

    policy: Path
    reward: Path
    prompts: Path
    heldout_prompts: Path
    reward_model_accuracy: float
    labeller_accuracy: float
    gold_start: float
    seconds: dict[str, float] = field(compare=False)


class _Clock:
    """Seconds by phase, announced as each begins."""

    def __init__(self, announce: Callable[[str], None] | None) -> None:
        self.announce = announce
        self.seconds: dict[str, float] = {}
        self._phase: tuple[str, float] | None = None

    def start(self, phase: str, line: str = "") -> None:
        """End the phase before, begin this one; an empty name only ends."""
        now = time.perf_counter()
        if self._phase:
            self.seconds[self._phase[0]] = now - self._phase[1]
        self._phase = (phase, now) if phase else None
        if self.announce and line:
            self.announce(line)


def write_prompts(path: Path, prompts: Sequence[str]) -> Path:
    """One JSON object with the column `prompt` per line."""
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")
    return path


def build_world(
    out: Path,
    *,
    seed: int,
    size: WorldSize | None = None,
    announce: Callable[[str], None] | None = None,
) -> DemoWorld:
    """Make the whole world under `out`, the same for the same seed (and library versions).

    Args:
      out: directory; `policy/`, `reward/`, `prompts.jsonl`, `heldout_prompts.jsonl` and `world.json` go there.
      seed: decides the split, the corpus, the weights, the pairs and their labels.
      size: smaller worlds for tests.
      announce: called with one line of text as each phase begins.
    """
    size = size or WorldSize()
    clock = _Clock(announce)
    out.mkdir(parents=True, exist_ok=True)
    train, held_out = split_prompts(HELD_OUT_SHARE, seed=seed)
    with quiet(), one_thread():
        clock.start("corpus", f"writing {size.answers} answers to {len(train)} prompts ({len(held_out)} held out)")
        corpus = write_corpus(train, size.answers, seed=seed)
        tokenizer = train_tokenizer([text for pair in corpus for text in pair], vocabulary=size.vocabulary)
        clock.start("finetune", "fine-tuning a small language model on them, from scratch")
        model = new_policy(tokenizer, seed=seed)
        finetune(model, tokenizer, corpus, epochs=size.epochs, seed=seed)
        save(model, tokenizer, out / "policy")
        clock.start("pairs", f"sampling {size.pairs} pairs of its answers for the labeller")
        asked = _cycle(train, size.pairs) + _cycle(held_out, size.held_out_pairs)
        first = sample_answers(model, tokenizer, asked, seed=2 * seed)
        second = sample_answers(model, tokenizer, asked, seed=2 * seed + 1)
        n = size.pairs
        pairs = label_pairs(asked[:n], first[:n], second[:n], seed=2 * seed)
        test_pairs = label_pairs(asked[n:], first[n:], second[n:], seed=2 * seed + 1)
        clock.start("reward", f"training a reward model on {len(pairs)} labelled pairs")
        reward = train_reward_model(out / "policy", tokenizer, pairs, epochs=size.reward_epochs, seed=seed)
        reward.save_pretrained(out / "reward")
        tokenizer.save_pretrained(out / "reward")
        agreed = accuracy(reward, tokenizer, test_pairs)
    clock.start("")
    prompts = [pair.prompt for pair in test_pairs]
    chosen = gold_judge(prompts, [pair.chosen for pair in test_pairs])
    rejected = gold_judge(prompts, [pair.rejected for pair in test_pairs])
    world = DemoWorld(
        policy=out / "policy",
        reward=out / "reward",
        prompts=write_prompts(out / "prompts.jsonl", train),
        heldout_prompts=write_prompts(out / "heldout_prompts.jsonl", held_out),
        reward_model_accuracy=agreed,
        labeller_accuracy=mean(one > other for one, other in zip(chosen, rejected, strict=True)),
        gold_start=mean(gold_judge(asked[n:], first[n:])),
        seconds=clock.seconds,
    )
    (out / "world.json").write_text(json.dumps(asdict(world), default=str, indent=2) + "\n", encoding="utf-8")
    return world


def _cycle(prompts: Sequence[str], count: int) -> list[str]:
    """`count` prompts, from the first on, and again from the first when they run out."""
    return [prompts[i % len(prompts)] for i in range(count)]
