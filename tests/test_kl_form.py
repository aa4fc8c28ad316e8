"""The forms of the KL: which of them a run takes, and what it says of the others."""

import json
import subprocess
import sys

import pytest
from tiny import save_tiny_world, tiny_run, write_run

from kleash.config import RunConfig
from kleash.errors import KleashWarning
from kleash.kl_form import FORMS, NO_LEASH
from kleash.parts import Given
from kleash.training import train_run


def test_the_default_is_unbiased_and_every_other_form_says_what_is_wrong_with_it():
    assert FORMS[RunConfig.model_fields["kl"].default].bias is None
    assert [name for name, form in FORMS.items() if form.bias is None] == ["exact", "k1", "blend"]
    assert not FORMS.keys() & NO_LEASH.keys()


@pytest.mark.parametrize("form", FORMS)
def test_every_form_trains_its_own_way(tmp_path, form):
    """Step 0 is the same for all; from then on each pulls in its own direction, and the KL in the loss shows."""
    world = save_tiny_world(tmp_path)
    content = tiny_run(world, tmp_path / "run", kl=form, allow_biased=True, updates=2, leash={"beta": 2.0})
    config = RunConfig.model_validate(content)
    if FORMS[form].bias:
        with pytest.warns(KleashWarning, match=f"The leash {form} is biased, since "):
            train_run(config, Given(), quiet=True)
    else:
        train_run(config, Given(), quiet=True)
    first, second = map(json.loads, (tmp_path / "run" / "records.jsonl").read_text().splitlines())
    assert first["kl_policy_ref_per_sequence"] == first["kl_policy_ref_per_sequence_k1"] == 0.0
    assert first["ratio_max_first_step"] == second["ratio_max_first_step"] == 1.0
    assert second["kl_policy_ref_per_sequence"] > 0
    assert (second["leash_loss"] > 0) == (FORMS[form].in_loss is not None)


def test_on_the_command_line_a_biased_form_is_named_in_one_line(tmp_path):
    world = save_tiny_world(tmp_path)
    path = write_run(world, tmp_path / "run", kl="k3_in_loss", allow_biased=True, updates=1)
    command = [sys.executable, "-m", "kleash.cli", "train", str(path)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    first, *_ = found.stderr.splitlines()
    assert first == "kleash: The leash k3_in_loss is biased, since its gradient is that of KL(reference || policy)."
