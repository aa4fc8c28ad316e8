"""The whole measurement: enumerated truths, the same numbers whatever the batches, and what cannot be measured."""

import json
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import FOUR, MANY, EnumerablePair
from pydantic import ValidationError
from stream import covered, require_what_measure_says, stream_of, width
from tiny import LIVELY, PROMPTS, WORDS, tiny_policy, tiny_tokenizer

from kleash.batch import Rollout
from kleash.errors import ConfigError, KleashWarning, ModelError, NonFiniteError, PromptError
from kleash.measured import MeasuredDrift
from kleash.measurement import MeasureConfig, measure, require_one_process
from kleash.rollout import RolloutConfig, rollout_of

INTERVALS = [
    "kl_policy_ref_per_sequence",
    "log_ratio_per_sequence",
    "kl_policy_ref_per_token",
    "policy_entropy_per_token",
    "ref_entropy_per_token",
    "response_length",
]
PAIRS = {
    "small drift": EnumerablePair(drift=0.05, seed=1),
    "EOS, small drift": EnumerablePair(drift=0.05, eos=True, seed=1),
    "six tokens": EnumerablePair(vocab=6, length=3, seed=1),
    "hot": EnumerablePair(temperature=2.0, seed=1),
    "four prompts, 16 responses each": EnumerablePair(prompts=FOUR, seed=1),
    "prompts drawn from 84, one response each": EnumerablePair(drift=0.05, prompts=MANY, seed=1),
}
CHAT = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}{% if add_generation_prompt %}it{% endif %}"


def of_pair(pair: EnumerablePair, **config: object) -> MeasuredDrift:
    asked = {"max_new_tokens": pair.length, "temperature": pair.temperature, **config}
    return measure(
        pair.policy,
        pair.reference,
        prompts=list(pair.prompts),
        config=MeasureConfig(**asked),
        tokenizer=pair.tokenizer,
    )


def tiny_measure(policy: object = None, reference: object = None, **given: object) -> MeasuredDrift:
    """A measurement of tiny models in memory on the tiny prompts."""
    config = {"max_new_tokens": 6, "samples": 24, **given.pop("config", {})}
    if "responses" in given:
        config = {key: value for key, value in config.items() if key not in ("max_new_tokens", "samples")}
    else:
        given = {"prompts": PROMPTS, **given}
    return measure(
        policy or tiny_policy(2, **LIVELY),
        reference or tiny_policy(3, **LIVELY),
        config=MeasureConfig(**config),
        **{"tokenizer": tiny_tokenizer(), **given},
    )


# --- the truth


@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_every_figure_is_within_four_standard_errors_of_the_sum_over_all_responses(architecture, eos, temperature):
    pair = EnumerablePair(
        architecture=architecture, eos=eos, temperature=temperature, prompts=("b", "c b", "d"), length=3, drift=0.5
    )
    truth, found = pair.truth, of_pair(pair, samples=3000, batch=1024)
    expected = {
        "kl_policy_ref_per_sequence": truth.kl_policy_ref_per_sequence,
        "log_ratio_per_sequence": truth.kl_policy_ref_per_sequence,
        "kl_policy_ref_per_token": truth.per_token(truth.exact),
        "policy_entropy_per_token": truth.per_token(truth.policy_entropy),
        "ref_entropy_per_token": truth.per_token(truth.ref_entropy),
        "response_length": truth.mean(truth.length),
    }
    for name, value in expected.items():
        interval = getattr(found, name)
        half_width = (interval.high - interval.low) / 2
        assert abs(interval.mean - value) <= 2.05 * half_width + 1e-6, name
        assert half_width < 0.15 * abs(value) + 1e-6, name
    assert sum(row["kl_policy_ref_per_sequence"] for row in found.figures["by_position"]) == pytest.approx(
        found.kl_policy_ref_per_sequence.mean, rel=1e-4
    )


def test_each_prompt_has_its_own_enumerated_drift():
    pair = EnumerablePair(prompts=("b", "c b", "d"), length=3, drift=0.5, eos=True)
    found = of_pair(pair, samples=3000, batch=1024).figures["by_prompt"]
    assert [row["prompt"] for row in found] == list(pair.prompts)
    for row in found:
        truth = replace(pair, prompts=(row["prompt"],)).truth.kl_policy_ref_per_sequence
        interval = row["kl_policy_ref_per_sequence"]
        assert row["responses"] == interval["n"] == 1000
        assert abs(interval["mean"] - truth) <= 2.05 * (interval["high"] - interval["low"]) / 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:A few responses carry")
@pytest.mark.parametrize("name", PAIRS)
def test_the_interval_holds_the_truth_in_93_to_97_percent_and_is_a_fifth_as_wide_as_that_of_k1(name):
    pair, n, repetitions = PAIRS[name], 64, 1000
    truth = pair.truth.kl_policy_ref_per_sequence
    drawn = pair.drawn_prompts(n * repetitions, seed=0) if "drawn" in name else None
    stream = stream_of(pair, drawn or list(pair.prompts), n * repetitions, seed=0)
    if drawn is None:
        require_what_measure_says(pair, stream, n, seed=0)
    found = [stream.intervals(start, start + n) for start in range(0, n * repetitions, n)]
    exact, _, k1 = (list(column) for column in zip(*found, strict=True))
    assert len(exact) == repetitions
    assert 0.93 <= covered(exact, truth) <= 0.97
    assert width(k1) >= 5 * width(exact)


def test_a_model_is_exactly_0_from_itself_without_any_width():
    found = tiny_measure(tiny_policy(2, **LIVELY), tiny_policy(2, **LIVELY), config={"temperature": 0.7})
    for name in INTERVALS[:3]:
        interval = getattr(found, name)
        assert (interval.mean, interval.low, interval.high) == (0, 0, 0), name
    assert found.policy_entropy_per_token == found.ref_entropy_per_token
    assert found.figures["top_tokens"] == found.figures["drifted_tokens"] == []
    assert found.figures["k1_responses_for_same_interval"] is None


# --- the same numbers


@pytest.mark.parametrize("batch", [1, 5, 24])
def test_the_batches_change_nothing_beyond_float_error(batch):
    expected, found = tiny_measure(mapped=24), tiny_measure(mapped=24, config={"batch": batch})
    for name in INTERVALS:
        own, other = getattr(found, name), getattr(expected, name)
        assert (own.mean, own.low, own.high) == pytest.approx((other.mean, other.low, other.high), abs=2e-5), name
    assert [one["token_ids"] for one in found.token_maps] == [one["token_ids"] for one in expected.token_maps]
    assert [one["prompt"] for one in found.token_maps] == [one["prompt"] for one in expected.token_maps]


def test_the_same_seed_says_the_same_and_another_something_else():
    first, again, other = (tiny_measure(config={"seed": seed}).figures for seed in (1, 1, 2))
    assert first == again
    assert first["kl_policy_ref_per_sequence"] != other["kl_policy_ref_per_sequence"]


def test_the_first_responses_are_the_same_however_many_follow():
    few, more = tiny_measure(mapped=8, config={"samples": 8}), tiny_measure(mapped=8, config={"samples": 40})
    assert [one["token_ids"] for one in few.token_maps] == [one["token_ids"] for one in more.token_maps]


def test_models_that_were_training_go_on_training():
    policy, reference = tiny_policy(2, dropout=0.5).train(), tiny_policy(2, dropout=0.5).train()
    assert tiny_measure(policy, reference).kl_policy_ref_per_sequence.mean == 0
    assert all(module.training for model in (policy, reference) for module in model.modules())


# --- checkpoints


def saved(directory: Path, name: str, *, words: list[str] = WORDS, seed: int = 0, **config: object) -> str:
    path = directory / name
    tiny_policy(seed, **{**LIVELY, **config}).save_pretrained(path)
    tiny_tokenizer(words=words).save_pretrained(path)
    return str(path)


def test_checkpoints_say_what_their_models_say(tmp_path):
    found = tiny_measure(saved(tmp_path, "p", seed=2), saved(tmp_path, "r", seed=3), tokenizer=None)
    expected = tiny_measure()
    for name in INTERVALS:
        assert getattr(found, name) == getattr(expected, name), name
    assert found.figures["policy"] == str(tmp_path / "p")
    assert found.figures["reference"] == str(tmp_path / "r")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks for it
def test_an_adapter_is_measured_to_its_base_and_a_new_one_has_not_drifted(tmp_path):
    peft = pytest.importorskip("peft")
    base = saved(tmp_path, "base", architecture="llama", tie_word_embeddings=False)
    for name, fresh in (("new", True), ("old", False)):
        torch.manual_seed(1)
        options = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": fresh}
        model = tiny_policy(architecture="llama", tie_word_embeddings=False, **LIVELY)
        adapted = peft.get_peft_model(model, peft.LoraConfig(**options))
        adapted.peft_config["default"].base_model_name_or_path = base
        adapted.save_pretrained(tmp_path / name)
    many = {"tokenizer": None, "config": {"samples": 96}}
    new, old = (tiny_measure(tmp_path / name, base, **many) for name in ("new", "old"))
    assert new.kl_policy_ref_per_sequence.mean == 0
    assert old.kl_policy_ref_per_sequence.low > 0.01
    back = tiny_measure(base, tmp_path / "old", **many)
    assert back.kl_policy_ref_per_sequence.mean != old.kl_policy_ref_per_sequence.mean


def widened(model: torch.nn.Module, width: int, padding: float) -> torch.nn.Module:
    """The model over a vocabulary padded to a rounder size, with large logits in the padding."""
    model.resize_token_embeddings(width, mean_resizing=False)
    with torch.no_grad():
        model.get_output_embeddings().weight[len(WORDS) :] = padding
    return model


def test_padding_of_the_vocabulary_is_no_token_whichever_model_has_it(tmp_path):
    expected = tiny_measure()
    for name, seed in (("p", 2), ("r", 3)):
        widened(tiny_policy(seed, **LIVELY), 16, 5.0).save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    for policy, reference in (
        (tmp_path / "p", saved(tmp_path, "r_narrow", seed=3)),
        (saved(tmp_path, "p_narrow", seed=2), tmp_path / "r"),
    ):
        found = tiny_measure(policy, reference, tokenizer=None)
        for name in INTERVALS:
            own, other = getattr(found, name), getattr(expected, name)
            assert (own.mean, own.low, own.high) == pytest.approx((other.mean, other.low, other.high), abs=2e-5), name


def test_another_tokenizer_is_refused_with_the_first_difference(tmp_path):
    other = [*WORDS[:6], "bird", *WORDS[7:]]
    with pytest.raises(ModelError, match="found token 6 is 'bird' there and 'cat' in the policy"):
        tiny_measure(saved(tmp_path, "p"), saved(tmp_path, "r", words=other), tokenizer=None)


def test_bfloat16_weights_are_summed_in_float32(tmp_path):
    paths = saved(tmp_path, "p", seed=2), saved(tmp_path, "r", seed=3)
    half, full = (tiny_measure(*paths, tokenizer=None, config={"dtype": name}) for name in ("bfloat16", "float32"))
    assert half.figures["dtype"] == "bfloat16"
    assert half.kl_policy_ref_per_sequence.mean == pytest.approx(full.kl_policy_ref_per_sequence.mean, rel=0.25)
    assert (
        tiny_measure(paths[0], paths[0], tokenizer=None, config={"dtype": "bfloat16"}).kl_policy_ref_per_token.high == 0
    )


# --- what it says


def test_the_json_has_every_key_and_nothing_that_json_cannot_say():
    figures = tiny_measure(config={"seed": 7, "temperature": 0.8}).figures
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    for name in ("kl_policy_ref_per_sequence", "kl_policy_ref_per_sequence_k1", "kl_policy_ref_per_token"):
        assert set(figures[name]) == {"mean", "low", "high", "n"}
        assert figures[name]["n"] == 24
    assert {"by_position", "by_class", "by_prompt", "top_tokens", "drifted_tokens", "convergence"} <= set(figures)
    assert figures["policy"] == "a GPT2LMHeadModel in memory"
    assert (figures["seed"], figures["temperature"], figures["max_new_tokens"]) == (7, 0.8, 6)
    assert figures["prompts"] == "given as a list"
    assert figures["responses"] is figures["until"] is figures["until_reached"] is None
    assert figures["version"].count(".") == 2
    assert (figures["prompts_count"], figures["responses_count"]) == (8, 24)


@pytest.mark.parametrize(("samples", "n", "covers"), [(5, 5, True), (8, 8, True), (9, 16, False), (16, 16, False)])
def test_responses_are_dealt_evenly_and_the_interval_says_what_it_covers(samples, n, covers):
    figures = tiny_measure(config={"samples": samples}).figures
    assert figures["responses_count"] == n
    assert ("choice of prompts" in figures["interval_covers"]) == covers
    counts = [row["responses"] for row in figures["by_prompt"]]
    assert len(counts) == min(n, 8)
    assert set(counts) == {1 if covers else 2}


def test_an_interval_that_skewed_sums_do_not_bear_out_is_doubted_and_more_responses_are_the_remedy():
    pair = EnumerablePair(temperature=0.7, seed=1)
    with pytest.warns(KleashWarning, match="take about") as said:
        few = of_pair(pair, samples=16)
    assert [str(one.message) for one in said] == [few.figures["interval_doubt"]]
    assert few.figures["kl_policy_ref_per_sequence_skewness"] ** 2 > 0.1 * 16
    many = of_pair(pair, samples=2048, batch=512).figures
    assert many["interval_doubt"] is None
    assert many["kl_policy_ref_per_sequence_skewness"] == pytest.approx(pair.truth.skewness(pair.truth.exact), abs=0.3)


def test_one_response_has_a_mean_and_no_interval():
    found = tiny_measure(config={"samples": 1})
    assert found.kl_policy_ref_per_sequence.n == 1
    assert found.figures["kl_policy_ref_per_sequence"]["low"] is None
    assert found.kl_policy_ref_per_sequence.high == math.inf


def test_the_first_responses_are_mapped_token_by_token():
    found = tiny_measure(mapped=5, config={"batch": 3})
    assert [one["index"] for one in found.token_maps] == list(range(5))
    kl = [sum(one["kl_policy_ref"]) for one in found.token_maps]
    assert [one["kl_policy_ref_per_sequence"] for one in found.token_maps] == pytest.approx(kl, rel=1e-4)
    for one in found.token_maps:
        assert one["prompt"] in PROMPTS
        assert one["finished"] == (one["token_ids"][-1] == 1)
        assert all(both is not None for both in one["alternatives"])


# --- until


def test_it_stops_once_the_interval_is_as_narrow_as_asked():
    found = tiny_measure(config={"samples": None, "until": "5%", "at_most": 20_000, "batch": 512})
    interval = found.kl_policy_ref_per_sequence
    assert (interval.high - interval.low) / 2 <= 0.05 * interval.mean
    assert found.narrow_enough
    assert found.figures["until_reached"] is True
    assert found.figures["until"] == "5%"
    assert 64 < interval.n < 20_000
    assert interval.n % 8 == 0


def test_it_gives_up_at_the_limit_and_says_so():
    found = tiny_measure(config={"samples": None, "until": "±0.0001", "at_most": 90})
    assert found.kl_policy_ref_per_sequence.n == 88
    assert not found.narrow_enough
    assert found.figures["until_reached"] is False


def test_samples_are_the_least_before_it_asks():
    found = tiny_measure(config={"samples": 200, "until": "1000"})
    assert found.kl_policy_ref_per_sequence.n == 200
    assert tiny_measure(config={"samples": None, "until": "1000"}).kl_policy_ref_per_sequence.n == 64


# --- given responses


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


GIVEN = [
    {"prompt": "what is a cat", "response": "a dog sleeps .", "finished": True},
    {"prompt": "it runs", "response": "it", "finished": False},
    {"prompt": "a cat", "response": "runs runs runs", "finished": True},
]


def scored_plainly(rows: list[dict[str, object]], *, temperature: float) -> list[dict[str, float]]:
    """Sums along the given texts from float64 log-softmaxes of one forward pass each."""
    found = []
    for row in rows:
        prompt, response = ([WORDS.index(word) for word in str(row[name]).split()] for name in ("prompt", "response"))
        response += [1] if row["finished"] else []
        text = torch.tensor([prompt + response])
        at = slice(len(prompt) - 1, -1)
        with torch.no_grad():
            log_pi, log_rho = (
                (tiny_policy(seed, **LIVELY)(input_ids=text).logits[0, at].double() / temperature).log_softmax(-1)
                for seed in (2, 3)
            )
        chosen = (torch.arange(len(response)), torch.tensor(response))
        found.append(
            {
                "kl": float((log_pi.exp() * (log_pi - log_rho)).sum()),
                "ratio": float((log_pi[chosen] - log_rho[chosen]).sum()),
                "length": len(response),
            }
        )
    return found


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_given_responses_have_the_figures_of_their_texts(tmp_path, temperature):
    path = write(tmp_path / "given.jsonl", GIVEN)
    found = tiny_measure(responses=path, mapped=3, config={"temperature": temperature, "batch": 2})
    expected = scored_plainly(GIVEN, temperature=temperature)
    for one, truth in zip(found.token_maps, expected, strict=True):
        assert one["kl_policy_ref_per_sequence"] == pytest.approx(truth["kl"], rel=1e-4)
        assert one["log_ratio_per_sequence"] == pytest.approx(truth["ratio"], abs=1e-4)
        assert len(one["token_ids"]) == truth["length"]
    assert found.kl_policy_ref_per_sequence.mean == pytest.approx(sum(one["kl"] for one in expected) / 3, rel=1e-4)
    assert found.log_ratio_per_sequence.mean == pytest.approx(sum(one["ratio"] for one in expected) / 3, abs=1e-4)
    assert found.figures["finished_share"] == pytest.approx(2 / 3, rel=1e-4)


def test_what_somebody_else_wrote_is_labelled_and_what_the_policy_wrote_is_k1(tmp_path):
    path = write(tmp_path / "given.jsonl", GIVEN)
    others, own = (tiny_measure(responses=path, config={"written_by_policy": own}).figures for own in (False, True))
    assert "kl_policy_ref_per_sequence_k1" not in others
    assert others["written_by_policy"] is False
    assert others["k1_responses_for_same_interval"] is None
    assert own["kl_policy_ref_per_sequence_k1"] == others["log_ratio_per_sequence"]
    assert own["k1_responses_for_same_interval"] > 0
    assert own["max_new_tokens"] is None
    assert own["responses"] == own["prompts"] == str(path)


def test_chat_completions_are_scored_as_their_text_behind_the_template(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    chat = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["response"]}],
            "finished": row["finished"],
        }
        for row in GIVEN
    ]
    found = tiny_measure(responses=write(tmp_path / "chat.jsonl", chat), tokenizer=tokenizer)
    expected = scored_plainly([{**row, "prompt": f"{row['prompt']} it"} for row in GIVEN], temperature=1.0)
    assert found.kl_policy_ref_per_sequence.mean == pytest.approx(sum(one["kl"] for one in expected) / 3, rel=1e-4)


def test_several_responses_to_each_prompt_are_its_stratum_in_a_file_too(tmp_path):
    rows = [{**row, "response": text} for row in GIVEN for text in ("a cat", "it runs .")]
    figures = tiny_measure(responses=write(tmp_path / "given.jsonl", rows)).figures
    assert (figures["prompts_count"], figures["responses_count"]) == (3, 6)
    assert [row["responses"] for row in figures["by_prompt"]] == [2, 2, 2]
    assert figures["interval_covers"] == "the responses"


def test_what_the_policy_sampled_scores_the_same_when_it_is_given_back(tmp_path):
    sampled = tiny_measure(mapped=24)
    rows = []
    for one in sampled.token_maps:
        words = [WORDS[token] for token in one["token_ids"] if token != 1]
        rows.append({"prompt": one["prompt"], "response": " ".join(words), "finished": one["finished"]})
    found = tiny_measure(responses=write(tmp_path / "given.jsonl", rows), config={"written_by_policy": True})
    for name in INTERVALS:
        own, other = getattr(found, name), getattr(sampled, name)
        assert (own.mean, own.low, own.high) == pytest.approx((other.mean, other.low, other.high), abs=2e-5), name


# --- prompts and limits


def test_chat_prompts_are_answered_behind_the_template():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    chats = [{"prompt": [{"role": "user", "content": text}]} for text in PROMPTS]
    found = tiny_measure(prompts=chats, tokenizer=tokenizer)
    plain = tiny_measure(prompts=[f"{text} it" for text in PROMPTS])
    assert found.kl_policy_ref_per_sequence == plain.kl_policy_ref_per_sequence
    assert found.figures["by_prompt"][0]["prompt"] == chats[0]["prompt"]


@pytest.mark.parametrize(("positions", "limit"), [(64, 60), (40, 36), (1000, 128)])
def test_a_limit_that_nobody_named_is_128_or_what_the_shorter_context_leaves(positions, limit):
    models = [tiny_policy(seed, architecture="llama", **LIVELY) for seed in (2, 3)]  # their positions have no end
    models[0].config.max_position_embeddings, models[1].config.max_position_embeddings = 1000, positions
    found = tiny_measure(*models, config={"max_new_tokens": None, "samples": 2})
    assert found.figures["max_new_tokens"] == limit  # the longest prompt has 4 tokens


def test_a_prompt_that_leaves_no_room_is_named():
    with pytest.raises(PromptError, match=r"of at most 58 tokens .* longest in row 2 with 60; .* lower max_new_tokens"):
        tiny_measure(prompts=["a", "cat " * 60])
    with pytest.raises(PromptError, match="of at most 63 tokens"):
        tiny_measure(prompts=["cat " * 64], config={"max_new_tokens": None})


def test_a_given_response_that_does_not_fit_is_named(tmp_path):
    path = write(tmp_path / "long.jsonl", [GIVEN[0], {**GIVEN[1], "response": "cat " * 63}])
    with pytest.raises(PromptError, match="together of at most 64 tokens, found 65 in row 2"):
        tiny_measure(responses=path)


def sampled_at(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the sampler draw at another temperature than the one at which its tokens are scored."""

    def rollout_at(*arguments: Any, config: RolloutConfig, **more: Any) -> Rollout:
        return rollout_of(*arguments, config=config.model_copy(update={"temperature": temperature}), **more)

    monkeypatch.setattr("kleash.measuring.rollout_of", rollout_at)


@pytest.mark.filterwarnings("error")
def test_sampler_and_scorer_agree_in_float32_and_given_responses_have_no_sampler(tmp_path):
    figures = tiny_measure().figures
    assert 0 <= figures["kl_rollout_policy_per_token_k3"] < 1e-9
    assert figures["logprob_mismatch_max"] < 1e-4
    figures = tiny_measure(responses=write(tmp_path / "given.jsonl", GIVEN)).figures
    assert figures["kl_rollout_policy_per_token_k3"] is figures["logprob_mismatch_max"] is None


def test_a_sampler_that_is_not_the_scorer_is_warned_of_where_the_alarm_of_a_run_would_ring(monkeypatch):
    sampled_at(0.5, monkeypatch)
    with pytest.warns(KleashWarning, match=r"at most 0\.02 nats per token apart, found 0\.\d+: .*; measure in float32"):
        figures = tiny_measure().figures
    assert figures["kl_rollout_policy_per_token_k3"] > 0.02
    sampled_at(0.98, monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures = tiny_measure().figures
    assert 1e-6 < figures["kl_rollout_policy_per_token_k3"] < 0.02


def test_a_reference_that_forbids_what_the_policy_says_stops_with_the_reason():
    reference = tiny_policy(3, tie_word_embeddings=False, **LIVELY)
    head = torch.nn.Linear(16, len(WORDS))
    with torch.no_grad():
        head.weight.copy_(reference.lm_head.weight)
        head.bias.fill_(0.0)[5] = -math.inf
    reference.lm_head = head
    with pytest.raises(NonFiniteError, match=r"found -?inf at .*the reference forbids a token that the policy allows"):
        tiny_measure(reference=reference)


# --- bad usage


@pytest.mark.parametrize(
    "config",
    [
        {"samples": 0},
        {"at_most": 0},
        {"batch": 0},
        {"max_new_tokens": 0},
        {"temperature": 0.0},
        {"temperature": math.nan},
        {"dtype": "float16"},
        {"seed": -1},
        {"sample": 3},
    ],
)
def test_a_setting_out_of_range_is_refused(config):
    with pytest.raises(ValidationError):
        MeasureConfig(**config)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "Expected prompts to answer or responses to score, found neither; give one of them"),
        ({"prompts": ["a"], "responses": "x.jsonl"}, "found both; give one of them"),
        ({"prompts": ["a"], "config": MeasureConfig(written_by_policy=True)}, "written_by_policy with given responses"),
        ({"responses": "x", "config": MeasureConfig(samples=3)}, "Expected samples with prompts to answer"),
        ({"responses": "x", "config": MeasureConfig(until="5%")}, "Expected until with prompts to answer"),
        ({"responses": "x", "config": MeasureConfig(max_new_tokens=3)}, "Expected max_new_tokens with prompts"),
        ({"prompts": ["a"], "config": MeasureConfig(at_most=3)}, "Expected at_most with until, found it alone"),
        ({"prompts": ["a"], "config": MeasureConfig(until="wide")}, "Expected a half-width such as"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_loaded(given, said):
    with pytest.raises(ConfigError, match=said):
        measure("nowhere", "nowhere", **given)


def test_a_command_of_several_processes_is_refused(monkeypatch):
    require_one_process()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="Expected one process, found several; measure without a launcher"):
        require_one_process()


@pytest.mark.parametrize("prompts", [[], [""], [{"text": "a"}], [{"prompt": 3}]])
def test_prompts_that_are_none_are_refused(prompts):
    with pytest.raises(PromptError):
        tiny_measure(prompts=prompts)
