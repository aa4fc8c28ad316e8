"""The reward on real responses: finite, varied, repeatable, the same alone as in a batch, and on the last token."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kleash.config import RunConfig
from kleash.errors import RewardError
from kleash.parts import Parts
from kleash.preflight.agreement import Precision
from kleash.preflight.check import Check, failed, failed_with, passed, warned
from kleash.preflight.sample import Sample, uniforms_of
from kleash.rewards import adjusted_rewards
from kleash.scorers import Scorer, shortened


def reward_checks(role: str, scorer: Scorer, sample: Sample, precision: Precision) -> tuple[list[Check], Tensor | None]:
    """The checks of a reward or a judge, and its scores [batch] if it gave any.

    Args:
      role: reward or judge; begins the checks' names.
      scorer: what is looked at.
      sample: the responses that it scores: all together twice, then some of them alone.
      precision: what rounding explains.
    """
    try:
        scores = scorer(sample.prompts, sample.rollout)
        again = scorer(sample.prompts, sample.rollout)
        alone = torch.cat([scorer(*sample.alone(row)) for row in sample.rows_alone])
    except RewardError as error:
        return [failed_with(f"{role} finite", error)], None
    return list(_checks(role, sample, scores, again, alone, precision)), scores


def _checks(
    role: str, sample: Sample, scores: Tensor, again: Tensor, alone: Tensor, precision: Precision
) -> Iterator[Check]:
    yield passed(f"{role} finite", f"{len(scores)} scores, {scores.min():.3g} to {scores.max():.3g}")
    yield _spread(f"{role} spread", sample, scores)
    noise = float((scores - again).abs().max())
    if noise:
        yield warned(
            f"{role} repeats",
            f"the same responses scored twice are up to {noise:.3g} apart",
            "fix its seed, or average over several calls: its noise is the policy's noise",
        )
    else:
        yield passed(f"{role} repeats", "scored twice, the same scores")
    difference, row = map(float, (scores[: len(alone)] - alone).abs().max(0))
    allowed = precision.relative * max(1.0, float(scores.abs().max()))
    apart = f"response {int(row) + 1} scores {scores[int(row)]:.4g} in the batch and {alone[int(row)]:.4g} alone"
    if difference > allowed + 4 * noise:
        yield failed(
            f"{role} alone",
            f"{apart}: the {role} reads the padding, or the other responses",
            "mask the padding in it, and let each score depend on its own prompt and completion only",
        )
    elif difference > allowed:
        yield warned(
            f"{role} alone",
            f"{apart}, which may be its noise of {noise:.3g}: whether the {role} reads the padding, or the other "
            "responses, cannot be told",
            "fix its seed while it is checked",
        )
    else:
        yield passed(f"{role} alone", f"alone the score of the padded batch, to {difference:.1g}")


def _spread(name: str, sample: Sample, scores: Tensor) -> Check:
    pairs = {
        f"{prompt!r} {said}" for prompt, said in zip(sample.prompts.texts, sample.rollout.completions, strict=True)
    }
    if len(pairs) < 2:
        return passed(name, "one prompt and one response, so nothing to compare")
    std = float(scores.double().std())
    if std == 0:
        return warned(
            name,
            f"{len(scores)} responses, {len(pairs)} of them different, and one score {scores[0]:.3g} for all",
            "give a reward that tells responses apart: nothing is learnt from a constant one",
        )
    return passed(name, f"standard deviation {std:.3g} over {len(scores)} prompts")


def score_position(parts: Parts, config: RunConfig, sample: Sample, scores: Tensor | None) -> Check:
    """Which token gets the score, shown on the first response, and whether it is the last one of every response."""
    name, rollout = "score position", sample.rollout
    mask, eos = rollout.response_mask, torch.tensor(parts.eos_token_ids, device=rollout.sequences.device)
    ones, no_kl = torch.ones(len(mask), device=mask.device), torch.zeros_like(rollout.rollout_logprobs)
    rewards = adjusted_rewards(ones, no_kl, mask, beta=0.0)
    closes = torch.isin(rollout.responses, eos) & mask
    for row, length in enumerate(mask.sum(1).tolist()):
        places = rewards[row].nonzero().flatten().tolist()
        if places != [length - 1] or not bool(mask[row, :length].all()):
            where = ", ".join(str(place + 1) for place in places)
            return failed(
                name,
                f"the score of response {row + 1} is on token {where} of {length}",
                "report this: the score belongs on the last response token, never on padding",
            )
        if closes[row].nonzero().flatten().tolist() != [length - 1] * bool(rollout.finished[row]):
            return failed(
                name,
                f"response {row + 1} of {length} tokens is called {'' if rollout.finished[row] else 'un'}finished, "
                f"with EOS at tokens {(closes[row].nonzero().flatten() + 1).tolist()}",
                "report this: a response is finished if, and only if, its last token is EOS",
            )
    if not _closed_by_an_eos_in_the_last_place(parts, config, sample):
        return failed(
            name,
            "an EOS in the last possible place is called unfinished",
            "report this: such a response has closed, and owes no missing_eos_penalty",
        )
    return passed(name, _shown(sample, scores, parts.tokenizer))


def _closed_by_an_eos_in_the_last_place(parts: Parts, config: RunConfig, sample: Sample) -> bool:
    """Whether a response of one token counts as finished once that very token is the EOS."""
    prompt, uniforms = sample.prompts.rows(0, 1), uniforms_of(config, 1)[:, :1]
    token = int(parts.rollout(parts.policy, prompt, uniforms, config.rollout).responses)
    again = replace(parts, eos_token_ids=[token]).rollout(parts.policy, prompt, uniforms, config.rollout)
    return bool(again.finished) or int(again.responses) != token  # another one is dropout's, which has its own check


def _shown(sample: Sample, scores: Tensor | None, tokenizer: PreTrainedTokenizerBase) -> str:
    """The first response, cut short, and the token that its score is given to."""
    own = sample.rollout.responses[0][sample.rollout.response_mask[0]].tolist()
    said, last = (str(tokenizer.decode(tokens)) for tokens in (own, own[-1:]))
    score = "its score" if scores is None else f"the score {scores[0]:.3g}"
    closed = f"{int(sample.rollout.finished.sum())} of {len(sample.prompts)} responses end with EOS"
    return (
        f"{shortened(sample.prompts.texts[0], 40)} -> {shortened(said, 60)}: {score} goes to token {len(own)} of "
        f"{len(own)}, {last!r} ({own[-1]}); {closed}"
    )
