"""The same loop on a GPU in bfloat16: it runs, starts at KL 0 and ratio 1, and stays finite."""

import json
from pathlib import Path

import pytest
import torch
from tiny import save_tiny_world, tiny_run

from kleash.config import config_from
from kleash.parts import Given
from kleash.training import train_run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_loop_runs_in_bfloat16(tmp_path: Path, architecture: str) -> None:
    world = save_tiny_world(tmp_path, architecture=architecture)
    train_run(config_from(tiny_run(world, tmp_path / "run", mixed_precision="bf16"), "test"), Given(), quiet=True)
    records = [json.loads(line) for line in (tmp_path / "run" / "records.jsonl").read_text().splitlines()]
    assert len(records) == 4
    assert records[0]["kl_policy_ref_per_sequence"] == 0
    assert records[0]["ratio_max_first_step"] == 1
    assert all(value is not None for name, value in records[-1].items() if not name.startswith("eval_"))
    assert records[-1]["kl_rollout_policy_per_token_k3"] < 1e-2
