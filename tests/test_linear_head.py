"""Linear heads: whatever is found linear gives the model's own logits, and everything else is refused."""

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
from tiny import LIVELY, tiny_config, tiny_policy
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from kleash.fused.head import Head
from kleash.linear_head import NORMED_ROWS, ROWS, TIME, LinearHead, last_hidden_states, linear_head_of
from kleash.models import fingerprint, response_logits
from kleash.reference import frozen_copy

SIZES = {
    **dict.fromkeys(["hidden_size", "n_embd", "d_model"], 32),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "decoder_layers", "encoder_layers", "num_layers"], 2),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads"], 4),
    **dict.fromkeys(["decoder_attention_heads", "encoder_attention_heads"], 4),
    **dict.fromkeys(["intermediate_size", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_dim"], 48),
    **dict.fromkeys(["max_position_embeddings", "n_positions"], 64),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts"], 4),
    **dict.fromkeys(["bos_token_id", "eos_token_id", "n_group", "topk_group"], 1),
    **dict.fromkeys(["num_key_value_heads", "num_experts_per_tok"], 2),
    "vocab_size": 41,
    "pad_token_id": 0,
    "moe_intermediate_size": 16,
    "state_size": 8,
    "rotary_dim": 4,
    "is_decoder": True,
}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
NARROW = {"head_dim": 8}
PLAIN = LinearHead()
NEWER = ("beam",)  # than the oldest transformers that we promise to work with: since 5.21
TRANSFORMED = "outside both base model and head, which may come between them"

ARCHITECTURES: dict[str, tuple[dict[str, object], LinearHead | str]] = {
    "apertus": ({}, PLAIN),
    "arcee": ({}, PLAIN),
    "bart": ({}, PLAIN),
    "beam": (NARROW, LinearHead(softcap=30.0)),
    "bert": ({}, TRANSFORMED),
    "bert-generation": ({}, PLAIN),
    "biogpt": ({}, PLAIN),
    "bitnet": ({}, PLAIN),
    "bloom": ({}, PLAIN),
    "camembert": ({}, TRANSFORMED),
    "codegen": ({}, PLAIN),
    "cohere": ({"logit_scale": 0.37}, LinearHead(scale=0.37)),
    "cohere2": ({**NARROW, "logit_scale": 0.37}, LinearHead(scale=0.37)),
    "ctrl": ({}, PLAIN),
    "deepseek_v3": (MLA, PLAIN),
    "electra": ({}, TRANSFORMED),
    "ernie4_5": (NARROW, PLAIN),
    "exaone4": ({}, PLAIN),
    "falcon": ({}, PLAIN),
    "falcon_h1": ({**NARROW, **MAMBA, "lm_head_multiplier": 0.37}, LinearHead(scale=0.37)),
    "falcon_mamba": ({}, PLAIN),
    "gemma": (NARROW, PLAIN),
    "gemma2": (NARROW, LinearHead(softcap=30.0)),
    "gemma3_text": (NARROW, PLAIN),
    "gemma3_text with a cap": ({**NARROW, "final_logit_softcapping": 20.0}, LinearHead(softcap=20.0)),
    "glm4": (NARROW, PLAIN),
    "gpt2": ({}, PLAIN),
    "gpt_bigcode": ({}, PLAIN),
    "gpt_neo": ({"attention_types": [[["global", "local"], 1]]}, PLAIN),
    "gpt_neox": ({}, PLAIN),
    "gpt_oss": (NARROW, PLAIN),
    "gptj": ({}, PLAIN),
    "granite": ({"logits_scaling": 7.0}, LinearHead(scale=1 / 7.0)),
    "granitemoe": ({"logits_scaling": 7.0}, LinearHead(scale=1 / 7.0)),
    "helium": (NARROW, PLAIN),
    "hyperclovax": ({"logits_scaling": 7.0}, LinearHead(scale=7.0)),
    "inkling_text": ({"logits_mup_width_multiplier": 3.0}, LinearHead(scale=1 / 3.0)),
    "inkling_text that cuts": ({"unpadded_vocab_size": 40}, r"logits \[2, 8, 40\] where its head gives \[2, 8, 41\]"),
    "jamba": ({}, PLAIN),
    "lfm2": ({}, PLAIN),
    "llama": ({}, PLAIN),
    "llama4_text": (NARROW, "no base model apart from the model itself"),
    "mamba": ({}, PLAIN),
    "minicpm3": ({**MLA, "dim_model_base": 16}, LinearHead(scale=1 / 2.0)),
    "mistral": (NARROW, PLAIN),
    "mixtral": ({}, PLAIN),
    "modernbert-decoder": ({}, TRANSFORMED),
    "mpt": ({}, PLAIN),
    "nanochat": ({}, LinearHead(softcap=15.0)),
    "nemotron": ({}, PLAIN),
    "olmo": ({}, PLAIN),
    "olmo2": ({}, PLAIN),
    "olmoe": ({}, PLAIN),
    "openai-gpt": ({}, PLAIN),
    "opt": ({}, PLAIN),
    "opt with a projection": ({"word_embed_proj_dim": 16}, PLAIN),
    "persimmon": ({}, PLAIN),
    "phi": ({}, PLAIN),
    "phi3": ({}, PLAIN),
    "qwen2": ({}, PLAIN),
    "qwen2_moe": ({"shared_expert_intermediate_size": 16}, PLAIN),
    "qwen3": (NARROW, PLAIN),
    "qwen3_moe": (NARROW, PLAIN),
    "recurrent_gemma": ({}, LinearHead(softcap=30.0)),
    "rembert": ({}, TRANSFORMED),
    "roberta": ({}, TRANSFORMED),
    "rwkv": ({}, PLAIN),
    "smollm3": ({}, PLAIN),
    "stablelm": ({}, PLAIN),
    "starcoder2": ({}, PLAIN),
    "vaultgemma": (NARROW, LinearHead(softcap=30.0)),
    "xglm": ({}, PLAIN),
    "xlstm": ({"head_dim": 8}, LinearHead(softcap=30.0)),
}


def tiny_model(name: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    """The architecture in small; every weight, norm and bias is random, and the head's products reach far."""
    kind = name.split(" ")[0]
    if kind not in CONFIG_MAPPING and kind in NEWER:
        pytest.skip(f"this transformers does not know {kind}")
    config = AutoConfig.for_model(kind, **{**SIZES, **ARCHITECTURES[name][0], **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.3 * noise if parameter.ndim > 1 else parameter + 0.3 * noise)
        model.get_output_embeddings().weight.mul_(20)
    return model


def tokens_and_mask(width: int = 41) -> tuple[Tensor, Tensor]:
    """Three rows of ten tokens, of which the second begins with padding."""
    sequences = torch.randint(3, width, (3, 10), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(sequences, dtype=torch.bool)
    mask[1, :3] = False
    return sequences, mask


def both_logits(model: PreTrainedModel, linear: LinearHead, time: int = 4) -> tuple[Tensor, Tensor]:
    """The logits by hidden states and head, and those of the model itself."""
    inputs = (model, *tokens_and_mask(model.get_output_embeddings().weight.shape[0]), time)
    return linear.of(model).logits(last_hidden_states(*inputs)), response_logits(*inputs)


# --- the models of transformers ---


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_every_architecture_is_refused_or_gives_its_own_logits(name):
    expected = ARCHITECTURES[name][1]
    model = tiny_model(name)
    found = linear_head_of(model)
    if isinstance(expected, str):
        assert isinstance(found, str)
        assert re.search(expected, found), found
        return
    assert found == expected
    ours, theirs = both_logits(model, found)
    assert theirs.abs().max() > (0.6 * found.softcap if found.softcap else 10)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max()))


@pytest.mark.parametrize("name", ["gpt2", "nanochat", "phi", "granite", "minicpm3", "opt with a projection"])
def test_gradients_reach_every_parameter_as_through_the_models_own_logits(name):
    model = tiny_model(name).double()
    linear = linear_head_of(model)
    weights = torch.randn(3, 4, 41, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gradients = []
    for logits in both_logits(model, linear):
        model.zero_grad()
        (logits * weights).sum().backward()
        gradients.append({key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})
    ours, theirs = gradients
    assert ours.keys() == theirs.keys()
    assert len(ours) > 10
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-9, atol=1e-9 * float(theirs[key].abs().max()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["gpt2", "nanochat", "granite", "cohere", "minicpm3", "beam", "bert"])
@torch.no_grad()
def test_the_verdict_is_the_same_in_every_dtype(name, dtype):
    model = tiny_model(name).to(dtype)
    expected = ARCHITECTURES[name][1]
    found = linear_head_of(model)
    if isinstance(expected, str):
        assert expected in found
    else:
        assert found == expected
        ours, theirs = both_logits(model, found)
        tolerance = 4 * max(torch.finfo(dtype).eps, torch.finfo(theirs.dtype).eps)  # some cap in float32
        torch.testing.assert_close(
            ours.double(), theirs.double(), rtol=tolerance, atol=tolerance * float(theirs.abs().max())
        )


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
@torch.no_grad()
def test_a_frozen_copy_has_a_head_of_its_own_with_the_same_bits(name):
    model = tiny_model(name)
    reference = frozen_copy(model)
    linear = linear_head_of(reference)
    assert linear == linear_head_of(model) == ARCHITECTURES[name][1]
    head = linear.of(reference)
    assert head.weight is reference.get_output_embeddings().weight
    assert not head.weight.requires_grad
    assert torch.equal(both_logits(reference, linear)[0], both_logits(model, linear)[0])


def test_the_head_stands_on_the_live_parameters():
    model = tiny_model("phi")
    head = LinearHead(scale=2.0, softcap=3.0).of(model)
    assert head == Head(weight=model.lm_head.weight, bias=model.lm_head.bias, scale=2.0, softcap=3.0)
    assert head.weight is model.lm_head.weight
    assert head.bias is model.lm_head.bias
    assert LinearHead().of(tiny_model("llama")).bias is None


@pytest.mark.parametrize("time", [1, 3, 9])
def test_row_t_of_the_hidden_states_belongs_to_response_token_t(time):
    model = tiny_policy(2, **LIVELY)
    sequences, mask = tokens_and_mask(12)
    found = last_hidden_states(model, sequences, mask, time)
    alone = model.transformer(input_ids=sequences[1:2, 3:]).last_hidden_state[0]
    kept = min(time, 6)
    torch.testing.assert_close(found[1, -kept:], alone[-kept - 1 : -1], atol=1e-5, rtol=0)
    assert found.shape == (3, time, 16)


# --- models made by hand ---


def as_it_is(x: Tensor) -> Tensor:
    return x


class Between(GPT2LMHeadModel):
    """GPT-2 with something before and after its head."""

    before: Callable[[Tensor], Tensor] = staticmethod(as_it_is)
    after: Callable[[Tensor], Tensor] = staticmethod(as_it_is)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, use_cache: bool) -> object:
        hidden = self.transformer(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache
        ).last_hidden_state
        return CausalLMOutput(logits=self.after(self.head(self.before(hidden))))

    def head(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden)


def between(kind: type[Between] = Between, *, bias: bool = False, **parts: object) -> Between:
    """The tiny GPT-2 with random weights and the given `before`, `after` and entries of its config."""
    torch.manual_seed(0)
    model = kind(tiny_config(**LIVELY)).eval()
    if bias:
        model.lm_head = nn.Linear(16, 12)
    for name, part in parts.items():
        setattr(model if name in {"before", "after"} else model.config, name, part)
    return model


def capped(logits: Tensor, cap: float) -> Tensor:
    return torch.tanh(logits / cap) * cap


def with_one_forbidden(logits: Tensor) -> Tensor:
    return logits.index_fill(-1, torch.tensor([5]), torch.finfo(logits.dtype).min)


LINEAR = {
    "nothing": ({}, PLAIN),
    "bias": ({"bias": True}, PLAIN),
    "factor after": ({"logit_scale": 0.4, "after": lambda x: x * 0.4}, LinearHead(scale=0.4)),
    "divisor after": ({"logits_scaling": 3.0, "after": lambda x: x / 3.0}, LinearHead(scale=1 / 3.0)),
    "factor after, bias": ({"logit_scale": 0.4, "after": lambda x: x * 0.4, "bias": True}, LinearHead(scale=0.4)),
    "factor before": ({"output_multiplier": 0.4, "before": lambda x: x * 0.4}, LinearHead(scale=0.4)),
    "divisor before": ({"logits_scaling": 3.0, "before": lambda x: x / 3.0}, LinearHead(scale=1 / 3.0)),
    "cap": ({"final_logit_softcapping": 30, "after": lambda x: capped(x, 30)}, LinearHead(softcap=30.0)),
    "small cap": ({"final_logit_softcapping": 0.5, "after": lambda x: capped(x, 0.5)}, LinearHead(softcap=0.5)),
    "factor, then cap": (
        {"output_multiplier": 0.4, "final_logit_softcapping": 20.0, "after": lambda x: capped(0.4 * x, 20.0)},
        LinearHead(scale=0.4, softcap=20.0),
    ),
    "names without meaning": ({"logit_scale": 0.4, "final_logit_softcapping": 30.0, "logits_scaling": 0.0}, PLAIN),
    "a scale in words": ({"logit_scale": "inv_sqrt_d_model"}, PLAIN),
    "nearly 1": ({"logits_scaling": 1.001, "after": lambda x: x / 1.001}, LinearHead(scale=1 / 1.001)),
}


@pytest.mark.parametrize("name", LINEAR)
@torch.no_grad()
def test_what_the_config_names_is_found_and_right(name):
    parts, expected = LINEAR[name]
    model = between(**parts)
    found = linear_head_of(model)
    assert found == expected
    ours, theirs = both_logits(model, found)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_bias_that_forbids_a_token_is_no_obstacle():
    model = between(bias=True)
    model.lm_head.bias[5] = -torch.inf
    assert linear_head_of(model) == PLAIN
    ours, theirs = both_logits(model, PLAIN)
    assert (theirs[..., 5] == -torch.inf).all()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


BEFORE, AFTER = "something between the last hidden states and the head", "logits that are not the head's product"
REFUSED = {
    "clamp": ({"after": lambda x: x.clamp(-50, 50)}, AFTER),
    "wide clamp": ({"after": lambda x: x.clamp(max=5000)}, AFTER),
    "small ones cut": ({"after": lambda x: x.where(x.abs() > 0.05, 0)}, AFTER),
    "unnamed cap": ({"after": lambda x: capped(x, 17.3)}, AFTER),
    "wide unnamed cap": ({"after": lambda x: capped(x, 3000.0)}, AFTER),
    "cap under a clamp's name": ({"final_logit_softcapping": 30.0, "after": lambda x: x.clamp(-30, 30)}, AFTER),
    "cap, then factor": (
        {"logit_scale": 0.4, "final_logit_softcapping": 20.0, "after": lambda x: 0.4 * capped(x, 20.0)},
        AFTER,
    ),
    "another factor than named": ({"logit_scale": 0.4, "after": lambda x: x * 0.41}, AFTER),
    "unnamed factor": ({"after": lambda x: x * 1.0001}, AFTER),
    "square": ({"logit_scale": 0.4, "after": lambda x: x * 0.16}, AFTER),
    "offset": ({"after": lambda x: x + 1e-3}, AFTER),
    "log-softmax": ({"after": lambda x: x.log_softmax(-1)}, AFTER),
    "a forbidden token": ({"after": with_one_forbidden}, AFTER),
    "another order": ({"after": lambda x: x.flip(-1)}, AFTER),
    "a row's own": ({"after": lambda x: x * torch.tensor([[[1.0]], [[2.0]]])}, AFTER),
    "NaN before": ({"before": lambda x: x * float("nan")}, BEFORE),
    "NaN": ({"after": lambda x: x * float("nan")}, AFTER),
    "narrower": ({"after": lambda x: x[..., :-1]}, r"logits \[2, 8, 11\] where its head gives \[2, 8, 12\]"),
    "last position": ({"after": lambda x: x[:, -1:]}, r"logits \[2, 1, 12\] where its head gives \[2, 8, 12\]"),
    "norm upon a norm": ({"before": lambda x: functional.layer_norm(x, (16,))}, BEFORE),
    "square norm upon a norm": ({"before": lambda x: functional.rms_norm(x, (16,))}, BEFORE),
    "unnamed factor before": ({"before": lambda x: x * 1.5}, BEFORE),
    "a hair before": ({"before": lambda x: x * (1 + 2e-7)}, BEFORE),
    "another factor than named before": ({"logit_scale": 0.4, "before": lambda x: x * 0.41}, BEFORE),
    "noise before": ({"before": lambda x: x + 1e-6 * torch.randn_like(x)}, BEFORE),
    "a scale before a bias": (
        {"logit_scale": 0.4, "before": lambda x: x * 0.4, "bias": True},
        "a scale before a head with a bias",
    ),
    "the last alone": ({"before": lambda x: x[:, -1:]}, r"given \[2, 1, 16\] .* hidden states are \[2, 8, 16\]"),
    "double": ({"before": lambda x: x.double(), "after": lambda x: x}, "cannot be tried out on a few tokens"),
    "an error": ({"after": lambda x: x.view(-1, 7)}, r"cannot be tried out on a few tokens \(RuntimeError: shape"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_config_does_not_name_is_refused(name):
    parts, reason = REFUSED[name]
    found = linear_head_of(between(**parts))
    assert isinstance(found, str), found
    assert re.search(reason, found), found
    assert not found.endswith(".")
    assert "\n" not in found


class Silent(nn.Module):
    """A residual block that starts as nothing, as adapters do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(16, 16))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + hidden @ self.weight


def test_a_layer_that_does_nothing_yet_is_refused_all_the_same():
    reason = "before.weight outside both base model and head, which may come between them"
    assert linear_head_of(between(before=Silent())) == reason
    assert linear_head_of(between(before=nn.LayerNorm(16))).startswith("before.weight outside")
    assert linear_head_of(between(after=nn.Linear(12, 12))).startswith("after.weight outside")


class Twice(Between):
    def head(self, hidden: Tensor) -> Tensor:
        return (self.lm_head(hidden) + self.lm_head(hidden)) / 2


class Unseen(Between):
    def head(self, hidden: Tensor) -> Tensor:
        return functional.linear(hidden, self.lm_head.weight)


class Careless(Between):
    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, use_cache: bool) -> object:
        return super().forward(input_ids, torch.ones_like(attention_mask), position_ids, use_cache)


class Headless(Between):
    def get_output_embeddings(self) -> None:
        return None


class Baseless(Between):
    base_model_prefix = ""

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


class OwnTensor(Tensor):
    """As quantised and sharded weights are: a tensor of another type inside a plain module."""


def with_own_tensor(model: Between) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone().as_subclass(OwnTensor))


def with_zeros(model: Between) -> None:
    nn.init.zeros_(model.lm_head.weight)


def with_nan(model: Between) -> None:
    nn.init.constant_(model.transformer.ln_f.bias, float("nan"))


def with_replaced_forward(model: Between) -> None:
    model.lm_head.forward = lambda hidden: functional.linear(hidden, model.lm_head.weight)


def with_head(head: Callable[[], nn.Module]) -> Callable[[Between], None]:
    return lambda model: setattr(model, "lm_head", head())


def nothing(model: Between) -> None:
    pass


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        (Twice, nothing, "a head that is called 2 times in one forward pass"),
        (Unseen, nothing, "a head that is called 0 times in one forward pass"),
        (Careless, nothing, BEFORE),
        (Between, with_nan, "last hidden states that are not finite"),
        (Headless, nothing, "a head of type NoneType, not a plain torch.nn.Linear"),
        (Baseless, nothing, "no base model apart from the model itself"),
        (Between, with_zeros, "a head of zeros, whose logits show nothing"),
        (Between, with_own_tensor, "a head with a weight of type OwnTensor in torch.float32, not a plain tensor"),
        (Between, with_replaced_forward, "a head with hooks or another forward, which may change what goes in or"),
        (Between, with_head(lambda: nn.Sequential(nn.Linear(16, 12))), "a head of type Sequential, not a plain"),
        (
            Between,
            with_head(lambda: torch.nn.utils.parametrizations.weight_norm(nn.Linear(16, 12))),
            "a head of type ParametrizedLinear, not a plain",
        ),
    ],
)
def test_a_head_of_another_kind_is_refused(kind, change, reason):
    model = between(kind)
    change(model)
    assert linear_head_of(model).startswith(reason)


@pytest.mark.parametrize(
    "register",
    ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"],
)
def test_a_head_with_hooks_is_refused_and_keeps_them(register):
    model = between()
    calls = []
    handle = getattr(model.lm_head, register)(lambda *_: calls.append(1))
    assert linear_head_of(model).startswith("a head with hooks")
    assert calls == []
    handle.remove()
    assert linear_head_of(model) == PLAIN


def test_a_hook_on_the_model_that_changes_its_logits_is_seen():
    model = tiny_model("llama")

    def clamp(_: nn.Module, __: object, output: CausalLMOutput) -> None:
        output.logits = output.logits.clamp(-50, 50)

    with model.register_forward_hook(clamp):
        assert linear_head_of(model).startswith(AFTER)
    assert linear_head_of(model) == PLAIN


# --- adapters ---


@torch.no_grad()
def test_an_adapter_inside_the_base_model_is_no_obstacle():
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    before = both_logits(model, PLAIN)[1]
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    found = linear_head_of(model.eval())
    assert found == PLAIN
    ours, theirs = both_logits(model, found)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    assert not torch.allclose(theirs, before, atol=1.0)


def test_an_adapter_on_the_head_is_refused():
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    assert linear_head_of(model.eval()) == "a head of type Linear, not a plain torch.nn.Linear"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_head_saved_beside_an_adapter_and_the_wrapper_of_peft_are_refused():
    peft = pytest.importorskip("peft")
    options = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    wrapped = peft.get_peft_model(tiny_model("llama"), options)
    assert linear_head_of(wrapped.get_base_model()).startswith("a head of type ModulesToSaveWrapper, not a plain")
    options = peft.LoraConfig(r=2, target_modules=["q_proj"])
    wrapped = peft.get_peft_model(tiny_model("llama"), options)
    assert isinstance(linear_head_of(wrapped), str)
    assert linear_head_of(wrapped.get_base_model()) == PLAIN


# --- no trace ---


def hooks(model: nn.Module) -> Iterator[object]:
    for module in model.modules():
        yield [*module._forward_hooks, *module._forward_pre_hooks, *module._backward_hooks]


@pytest.mark.parametrize("name", ["nothing", "clamp", "an error", "noise before"])
def test_the_probe_leaves_no_trace(name):
    model = between(**{**LINEAR, **REFUSED}[name][0])
    model.transformer.h[0].train()
    model.lm_head.train()
    model.transformer.wpe.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    wants = [p.requires_grad for p in model.parameters()]
    bits, held = fingerprint(model), list(hooks(model))
    torch.manual_seed(7)
    state = torch.get_rng_state()
    found = linear_head_of(model)
    assert isinstance(found, str) == (name != "nothing")
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == wants
    assert all(p.grad is None for p in model.parameters())
    assert fingerprint(model) == bits
    assert list(hooks(model)) == held
    assert not any(map(bool, held))
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("guard", [nullcontext, torch.no_grad, torch.inference_mode])
def test_the_probe_works_with_and_without_gradients_and_leaves_the_model_trainable(guard):
    model = tiny_model("llama")
    with guard():
        assert linear_head_of(model) == PLAIN
    both_logits(model, PLAIN)[0].sum().backward()
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0


def test_what_a_model_remembers_of_the_probe_serves_in_training():
    table: list[Tensor] = []

    def remembering(logits: Tensor) -> Tensor:
        if not table:
            table.append(torch.ones(12))
        return logits * table[0]

    model = between(after=remembering)
    assert linear_head_of(model) == PLAIN
    assert len(table) == 1
    response_logits(model, *tokens_and_mask(12), 4).sum().backward()
    assert model.lm_head.weight.grad.abs().sum() > 0


def test_a_model_in_training_is_looked_at_without_its_dropout():
    model = tiny_policy(2, dropout=0.5, **LIVELY).train()
    assert linear_head_of(model) == PLAIN
    assert all(module.training for module in model.modules())


def test_a_verdict_holds_while_the_model_learns():
    model = tiny_model("gemma2")
    found = linear_head_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    ours, _ = both_logits(model, found)
    before = copy.deepcopy(ours.detach())
    ours.square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        ours, theirs = both_logits(model, found)
    assert not torch.allclose(ours, before, atol=1e-3)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


class Largest(TorchDispatchMode):
    """The largest new tensor that is made within, in numbers; views of the model's own are none."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.numbers = 0

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.numbers = max(self.numbers, tensor.numel())
        return made


def test_trying_a_model_out_copies_no_part_of_its_head_that_grows_with_the_vocabulary():
    """Beside the logits of a few positions, which are ROWS * TIME a token."""
    vocab, width = 40 * NORMED_ROWS, 4 * ROWS * TIME
    model = GPT2LMHeadModel(GPT2Config(vocab_size=vocab, n_embd=width, n_layer=1, n_head=2, n_positions=64)).eval()
    with Largest(model) as largest:
        assert isinstance(linear_head_of(model), LinearHead)
    assert largest.numbers == ROWS * TIME * vocab == model.lm_head.weight.numel() / 4
