"""Drift measured inside other trainers: the figures of `kleash measure`, and training as it would be without them."""

import copy
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from test_floors import imported
from tiny import LIVELY, PROMPTS, tiny_policy, tiny_tokenizer
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

import kleash.integrations
from kleash.demo.quiet import quiet
from kleash.errors import CheckpointError, ConfigError, ModelError, PromptError, RunDirectoryError
from kleash.generators import untouched_generators
from kleash.glossary import GLOSSARY
from kleash.integrations.trl import DriftCallback
from kleash.integrations.view import view_of
from kleash.linear_head import LinearHead, linear_head_of
from kleash.measurement import MeasureConfig, measure
from kleash.models import adapter_name, fingerprint
from kleash.reference import frozen_copy

CONFIG = MeasureConfig(samples=24, max_new_tokens=6, temperature=0.9, seed=3)
LORA = LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "v_proj"])  # changes the model from the start


def cats(completions: list[str], **columns: object) -> list[float]:
    return [float(text.split().count("cat")) for text in completions]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that every run starts from, on disk."""
    directory = tmp_path_factory.mktemp("start")
    with quiet():
        tiny_policy(architecture="llama", dropout=0.1, **LIVELY).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def loaded(start: Path) -> torch.nn.Module:
    with quiet():
        return AutoModelForCausalLM.from_pretrained(start)


def lora(start: Path, seed: int | None = None) -> torch.nn.Module:
    """A policy with an adapter that is never the same twice, unless a seed says so."""
    torch.manual_seed(random.randrange(2**32) if seed is None else seed)
    policy = loaded(start)
    with quiet():
        return get_peft_model(policy, LORA)


def grpo(out: Path, policy: torch.nn.Module, **changes: object) -> Trainer:
    """TRL's GRPOTrainer on the tiny world: three steps of two prompts with four answers each."""
    with quiet():
        from trl import GRPOConfig, GRPOTrainer

        settings = {
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 6,
            "learning_rate": 3e-2,
            "max_steps": 3,
            **changes,
        }
        return GRPOTrainer(
            model=policy,
            reward_funcs=[cats],
            args=GRPOConfig(output_dir=str(out), **ALWAYS, **settings),
            train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
            processing_class=tiny_tokenizer(),
        )


def supervised(out: Path, policy: torch.nn.Module, **changes: object) -> Trainer:
    """A plain transformers Trainer: three steps on four texts of one length."""
    texts = ["what is a cat <eos>", "what is a dog <eos>", "a dog it runs .", "is a cat it ."]
    rows = [{"input_ids": tiny_tokenizer()(text)["input_ids"]} for text in texts]
    settings = {"per_device_train_batch_size": 2, "learning_rate": 3e-2, "max_steps": 3, **changes}
    with quiet():
        return Trainer(
            model=policy,
            args=TrainingArguments(output_dir=str(out), **ALWAYS, **settings),
            train_dataset=[{**row, "labels": row["input_ids"]} for row in rows],
            processing_class=tiny_tokenizer(),
        )


ALWAYS = {
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "use_cpu": True,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


def with_drift(trainer: Trainer, *, every: int = 2, **changes: object) -> DriftCallback:
    callback = DriftCallback(trainer, prompts=PROMPTS, every=every, **{"config": CONFIG, **changes})
    trainer.add_callback(callback)
    return callback


def train(trainer: Trainer, **arguments: object) -> None:
    with quiet():
        trainer.train(**arguments)


def lines(trainer: Trainer) -> list[dict[str, object]]:
    return [json.loads(line) for line in (Path(trainer.args.output_dir) / "drift.jsonl").read_text().splitlines()]


def without_rounding(figures: dict[str, object]) -> dict[str, object]:
    """All but the figures of what rounding alone does between sampler and scorer, another time every time."""
    rounding = {name: figures[name] for name in ("kl_rollout_policy_per_token_k3", "logprob_mismatch_max")}
    assert all(abs(value) < 1e-5 for value in rounding.values())
    return {name: value for name, value in figures.items() if name not in rounding}


def kl_of(line: dict[str, object]) -> float:
    return line["kl_policy_ref_per_sequence"]["mean"]


def logged(trainer: Trainer, *, drift: bool) -> list[dict[str, float]]:
    """The trainer's rows of the drift, or all others without what a clock says."""
    rows = [row for row in trainer.state.log_history if any(name.startswith("kl_policy_ref") for name in row) == drift]
    clocks = ("step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second")
    return [{name: value for name, value in row.items() if name not in clocks} for row in rows]


@pytest.fixture(scope="module")
def watched(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A GRPO run with the callback."""
    trainer = grpo(tmp_path_factory.mktemp("watched"), loaded(start))
    with_drift(trainer)
    train(trainer)
    return trainer


@pytest.fixture(scope="module")
def unwatched(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """The same run without it."""
    trainer = grpo(tmp_path_factory.mktemp("unwatched"), loaded(start))
    train(trainer)
    return trainer


def test_the_drift_is_measured_before_the_first_step_after_every_second_one_and_after_the_last(watched):
    assert [line["step"] for line in lines(watched)] == [0, 2, 3]


def test_the_drift_is_exactly_zero_before_the_first_step_and_grows_from_there(watched):
    first, second, third = lines(watched)
    assert first["kl_policy_ref_per_sequence"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "n": 24}
    assert first["kl_policy_ref_per_sequence_k1"]["mean"] == 0
    assert 0.05 < kl_of(second) < kl_of(third)


def test_the_last_measurement_is_that_of_kleash_measure_on_what_was_saved(watched, start, tmp_path):
    with quiet():
        watched.save_model(str(tmp_path))
        expected = measure(tmp_path, start, prompts=PROMPTS, config=CONFIG).figures
    found = lines(watched)[-1]
    assert kl_of(found) > 0.05
    where_from = {"policy", "reference", "step", "reference_fingerprint"}
    found, expected = (
        {name: value for name, value in figures.items() if name not in where_from}
        for figures in (without_rounding(found), without_rounding(expected))
    )
    assert found == expected


def test_the_trainers_log_has_the_figures_under_the_names_of_the_glossary(watched):
    rows = logged(watched, drift=True)
    assert [row["step"] for row in rows] == [0, 2, 3]
    for row, line in zip(rows, lines(watched), strict=True):
        figures = {name: value for name, value in row.items() if name not in ("step", "epoch")}
        assert set(figures) <= set(GLOSSARY)
        exact, k1 = line["kl_policy_ref_per_sequence"], line["kl_policy_ref_per_sequence_k1"]
        assert figures["kl_policy_ref_per_sequence"] == exact["mean"]
        assert figures["kl_policy_ref_per_sequence_low"] == exact["low"]
        assert figures["kl_policy_ref_per_sequence_high"] == exact["high"]
        assert figures["kl_policy_ref_per_sequence_k1"] == k1["mean"]
        assert figures["entropy_per_token"] == line["policy_entropy_per_token"]["mean"]
        assert figures["response_length_mean"] == line["response_length"]["mean"]
        assert figures["eos_share"] == line["finished_share"]
        parts = [figures[f"kl_policy_ref_per_sequence_{part}"] for part in ("first_token", "eos", "special", "other")]
        assert sum(parts) == pytest.approx(exact["mean"], rel=1e-4)


def test_a_run_without_checkpoints_keeps_no_start_nor_does_one_with_a_given_reference(watched, start, tmp_path):
    assert [file.name for file in Path(watched.args.output_dir).glob("drift*")] == ["drift.jsonl"]
    trainer = supervised_with_saves(tmp_path, loaded(start))
    begin(trainer, config=CONFIG, reference=start)
    assert [file.name for file in tmp_path.glob("drift*")] == ["drift.jsonl"]


def test_training_ends_at_the_same_weights_bit_for_bit_as_without_the_callback(watched, unwatched):
    assert fingerprint(watched.model) == fingerprint(unwatched.model)


def test_what_trl_logs_is_what_it_logs_without_the_callback(watched, unwatched):
    assert logged(watched, drift=False) == logged(unwatched, drift=False)
    assert len(logged(watched, drift=False)) == 4


def test_a_deep_copy_of_trls_model_speaks_with_the_originals_weights_and_ours_does_not(unwatched):
    policy, tokens = unwatched.model, torch.tensor([[3, 4, 5]])
    naive, ours = copy.deepcopy(policy), frozen_copy(view_of(policy))
    with torch.no_grad():
        before = [model(tokens).logits for model in (naive, ours)]
        policy.get_output_embeddings().weight.mul_(2)
        after = [model(tokens).logits for model in (naive, ours)]
        policy.get_output_embeddings().weight.div_(2)
    assert not torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])


def test_a_view_has_the_models_weights_and_leaves_its_modes_gradients_and_forward_alone(unwatched):
    policy = unwatched.model.train()
    forward = policy.forward
    view = view_of(policy)
    view.config.use_cache = not policy.config.use_cache
    assert not any(module.training for module in view.modules())
    assert all(module.training for module in policy.modules())
    assert all(mine is its for mine, its in zip(view.parameters(), policy.parameters(), strict=True))
    assert all(weight.requires_grad for weight in policy.parameters())
    assert policy.forward == forward
    assert view.config.use_cache != policy.config.use_cache
    assert isinstance(linear_head_of(view), LinearHead)


def test_a_view_looks_into_the_wrappers_of_processes_and_compilers(start):
    policy = loaded(start)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(policy)
    finally:
        torch.distributed.destroy_process_group()
    compiled = torch.nn.Module()
    compiled._orig_mod = policy  # as torch.compile holds it
    for model in (wrapped, compiled):
        assert type(view_of(model)) is type(policy)
        assert next(view_of(model).parameters()) is next(policy.parameters())


def test_generators_draw_after_a_measurement_what_they_would_have_drawn_without_it():
    def drawn() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    expected = drawn()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    with untouched_generators(torch.device("cpu")):
        drawn()
    assert drawn() == expected


@pytest.mark.parametrize("beta", [0.0, 0.1])  # with one, TRL puts a second adapter into the policy
def test_a_lora_policy_is_measured_to_its_starting_adapter_on_the_base_that_it_shares(start, tmp_path, beta):
    trainer = grpo(tmp_path / "watched", lora(start, seed=0), beta=beta, max_steps=1)
    callback = with_drift(trainer, every=1)
    train(trainer)
    unwatched = grpo(tmp_path / "unwatched", lora(start, seed=0), beta=beta, max_steps=1)
    train(unwatched)
    first, last = lines(trainer)
    assert kl_of(first) == 0
    assert kl_of(last) > 0.01
    assert fingerprint(trainer.model) == fingerprint(unwatched.model)
    assert len(trainer.model.peft_config) == (2 if beta else 1)
    policy = view_of(trainer.model)
    assert adapter_name(policy) == "default"
    apart = [name for name, weight in policy.named_parameters() if callback.reference.get_parameter(name) is not weight]
    assert apart
    assert all("lora" in name for name in apart)


def test_the_copy_of_a_lora_policys_start_is_not_its_base(start, tmp_path):
    trainer = supervised(tmp_path, lora(start), max_steps=1)
    with_drift(trainer, every=1, reference=start)
    train(trainer)
    assert kl_of(lines(trainer)[0]) > 0.01


def test_any_trainer_of_a_causal_model_can_be_measured_and_autocast_does_not_enter_the_figures(start, tmp_path):
    trainer = supervised(tmp_path / "run", loaded(start), bf16=True)
    with_drift(trainer)
    train(trainer)
    with quiet():
        trainer.save_model(str(tmp_path / "saved"))
        expected = measure(tmp_path / "saved", start, prompts=PROMPTS, config=CONFIG)
    assert [line["step"] for line in lines(trainer)] == [0, 2, 3]
    assert lines(trainer)[-1]["by_prompt"] == expected.figures["by_prompt"]
    assert kl_of(lines(trainer)[-1]) > 0.05


def test_a_reference_that_is_loaded_disturbs_nothing_either(start, tmp_path):
    trainer = supervised(tmp_path / "watched", loaded(start))
    with_drift(trainer, reference=start)
    train(trainer)
    unwatched = supervised(tmp_path / "unwatched", loaded(start))
    train(unwatched)
    assert fingerprint(trainer.model) == fingerprint(unwatched.model)
    assert kl_of(lines(trainer)[0]) == 0


def test_trls_reference_model_serves_as_ours(start, tmp_path):
    trainer = grpo(tmp_path, loaded(start), beta=0.1, max_steps=1)
    callback = with_drift(trainer, every=1, reference=trainer.ref_model)
    train(trainer)
    assert next(callback.reference.parameters()) is next(trainer.ref_model.parameters())
    first, last = lines(trainer)
    assert kl_of(first) == 0
    assert kl_of(last) > 0.01


def test_without_a_config_each_prompt_is_answered_once_as_the_trainer_samples(start, tmp_path):
    trainer = grpo(tmp_path, loaded(start), temperature=0.7)
    assert with_drift(trainer, config=None).config == MeasureConfig(samples=8, temperature=0.7, max_new_tokens=6)
    trainer = supervised(tmp_path, loaded(start))
    assert with_drift(trainer, config=None).config == MeasureConfig(samples=8)


def test_the_last_checkpoint_knows_the_last_measurement(start, tmp_path):
    trainer = supervised_with_saves(tmp_path, loaded(start))
    with_drift(trainer, every=3)
    train(trainer)
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    rows = [row for row in state["log_history"] if "kl_policy_ref_per_sequence" in row]
    assert [row["step"] for row in rows] == [0, 3, 4]
    assert rows[-1]["kl_policy_ref_per_sequence"] == kl_of(lines(trainer)[-1])


def test_a_run_that_another_callback_ends_is_measured_at_its_end(start, tmp_path):
    class Ends(TrainerCallback):
        def on_step_end(self, args, state, control, **of_trainer):
            control.should_training_stop = state.global_step == 1

    trainer = supervised(tmp_path, loaded(start))
    with_drift(trainer)
    trainer.add_callback(Ends())
    train(trainer)
    assert [line["step"] for line in lines(trainer)] == [0, 1]


def test_only_the_first_process_measures(start, tmp_path):
    trainer = supervised(tmp_path, loaded(start))
    callback = with_drift(trainer)
    trainer.state.is_world_process_zero = False
    callback.on_train_begin(trainer.args, trainer.state, trainer.control)
    trainer.state.global_step = 2
    callback.on_step_end(trainer.args, trainer.state, trainer.control)
    assert callback.reference is None
    assert not (tmp_path / "drift.jsonl").exists()


TWO_PROCESSES = """
import gc, os, sys
from pathlib import Path
import torch
import test_trl
trainer = test_trl.supervised(Path(sys.argv[1]), test_trl.loaded(Path(sys.argv[2])))
if sys.argv[3] == "watched":
    test_trl.with_drift(trainer)
test_trl.train(trainer)
assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
if os.environ["RANK"] == "0":
    print("weights", test_trl.fingerprint(trainer.model))
del trainer  # its wrapped model holds the process group, whose threads would outlive it and may abort the interpreter
gc.collect()
torch.distributed.destroy_process_group()
assert not [task for task in Path("/proc/self/task").glob("*/comm") if "gloo" in task.read_text()]
"""


@pytest.mark.slow
def test_two_processes_train_as_without_the_callback_and_write_one_record(start: Path, tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(TWO_PROCESSES)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    weights = []
    for name in ("watched", "unwatched"):
        done = subprocess.run(
            [*launcher, str(tmp_path / "job.py"), str(tmp_path / name), str(start), name],
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
            },
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        weights += [line for line in done.stdout.splitlines() if line.startswith("weights")]
    assert len(weights) == 2
    assert weights[0] == weights[1]
    record = [json.loads(line) for line in (tmp_path / "watched" / "drift.jsonl").read_text().splitlines()]
    assert [line["step"] for line in record] == [0, 2, 3]
    assert kl_of(record[0]) == 0
    assert kl_of(record[-1]) > 0.05


def resumed(out: Path, policy: torch.nn.Module, step: int, **callback: object) -> Trainer:
    """A run of four steps that goes on from the checkpoint of a step."""
    trainer = supervised_with_saves(out, policy)
    with_drift(trainer, **callback)
    train(trainer, resume_from_checkpoint=str(out / f"checkpoint-{step}"))
    return trainer


def supervised_with_saves(out: Path, policy: torch.nn.Module) -> Trainer:
    trainer = supervised(out, policy, max_steps=4)
    trainer.args.save_strategy, trainer.args.save_steps = "steps", 1
    return trainer


@pytest.mark.parametrize("policy", [loaded, lora])
def test_a_resumed_run_is_measured_to_the_start_of_the_run_and_not_to_the_checkpoint(
    start: Path, tmp_path: Path, policy: Callable[[Path], torch.nn.Module]
) -> None:
    whole = supervised_with_saves(tmp_path, policy(start))
    with_drift(whole)
    train(whole)
    expected = lines(whole)
    assert [line["step"] for line in expected] == [0, 2, 4]
    again = resumed(tmp_path, policy(start), 3)
    found = lines(again)
    assert [line["step"] for line in found] == [0, 2, 3, 4]
    assert found[0] == expected[0]
    assert 0 < kl_of(found[2]) < 2 * kl_of(expected[2])
    assert without_rounding(found[3]) == without_rounding(expected[2])


def test_a_resumed_run_needs_the_reference_that_it_was_measured_to(start, tmp_path):
    whole = supervised_with_saves(tmp_path, loaded(start))
    with_drift(whole)
    train(whole)
    before = (tmp_path / "drift.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=r"Expected the reference that .*drift\.jsonl measures to, found another"):
        resumed(tmp_path, loaded(start), 3, reference=tmp_path / "checkpoint-3")
    (tmp_path / "drift_reference.safetensors").write_bytes(b"half")
    with pytest.raises(CheckpointError, match=r"found a damaged file .*; pass the model that the run started from"):
        resumed(tmp_path, loaded(start), 3)
    (tmp_path / "drift_reference.safetensors").unlink()
    with pytest.raises(CheckpointError, match="found no such file; pass the model that the run started from"):
        resumed(tmp_path, loaded(start), 3)
    assert (tmp_path / "drift.jsonl").read_bytes() == before
    assert kl_of(lines(resumed(tmp_path, loaded(start), 3, reference=start))[-1]) == kl_of(
        json.loads(before.split(b"\n")[2])
    )


def test_a_start_that_belongs_to_another_model_is_refused(start, tmp_path):
    whole = supervised_with_saves(tmp_path, loaded(start))
    callback = with_drift(whole)
    train(whole)
    name = "model.norm.weight"
    callback.record.keep({**callback.record.kept(), name: torch.ones(3)})
    with pytest.raises(CheckpointError, match=rf"what learns in the policy, found another {name}; pass the model"):
        resumed(tmp_path, loaded(start), 3)


def test_a_second_train_goes_on_measuring_to_where_the_first_one_started(start, tmp_path):
    trainer = supervised(tmp_path, loaded(start))
    with_drift(trainer)
    train(trainer)
    end = kl_of(lines(trainer)[-1])
    with pytest.raises(RunDirectoryError, match=r"found .*drift\.jsonl of another run; choose another output_dir"):
        train(trainer)
    (tmp_path / "drift.jsonl").unlink()
    train(trainer)
    assert kl_of(lines(trainer)[0]) == end > 0


def test_a_retry_with_smaller_batches_begins_the_record_again_and_keeps_the_reference(start, tmp_path):
    class Fails(TrainerCallback):
        def on_step_end(self, args, state, control, **of_trainer):
            if args.per_device_train_batch_size and trainer._train_batch_size == 2 and state.global_step == 2:
                raise RuntimeError("CUDA out of memory.")

    trainer = supervised(tmp_path, loaded(start), auto_find_batch_size=True)
    with_drift(trainer, every=1)
    trainer.add_callback(Fails())
    train(trainer)
    assert trainer._train_batch_size == 1
    assert [line["step"] for line in lines(trainer)] == [0, 1, 2, 3]
    assert kl_of(lines(trainer)[0]) > 0.01  # two steps were taken before memory ran out


def test_what_cannot_be_measured_is_refused_in_one_sentence_before_the_first_step(start, tmp_path):
    policy = loaded(start)
    trainer = supervised(tmp_path, policy)
    with pytest.raises(ConfigError, match="Expected the trainer, found LlamaForCausalLM; write trainer"):
        DriftCallback(policy, prompts=PROMPTS, every=1)
    with pytest.raises(ConfigError, match="Expected every to be at least 1 step, found 0"):
        DriftCallback(trainer, prompts=PROMPTS, every=0)
    with pytest.raises(PromptError, match="Expected at least one prompt"):
        DriftCallback(trainer, prompts=[], every=1)
    with pytest.raises(PromptError, match="Expected prompts of at most"):
        begin(trainer, prompts=["a " * 100])
    with pytest.raises(ModelError, match="found one with the policy's own weights"):
        begin(trainer, reference=policy)
    trainer.ref_model, trainer.args.sync_ref_model = loaded(start), True
    with pytest.raises(ModelError, match="found a ref_model that sync_ref_model moves"):
        begin(trainer, reference=trainer.ref_model)
    assert trainer.state.global_step == 0
    assert not (tmp_path / "drift.jsonl").exists()


def begin(trainer: Trainer, **changes: object) -> None:
    callback = DriftCallback(trainer, **{"prompts": PROMPTS, "every": 1, **changes})
    callback.on_train_begin(trainer.args, trainer.state, trainer.control)


def test_a_sharded_model_is_refused_on_every_process(start, tmp_path):
    trainer = supervised(tmp_path, loaded(start))
    next(trainer.model.parameters()).ds_id = 0  # DeepSpeed's mark on a parameter in pieces
    trainer.state.is_world_process_zero = False
    with pytest.raises(ModelError, match=r"found a sharded one \(FSDP, ZeRO-3 or tensor parallel\); leave"):
        begin(trainer)
    trainer = supervised(tmp_path, loaded(start))
    trainer.is_fsdp_enabled = True
    with pytest.raises(ModelError, match="found a sharded one"):
        begin(trainer)


def test_a_layer_that_may_compute_with_another_layer_is_refused(start):
    policy = loaded(start)
    head = policy.lm_head
    head.forward = lambda hidden: torch.nn.functional.linear(hidden.float(), head.weight.float())
    with pytest.raises(ModelError, match="found another forward pass on lm_head, as cast_lm_head_to_fp32 makes it"):
        view_of(policy)
    with pytest.raises(ModelError, match="Expected a transformers or peft model, found a Linear"):
        view_of(head)


def test_a_processors_tokenizer_is_taken(start, tmp_path):
    trainer = supervised(tmp_path, loaded(start))
    trainer.processing_class = SimpleNamespace(tokenizer=tiny_tokenizer())
    begin(trainer, config=CONFIG)
    assert kl_of(lines(trainer)[0]) == 0


def test_the_integration_knows_transformers_and_not_trl():
    for file in Path(kleash.integrations.__file__).parent.glob("*.py"):
        assert not any(name.split(".")[0] == "trl" for name in imported(file.stem, file.read_text(), set()))
    code = "import sys, kleash.integrations.trl; sys.exit('trl' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
