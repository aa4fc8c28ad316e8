"""The few real responses that the checks look at, in a batch and each alone."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kleash.batch import Prompts, Rollout
from kleash.config import RunConfig
from kleash.language_model import Models
from kleash.parts import Parts
from kleash.prompts import prompts_of_update
from kleash.scoring import Scored, score_rollout
from kleash.seeds import generator_for

ROWS = 8
ALONE = 4  # of them, the ones with the shortest prompts, so with the most padding
LONGEST_RESPONSE = 32  # tokens; a sample need not be longer to show a fault


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Some prompts of the first update, shortest first, and the policy's responses to them."""

    prompts: Prompts
    rollout: Rollout

    def alone(self, row: int) -> tuple[Prompts, Rollout]:
        """One response without the batch: every token that is padding is gone."""
        kept, rollout = self.rollout.attention_mask[row], self.rollout
        own = rollout.response_mask[row]
        return self.prompts.rows(row, row + 1), Rollout(
            sequences=rollout.sequences[row][kept].unsqueeze(0),
            attention_mask=kept[kept].unsqueeze(0),
            response_mask=own[own].unsqueeze(0),
            rollout_logprobs=rollout.rollout_logprobs[row][own].unsqueeze(0),
            finished=rollout.finished[row : row + 1],
            completions=rollout.completions[row : row + 1],
        )

    @property
    def rows_alone(self) -> range:
        return range(min(ALONE, len(self.prompts)))


def sample_of(parts: Parts, config: RunConfig) -> Sample:
    """The policy's responses to prompts of every length in the first update; the same ones for the same seed.

    Raises:
      NonFiniteError: the policy has NaN or infinite logits.
    """
    count = config.rollout.prompts_per_update
    prompts = prompts_of_update(parts.prompts, 1, per_update=count, seed=config.seed)
    by_length = sorted(range(count), key=lambda row: len(prompts.tokens[row]))
    rows = min(ROWS, count)
    chosen = prompts.at([by_length[number * (count - 1) // max(rows - 1, 1)] for number in range(rows)])
    uniforms = uniforms_of(config, rows)
    return Sample(prompts=chosen, rollout=parts.rollout(parts.policy, chosen, uniforms, config.rollout))


def uniforms_of(config: RunConfig, rows: int) -> Tensor:
    """[rows, time] the numbers that the sample is drawn with."""
    shape = (rows, min(config.rollout.max_new_tokens, LONGEST_RESPONSE))
    return torch.rand(shape, dtype=torch.float64, generator=generator_for(config.seed, "probe"))


def scored_sample(sample: Sample, models: Models, config: RunConfig) -> Scored:
    """What the models say of the sample, in micro-batches of the size that training uses.

    Raises:
      NonFiniteError: a log-prob, value or KL is NaN or infinite.
    """
    rows = torch.arange(len(sample.prompts))
    parts = list(torch.split(rows, config.ppo.micro_batch or len(rows)))
    return score_rollout(models, sample.rollout, parts, temperature=config.rollout.temperature)
