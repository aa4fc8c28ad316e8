"""Sampling: the policy answers a batch of prompts, one key-value-cached token at a time.

The distribution sampled from is softmax(logits / temperature) of the policy and nothing else: no top-k, no
top-p, no banned tokens, so that the one-token estimates of the KL stay unbiased. A token is drawn by inverting
the cumulative distribution at a uniform number that belongs to its row and step, which makes a rollout a
function of the policy, the prompts and those numbers, whatever the batch is split into.
"""

from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from kleash.batch import Prompts, Rollout
from kleash.errors import NonFiniteError
from kleash.models import accepts, forward_arguments

BLOCK = 256


class RolloutConfig(BaseModel):
    """How responses are sampled."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompts_per_update: int = Field(64, ge=1)
    """Prompts, and so responses, in one update, over all processes."""
    max_new_tokens: int = Field(64, ge=1)
    """A response is cut here; the cut is part of the task, nothing is bootstrapped beyond it."""
    temperature: float = Field(1.0, ge=1e-3, le=1e3)
    """Belongs to the policy: every log-prob of policy and reference is taken at this temperature."""
    batch: int | None = Field(None, ge=1)
    """Sequences sampled together on each process; null = all of its share."""


def draw_tokens(logits: Tensor, uniforms: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
    """One token per row by inversion of the cumulative distribution, and its log-prob.

    The token is the first v with cdf(v) > u. The sum is taken in two levels, over blocks and then inside one
    block, in float64, so that a vocabulary of 10^5 costs one pass and no token is favoured by rounding. A token
    of probability 0 is never drawn.

    Args:
      logits: [batch, vocab], at least one finite per row; -inf forbids a token.
      uniforms: [batch] float64 in [0, 1).
      temperature: above 0.

    Returns:
      ([batch] int64 tokens, [batch] float32 log-probs in nats).

    Raises:
      NonFiniteError: a row has NaN or +inf logits, or forbids every token.
    """
    scaled = logits.float() / temperature
    largest = scaled.amax(-1, keepdim=True)
    if not bool(largest.isfinite().all()):
        row = int((~largest.isfinite()).nonzero()[0, 0])
        raise NonFiniteError(
            f"Expected finite logits to sample from, found {float(largest[row]):g} as the largest in row {row}; "
            "lower the learning rate, or look for NaN weights."
        )
    weights = (scaled - largest).exp()
    batch, vocab = weights.shape
    blocks = nn.functional.pad(weights, (0, -vocab % BLOCK)).view(batch, -1, BLOCK)
    block_cdf = blocks.sum(-1).double().cumsum(-1)
    total = block_cdf[:, -1:]
    target = uniforms.to(logits.device).unsqueeze(1) * total
    block = torch.searchsorted(block_cdf, target, right=True)
    before = torch.where(block > 0, block_cdf.gather(1, (block - 1).clamp_min(0)), 0.0)
    inside = blocks.gather(1, block.unsqueeze(-1).expand(-1, -1, BLOCK)).squeeze(1).double().cumsum(-1)
    last_possible = (inside < inside[:, -1:]).sum(-1, keepdim=True)
    offset = torch.minimum(torch.searchsorted(inside, target - before, right=True), last_possible)
    tokens = block * BLOCK + offset
    logprobs = (scaled - largest).gather(1, tokens).double() - total.log()
    return tokens.squeeze(1), logprobs.squeeze(1).float()


def left_padded(tokens: list[list[int]], pad_token_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids [batch, longest] padded on the left, and their attention mask, bool."""
    longest = max(map(len, tokens))
    ids = torch.full((len(tokens), longest), pad_token_id)
    mask = torch.zeros((len(tokens), longest), dtype=torch.bool)
    for row, sequence in enumerate(tokens):
        ids[row, longest - len(sequence) :] = torch.tensor(sequence)
        mask[row, longest - len(sequence) :] = True
    return ids.to(device), mask.to(device)


@dataclass(frozen=True, kw_only=True)
class Responses:
    """What the sampler drew: tokens [batch, time], their log-probs in nats, the mask, and who closed with EOS."""

    tokens: Tensor
    logprobs: Tensor
    mask: Tensor
    finished: Tensor


@torch.no_grad()
def sample_responses(
    model: nn.Module,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    *,
    uniforms: Tensor,
    temperature: float,
    eos_token_ids: list[int],
    pad_token_id: int,
    vocab: int | None = None,
) -> Responses:
    """Sample until every row has closed with EOS or all uniforms are used.

    Rows that have closed leave the batch once they are half of it; the numbers of the others stay theirs.

    Args:
      model: the policy, a causal language model outside any wrapper.
      prompt_ids: [batch, prompt] left-padded.
      prompt_mask: [batch, prompt] bool.
      uniforms: [batch, time] float64 in [0, 1); time is the length limit.
      temperature: above 0.
      eos_token_ids: every token that closes a response.
      pad_token_id: fills the responses after their end.
      vocab: only the first so many tokens can be drawn; None = every one that the model has a logit for.
    """
    batch, limit = uniforms.shape
    device = prompt_ids.device
    tokens = torch.full((batch, limit), pad_token_id, device=device)
    logprobs = torch.zeros((batch, limit), device=device)
    mask = torch.zeros((batch, limit), dtype=torch.bool, device=device)
    eos = torch.tensor(eos_token_ids, device=device)
    active = torch.arange(batch, device=device)
    open_rows = torch.ones(batch, dtype=torch.bool, device=device)
    ids, attention_mask, cache, fresh = prompt_ids, prompt_mask, None, prompt_ids
    for step in range(limit):
        output = model(**_step_arguments(model, fresh, attention_mask, cache))
        logits = output.logits[:, -1, :vocab]
        drawn, drawn_logprobs = draw_tokens(logits, uniforms[active.cpu(), step], temperature=temperature)
        writing = open_rows[active]
        tokens[active, step] = torch.where(writing, drawn, pad_token_id)
        logprobs[active, step] = torch.where(writing, drawn_logprobs, 0.0)
        mask[active, step] = writing
        open_rows[active] = writing & ~torch.isin(drawn, eos)
        remaining = open_rows[active]
        if not bool(remaining.any()):
            break
        cache = _cache_of(model, output)
        ids = torch.cat([ids, drawn.unsqueeze(1)], 1)
        attention_mask = torch.cat([attention_mask, torch.ones_like(attention_mask[:, :1])], 1)
        if 2 * int(remaining.sum()) <= len(active):
            kept = remaining.nonzero().flatten()
            active, ids, attention_mask = active[kept], ids[kept], attention_mask[kept]
            if cache is not None:
                cache.reorder_cache(kept)  # batch_select_indices forgets the states of linear attention
        fresh = ids if cache is None else ids[:, -1:]
    time = int(mask.any(0).sum())
    return Responses(tokens=tokens[:, :time], logprobs=logprobs[:, :time], mask=mask[:, :time], finished=~open_rows)


def _step_arguments(model: nn.Module, fresh: Tensor, attention_mask: Tensor, cache: object | None) -> dict[str, object]:
    arguments: dict[str, object] = {**forward_arguments(model, fresh, attention_mask), "use_cache": True}
    if accepts(model, "logits_to_keep"):
        arguments["logits_to_keep"] = 1
    if cache is not None:
        arguments[_cache_name(model)] = cache
    return arguments


def _cache_name(model: nn.Module) -> str:
    """What the model's forward calls its cache; transformers renamed it in 5.24."""
    return "cache" if accepts(model, "cache") else "past_key_values"


def _cache_of(model: nn.Module, output: object) -> Any:
    """The cache, if a step can go on from it; else None, and the next step reads the whole text.

    A model of states alone (Mamba) takes a mask of the fresh token only, not of the whole text, and errs in silence.
    """
    cache = getattr(output, _cache_name(model), None)
    layers = getattr(cache, "layers", ())
    return None if layers and not any(hasattr(layer, "keys") for layer in layers) else cache


def rollout_of(
    model: nn.Module,
    prompts: Prompts,
    tokenizer: PreTrainedTokenizerBase,
    *,
    uniforms: Tensor,
    config: RolloutConfig,
    eos_token_ids: list[int],
    device: torch.device,
    vocab: int | None = None,
) -> Rollout:
    """Sample one response per prompt, in batches of config.batch.

    Args:
      model: the policy, outside any wrapper.
      prompts: the share of this process.
      tokenizer: decodes the responses; gives the pad token.
      uniforms: [batch, max_new_tokens] float64 in [0, 1), one row per prompt.
      config: temperature and batch size.
      eos_token_ids: every token that closes a response.
      device: where the model is.
      vocab: only the first so many tokens can be drawn; None = every one that the model has a logit for.
    """
    pad_token_id = tokenizer.pad_token_id
    ids, prompt_mask = left_padded(prompts.tokens, pad_token_id, device)
    size = config.batch or len(prompts)
    parts = [
        sample_responses(
            model,
            ids[start : start + size],
            prompt_mask[start : start + size],
            uniforms=uniforms[start : start + size],
            temperature=config.temperature,
            eos_token_ids=eos_token_ids,
            pad_token_id=pad_token_id,
            vocab=vocab,
        )
        for start in range(0, len(prompts), size)
    ]
    time = max(part.tokens.shape[1] for part in parts)
    tokens = _joined([part.tokens for part in parts], time, pad_token_id)
    mask = _joined([part.mask for part in parts], time, False)
    completions = tokenizer.batch_decode(
        [row[kept].tolist() for row, kept in zip(tokens, mask, strict=True)], skip_special_tokens=True
    )
    return Rollout(
        sequences=torch.cat([ids, tokens], 1),
        attention_mask=torch.cat([prompt_mask, mask], 1),
        response_mask=mask,
        rollout_logprobs=_joined([part.logprobs for part in parts], time, 0.0),
        finished=torch.cat([part.finished for part in parts]),
        completions=completions,
    )


def _joined(parts: list[Tensor], time: int, fill: float) -> Tensor:
    """Rows of all parts below each other, padded on the right to `time`."""
    return torch.cat([nn.functional.pad(part, (0, time - part.shape[1]), value=fill) for part in parts])
