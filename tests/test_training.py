"""The main job on tiny real models: what it leaves behind, what repeats, what reaches the rewards, what stops it."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tiny import PROMPTS, save_tiny_world, tiny_policy, tiny_reward_model, tiny_tokenizer, tree
from transformers import AutoModelForCausalLM, AutoTokenizer

import kleash
from kleash.checkpoint import checkpoints_in
from kleash.glossary import GLOSSARY
from kleash.models import fingerprint
from kleash.training import Clock

ROLLOUT = kleash.RolloutConfig(prompts_per_update=8, max_new_tokens=4)
PPO = kleash.PPOConfig(epochs=2, minibatches=2, learning_rate=3e-3)


def words(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    return [len(completion.split()) / 4 for completion in completions]


def cats(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    return [completion.split().count("cat") for completion in completions]


def train(out: Path, **changes: object) -> kleash.RunResult:
    settings = {
        "policy": tiny_policy(),
        "tokenizer": tiny_tokenizer(),
        "reward": words,
        "prompts": PROMPTS,
        "leash": kleash.LeashConfig(beta=0.1),
        "rollout": ROLLOUT,
        "ppo": PPO,
        "updates": 3,
        "quiet": True,
        **changes,
    }
    return kleash.train(out=out, **settings)


def rows_of(out: Path, file: str = "records.jsonl") -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / file).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("runs") / "run", eval_reward=cats).out


def test_a_run_leaves_what_its_directory_promises(run: Path) -> None:
    assert sorted(path.name for path in run.iterdir()) == [
        "alarms.jsonl", "checkpoints", "config.yaml", "drift.jsonl", "records.jsonl", "report.html", "samples.jsonl",
        "timings.jsonl", "token_maps.jsonl",
    ]  # fmt: skip
    assert [path.name for path in checkpoints_in(run / "checkpoints")] == ["000000", "000003"]
    assert "<html" in (run / "report.html").read_text(encoding="utf-8")
    config = kleash.read_config(run / "config.yaml")
    assert (config.policy, config.reward) == ("given as a GPT2LMHeadModel", "given as the function words")
    assert (config.rollout, config.ppo, config.updates) == (ROLLOUT, PPO, 3)


def test_each_update_has_one_record_with_every_figure_of_the_glossary(run: Path) -> None:
    records = rows_of(run)
    assert [record["update"] for record in records] == [1, 2, 3]
    assert all(list(record) == list(GLOSSARY) for record in records)
    tail = ("score_tail_index", "score_tail_gap")  # of eight scores with ties there may be none
    assert all(value is not None for record in records for name, value in record.items() if name not in tail)


def test_each_update_has_one_drift_map_which_adds_up_to_its_record(run: Path) -> None:
    for record, drift in zip(rows_of(run), rows_of(run, "drift.jsonl"), strict=True):
        total = pytest.approx(record["kl_policy_ref_per_sequence"], rel=1e-4)
        assert drift["update"] == record["update"]
        assert sum(row["kl_policy_ref_per_sequence"] for row in drift["by_position"]) == total
        assert sum(row["kl_policy_ref_per_sequence"] for row in drift["by_class"].values()) == total
        assert drift["by_position"][0]["sequences"] == 8
        assert drift["by_class"]["eos"]["tokens"] == round(8 * record["eos_share"])
        assert record["truncated_share"] == 1 - record["eos_share"]
        assert bool(drift["top_tokens"]) == (record["update"] > 1)
        for token in drift["top_tokens"]:
            assert token["ratio"] == pytest.approx(token["policy_prob"] / token["ref_prob"], rel=1e-4)
            assert token["position"] or any(prompt.endswith(token["context"]) for prompt in PROMPTS)


def test_each_update_has_one_line_of_seconds_by_phase(run: Path) -> None:
    timings = rows_of(run, "timings.jsonl")
    assert [row["update"] for row in timings] == [1, 2, 3]
    for row in timings:
        phases = [row[f"seconds_{name}"] for name in ("sampling", "rewarding", "scoring", "optimising")]
        assert all(second >= 0 for second in phases)
        assert sum(phases) <= row["seconds_total"] + 0.001


def test_the_samples_are_readable_and_carry_their_own_figures(run: Path) -> None:
    samples = rows_of(run, "samples.jsonl")
    assert [(row["update"], row["index"]) for row in samples] == [(n, i) for n in (1, 2, 3) for i in range(4)]
    for row in samples:
        assert row["prompt"] in PROMPTS
        assert row["score"] == words([], [row["response"]])[0]
        assert row["eval_score"] == cats([], [row["response"]])[0]
        assert 1 <= row["response_length"] <= 4
        assert row["finished"] or row["response_length"] == 4
    assert all(row["kl_policy_ref_per_sequence"] == 0 for row in samples[:4])
    assert all(row["kl_policy_ref_per_sequence"] > 0 for row in samples[4:])


def test_at_the_first_update_the_kl_is_exactly_0_and_the_ratio_exactly_1(run: Path) -> None:
    first, second, _ = rows_of(run)
    for name in ("kl_policy_ref_per_sequence", "kl_policy_ref_per_sequence_k1", "kl_policy_ref_per_token"):
        assert first[name] == 0
    assert first["ratio_max_first_step"] == second["ratio_max_first_step"] == 1
    assert first["rewards_per_sequence_mean"] == pytest.approx(first["score_mean"], abs=1e-6)
    assert second["kl_policy_ref_per_sequence"] > 0


def test_beta_reaches_the_rewards(run: Path) -> None:
    for record in rows_of(run):
        expected = record["score_mean"] - 0.1 * record["kl_policy_ref_per_sequence"]
        assert record["rewards_per_sequence_mean"] == pytest.approx(expected, abs=1e-6)
        assert record["beta"] == 0.1


def test_a_great_beta_holds_the_policy_that_runs_away_without_one(tmp_path: Path) -> None:
    drift, score = {}, {}
    for beta in (0.0, 100.0):
        result = train(
            tmp_path / str(beta),
            reward=cats,
            leash=kleash.LeashConfig(beta=beta),
            rollout=kleash.RolloutConfig(prompts_per_update=16, max_new_tokens=4),
            ppo=kleash.PPOConfig(epochs=2, minibatches=1, learning_rate=3e-2),
            updates=5,
        )
        last = rows_of(result.out)[-1]
        drift[beta], score[beta] = last["kl_policy_ref_per_sequence"], last["score_mean"]
    assert drift[0.0] > 1
    assert drift[100.0] < drift[0.0] / 4
    assert score[0.0] > score[100.0] + 0.4


def test_the_same_seed_writes_the_same_bytes_and_another_one_does_not(run: Path, tmp_path: Path) -> None:
    again, other = train(tmp_path / "again", eval_reward=cats).out, train(tmp_path / "other", seed=1, updates=1).out
    for file in ("records.jsonl", "drift.jsonl", "samples.jsonl"):
        assert (again / file).read_bytes() == (run / file).read_bytes()
        assert (other / file).read_bytes().splitlines()[0] != (run / file).read_bytes().splitlines()[0]
    weights = "checkpoints/000003/policy/model.safetensors"
    assert (again / weights).read_bytes() == (run / weights).read_bytes()


def test_micro_batches_change_nothing_that_is_learnt(run: Path, tmp_path: Path) -> None:
    small = train(tmp_path / "small", eval_reward=cats, ppo=PPO.model_copy(update={"micro_batch": 1}), updates=2).out
    for name in ("score_mean", "gradient_norm", "policy_loss", "value_loss", "advantage_std", "entropy_per_token"):
        for found, expected in zip(rows_of(small), rows_of(run), strict=False):
            assert found[name] == pytest.approx(expected[name], abs=2e-5), name


def test_the_model_that_came_in_is_the_one_that_was_trained_and_the_reference_is_not(tmp_path: Path) -> None:
    policy, reference = tiny_policy(), tiny_policy()
    start = fingerprint(reference)
    result = train(tmp_path / "run", policy=policy, reference=reference, updates=1)
    assert fingerprint(reference) == start != fingerprint(policy)
    assert fingerprint(AutoModelForCausalLM.from_pretrained(result.checkpoint / "policy")) == fingerprint(policy)
    assert AutoTokenizer.from_pretrained(result.checkpoint / "policy").pad_token == "<pad>"
    assert json.loads((result.checkpoint / "state.json").read_text())["reference_fingerprint"] == start


def test_a_reference_that_shares_weights_with_the_policy_is_refused(tmp_path: Path) -> None:
    policy, reference = tiny_policy(), tiny_policy()
    reference.transformer = policy.transformer
    for one in (policy, reference):
        with pytest.raises(kleash.ModelError, match=r"parameters of its own, found that it shares .* with the policy"):
            train(tmp_path / "run", policy=policy, reference=one, updates=1)
    assert all(parameter.requires_grad for parameter in policy.parameters())
    assert not (tmp_path / "run").exists()


def test_a_reference_that_is_padded_to_a_rounder_size_is_the_same_model(tmp_path: Path) -> None:
    reference = tiny_policy()
    reference.resize_token_embeddings(reference.config.vocab_size + 4, mean_resizing=False)
    reference.get_output_embeddings().weight.data[-4:] = 9.0
    reference.save_pretrained(tmp_path / "padded")
    tiny_tokenizer().save_pretrained(tmp_path / "padded")
    padded = rows_of(train(tmp_path / "run", reference=tmp_path / "padded", updates=2).out)
    usual = rows_of(train(tmp_path / "usual", updates=2).out)
    assert padded[0]["kl_policy_ref_per_sequence"] == 0
    for name in ("kl_policy_ref_per_sequence", "score_mean", "gradient_norm"):
        assert padded[1][name] == pytest.approx(usual[1][name], abs=1e-6)


def test_a_reward_model_in_memory_scores_and_starts_the_value_model(tmp_path: Path) -> None:
    reward_model = tiny_reward_model()
    start = fingerprint(reward_model)
    result = train(tmp_path / "run", reward=reward_model, updates=1)
    assert fingerprint(reward_model) == start
    assert rows_of(result.out)[0]["explained_variance"] is not None
    assert kleash.read_config(result.out / "config.yaml").reward == "given as a GPT2ForSequenceClassification"


def test_paths_and_files_serve_as_well_as_objects(tmp_path: Path) -> None:
    world = save_tiny_world(tmp_path)
    result = train(
        tmp_path / "run",
        policy=world["policy"],
        tokenizer=None,
        reward=Path(world["reward"]),
        prompts=world["prompts"],
        updates=1,
    )
    assert kleash.read_config(result.out / "config.yaml").policy == world["policy"]
    assert rows_of(result.out)[0]["eval_score_mean"] is None


def test_other_columns_reach_the_reward(tmp_path: Path) -> None:
    seen = []

    def graded(prompts: Sequence[str], completions: Sequence[str], grade: Sequence[int]) -> list[float]:
        seen.extend(zip(prompts, grade, strict=True))
        return [float(number) for number in grade]

    rows = [{"prompt": text, "grade": number} for number, text in enumerate(PROMPTS)]
    result = train(tmp_path / "run", reward=graded, prompts=rows, updates=1)
    assert set(seen) == {(text, number) for number, text in enumerate(PROMPTS)}
    assert rows_of(result.out)[0]["score_mean"] == 3.5


def test_padding_with_eos_trains_and_counts_the_closing_eos(tmp_path: Path) -> None:
    with pytest.warns(kleash.KleashWarning, match="one token for both"):
        result = train(tmp_path / "run", tokenizer=tiny_tokenizer(pad_token="<eos>"), reward=cats, updates=2)
    usual = train(tmp_path / "usual", reward=cats, updates=2)
    for found, expected in zip(rows_of(result.out), rows_of(usual.out), strict=True):
        assert found == expected


def test_a_missing_eos_costs_its_penalty(tmp_path: Path) -> None:
    ppo = PPO.model_copy(update={"missing_eos_penalty": 2.0})
    record = rows_of(train(tmp_path / "run", ppo=ppo, updates=1).out)[0]
    assert 0 < record["eos_share"] < 1
    expected = record["score_mean"] - 2.0 * (1 - record["eos_share"])
    assert record["rewards_per_sequence_mean"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_score_that_stops_being_finite_stops_the_run_at_its_step_and_names_the_prompt(
    tmp_path: Path, wrong: float
) -> None:
    class Failing:
        calls = 0

        def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
            self.calls += 1
            scores = words(prompts, completions)
            if self.calls == 9:  # six calls of the checks, then updates 1, 2 and 3
                self.prompt, scores[5] = prompts[5], wrong
            return scores

    failing = Failing()
    with pytest.raises(kleash.RewardError) as caught:
        train(tmp_path / "run", reward=failing, updates=4)
    assert f"found {wrong} for the prompt {failing.prompt!r}" in str(caught.value)
    assert str(caught.value).endswith("; mend the reward for such a response, then go on with --resume.")
    assert len(rows_of(tmp_path / "run")) == 2
    assert checkpoints_in(tmp_path / "run" / "checkpoints")[-1].name == "000002"
    result = train(tmp_path / "run", reward=failing, updates=4, resume=True)
    assert [record["update"] for record in rows_of(result.out)] == [1, 2, 3, 4]


def test_an_update_that_is_not_finite_stops_the_run_and_saves_no_broken_weights(tmp_path: Path) -> None:
    class Exploding:
        calls = 0

        def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
            self.calls += 1
            return words(prompts, completions) if self.calls < 8 else [1e30] * len(prompts)

    with pytest.raises(kleash.RunStopped, match="Expected a finite"):
        train(tmp_path / "run", reward=Exploding(), updates=4)
    assert len(rows_of(tmp_path / "run")) == 1
    for checkpoint in checkpoints_in(tmp_path / "run" / "checkpoints"):
        model = AutoModelForCausalLM.from_pretrained(checkpoint / "policy")
        assert all(bool(weights.isfinite().all()) for weights in model.parameters())


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"updates": 0}, kleash.ConfigError, "updates in the arguments of kleash.train: greater than or equal to 1"),
        ({"prompts": []}, kleash.PromptError, "Expected at least one prompt"),
        ({"prompts": [{"text": "a cat"}]}, kleash.PromptError, "Expected a column `prompt`"),
        ({"prompts": [""]}, kleash.PromptError, "Expected text or chat messages"),
        ({"tokenizer": None}, kleash.ModelError, "Expected a tokenizer for a policy"),
        ({"tokenizer": tiny_tokenizer(pad_token=None)}, kleash.ModelError, "with a pad token, found none"),
        ({"reference": tiny_policy(vocab=20)}, kleash.ModelError, "the policy's vocabulary of 12, found 20"),
        ({"reward": tiny_reward_model(labels=2)}, kleash.RewardError, "one label at given as a GPT2.*, found 2"),
        ({"reward": lambda prompts, completions: [1.0]}, kleash.RewardError, "Expected 8 scores from .*, found 1"),
        ({"reward": lambda prompts, completions: None}, kleash.RewardError, "found NoneType; return"),
        ({"reward": lambda prompts, completions: ["x"] * len(prompts)}, kleash.RewardError, "Expected numbers from"),
        ({"eval_reward": lambda prompts, completions: 1 / 0}, kleash.RewardError, "found ZeroDivisionError"),
        ({"rollout": kleash.RolloutConfig(max_new_tokens=61)}, kleash.PromptError, "Expected prompts of at most 3 tok"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_written(
    tmp_path: Path, changes: dict[str, object], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        train(tmp_path / "run", **changes)
    assert tree(tmp_path) == {}


def test_a_run_never_writes_over_another(run: Path, tmp_path: Path) -> None:
    before = tree(run)
    with pytest.raises(kleash.RunDirectoryError, match="found another run"):
        train(run)
    assert tree(run) == before


def test_the_clock_takes_the_seconds_of_each_phase() -> None:
    clock = Clock()
    with clock.phase("outer"), clock.phase("inner"):
        torch.ones(3).sum()
    assert list(clock.seconds) == ["seconds_inner", "seconds_outer"]
    assert 0 <= clock.seconds["seconds_inner"] <= clock.seconds["seconds_outer"]
