"""Checkpoints: what goes in comes out bit for bit, and a damaged one is refused before anything is read from it."""

import ast
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_policy, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import kleash
from kleash.checkpoint import (
    FORMAT,
    CheckpointState,
    Learners,
    checkpoints_in,
    load_learners,
    read_checkpoint_state,
    require_same_run,
    save_checkpoint,
)
from kleash.errors import CheckpointError
from kleash.leash import ZieglerLeash
from kleash.models import fingerprint, trainable_parameters, value_model_from_policy
from kleash.reference import move_towards

BETA = 0.1 + 0.2  # 0.30000000000000004: a number whose last bit a careless text would lose

STATE = CheckpointState(
    update=10,
    seed=3,
    leash={"beta": BETA},
    scheduler={"last_epoch": 10, "_last_lr": [1 / 3]},
    reference_fingerprint="a" * 64,
    prompts_fingerprint="b" * 64,
)


def learners_after(steps: int, *, seed: int = 0) -> Learners:
    """Policy, value model and AdamW after some steps on a loss that touches every parameter."""
    policy = tiny_policy(seed)
    value = value_model_from_policy(policy)
    optimizer = torch.optim.AdamW(trainable_parameters(policy, value), lr=1e-2, betas=(0.8, 0.99), fused=True)
    for _ in range(steps):
        optimizer.zero_grad()
        sum((parameter**3).sum() for parameter in trainable_parameters(policy, value)).backward()
        optimizer.step()
    return Learners(policy=policy, value=value, optimizer=optimizer)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("run"), learners_after(2), tiny_tokenizer(), STATE, keep=2)


def moments(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    state = optimizer.state_dict()["state"]
    return [state[number][key] for number in sorted(state) for key in sorted(state[number])]


def test_policy_value_model_and_optimizer_come_back_bit_for_bit(saved: Path) -> None:
    original, other = learners_after(2), learners_after(0, seed=5)
    assert fingerprint(other.policy) != fingerprint(original.policy)
    load_learners(saved, other)
    assert fingerprint(other.policy) == fingerprint(original.policy)
    assert fingerprint(other.value) == fingerprint(original.value)
    assert len(moments(original.optimizer)) == len(moments(other.optimizer)) > 0
    pairs = zip(moments(original.optimizer), moments(other.optimizer), strict=True)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)


def test_the_next_step_is_the_one_that_would_have_been_taken(saved: Path) -> None:
    restored = learners_after(0, seed=5)
    load_learners(saved, restored)
    step_of(restored)
    straight = learners_after(3)
    assert fingerprint(restored.policy) == fingerprint(straight.policy)
    assert fingerprint(restored.value) == fingerprint(straight.value)


def step_of(learners: Learners) -> None:
    learners.optimizer.zero_grad()
    sum((parameter**3).sum() for parameter in trainable_parameters(learners.policy, learners.value)).backward()
    learners.optimizer.step()


def test_a_reference_that_moved_comes_back_bit_for_bit_and_one_that_stays_is_not_written(
    saved: Path, tmp_path: Path
) -> None:
    assert "reference.safetensors" not in files_of(saved)
    moving = [replace(learners, moving_reference=tiny_policy(7)) for learners in (learners_after(1), learners_after(0))]
    move_towards(moving[0].moving_reference, moving[0].policy, 0.3)
    assert fingerprint(moving[0].moving_reference) != fingerprint(moving[1].moving_reference)
    checkpoint = save_checkpoint(tmp_path / "moving", moving[0], tiny_tokenizer(), STATE, keep=2)
    assert sorted(set(files_of(checkpoint)) - set(files_of(saved))) == ["reference.safetensors"]
    read_checkpoint_state(checkpoint)
    load_learners(checkpoint, moving[1])
    assert fingerprint(moving[0].moving_reference) == fingerprint(moving[1].moving_reference)


def test_a_value_model_of_another_shape_is_refused(saved: Path) -> None:
    learners = learners_after(0)
    learners.value.head = torch.nn.Linear(16, 2, bias=False)
    with pytest.raises(CheckpointError, match=r"found head\.weight \[1, 16\] only there; resume with the models that"):
        load_learners(saved, learners)


def test_the_small_state_comes_back_with_every_bit_of_its_numbers(saved: Path) -> None:
    state = read_checkpoint_state(saved)
    assert state == STATE
    leash = ZieglerLeash(beta=0.5, target_kl_per_sequence=6).restored(state.leash)
    assert leash.beta.hex() == BETA.hex()
    assert leash.state == STATE.leash


def test_the_policy_loads_like_any_other_model(saved: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved / "policy")
    assert fingerprint(model) == fingerprint(learners_after(2).policy)
    tokenizer = AutoTokenizer.from_pretrained(saved / "policy")
    assert tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<pad>", "<eos>")


def test_the_same_state_makes_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    again = save_checkpoint(tmp_path / "checkpoints", learners_after(2), tiny_tokenizer(), STATE, keep=2)
    assert (again / "manifest.json").read_bytes() == (saved / "manifest.json").read_bytes()


def files_of(checkpoint: Path) -> list[str]:
    return sorted(str(file.relative_to(checkpoint)) for file in checkpoint.rglob("*") if file.is_file())


def test_the_manifest_knows_every_file(saved: Path) -> None:
    known = json.loads((saved / "manifest.json").read_text())
    assert sorted([*known, "manifest.json"]) == files_of(saved)
    assert {"policy/model.safetensors", "value.safetensors", "optimizer.safetensors", "state.json"} <= set(known)


def test_every_file_cut_short_or_changed_or_gone_is_found(saved: Path, tmp_path: Path) -> None:
    for name in files_of(saved):
        for harm, said in ((cut_short, "cut short|no manifest"), (gone, "cut short|no manifest"), (changed, "changed")):
            if harm is changed and name == "manifest.json":
                continue
            copy = tmp_path / "copy"
            shutil.copytree(saved, copy)
            harm(copy / name)
            with pytest.raises(CheckpointError, match=said) as caught:
                read_checkpoint_state(copy)
            assert f"remove {copy} to resume from the one before it" in str(caught.value)
            shutil.rmtree(copy)


def cut_short(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def gone(file: Path) -> None:
    file.unlink()


def changed(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path) -> None:
    other = save_checkpoint(tmp_path, learners_after(0), tiny_tokenizer(), replace(STATE, format=FORMAT + 1), keep=2)
    with pytest.raises(CheckpointError, match=f"Expected a checkpoint of format {FORMAT}, found {FORMAT + 1}"):
        read_checkpoint_state(other)


def test_the_newest_are_kept_by_number_and_a_half_written_one_is_no_checkpoint(tmp_path: Path) -> None:
    learners = learners_after(0)
    (tmp_path / ".000003.partial" / "policy").mkdir(parents=True)
    for update in (2, 999_999, 1_000_000):
        save_checkpoint(tmp_path, learners, tiny_tokenizer(), replace(STATE, update=update), keep=2)
    assert [path.name for path in checkpoints_in(tmp_path)] == ["999999", "1000000"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1000000", "999999"]


def test_a_checkpoint_that_fails_half_way_never_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_space(*arguments: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("kleash.checkpoint.save_file", out_of_space)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(tmp_path, learners_after(0), tiny_tokenizer(), STATE, keep=2)
    assert checkpoints_in(tmp_path) == []


def test_no_directory_holds_no_checkpoints(tmp_path: Path) -> None:
    assert checkpoints_in(tmp_path / "nowhere") == []


def test_another_reference_and_other_prompts_are_refused_with_both_fingerprints() -> None:
    require_same_run(STATE, reference_fingerprint="a" * 64, prompts_fingerprint="b" * 64)
    with pytest.raises(CheckpointError, match=f"the reference .*{'a' * 64}.*{'c' * 64}"):
        require_same_run(STATE, reference_fingerprint="c" * 64, prompts_fingerprint="b" * 64)
    with pytest.raises(CheckpointError, match=f"the prompts .*{'b' * 64}.*{'c' * 64}"):
        require_same_run(STATE, reference_fingerprint="a" * 64, prompts_fingerprint="c" * 64)


SOURCES = sorted(Path(kleash.__file__).parent.rglob("*.py"))
RUNS_WHAT_IT_READS = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "eval", "exec"}


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_no_source_loads_what_could_run_code(source: Path) -> None:
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = {alias.name.split(".")[0] for alias in node.names} | {
                str(getattr(node, "module", "")).split(".")[0]
            }
            assert not modules & RUNS_WHAT_IT_READS
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in RUNS_WHAT_IT_READS
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            assert node.attr not in ("load", "save")
        if isinstance(node, ast.keyword):
            assert node.arg not in ("trust_remote_code", "allow_pickle", "weights_only")
