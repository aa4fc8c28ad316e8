"""The baseline without training: responses of the reference, judged as a run would judge them, and the best of them.

What a run buys with drift has to be held against what drawing n responses and keeping the best would have bought.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kleash.batch import Prompts
from kleash.best_of_n import BestOfN, best_of_n_from_samples
from kleash.config import RunConfig
from kleash.errors import ConfigError
from kleash.estimators import per_sequence
from kleash.models import default_device
from kleash.parts import Given, Parts, load_parts
from kleash.progress import silent_libraries
from kleash.prompts import prompts_of_update
from kleash.scorers import reward_models
from kleash.seeds import generator_for


@dataclass(frozen=True, kw_only=True)
class ReferenceSamples:
    """N responses of the reference to each prompt, judged; each [prompts, draws], on the CPU.

    ref_sequence_logprobs are log rho(response | prompt) at the run's temperature, in nats; responses are numbers, equal
    for equal responses to one prompt. eval_scores is None without a held-out judge.
    """

    scores: Tensor
    eval_scores: Tensor | None
    ref_sequence_logprobs: Tensor
    responses: Tensor


def best_of_n_baseline(config: RunConfig, given: Given, *, best_of: int, prompts: int) -> list[BestOfN]:
    """Best of 1, 2, 4 .. best_of from the reference of a run: its drift, score and held-out score.

    All of them come from the same best_of responses to each of the run's first prompts. The numbers follow from the
    run's seed; temperature, length limit, reward and judge are the run's.

    Args:
      config: of the run; policy and leash play no part.
      given: parts handed over as objects.
      best_of: the largest n, and how many responses are drawn for each prompt.
      prompts: how many prompts; at most as many as there are.

    Raises:
      InputError: see load_parts; or best_of or prompts below 1.
    """
    if best_of < 1 or prompts < 1:
        raise ConfigError(
            f"Expected at least one response to at least one prompt, found {best_of} and {prompts}; raise them."
        )
    with silent_libraries():
        parts = load_parts(config, given)
        drawn = reference_samples(parts, config, draws=best_of, prompts=min(prompts, len(parts.prompts)))
    columns = (drawn.scores, drawn.eval_scores, drawn.ref_sequence_logprobs, drawn.responses)
    return [best_of_n_from_samples(*columns, n=n) for n in doubling(best_of)]


def doubling(largest: int) -> list[int]:
    """1, 2, 4 .. up to the largest, which is always there.

    >>> doubling(16), doubling(12)
    ([1, 2, 4, 8, 16], [1, 2, 4, 8, 12])
    """
    return [*(2**power for power in range((largest - 1).bit_length())), largest]


@torch.no_grad()
def reference_samples(parts: Parts, config: RunConfig, *, draws: int, prompts: int) -> ReferenceSamples:
    """Draw from the reference and judge, as many responses at a time as the run samples together."""
    device = default_device()
    scorers = [scorer for scorer in (parts.scorer, parts.eval_scorer) if scorer is not None]
    models: list[nn.Module] = [parts.reference, *(model for scorer in scorers for model in reward_models(scorer))]
    for model in models:
        model.to(device)
    asked = repeated(prompts_of_update(parts.prompts, 1, per_update=prompts, seed=config.seed), draws)
    shape = (len(asked), config.rollout.max_new_tokens)
    uniforms = torch.rand(shape, dtype=torch.float64, generator=generator_for(config.seed, "best-of-n"))
    size = config.rollout.batch or config.rollout.prompts_per_update
    columns: list[list[Tensor]] = [[] for _ in range(1 + len(scorers))]
    responses: list[tuple[int, ...]] = []
    for start in range(0, len(asked), size):
        some = asked.rows(start, start + size)
        rollout = parts.rollout(parts.reference, some, uniforms[start : start + size], config.rollout)
        logprobs = per_sequence(rollout.rollout_logprobs.double(), rollout.response_mask)
        for column, values in zip(columns, [logprobs, *(scorer(some, rollout) for scorer in scorers)], strict=True):
            column.append(values.cpu())
        responses += [
            tuple(row[kept].tolist()) for row, kept in zip(rollout.responses, rollout.response_mask, strict=True)
        ]
    logprobs, scores, *judged = (torch.cat(column).reshape(prompts, draws) for column in columns)
    number_of = {response: number for number, response in enumerate(dict.fromkeys(responses))}
    return ReferenceSamples(
        scores=scores,
        eval_scores=judged[0] if judged else None,
        ref_sequence_logprobs=logprobs,
        responses=torch.tensor([number_of[response] for response in responses]).reshape(prompts, draws),
    )


def repeated(prompts: Prompts, times: int) -> Prompts:
    """Every prompt so many times in a row."""
    return prompts.at([row for row in range(len(prompts)) for _ in range(times)])
