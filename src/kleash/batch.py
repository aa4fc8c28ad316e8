"""The two records that travel through an update: what was asked, and what the policy answered."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Message = dict[str, str]
PromptText = str | list[Message]


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """A batch of prompts, as text and as tokens.

    texts:    [batch] as the user gave them, strings or chat messages.
    tokens:   [batch] lists of token ids, chat template applied, no padding.
    columns:  every other column of the prompt file, each [batch].
    """

    texts: list[PromptText]
    tokens: list[list[int]]
    columns: dict[str, list[Any]]

    def __len__(self) -> int:
        return len(self.texts)

    def rows(self, start: int, stop: int) -> "Prompts":
        """The prompts from start to stop, like a slice of a list."""
        return self.at(range(len(self))[start:stop])

    def at(self, rows: Sequence[int]) -> "Prompts":
        """The prompts of these rows, in their order; a row may come more than once."""
        columns = {name: [values[row] for row in rows] for name, values in self.columns.items()}
        return Prompts(
            texts=[self.texts[row] for row in rows], tokens=[self.tokens[row] for row in rows], columns=columns
        )


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """Prompts with the responses that the policy sampled, prompts padded left and responses right.

    sequences:        [batch, prompt + time] int64 token ids.
    attention_mask:   [batch, prompt + time] bool, True on prompt and response tokens.
    response_mask:    [batch, time] bool, True where the policy sampled the token, the closing EOS included.
    rollout_logprobs: [batch, time] log-probs at sampling time, nats, 0 off the mask.
    finished:         [batch] bool, True where the response closed with an EOS token.
    completions:      [batch] the responses as text, without special tokens.
    """

    sequences: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    rollout_logprobs: Tensor
    finished: Tensor
    completions: list[str]

    @property
    def response_time(self) -> int:
        """Width of the response part."""
        return self.response_mask.shape[1]

    @property
    def responses(self) -> Tensor:
        """[batch, time] the response tokens; off the mask they are padding."""
        return self.sequences[:, self.sequences.shape[1] - self.response_time :]


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Some rows of a rollout, with the padding that all of them share cut away on both sides."""

    rows: Tensor
    sequences: Tensor
    attention_mask: Tensor
    response_mask: Tensor

    @property
    def time(self) -> int:
        """Width of the response part after the cut."""
        return self.response_mask.shape[1]

    @property
    def responses(self) -> Tensor:
        """[rows, time] response tokens."""
        return self.sequences[:, self.sequences.shape[1] - self.time :]

    def own(self, values: Tensor) -> Tensor:
        """This micro-batch's part of a [batch, time] tensor."""
        return values[self.rows, : self.time]


def micro_batch_of(rollout: Rollout, rows: Tensor) -> MicroBatch:
    """The rows' part of the rollout, without columns that are padding in every row."""
    rows = rows.to(rollout.sequences.device)
    attention_mask, response_mask = rollout.attention_mask[rows], rollout.response_mask[rows]
    used = attention_mask.any(0).nonzero().flatten()
    first, last = int(used[0]), int(used[-1]) + 1
    padding_after = attention_mask.shape[1] - last
    return MicroBatch(
        rows=rows,
        sequences=rollout.sequences[rows, first:last],
        attention_mask=attention_mask[:, first:last],
        response_mask=response_mask[:, : response_mask.shape[1] - padding_after],
    )
