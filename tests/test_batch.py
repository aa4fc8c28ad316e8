"""The records of an update: rows go together, and a micro-batch cuts away shared padding only."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from kleash.batch import Prompts, Rollout, micro_batch_of

PAD = 0


def rollout_from(prompts: list[list[int]], responses: list[list[int]]) -> Rollout:
    """Prompts padded left and responses right, as the sampler leaves them; log-probs count up."""
    before, time = max(map(len, prompts)), max(map(len, responses))
    sequences = [
        [PAD] * (before - len(p)) + p + r + [PAD] * (time - len(r)) for p, r in zip(prompts, responses, strict=True)
    ]
    mask = [[t < len(r) for t in range(time)] for r in responses]
    attention = [[i >= before - len(p) for i in range(before)] + row for p, row in zip(prompts, mask, strict=True)]
    response_mask = torch.tensor(mask)
    return Rollout(
        sequences=torch.tensor(sequences),
        attention_mask=torch.tensor(attention),
        response_mask=response_mask,
        rollout_logprobs=response_mask * torch.arange(float(response_mask.numel())).view_as(response_mask),
        finished=torch.ones(len(prompts), dtype=torch.bool),
        completions=[" ".join(map(str, r)) for r in responses],
    )


@st.composite
def rollouts(draw: DrawFn) -> tuple[Rollout, torch.Tensor, list[list[int]], list[list[int]]]:
    """A rollout, some of its rows in any order, and the prompts and responses that it was made from."""
    batch = draw(st.integers(1, 5))
    tokens = st.lists(st.integers(0, 9), min_size=1, max_size=5)  # PAD = 0 is an ordinary token too
    prompts, responses = ([draw(tokens) for _ in range(batch)] for _ in range(2))
    rows = draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=batch, unique=True))
    return rollout_from(prompts, responses), torch.tensor(rows), prompts, responses


def test_responses_are_the_right_part_of_the_sequences():
    rollout = rollout_from([[1, 2], [3]], [[4], [5, 6, 7]])
    assert rollout.sequences.tolist() == [[1, 2, 4, 0, 0], [0, 3, 5, 6, 7]]
    assert rollout.response_time == 3
    assert rollout.responses.tolist() == [[4, 0, 0], [5, 6, 7]]


def test_a_micro_batch_cuts_the_padding_that_its_rows_share():
    rollout = rollout_from([[1, 2, 3], [4], [5, 6]], [[7], [8, 9], [1, 2, 3, 4]])
    part = micro_batch_of(rollout, torch.tensor([1, 0]))
    assert part.sequences.tolist() == [[0, 0, 4, 8, 9], [1, 2, 3, 7, 0]]
    assert part.attention_mask.tolist() == [[False, False, True, True, True], [True, True, True, True, False]]
    assert part.response_mask.tolist() == [[True, True], [True, False]]
    assert part.responses.tolist() == [[8, 9], [7, 0]]
    assert part.time == 2
    alone = micro_batch_of(rollout, torch.tensor([1]))
    assert alone.sequences.tolist() == [[4, 8, 9]]
    assert part.own(rollout.rollout_logprobs).tolist() == [[4.0, 5.0], [0.0, 0.0]]


@given(rollouts())
def test_a_micro_batch_holds_the_very_tokens_of_its_rows(given_rollout):
    rollout, rows, prompts, responses = given_rollout
    part = micro_batch_of(rollout, rows)
    for i, row in enumerate(rows.tolist()):
        assert part.sequences[i][part.attention_mask[i]].tolist() == prompts[row] + responses[row]
        assert part.responses[i][part.response_mask[i]].tolist() == responses[row]
        own = part.own(rollout.rollout_logprobs)[i]
        assert torch.equal(own[part.response_mask[i]], rollout.rollout_logprobs[row][rollout.response_mask[row]])
    assert part.sequences.shape[1] == max(len(prompts[r]) for r in rows) + max(len(responses[r]) for r in rows)
    assert part.attention_mask.any(0).all()  # nothing left that is padding in every row


def test_rows_of_prompts_keep_their_columns():
    prompts = Prompts(texts=["a", "b", "c"], tokens=[[1], [2], [3]], columns={"answer": [7, 8, 9]})
    assert len(prompts) == 3
    part = prompts.rows(1, 3)
    assert (part.texts, part.tokens, part.columns) == (["b", "c"], [[2], [3]], {"answer": [8, 9]})
