"""A model whose weights did not all come from its checkpoint, or are no numbers, is refused by name."""

import logging
import math
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_policy, tiny_reward_model

from kleash.errors import ModelError, RewardError
from kleash.models import load_causal_model
from kleash.scorers import load_reward_model
from kleash.weights import require_finite, unloaded_weight

LOADERS = {
    "policy": (lambda place: load_causal_model(place, "policy"), tiny_policy, ModelError),
    "reward": (load_reward_model, tiny_reward_model, RewardError),
}
ATTENTION = {"gpt2": "transformer.h.1.attn.c_attn.weight", "llama": "model.layers.1.self_attn.q_proj.weight"}


def refused(kind: str, place: Path) -> str:
    load, _, error = LOADERS[kind]
    with pytest.raises(error) as caught:
        load(str(place))
    assert "\n" not in str(caught.value)
    assert str(place) in str(caught.value)
    return str(caught.value)


def saved(kind: str, place: Path, name: str, change: object, **config: object) -> Path:
    """A model on disk of which one weight is changed, or taken out by a change that gives None."""
    LOADERS[kind][1](**config).save_pretrained(place)
    file = place / "model.safetensors"
    tensors = load_file(file)
    changed = change(tensors.pop(name))
    save_file(tensors if changed is None else {**tensors, name: changed}, file, metadata={"format": "pt"})
    return place


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("architecture", ATTENTION)
def test_a_model_with_a_missing_weight_is_refused_by_its_name(tmp_path, kind, architecture):
    name, logged = ATTENTION[architecture], list[str]()
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())
    logging.getLogger("transformers.modeling_utils").addHandler(handler)
    place = saved(kind, tmp_path, name, lambda _: None, architecture=architecture)
    assert f"found a checkpoint without {name}; give one that was" in refused(kind, place)
    logging.getLogger("transformers.modeling_utils").removeHandler(handler)
    assert not any("LOAD REPORT" in line for line in logged)  # a sentence, without transformers' table before it


@pytest.mark.parametrize("kind", LOADERS)
def test_a_weight_of_another_shape_is_refused_by_its_name(tmp_path, kind):
    name = ATTENTION["llama"]
    place = saved(kind, tmp_path, name, lambda weight: weight[:3].contiguous(), architecture="llama")
    assert f"found {name} of shape [3, 16] where the model's config says [16, 16]; " in refused(kind, place)


def test_an_untied_head_that_is_missing_is_refused_and_a_tied_one_is_there(tmp_path):
    for tied in (True, False):
        policy = tiny_policy(architecture="llama", tie_word_embeddings=tied)
        policy.model.save_pretrained(tmp_path / str(tied))  # the trunk alone
        policy.config.save_pretrained(tmp_path / str(tied))
    assert "found a checkpoint without lm_head.weight" in refused("policy", tmp_path / "False")
    load_causal_model(tmp_path / "True", "policy")


def test_a_name_of_a_loaded_tensor_and_a_buffer_are_not_missing():
    """Whatever a version of transformers says of them."""
    model = tiny_policy(tie_word_embeddings=True)
    model.register_buffer("table", torch.zeros(2))
    assert unloaded_weight(model, {"lm_head.weight", "table"}, []) is None
    assert unloaded_weight(model, {"lm_head.weight", "transformer.wte.weight"}, []) is not None


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_no_number_is_refused_by_role_and_name(tmp_path, kind, value):
    def spoilt(weight: torch.Tensor) -> torch.Tensor:
        weight[-1, -1] = value
        return weight

    name = ATTENTION["gpt2"]
    said = refused(kind, saved(kind, tmp_path, name, spoilt))
    role = "policy" if kind == "policy" else "reward model"
    assert said.startswith(f"Expected finite weights in the {role} {tmp_path}, found NaN or infinity in {name}; ")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_largest_numbers_and_empty_or_whole_ones_are_finite(dtype):
    model = torch.nn.ParameterDict({"large": torch.full((99,), torch.finfo(dtype).max, dtype=dtype)})
    model["none"] = torch.zeros(0, 3, dtype=dtype)
    model["whole"] = torch.nn.Parameter(torch.zeros(3, dtype=torch.int32), requires_grad=False)
    require_finite(model, "model")
    model["large"].data[7] = float("nan")
    with pytest.raises(ModelError, match=r"in the model, found NaN or infinity in large; "):
        require_finite(model, "model")


@pytest.mark.parametrize(("value", "refused"), [(-math.inf, False), (math.inf, True), (math.nan, True)])
def test_a_head_may_forbid_tokens_by_its_bias(value, refused):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(3, 5)

        def get_output_embeddings(self):
            return self.head

    model = Model()
    model.head.bias.data[2] = value
    with pytest.raises(ModelError, match=r"NaN or infinity in head.bias") if refused else nullcontext():
        require_finite(model, "model")
    model.head.weight.data[2] = value
    with pytest.raises(ModelError, match=r"NaN or infinity in head"):
        require_finite(model, "model")


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("kept", [0, 5, 3000])
def test_a_file_that_was_cut_short_is_named(tmp_path, kind, kept):
    LOADERS[kind][1]().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    assert refused(kind, tmp_path).endswith(f"found {file} damaged or cut short; copy or save it again.")


def test_a_config_that_its_model_refuses_is_one_sentence(tmp_path):
    tiny_policy(architecture="llama").save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"hidden_size": 16', '"hidden_size": "x"'))
    assert "found none that loads" in refused("policy", tmp_path)
