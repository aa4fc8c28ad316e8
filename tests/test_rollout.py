"""Sampling: exact inversion of the distribution, and the cached loop against the plain one."""

import math
from dataclasses import dataclass

import pytest
import torch
from exact import World
from hypothesis import given
from hypothesis import strategies as st
from test_linear_head import tiny_model
from tiny import LIVELY, PROMPTS, WORDS, tiny_models, tiny_policy, tiny_prompts, tiny_rollout
from torch import Tensor, nn

from kleash.errors import NonFiniteError
from kleash.logprobs import token_logprobs
from kleash.rollout import BLOCK, Responses, draw_tokens, left_padded, sample_responses
from kleash.scoring import score_rollout

INF, NAN = math.inf, math.nan
LAST = 1 - 2**-53  # the largest float64 below 1
ARCHITECTURES = ["gpt2", "llama"]


def random_logits(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def uniforms_for(batch: int, time: int, *, seed: int = 0) -> Tensor:
    return torch.rand(batch, time, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- one token ---


@pytest.mark.parametrize("vocab", [1, 2, 7, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK + 41])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.5])
def test_a_token_owns_exactly_its_stretch_of_the_cumulative_distribution(vocab, temperature):
    """A hair before each boundary the token is drawn, a hair behind it the next one: shares are right to 1e-6."""
    logits = random_logits(vocab) / 2
    cdf = (logits.double() / temperature).softmax(-1).cumsum(-1)
    starts, ends = torch.cat([torch.zeros(1), cdf[:-1]]).double(), torch.cat([cdf[:-1], torch.ones(1)]).double()
    hair = 1e-6
    assert (ends - starts).min() > 4 * hair
    uniforms = torch.cat([starts + hair, ends - hair])
    tokens, _ = draw_tokens(logits.expand(2 * vocab, -1), uniforms, temperature=temperature)
    assert tokens.tolist() == [*range(vocab), *range(vocab)]


def test_a_grid_of_uniforms_gives_every_token_its_share():
    logits, n = random_logits(7), 50_000
    grid = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    tokens, _ = draw_tokens(logits.expand(n, -1), grid, temperature=1.0)
    shares = tokens.bincount(minlength=7) / n
    torch.testing.assert_close(shares.double(), logits.double().softmax(-1), atol=1.5 / n, rtol=0)


@pytest.mark.parametrize("vocab", [5, BLOCK, 2 * BLOCK + 5])
def test_a_forbidden_token_is_never_drawn(vocab):
    logits = random_logits(vocab)
    logits[::2] = -INF  # the first, the last of an odd vocabulary, and every other one
    uniforms = torch.cat([torch.tensor([0.0, LAST], dtype=torch.float64), (torch.arange(4000) + 0.5) / 4000])
    tokens, logprobs = draw_tokens(logits.expand(len(uniforms), -1), uniforms, temperature=1.0)
    assert (tokens % 2 == 1).all()
    assert logprobs.isfinite().all()
    assert tokens[0] == 1  # u = 0 is the first token that may be drawn, the largest u the last one
    assert tokens[1] == (vocab - 1 if vocab % 2 == 0 else vocab - 2)


@pytest.mark.parametrize("allowed", [100, BLOCK + 100])
def test_rounding_of_a_sum_does_not_push_the_largest_uniform_past_the_last_token_allowed(allowed):
    """A block's float32 sum may exceed the float64 sum of its tokens: what is left over belongs to no forbidden one."""
    logits = random_logits(500, 2 * BLOCK)
    logits[:, allowed:] = -INF
    tokens, logprobs = draw_tokens(logits, torch.full((500,), LAST, dtype=torch.float64), temperature=1.0)
    assert (tokens == allowed - 1).all()
    assert logprobs.isfinite().all()


@pytest.mark.parametrize("allowed", [0, 3, BLOCK - 1, BLOCK, 2 * BLOCK])
@pytest.mark.parametrize("uniform", [0.0, 0.5, LAST])
def test_the_only_token_allowed_is_certain(allowed, uniform):
    logits = torch.full((1, 2 * BLOCK + 1), -INF)
    logits[0, allowed] = -3.0
    tokens, logprobs = draw_tokens(logits, torch.tensor([uniform], dtype=torch.float64), temperature=0.3)
    assert (tokens.item(), logprobs.item()) == (allowed, 0.0)


def test_huge_logits_overflow_nothing():
    logits = torch.tensor([[1e30, -1e30, 1e30, 0.0], [-3e38, -3e38, -3e38, -3e38], [88.0, 89.0, 1000.0, 999.0]])
    tokens, logprobs = draw_tokens(logits, torch.tensor([0.6, 0.6, 0.9], dtype=torch.float64), temperature=1.0)
    assert tokens.tolist() == [2, 2, 3]
    expected = [math.log(0.5), math.log(0.25), -math.log(1 + math.e)]
    torch.testing.assert_close(logprobs, torch.tensor(expected), atol=1e-6, rtol=0)


def test_a_token_far_below_the_rounding_of_the_sum_does_not_catch_the_last_uniform():
    logits = torch.tensor([[0.0, 0.0, -60.0, -INF]])  # e^-60 is lost in float64 beside 2
    tokens, logprobs = draw_tokens(logits, torch.tensor([LAST], dtype=torch.float64), temperature=1.0)
    assert tokens.item() in (1, 2)
    assert logprobs.isfinite().all()


logit = st.floats(-80, 80) | st.just(-INF)


@given(
    st.lists(logit, min_size=1, max_size=12).filter(lambda row: max(row) > -INF),
    st.floats(0.05, 20),
    st.floats(0, LAST),
)
def test_the_drawn_token_holds_the_uniform_and_has_its_log_prob(row, temperature, uniform):
    logits = torch.tensor([row])
    tokens, logprobs = draw_tokens(logits, torch.tensor([uniform], dtype=torch.float64), temperature=temperature)
    probabilities = (logits.double()[0] / temperature).softmax(-1)
    token, cdf = tokens.item(), probabilities.cumsum(-1)
    assert row[token] > -INF
    assert cdf[token] - probabilities[token] - 1e-6 <= uniform <= cdf[token] + 1e-6
    expected = token_logprobs(logits, tokens, temperature=temperature)
    torch.testing.assert_close(logprobs, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("wrong", [[NAN, 0.0], [INF, 0.0], [-INF, -INF]])
def test_logits_that_no_token_can_be_drawn_from_stop_the_run(wrong):
    logits = torch.tensor([[0.0, 1.0], wrong])
    with pytest.raises(NonFiniteError, match="largest in row 1"):
        draw_tokens(logits, torch.tensor([0.5, 0.5], dtype=torch.float64), temperature=1.0)


# --- whole responses ---


@dataclass
class Output:
    logits: Tensor


class TablePolicy(nn.Module):
    """A Markov policy without a cache and without positions, for worlds that can be enumerated."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Output:
        return Output(logits=self.table[input_ids])


def test_whole_responses_come_as_often_as_their_probability_says():
    world = World(vocab=3, length=2, eos=0, markov=True)
    logits = world.random_logits(4)
    side = 200
    grid = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    prompt = torch.full((side**2, 1), 3)  # a token of its own: its row starts the response
    drawn = sample_responses(
        TablePolicy(torch.cat([logits[1:], logits[:1]])),
        prompt,
        torch.ones_like(prompt, dtype=torch.bool),
        uniforms=torch.cartesian_prod(grid, grid),
        temperature=1.0,
        eos_token_ids=[0],
        pad_token_id=0,
    )
    shares = (drawn.tokens.unsqueeze(1) == world.responses).all(-1).double().mean(0)
    torch.testing.assert_close(shares, world.sequence_logprobs(logits).exp(), atol=2 / side, rtol=0)
    rows = (drawn.tokens.unsqueeze(1) == world.responses).all(-1).long().argmax(1)
    assert torch.equal(drawn.mask, world.response_mask[rows])
    expected = torch.where(drawn.mask, world.token_logprobs(logits)[rows], 0.0)
    torch.testing.assert_close(drawn.logprobs.double(), expected, atol=1e-6, rtol=0)


@torch.no_grad()
def written_alone(model: nn.Module, prompt: list[int], uniforms: Tensor, *, temperature: float, eos: list[int]) -> list:
    """[(token, log-prob)] of one response: no batch, no padding, no cache, the whole text read at every step."""
    text, written = list(prompt), []
    for uniform in uniforms:
        logits = model(input_ids=torch.tensor([text]), use_cache=False).logits[:, -1]
        token, logprob = draw_tokens(logits, uniform.reshape(1), temperature=temperature)
        text.append(token.item())
        written.append((token.item(), logprob.item()))
        if token.item() in eos:
            break
    return written


def sampled(model: nn.Module, prompts: list[list[int]], uniforms: Tensor, **options: object) -> Responses:
    options = {"temperature": 1.0, "eos_token_ids": [1], "pad_token_id": 0, **options}
    ids, mask = left_padded(prompts, options["pad_token_id"], torch.device("cpu"))
    return sample_responses(model, ids, mask, uniforms=uniforms, **options)


def shapes_read(model: nn.Module) -> list[tuple[int, int]]:
    """[batch, time] of the tokens of every call from now on."""
    shapes: list[tuple[int, int]] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return shapes


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("eos", [[1], [1, 4, 7]])
def test_the_cached_loop_writes_what_each_row_writes_alone(architecture, temperature, eos):
    """Compaction of closed rows, left padding, and the key-value cache change no token."""
    model = tiny_policy(2, architecture=architecture, **LIVELY)
    shapes = shapes_read(model)
    prompts = tiny_prompts(PROMPTS + PROMPTS[::-1]).tokens
    uniforms = uniforms_for(len(prompts), 24, seed=3)
    drawn = sampled(model, prompts, uniforms, temperature=temperature, eos_token_ids=eos)
    assert shapes[0][0] == len(prompts)
    assert min(shapes)[0] <= len(prompts) / 2  # the batch did shrink
    assert {width for _, width in shapes[1:]} == {1}  # the cache was used
    for row, prompt in enumerate(prompts):
        alone = written_alone(model, prompt, uniforms[row], temperature=temperature, eos=eos)
        tokens, logprobs = zip(*alone, strict=True)
        assert drawn.tokens[row][drawn.mask[row]].tolist() == list(tokens)
        assert drawn.mask[row].tolist() == [t < len(tokens) for t in range(drawn.mask.shape[1])]
        assert (drawn.tokens[row][~drawn.mask[row]] == 0).all()
        assert drawn.finished[row].item() == (tokens[-1] in eos)
        torch.testing.assert_close(drawn.logprobs[row][drawn.mask[row]], torch.tensor(logprobs), atol=1e-5, rtol=0)
        assert (drawn.logprobs[row][~drawn.mask[row]] == 0).all()


@pytest.mark.parametrize(("name", "cached"), [("falcon_h1", True), ("mamba", False)])
def test_a_model_with_states_writes_what_each_row_writes_alone(name, cached):
    """Rows leave states as they leave keys and values; a model of states alone reads the whole text at every step."""
    model = tiny_model(name)
    model.get_output_embeddings().weight.data.div_(20)
    prompts, eos = [[3, 4, 5, 6], [7, 8], [9, 10, 11], [12, 13, 14, 15, 16]], list(range(1, 14))
    uniforms = torch.rand(4, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shapes = shapes_read(model)
    drawn = sampled(model, prompts, uniforms, eos_token_ids=eos)
    assert shapes[0] == (4, 5)
    assert min(shapes)[0] < 4
    assert ({width for _, width in shapes[1:]} == {1}) == cached
    for row, prompt in enumerate(prompts):
        alone = written_alone(model, prompt, uniforms[row], temperature=1.0, eos=eos)
        tokens, logprobs = zip(*alone, strict=True)
        assert drawn.tokens[row][drawn.mask[row]].tolist() == list(tokens)
        torch.testing.assert_close(drawn.logprobs[row][drawn.mask[row]], torch.tensor(logprobs), atol=1e-5, rtol=0)


def test_an_eos_as_the_last_possible_token_counts_as_finished():
    model, prompts, uniforms = tiny_policy(2, **LIVELY), tiny_prompts().tokens, uniforms_for(8, 12, seed=3)
    drawn = sampled(model, prompts, uniforms)
    row = next(i for i in range(8) if drawn.finished[i] and drawn.mask[i].sum() > 2)
    length = int(drawn.mask[row].sum())
    exactly = sampled(model, prompts, uniforms[:, :length])
    assert exactly.finished[row].item()
    assert exactly.mask[row].tolist() == [True] * length
    assert exactly.tokens[row, -1].item() == 1
    cut = sampled(model, prompts, uniforms[:, : length - 1])
    assert not cut.finished[row].item()
    assert cut.mask[row].tolist() == [True] * (length - 1)
    assert torch.equal(cut.tokens[row], exactly.tokens[row, :-1])


def test_padding_with_eos_writes_the_same_responses():
    model, prompts, uniforms = tiny_policy(2, **LIVELY), tiny_prompts().tokens, uniforms_for(8, 12, seed=3)
    with_pad, with_eos = sampled(model, prompts, uniforms), sampled(model, prompts, uniforms, pad_token_id=1)
    assert torch.equal(with_pad.mask, with_eos.mask)
    assert torch.equal(with_pad.finished, with_eos.finished)
    assert torch.equal(with_pad.tokens[with_pad.mask], with_eos.tokens[with_eos.mask])
    assert torch.equal(with_pad.logprobs, with_eos.logprobs)
    assert (with_eos.tokens[~with_eos.mask] == 1).all()
    closing = (with_eos.tokens == 1) & with_eos.mask
    assert torch.equal(closing.any(1), with_eos.finished)  # the closing EOS is on the mask, the padding is not


def test_a_pad_token_that_the_policy_samples_is_a_token_like_any_other():
    model, prompts, uniforms = tiny_policy(2, **LIVELY), tiny_prompts(PROMPTS * 4).tokens, uniforms_for(32, 8, seed=1)
    drawn = sampled(model, prompts, uniforms)
    inside = (drawn.tokens[:, :-1] == 0) & drawn.mask[:, 1:]  # sampled, and the response went on
    assert inside.any()
    row = int(inside.any(1).nonzero()[0])
    alone = written_alone(model, prompts[row], uniforms[row], temperature=1.0, eos=[1])
    assert drawn.tokens[row][drawn.mask[row]].tolist() == [token for token, _ in alone]


def test_the_numbers_of_one_row_move_no_other_row():
    model, prompts, uniforms = tiny_policy(2, **LIVELY), tiny_prompts().tokens, uniforms_for(8, 6)
    other = uniforms.clone()
    other[0] = torch.rand(6, dtype=torch.float64, generator=torch.Generator().manual_seed(99))
    first, second = sampled(model, prompts, uniforms), sampled(model, prompts, other)
    assert not torch.equal(first.tokens[0], second.tokens[0])
    time = min(first.tokens.shape[1], second.tokens.shape[1])
    assert torch.equal(first.tokens[1:, :time], second.tokens[1:, :time])


def test_when_all_have_closed_sampling_ends():
    model = TablePolicy(torch.tensor([[-INF, 0.0, -INF]] * 3))  # EOS for certain
    drawn = sampled(model, [[2], [2, 2]], uniforms_for(2, 50))
    assert drawn.tokens.tolist() == [[1], [1]]
    assert drawn.finished.all()


def test_a_policy_with_nan_weights_stops_at_the_first_token():
    model = tiny_policy()
    with torch.no_grad():
        model.get_output_embeddings().weight[3] = NAN
    with pytest.raises(NonFiniteError, match="lower the learning rate"):
        sampled(model, tiny_prompts().tokens, uniforms_for(8, 4))


# --- the rollout ---


def test_prompts_are_padded_on_the_left():
    ids, mask = left_padded([[5, 6, 7], [8], [9, 4]], 3, torch.device("cpu"))
    assert ids.tolist() == [[5, 6, 7], [3, 3, 8], [3, 9, 4]]
    assert mask.tolist() == [[True, True, True], [False, False, True], [False, True, True]]


def test_a_rollout_holds_prompt_and_response_and_the_text_without_special_tokens():
    policy, prompts = tiny_policy(2, **LIVELY), tiny_prompts()
    rollout = tiny_rollout(policy, seed=3, max_new_tokens=12)
    before = rollout.sequences.shape[1] - rollout.response_time
    assert torch.equal(rollout.attention_mask[:, before:], rollout.response_mask)
    assert rollout.finished.any()
    assert not rollout.finished.all()
    for row, prompt in enumerate(prompts.tokens):
        assert rollout.sequences[row, :before][rollout.attention_mask[row, :before]].tolist() == prompt
        response = rollout.responses[row][rollout.response_mask[row]].tolist()
        assert rollout.finished[row].item() == (response[-1] == 1)
        assert 1 not in response[:-1]
        words = [WORDS[token] for token in response if token > 2]
        assert rollout.completions[row].replace(".", " .").split() == words


@pytest.mark.parametrize("batch", [1, 3, 8, 100])
def test_the_sampling_batch_does_not_change_the_rollout(batch):
    policy = tiny_policy(2, **LIVELY)
    whole, parts = tiny_rollout(policy, seed=3), tiny_rollout(policy, seed=3, batch=batch)
    for name in ("sequences", "attention_mask", "response_mask", "finished"):
        assert torch.equal(getattr(whole, name), getattr(parts, name)), name
    assert whole.completions == parts.completions
    torch.testing.assert_close(whole.rollout_logprobs, parts.rollout_logprobs, atol=1e-5, rtol=0)


def test_parts_of_different_length_join_into_one_rollout():
    policy = tiny_policy(2, **LIVELY)
    lengths = {
        tiny_rollout(policy, seed=3, max_new_tokens=12, prompts=tiny_prompts([text])).response_time for text in PROMPTS
    }
    assert len(lengths) > 1
    rollout = tiny_rollout(policy, seed=3, max_new_tokens=12, batch=1)
    assert rollout.response_mask.any(0).all()
    assert (rollout.responses[~rollout.response_mask] == 0).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_sampler_is_the_scorer(architecture, temperature):
    """Log-probs at sampling time, from a cache and a growing batch, equal those of one full forward pass."""
    policy = tiny_policy(2, architecture=architecture, **LIVELY)
    rollout = tiny_rollout(policy, temperature=temperature)
    scored = score_rollout(tiny_models(policy), rollout, [torch.arange(8)], temperature=temperature)
    torch.testing.assert_close(rollout.rollout_logprobs, scored.policy_logprobs, atol=1e-5, rtol=0)
    elsewhere = score_rollout(tiny_models(policy), rollout, [torch.arange(8)], temperature=1.3)
    assert (rollout.rollout_logprobs - elsewhere.policy_logprobs).abs().max() > 0.01
