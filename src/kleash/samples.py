"""The responses of a run that are kept: a few of every update as text, and some of a few updates token by token."""

from typing import Any

import torch

from kleash.batch import Prompts, Rollout, micro_batch_of
from kleash.drift import SequenceFigures, TokenFigures
from kleash.language_model import LanguageModel
from kleash.models import unwrapped
from kleash.pieces import Pieces
from kleash.reading import Alternatives, likeliest_tokens
from kleash.run import Run
from kleash.token_map import token_maps

Rows = list[dict[str, Any]]


def samples_of(update: int, prompts: Prompts, rollout: Rollout, figures: SequenceFigures, *, count: int) -> Rows:
    """Rows of samples.jsonl: the first responses of the update that the main process holds, with their figures."""
    return [
        {
            **_described(update, i, prompts, figures),
            "response": rollout.completions[i],
            "response_length": int(figures.length[i]),
        }
        for i in range(min(count, len(prompts)))
    ]


def _described(update: int, row: int, prompts: Prompts, figures: SequenceFigures) -> dict[str, Any]:
    return {
        "update": update,
        "index": row,
        "prompt": prompts.texts[row],
        "score": float(figures.scores[row]),
        "eval_score": None if figures.eval_scores is None else float(figures.eval_scores[row]),
        "kl_policy_ref_per_sequence": float(figures.kl_policy_ref[row]),
        "finished": bool(figures.finished[row]),
    }


def is_mapped(run: Run, update: int) -> bool:
    """Whether responses of the update are kept token by token: the first, the last, and those with a checkpoint."""
    return update in (1, run.config.updates) or update % run.config.checkpoint.every == 0


@torch.no_grad()
def token_maps_of(
    run: Run, update: int, prompts: Prompts, rollout: Rollout, figures: SequenceFigures, tokens: TokenFigures
) -> Rows:
    """Rows of token_maps.jsonl: the first responses that the main process holds; none where they are not kept.

    To be called before the policy moves, so that what it finds likeliest is what it sampled from.

    Args:
      run: its policy and reference.
      update: its number.
      prompts, rollout: the share of this process.
      figures, tokens: of all processes.
    """
    count = min(run.config.mapped_responses, len(prompts))
    if not (count and is_mapped(run, update) and run.accelerator.is_main_process):
        return []
    alternatives = _alternatives(run, rollout, count)
    found = token_maps(tokens, alternatives, Pieces(run.parts.tokenizer), rows=count)
    k1 = figures.kl_policy_ref_k1.tolist()
    return [
        {**_described(update, i, prompts, figures), "kl_policy_ref_per_sequence_k1": k1[i], **found[i]}
        for i in range(count)
    ]


def _alternatives(run: Run, rollout: Rollout, count: int) -> Alternatives:
    """What policy and reference find likeliest along the first responses."""
    part, temperature = micro_batch_of(rollout, torch.arange(count)), run.config.rollout.temperature
    policy = unwrapped(run.models.policy)
    assert isinstance(policy, LanguageModel)
    with run.accelerator.autocast():
        likeliest = [
            likeliest_tokens(model, model.states(part), part.response_mask, temperature=temperature)
            for model in (policy, run.models.reference)
        ]
    return Alternatives(kept=part.response_mask, policy=likeliest[0], ref=likeliest[1])
