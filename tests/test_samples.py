"""The responses that a run keeps token by token: of which updates, and that they say what the models say."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_tiny_world, tiny_run
from transformers import AutoModelForCausalLM, AutoTokenizer

from kleash.config import config_from
from kleash.parts import Given
from kleash.training import train_run

CHANGES = {"updates": 5, "rollout": {"prompts_per_update": 8, "max_new_tokens": 6, "temperature": 0.7}}


def rows_of(out: Path, file: str = "token_maps.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / file).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_tiny_world(tmp_path_factory.mktemp("world"), scale=8.0)


def trained(world: dict[str, str], out: Path, **changes: object) -> Path:
    return train_run(config_from(tiny_run(world, out, **CHANGES, **changes), "a test"), Given(), quiet=True).out


@pytest.fixture(scope="module")
def run(world: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(world, tmp_path_factory.mktemp("runs") / "run", samples_per_update=8)


def test_the_first_and_the_last_update_are_kept_and_those_between_are_not(run: Path) -> None:
    assert [(row["update"], row["index"]) for row in rows_of(run)] == [(n, i) for n in (1, 5) for i in range(8)]


def test_a_checkpoint_brings_the_newest_ones(world: dict[str, str], tmp_path: Path) -> None:
    config = config_from(tiny_run(world, tmp_path / "run", **CHANGES, mapped_responses=2), "a test")
    train_run(config.model_copy(update={"updates": 4}), Given(), quiet=True)
    assert [(row["update"], row["index"]) for row in rows_of(tmp_path / "run")] == [(1, 0), (1, 1), (4, 0), (4, 1)]
    train_run(config.model_copy(update={"updates": 7}), Given(), quiet=True, resume=True)
    assert [(row["update"], row["index"]) for row in rows_of(tmp_path / "run")] == [(1, 0), (1, 1), (7, 0), (7, 1)]


def test_a_map_is_its_sample_token_by_token(run: Path) -> None:
    samples = {(row["update"], row["index"]): row for row in rows_of(run, "samples.jsonl")}
    for row in rows_of(run):
        sample = samples[row["update"], row["index"]]
        shared = sample.keys() & row.keys()
        assert shared >= {"prompt", "score", "eval_score", "kl_policy_ref_per_sequence", "finished"}
        assert {name: row[name] for name in shared} == {name: sample[name] for name in shared}
        assert len(row["token_ids"]) == sample["response_length"]
        assert sum(row["kl_policy_ref"]) == pytest.approx(sample["kl_policy_ref_per_sequence"], rel=1e-4, abs=1e-9)
        text = "".join(row["pieces"])
        for special in (" <eos>", " <unk>", " <pad>"):
            text = text.replace(special, "")
        assert text.strip() == sample["response"].strip()
        assert (row["pieces"][-1] == " <eos>") == row["finished"] == (row["classes"][-1] == "eos")
        k1 = sum(row["policy_logprobs"]) - sum(row["ref_logprobs"])
        assert row["kl_policy_ref_per_sequence_k1"] == pytest.approx(k1, abs=1e-4)


def test_nothing_has_drifted_before_the_first_step(run: Path) -> None:
    first = [row for row in rows_of(run) if row["update"] == 1]
    assert all(set(row["kl_policy_ref"]) == {0.0} and row["policy_logprobs"] == row["ref_logprobs"] for row in first)
    assert any(sum(row["kl_policy_ref"]) > 0 for row in rows_of(run) if row["update"] == 5)


def test_the_alternatives_are_the_likeliest_tokens_of_each_model_at_the_temperature(
    world: dict[str, str], run: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world["policy"])
    reference = AutoModelForCausalLM.from_pretrained(world["policy"])
    row = next(row for row in rows_of(run) if row["update"] == 5)
    prompt = tokenizer(row["prompt"])["input_ids"]
    with torch.no_grad():
        logits = reference(torch.tensor([prompt + row["token_ids"]])).logits[0, len(prompt) - 1 : -1]
    log_probs = torch.log_softmax(logits.double() / 0.7, -1)
    for position, alternatives in enumerate(row["alternatives"]):
        top = log_probs[position].topk(5)
        assert [piece.strip() for piece, _ in alternatives["ref"]] == tokenizer.convert_ids_to_tokens(top.indices)
        assert [logprob for _, logprob in alternatives["ref"]] == pytest.approx(top.values.tolist(), abs=1e-4)
        drawn = dict(map(tuple, alternatives["policy"])).get(row["pieces"][position])
        assert drawn is None or drawn == pytest.approx(row["policy_logprobs"][position], abs=1e-4)
    assert any(
        row["pieces"][position] in dict(map(tuple, alternatives["policy"]))
        for position, alternatives in enumerate(row["alternatives"])
    )


def test_keeping_none_changes_nothing_else(world: dict[str, str], run: Path, tmp_path: Path) -> None:
    without = trained(world, tmp_path / "run", samples_per_update=8, mapped_responses=0)
    assert not (without / "token_maps.jsonl").exists()
    for file in ("records.jsonl", "samples.jsonl", "drift.jsonl"):
        assert (without / file).read_bytes() == (run / file).read_bytes()
