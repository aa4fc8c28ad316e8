"""Tiny worlds in which every response can be written down, so that every oracle is a sum.

Nothing here calls kleash: the worlds are the truth that kleash is held to. A policy is a table of
logits, one row per state; the state of a position is all that the policy can see there.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


class World:
    """Every response to every prompt, in float64: `vocab` tokens, at most `length` of them.

    With `eos` a response ends at its first EOS; what stands behind it is EOS again, off the mask.
    The policy sees the prompt and the whole response so far, or with `markov` only the last token.
    Prompts are numbered and equally likely. N is the number of (prompt, response) pairs.

    prompt_of:      [N] int64.
    responses:      [N, length] int64.
    response_mask:  [N, length] bool, True up to and including the EOS.
    states:         [N, length] int64, the row of a logits table that speaks at each position.
    rows:           how many rows a logits table has.
    """

    def __init__(
        self, *, vocab: int, length: int, eos: int | None = None, prompts: int = 1, markov: bool = False
    ) -> None:
        self.vocab, self.length, self.prompts, self.markov = vocab, length, prompts, markov
        every = torch.cartesian_prod(*[torch.arange(vocab)] * length).reshape(-1, length)
        is_eos = torch.zeros_like(every, dtype=torch.bool) if eos is None else every == eos
        ended_before = (is_eos.cumsum(1) - is_eos.long()) > 0
        written_once = (is_eos | ~ended_before).all(1)
        every, mask = every[written_once], ~ended_before[written_once]
        self.prompt_of = torch.arange(prompts).repeat_interleave(len(every))
        self.responses, self.response_mask = every.repeat(prompts, 1), mask.repeat(prompts, 1)
        self._rows_per_prompt = 1 + vocab if markov else sum(vocab**t for t in range(length))
        self.rows = prompts * self._rows_per_prompt
        self.states = self.states_of(self.prompt_of, self.responses)

    def states_of(self, prompt_of: Tensor, responses: Tensor) -> Tensor:
        """[n] prompts and [n, time] tokens -> [n, time] the rows of the table, before each token."""
        states, prefix = [], torch.zeros_like(prompt_of)
        for t in range(responses.shape[1]):
            states.append(prompt_of * self._rows_per_prompt + prefix)
            # 0 is the empty prefix; longer ones are counted level by level, of a Markov policy only the last token
            prefix = (0 if self.markov else prefix * self.vocab) + 1 + responses[:, t]
        return torch.stack(states, 1)

    def random_logits(self, seed: int, *, scale: float = 1.0) -> Tensor:
        """[rows, vocab] independent normal logits."""
        return scale * torch.randn(self.rows, self.vocab, dtype=torch.float64, generator=generator(seed))

    def log_probs(self, logits: Tensor) -> Tensor:
        """[rows, vocab] -> [N, time, vocab] full log-probs at every position of every response."""
        return torch.log_softmax(logits, -1)[self.states]

    def token_logprobs(self, logits: Tensor) -> Tensor:
        """[rows, vocab] -> [N, time] log-probs of the tokens of every response, also off the mask."""
        return torch.log_softmax(logits, -1)[self.states, self.responses]

    def sequence_logprobs(self, logits: Tensor) -> Tensor:
        """[rows, vocab] -> [N] log pi(response | prompt)."""
        return torch.where(self.response_mask, self.token_logprobs(logits), 0.0).sum(1)

    def expectation(self, logits: Tensor, quantity: Tensor) -> Tensor:
        """E of `quantity` [N] when the policy answers equally likely prompts; differentiable in both."""
        return (self.sequence_logprobs(logits).exp() * quantity).sum() / self.prompts

    def variance(self, logits: Tensor, quantity: Tensor) -> Tensor:
        """Variance of `quantity` [N] when the policy answers equally likely prompts."""
        return self.expectation(logits, (quantity - self.expectation(logits, quantity)).square())

    def sequence_kl(self, logits: Tensor, ref_logits: Tensor) -> Tensor:
        """KL(policy || reference) of whole responses, the mean over prompts: a sum over every response."""
        log_ratio = self.sequence_logprobs(logits) - self.sequence_logprobs(ref_logits)
        return self.expectation(logits, log_ratio)

    def sample(self, logits: Tensor, n: int, *, seed: int) -> Tensor:
        """[n] rows of the enumeration, drawn as the policy draws responses."""
        probabilities = self.sequence_logprobs(logits).exp() / self.prompts
        return torch.multinomial(probabilities.detach(), n, replacement=True, generator=generator(seed))

    def optimum(self, ref_logits: Tensor, scores: Tensor, beta: float | Tensor) -> "Optimum":
        """What maximises E[score - beta * KL] over all policies, for `scores` [N]."""
        by_prompt = (self.prompts, -1)
        tilted = (self.sequence_logprobs(ref_logits) + scores / beta).reshape(by_prompt)
        log_z = tilted.logsumexp(1, keepdim=True)
        logprobs = tilted - log_z
        expected_score = (logprobs.exp() * scores.reshape(by_prompt)).sum(1).mean()
        return Optimum(
            sequence_logprobs=logprobs.flatten(),
            objective=beta * log_z.mean(),
            kl_policy_ref=expected_score / beta - log_z.mean(),
            expected_score=expected_score,
        )

    def logits_of(self, sequence_logprobs: Tensor) -> Tensor:
        """The [rows, vocab] table whose policy has these sequence log-probs; unreached rows stay 0.

        log pi(v | s) = log P(state s, then v) - log P(state s). Only without `markov`: a table with so
        short a memory cannot say everything.
        """
        assert not self.markov
        probabilities = sequence_logprobs.exp().unsqueeze(1).expand(-1, self.length)
        cells = (self.states * self.vocab + self.responses)[self.response_mask]
        reached = torch.zeros(self.rows * self.vocab, dtype=torch.float64)
        table = reached.index_add(0, cells, probabilities[self.response_mask]).reshape(self.rows, self.vocab)
        return torch.where((table == 0).all(1, keepdim=True), 0.0, table.log())


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """pi* = rho exp(score / beta) / Z:  J* = beta log Z,  KL* = E*[score] / beta - log Z (Korbak et al. 2022)."""

    sequence_logprobs: Tensor
    objective: Tensor
    kl_policy_ref: Tensor
    expected_score: Tensor


def generator(seed: int) -> torch.Generator:
    """A generator of its own, so that no test depends on another."""
    return torch.Generator().manual_seed(seed)


def one_token(probabilities: list[float]) -> Tensor:
    """[vocab] log-probs in float64; as logits they are the same distribution."""
    return torch.tensor(probabilities, dtype=torch.float64).log()


def gradient(value: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """Gradient of the scalar function `value` at a point, by autograd."""
    point = at.detach().clone().requires_grad_()
    (result,) = torch.autograd.grad(value(point), point)
    return result


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine between two tensors read as vectors."""
    return float((a * b).sum() / (a.norm() * b.norm()))


def markov_sum_moments(logits: Tensor, values: Tensor, *, length: int) -> tuple[float, float]:
    """Mean and variance of sum_t values[state_t, token_t] over responses too many to write down.

    Args:
      logits: [1 + vocab, vocab] of a Markov policy: row 0 starts, row 1 + v follows the token v.
      values: [1 + vocab, vocab] what drawing a token in a state adds to the sum.
      length: tokens per response.

    With S the sum so far, E[S; state], E[S^2; state] and P(state) walk forward together.
    """
    transition = torch.softmax(logits, -1)
    start = torch.zeros(len(logits), dtype=torch.float64)
    start[0] = 1
    probability, first, second = start, torch.zeros_like(start), torch.zeros_like(start)
    for _ in range(length):
        new_second = second @ transition + 2 * first @ (transition * values) + probability @ (transition * values**2)
        new_first = first @ transition + probability @ (transition * values)
        new_probability = probability @ transition
        nothing = torch.zeros(1, dtype=torch.float64)  # nobody returns to the start
        probability, first, second = (torch.cat([nothing, new]) for new in (new_probability, new_first, new_second))
    mean = first.sum()
    return float(mean), float(second.sum() - mean.square())
