"""Records: exactly the figures of the glossary, each equal to its sum by hand."""

import json
import math
from dataclasses import replace

import pytest
import torch

from kleash.batch import Rollout
from kleash.drift import (
    CONTEXT,
    SequenceFigures,
    TokenFigures,
    explained_variance,
    record_of,
    sequence_figures,
    token_figures,
)
from kleash.errors import ValueRangeError
from kleash.glossary import GLOSSARY
from kleash.ppo import UpdateStats
from kleash.scoring import Scored
from kleash.token_class import EOS, FIRST_TOKEN, NO_CLASS, OTHER, SPECIAL, TOKEN_CLASSES

NAN = math.nan
MASK = torch.tensor([[True, True, False], [True, False, False], [True, True, True]])
PROMPT, RESPONSES = 9, torch.tensor([[8, 1, 0], [1, 0, 0], [5, 5, 5]])  # 1 closes a response, 8 is special
STATS = UpdateStats(
    policy_loss=-0.25,
    leash_loss=0.0625,
    value_loss=0.5,
    clip_share=0.125,
    value_clip_share=0.25,
    ratio_mean=1.01,
    ratio_max=1.5,
    ratio_max_first_step=1.0,
    kl_old_policy_per_token_k3=0.01,
    gradient_norm=2.0,
    optimizer_steps=16,
)


def on_the_mask(*values: float) -> torch.Tensor:
    """[3, 3] the values on the response tokens in order, 0 elsewhere."""
    tensor = torch.zeros(3, 3)
    tensor[MASK] = torch.tensor(values)
    return tensor


def rollout(rows: int = 3) -> Rollout:
    return Rollout(
        sequences=torch.cat([torch.full((3, 1), PROMPT), RESPONSES], 1)[:rows],
        attention_mask=torch.cat([torch.ones(3, 1, dtype=torch.bool), MASK], 1)[:rows],
        response_mask=MASK[:rows],
        rollout_logprobs=on_the_mask(-1.0, -2.0, -0.5, -1.0, -1.5, -2.0)[:rows],
        finished=torch.tensor([True, True, False])[:rows],
        completions=["a", "b", "c"][:rows],
    )


SCORED = Scored(
    policy_logprobs=on_the_mask(-1.0, -2.25, -0.5, -1.0, -1.5, -1.5),
    ref_logprobs=on_the_mask(-1.5, -2.25, -1.5, -0.5, -2.5, -1.75),
    values=torch.zeros(3, 3),
    kl_policy_ref_per_token=on_the_mask(0.25, 0.5, 1.0, 0.0, 0.125, 2.0),
    kl_policy_first_ref_per_token=on_the_mask(0.5, 1.0, 1.0, 0.5, 0.0, 3.0),
    policy_entropy=on_the_mask(1.0, 2.0, 0.5, 1.5, 1.0, 0.0),
)
SCORES = torch.tensor([1.0, -1.0, 3.0])


def figures(eval_scores: torch.Tensor | None = None) -> SequenceFigures:
    return SequenceFigures(**{"eval_scores": None, **sequence_figures(rollout(), SCORED, SCORES, eval_scores)})


def tokens(rows: int = 3, *, time: int = 5) -> TokenFigures:
    one = Scored(**{name: column[:rows] for name, column in vars(SCORED).items() if column is not None})
    columns = token_figures(rollout(rows), one, time=time, eos_token_ids=[1], special_token_ids=[0, 1, 8])
    return TokenFigures(**columns)


def record(of: SequenceFigures, by_token: TokenFigures | None = None, **changes: object) -> dict:
    numbers = {
        "missing_eos_penalty": 0.3, "beta": 0.1, "learning_rate": 1e-5, "advantage_std": 1.25, "explained": 0.75,
        "share_of_k1": 0.25,
    }  # fmt: skip
    return record_of(7, of, by_token or tokens(), STATS, **{**numbers, **changes})


def k3(d: float) -> float:
    return math.expm1(-d) + d


def test_a_record_holds_exactly_the_figures_of_the_glossary():
    assert list(record(figures())) == list(GLOSSARY)
    assert all(metric.meaning and metric.unit and metric.healthy for metric in GLOSSARY.values())


def test_every_kl_in_the_glossary_says_its_direction_and_its_unit_says_its_granularity():
    for name, metric in GLOSSARY.items():
        if name.startswith("kl_"):
            directions = ("kl_policy_ref_", "kl_policy_first_ref_", "kl_rollout_policy_", "kl_old_policy_")
            assert name.startswith(directions), name
            granularity = "sequence" if "per_sequence" in name else "token"
            assert f"per_{granularity}" in name
            assert metric.unit == f"nats per {granularity}"


def test_the_columns_are_sums_over_each_response():
    found = figures()
    assert found.scores.tolist() == [1.0, -1.0, 3.0]
    assert found.kl_policy_ref.tolist() == [0.75, 1.0, 2.125]
    assert found.kl_policy_ref_k1.tolist() == [0.5, 1.0, 0.75]  # .5 + 0;  1;  -.5 + 1 + .25
    expected = [k3(0.5) + k3(0.0), k3(1.0), k3(-0.5) + k3(1.0) + k3(0.25)]
    assert found.kl_policy_ref_k3.tolist() == pytest.approx(expected, rel=1e-6)
    assert found.entropy.tolist() == [3.0, 0.5, 2.5]
    assert found.length.tolist() == [2, 1, 3]
    assert found.finished.tolist() == [1, 1, 0]
    # sampling said -2 where scoring says -2.25, and -2 where it says -1.5
    assert found.kl_rollout_policy_k3.tolist() == pytest.approx([k3(0.25), 0.0, k3(-0.5)], abs=1e-7)
    assert found.logprob_mismatch.tolist() == [0.25, 0.0, 0.5]


def test_every_figure_of_a_record_equals_its_hand_sum():
    found = record(figures(torch.tensor([2.0, 2.0, 5.0])))
    written = 6
    expected = {
        "update": 7,
        "score_mean": 1.0,
        "score_std": math.sqrt(8 / 3),
        "score_tail_gap": (2.96 - 1) / (2 - 1),
        "eval_score_mean": 3.0,
        "kl_policy_ref_per_sequence": 3.875 / 3,
        "kl_policy_ref_per_sequence_k1": 2.25 / 3,
        "kl_policy_ref_per_sequence_k3": (k3(0.5) + 2 * k3(1.0) + k3(-0.5) + k3(0.25)) / 3,
        "kl_policy_ref_per_token": 3.875 / written,
        "kl_policy_ref_per_sequence_first_token": 0.0 / 3,
        "kl_policy_ref_per_sequence_eos": (0.5 + 1.0) / 3,
        "kl_policy_ref_per_sequence_special": 0.25 / 3,
        "kl_policy_ref_per_sequence_other": (0.125 + 2.0) / 3,
        "beta": 0.1,
        "rewards_per_sequence_mean": 1.0 - 0.3 / 3 - 0.1 * 3.875 / 3,
        "entropy_per_token": 6.0 / written,
        "response_length_mean": 2.0,
        "eos_share": 2 / 3,
        "truncated_share": 1 / 3,
        "distinct_1_per_sequence": (1 + 1 + 1 / 3) / 3,
        "distinct_2_per_sequence": (1 + 1 / 2) / 2,
        "distinct_2_over_batch": 2 / 3,
        "kl_rollout_policy_per_token_k3": (k3(0.25) + k3(-0.5)) / written,
        "logprob_mismatch_max": 0.5,
        "policy_loss": -0.25,
        "leash_loss": 0.0625,
        "value_loss": 0.5,
        "clip_share": 0.125,
        "value_clip_share": 0.25,
        "ratio_mean": 1.01,
        "ratio_max": 1.5,
        "ratio_max_first_step": 1.0,
        "kl_old_policy_per_token_k3": 0.01,
        "gradient_norm": 2.0,
        "learning_rate": 1e-5,
        "explained_variance": 0.75,
        "advantage_std": 1.25,
        "share_of_k1": 0.25,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    for name in ("score", "eval_score"):
        assert found[f"{name}_low"] < found[f"{name}_mean"] < found[f"{name}_high"]
    for name in ("kl_policy_ref_per_sequence", "kl_policy_ref_per_sequence_k1"):
        assert found[f"{name}_low"] < found[name] < found[f"{name}_high"]
    # the observation is the sequence: 95 % by Student's t with 2 degrees of freedom, 4.303 standard errors
    sequences = torch.tensor([0.75, 1.0, 2.125], dtype=torch.float64)
    half = 4.302652729911275 * sequences.std().item() / math.sqrt(3)
    assert found["kl_policy_ref_per_sequence_high"] == pytest.approx(3.875 / 3 + half, rel=1e-6)


def test_the_kl_to_the_first_reference_stands_beside_the_other_with_its_own_interval():
    found, sequences = record(figures()), torch.tensor([1.5, 1.0, 3.5], dtype=torch.float64)
    half = 4.302652729911275 * sequences.std().item() / math.sqrt(3)
    assert found["kl_policy_first_ref_per_sequence"] == figures().first_kl_interval.mean == 2.0
    assert found["kl_policy_first_ref_per_sequence_low"] == pytest.approx(2.0 - half, rel=1e-6)
    assert found["kl_policy_first_ref_per_sequence_high"] == pytest.approx(2.0 + half, rel=1e-6)


def test_what_is_not_finite_is_missing_in_the_record_which_stays_json():
    broken = replace(figures(), kl_policy_ref=torch.tensor([0.5, math.inf, 1.0], dtype=torch.float64))
    found = record(broken, explained=None, advantage_std=NAN)
    for name in ("kl_policy_ref_per_sequence", "kl_policy_ref_per_token", "explained_variance", "advantage_std"):
        assert found[name] is None
    assert found["score_mean"] == 1.0
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_without_a_judge_its_figures_are_missing():
    found = record(figures())
    assert {name for name, value in found.items() if value is None} == {
        "eval_score_mean", "eval_score_low", "eval_score_high",
        "score_tail_index",  # three scores have no tail
    }  # fmt: skip


def test_one_sequence_has_a_mean_and_no_interval():
    one = Scored(**{name: column[:1] for name, column in vars(SCORED).items() if column is not None})
    columns = sequence_figures(rollout(1), one, SCORES[:1], None)
    found = record(SequenceFigures(eval_scores=None, **columns), tokens(1))
    assert found["kl_policy_ref_per_sequence"] == 0.75
    assert found["score_tail_gap"] is None
    assert found["score_mean"] == 1.0
    assert found["score_std"] == 0.0
    assert found["score_low"] is None
    assert found["kl_policy_ref_per_sequence_high"] is None


def test_the_four_classes_add_up_to_the_kl_of_the_sequences():
    found = record(figures())
    parts = [found[f"kl_policy_ref_per_sequence_{name}"] for name in TOKEN_CLASSES]
    assert sum(parts) == pytest.approx(found["kl_policy_ref_per_sequence"], rel=1e-12)


def test_the_tail_in_a_record_is_that_of_its_scores():
    thrice = {name: column.repeat(3) for name, column in vars(figures()).items() if column is not None}
    scores = torch.tensor([-8.0, -4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
    found = record(SequenceFigures(**{**thrice, "scores": scores, "eval_scores": -scores.square()}))
    assert found["score_tail_index"] == pytest.approx(2 / math.log(64))
    assert found["score_tail_gap"] == pytest.approx((4 + 0.92 * 4) / 2)  # place .99 * 8 = 7.92


def test_without_a_bigram_there_is_no_share_of_bigrams():
    one_token_each = replace(tokens(), response_mask=tokens().response_mask & (torch.arange(5) == 0))
    found = record(figures(), one_token_each)
    assert found["distinct_1_per_sequence"] == 1
    assert found["distinct_2_per_sequence"] is found["distinct_2_over_batch"] is None


def test_the_figures_of_tokens_are_padded_to_the_length_limit():
    found = tokens(time=5)
    for name in ("tokens", "response_mask", "policy_logprobs", "ref_logprobs", "kl_policy_ref", "classes"):
        assert vars(found)[name].shape == (3, 5), name
    assert torch.equal(found.tokens[:, :3], RESPONSES)
    assert torch.equal(found.response_mask[:, :3], MASK)
    assert torch.equal(found.policy_logprobs[:, :3], SCORED.policy_logprobs)
    assert torch.equal(found.ref_logprobs[:, :3], SCORED.ref_logprobs)
    assert torch.equal(found.kl_policy_ref[:, :3], SCORED.kl_policy_ref_per_token)
    assert not found.response_mask[:, 3:].any()
    assert found.classes.tolist() == [
        [SPECIAL, EOS, NO_CLASS, NO_CLASS, NO_CLASS],
        [EOS, NO_CLASS, NO_CLASS, NO_CLASS, NO_CLASS],
        [FIRST_TOKEN, OTHER, OTHER, NO_CLASS, NO_CLASS],
    ]
    assert vars(tokens(time=3))["tokens"].shape == (3, 3)
    with pytest.raises(ValueRangeError, match=r"Expected time between 3 and inf, found 2"):
        tokens(time=2)


@pytest.mark.parametrize("length", [0, 1, CONTEXT, CONTEXT + 3])
def test_the_end_of_a_prompt_is_kept_whatever_its_length(length):
    prompt = torch.arange(10, 10 + length).expand(3, length)
    known = torch.arange(length).expand(3, length) >= 2  # the first two columns are padding
    longer = replace(
        rollout(),
        sequences=torch.cat([prompt, RESPONSES], 1),
        attention_mask=torch.cat([known, MASK], 1),
    )
    found = token_figures(longer, SCORED, time=3, eos_token_ids=[1], special_token_ids=[])
    assert found["prompt_ends"].shape == found["prompt_ends_mask"].shape == (3, CONTEXT)
    for row in range(3):
        kept = found["prompt_ends"][row][found["prompt_ends_mask"][row]].tolist()
        assert kept == list(range(12, 10 + length))[-CONTEXT:]


def test_explained_variance_looks_at_the_response_only():
    returns = torch.tensor([[1.0, 3.0, NAN]])
    mask = torch.tensor([[True, True, False]])
    assert explained_variance(returns, returns, mask) == 1.0
    assert explained_variance(torch.zeros(1, 3), returns, mask) == 0.0
    assert explained_variance(torch.tensor([[3.0, 1.0, 9.0]]), returns, mask) == -3.0  # errors -2 and 2: 1 - 4 / 1
    assert explained_variance(returns, torch.ones(1, 3), mask) is None
