"""The first beta of a leash that was given a budget only: from how far apart the reference's own scores lie."""

import torch
from torch import Tensor

from kleash.config import RunConfig
from kleash.errors import RewardError
from kleash.leash import beta_for_budget
from kleash.masking import Reduce
from kleash.parts import Parts
from kleash.prompts import prompts_of_update
from kleash.seeds import generator_for

RESPONSES_PER_PROMPT = 4


def score_std_within_prompts(scores: Tensor, *, reduce: Reduce) -> float:
    """Standard deviation of scores among responses to the same prompt, pooled over prompts.

    sqrt(sum over prompts of sum_i (s_i - mean)^2 / (prompts (responses - 1))), in float64. The spread between prompts
    is left out: no policy can choose its prompts.

    Args:
      scores: [prompts, responses] of this process, at least two responses.
      reduce: adds a tensor over processes.
    """
    deviations = scores.double() - scores.double().mean(1, keepdim=True)
    freedom = deviations.new_tensor(float(scores.shape[0] * (scores.shape[1] - 1)))
    squares, known = reduce(torch.stack([deviations.square().sum(), freedom])).tolist()
    return float((squares / known) ** 0.5)


@torch.no_grad()
def first_beta(parts: Parts, config: RunConfig, *, own: slice, reduce: Reduce) -> float:
    """sigma / sqrt(2 target_kl_per_sequence), sigma from responses of the reference to the first update's prompts.

    Args:
      parts: models on their device.
      config: its leash has a target.
      own: the rows of this process.
      reduce: adds a tensor over processes.

    Raises:
      RewardError: the reward gives all responses to a prompt the same score, so nothing follows from it.
      ValueRangeError: what follows lies outside the leash's bounds.
    """
    count = config.rollout.prompts_per_update
    prompts = prompts_of_update(parts.prompts, 1, per_update=count, seed=config.seed).rows(own.start, own.stop)
    shape = (RESPONSES_PER_PROMPT, count, config.rollout.max_new_tokens)
    uniforms = torch.rand(shape, dtype=torch.float64, generator=generator_for(config.seed, "first beta"))
    rollouts = [parts.rollout(parts.reference, prompts, numbers[own], config.rollout) for numbers in uniforms]
    scores = torch.stack([parts.scorer(prompts, rollout) for rollout in rollouts], 1)
    sigma = score_std_within_prompts(scores.to(parts.reference.device), reduce=reduce)
    if sigma == 0:
        raise RewardError(
            "Expected a reward that tells the reference's responses to one prompt apart, found the same score for "
            "each of them; set leash.beta to a number, or look at the reward."
        )
    assert config.leash.target_kl_per_sequence is not None
    return beta_for_budget(sigma, config.leash.target_kl_per_sequence)
