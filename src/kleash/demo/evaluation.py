"""A policy on held-out prompts: what the reward model says, what the gold judge says, and how far it drifted."""

from dataclasses import dataclass
from pathlib import Path

import torch

from kleash.demo.gold import gold_judge
from kleash.estimators import Interval, mean_with_interval, per_sequence
from kleash.language_model import Models, language_models
from kleash.models import eos_token_ids, frozen, load_causal_model, load_tokenizer, value_model_from_policy
from kleash.prompts import load_prompts, tokenized_prompts
from kleash.rollout import RolloutConfig, rollout_of
from kleash.scorers import load_scorer
from kleash.scoring import score_rollout
from kleash.seeds import generator_for

BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Means over the held-out prompts with their 95 % intervals; KL(policy || reference) is exact, in nats."""

    score: Interval
    gold: Interval
    kl_policy_ref_per_sequence: Interval
    responses: list[str]


def evaluate(
    policy_path: Path, reference_path: Path, *, reward: Path, prompts: Path, length: int, seed: int
) -> Evaluation:
    """Sample one response per held-out prompt, the same random numbers for every policy, and judge them.

    Args:
      policy_path: checkpoint of the policy.
      reference_path: checkpoint that its KL is measured to.
      reward: the reward model.
      prompts: jsonl of held-out prompts.
      length: limit of a response, in tokens.
      seed: of the random numbers.
    """
    tokenizer = load_tokenizer(policy_path)
    policy, reference = (frozen(load_causal_model(path, "demo")) for path in (policy_path, reference_path))
    held_out = tokenized_prompts(load_prompts(prompts), tokenizer)
    shape = (len(held_out), length)
    rollout = rollout_of(
        policy,
        held_out,
        tokenizer,
        uniforms=torch.rand(shape, dtype=torch.float64, generator=generator_for(seed, "held-out")),
        config=RolloutConfig(max_new_tokens=length),
        eos_token_ids=eos_token_ids(policy, tokenizer),
        device=policy.device,
    )
    language_model, ref_language_model = language_models(policy, reference, vocab=policy.config.vocab_size)
    models = Models(policy=language_model, reference=ref_language_model, value=value_model_from_policy(policy))
    rows = list(torch.split(torch.arange(len(held_out)), BATCH))
    scored = score_rollout(models, rollout, rows, temperature=1.0)
    texts = [str(text) for text in held_out.texts]
    return Evaluation(
        score=mean_with_interval(load_scorer(str(reward), tokenizer)(held_out, rollout)),
        gold=mean_with_interval(torch.tensor(gold_judge(texts, rollout.completions))),
        kl_policy_ref_per_sequence=mean_with_interval(
            per_sequence(scored.kl_policy_ref_per_token, rollout.response_mask)
        ),
        responses=rollout.completions,
    )
