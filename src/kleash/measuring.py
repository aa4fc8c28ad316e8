"""The state of a measurement, and where its responses come from: the policy, or a file."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from kleash.batch import Prompts, Rollout
from kleash.dealing import dealt, is_even
from kleash.drift import TokenFigures, token_figures
from kleash.drift_map import special_token_ids
from kleash.estimators import Interval
from kleash.given_responses import given_rollouts, require_room_for_responses
from kleash.pair import Pair
from kleash.pieces import Pieces
from kleash.plan import Plan
from kleash.prompts import require_room
from kleash.reading import reading_of
from kleash.rollout import RolloutConfig, rollout_of
from kleash.tally import Tally
from kleash.token_map import token_maps

TOKENS_AT_ONCE = 8192  # of a padded batch, prompts and responses
ALTERNATIVE_POSITIONS = 60_000  # of all mapped responses

Batches = Iterator[tuple[Tensor, Rollout]]


@dataclass(kw_only=True)
class Measuring:
    """A measurement under way: the models, the prompts, and what has been found so far.

    pair, prompts, plan: what is measured, on what, and for how long.
    temperature:         of both models.
    sampled:             whether responses are dealt to the prompts, or were given.
    written_by_policy:   whether log policy - log reference of a response estimates the KL.
    mapped:              how many responses, the first ones, are kept token by token in `maps`.
    """

    pair: Pair
    prompts: Prompts
    plan: Plan
    temperature: float
    sampled: bool
    written_by_policy: bool
    mapped: int
    maps: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tally = Tally(tokenizer=self.pair.tokenizer)
        self._pieces = Pieces(self.pair.tokenizer)
        self._special_token_ids = special_token_ids(self.pair.tokenizer)

    @property
    def is_even(self) -> bool:
        """Whether no prompt has more responses than another, or none has more than one."""
        return not self.sampled or is_even(self.tally.responses, len(self.prompts))

    @property
    def interval(self) -> Interval:
        """The exact KL per sequence so far."""
        return self.tally.interval("kl_policy_ref", strata=self.tally.strata)

    def add(self, numbers: Tensor, rollout: Rollout) -> None:
        """Read a batch of responses: what both models say of it goes to the tally, of the first responses to the maps.

        Args:
          numbers: [batch] of the prompts that they answer.
          rollout: the responses.
        """
        rows = min(len(numbers), self.mapped - len(self.maps))
        reading = reading_of(
            self.pair.policy,
            self.pair.reference,
            rollout,
            temperature=self.temperature,
            alternatives_at_most=self._alternatives_of(rows),
        )
        columns = token_figures(
            rollout,
            reading,
            time=rollout.response_time,
            eos_token_ids=self.pair.eos_token_ids,
            special_token_ids=self._special_token_ids,
        )
        tokens = TokenFigures(**{name: column.cpu() for name, column in columns.items()})
        self.tally.add(numbers, rollout, reading, tokens)
        for row, found in enumerate(token_maps(tokens, reading.alternatives, self._pieces, rows=rows)):
            place = self.tally.responses - len(numbers) + row
            described = {
                "index": place,
                "prompt": self.prompts.texts[int(numbers[row])],
                "finished": bool(rollout.finished[row]),
                **self.tally.of_response(place, written_by_policy=self.written_by_policy),
            }
            self.maps.append(described | found)

    def _alternatives_of(self, rows: int) -> int:
        """At how many positions of so many mapped responses the likeliest tokens are kept: their share of all."""
        if not rows:
            return 0
        expected = self.plan.expected(self.interval if self.tally.responses else None)
        return round(ALTERNATIVE_POSITIONS * rows / min(self.mapped, expected))


def sampled_batches(state: Measuring, config: RolloutConfig, *, seed: int) -> Batches:
    """Responses of the policy, as many as the plan says; the numbers of the prompts beside them.

    Raises:
      PromptError: a prompt leaves no room for a response.
    """
    prompts, pair = state.prompts, state.pair
    require_room(prompts, max_new_tokens=config.max_new_tokens, context=pair.context)
    done = 0
    while (stop := state.plan.stop_after(done, state.interval if done else None)) > done:
        while done < stop:
            deal = dealt(
                prompts,
                done,
                most=stop - done,
                tokens_at_once=TOKENS_AT_ONCE,
                max_new_tokens=config.max_new_tokens,
                seed=seed,
                width=state.plan.width,
            )
            done += len(deal.prompts)
            yield (
                deal.prompts,
                rollout_of(
                    pair.policy.model,
                    prompts.at(deal.prompts.tolist()),
                    pair.tokenizer,
                    uniforms=deal.uniforms,
                    config=config,
                    eos_token_ids=pair.eos_token_ids,
                    device=pair.device,
                    vocab=pair.vocab,
                ),
            )


def given_batches(state: Measuring, responses: list[list[int]]) -> Batches:
    """The given responses, row by row, laid out as rollouts.

    Raises:
      PromptError: a prompt with its response is longer than the models' context.
    """
    require_room_for_responses(state.prompts, responses, context=state.pair.context)
    return given_rollouts(
        state.prompts,
        responses,
        state.pair.tokenizer,
        eos_token_ids=state.pair.eos_token_ids,
        tokens_at_once=TOKENS_AT_ONCE,
        width=state.plan.width,
        device=state.pair.device,
    )
