"""The configuration: YAML in, flags over it, the resolved one out; what is wrong with it in one sentence."""

from pathlib import Path

import pytest
import yaml

from kleash.config import (
    LeashConfig,
    ReferenceConfig,
    RunConfig,
    WeightedSource,
    config_as_yaml,
    config_from,
    read_config,
)
from kleash.errors import ConfigError
from kleash.kl_form import FORMS
from kleash.leash import BudgetLeash, FixedLeash, ScheduledLeash, ZieglerLeash
from kleash.ppo import PPOConfig
from kleash.rollout import RolloutConfig

LEAST = {"policy": "some/policy", "reward": "some/reward", "prompts": "prompts.jsonl", "out": "runs/first"}

AS_DESIGNED = """
policy: path-or-name               # any from_pretrained causal model
reference: null                    # null = a frozen copy of the policy's start
reward: path-or-name               # or module:function, or a list of {source, weight}
eval_reward: null                  # same forms; never trains, only judges
prompts: file-or-dataset           # column `prompt`
out: runs/first
kl: exact
leash: {beta: 0.05}
rollout: {prompts_per_update: 64, max_new_tokens: 64, temperature: 1.0}
ppo: {epochs: 4, minibatches: 4, clip_range: 0.2, learning_rate: 1.0e-5, gamma: 1.0, gae_lambda: 0.95}
updates: 100
seed: 0
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(LEAST))
    return path


def sentence_of(content: dict[str, object]) -> str:
    with pytest.raises(ConfigError) as caught:
        config_from({**LEAST, **content}, "run.yaml")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_keys_of_the_design_are_accepted_and_their_values_are_the_defaults() -> None:
    designed = config_from(yaml.safe_load(AS_DESIGNED), "run.yaml")
    least = config_from(
        {"policy": "path-or-name", "reward": "path-or-name", "prompts": "file-or-dataset", "out": "runs/first"}, ""
    )
    assert designed == least
    assert designed.leash == LeashConfig(kind="fixed", beta=0.05)
    assert (designed.updates, designed.seed, designed.kl, designed.reference) == (100, 0, "exact", ReferenceConfig())


def test_the_resolved_configuration_comes_back_from_its_yaml() -> None:
    config = RunConfig(
        policy="p",
        reward=(WeightedSource(source="a", weight=0.5), WeightedSource(source="module:function", weight=-2.0)),
        prompts="größe.jsonl",
        out="runs/2024",
        reference="r",
        eval_reward="judge:score",
        pad_token="<pad>",
        leash=LeashConfig(kind="ziegler", beta=0.1, target_kl_per_sequence=6.0, horizon=500.0),
        rollout=RolloutConfig(prompts_per_update=12, max_new_tokens=7, temperature=0.7, batch=3),
        ppo=PPOConfig(minibatches=3, micro_batch=2, learning_rate=1e-5, adam_betas=(0.8, 0.99)),
        updates=3,
        seed=5,
        mixed_precision="no",
        trackers=("tensorboard",),
    )
    assert config_from(yaml.safe_load(config_as_yaml(config)), "config.yaml") == config
    assert "größe" in config_as_yaml(config)


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--leash.beta", "0.2"], "leash.beta", 0.2),
        (["--leash.beta=0.2"], "leash.beta", 0.2),
        (["--leash.beta", "1e-3"], "leash.beta", 1e-3),
        (["--leash.beta", "0.1", "--leash.beta", "0.3"], "leash.beta", 0.3),
        (["--rollout.max-new-tokens", "9"], "rollout.max_new_tokens", 9),
        (["--rollout.max_new_tokens", "9"], "rollout.max_new_tokens", 9),
        (["--ppo.micro-batch", "2"], "ppo.micro_batch", 2),
        (["--ppo.micro-batch", "None"], "ppo.micro_batch", None),
        (["--ppo.adam-betas", "0.8", "0.9"], "ppo.adam_betas", (0.8, 0.9)),
        (["--ppo.adam-betas", "[0.8, 0.9]"], "ppo.adam_betas", (0.8, 0.9)),
        (["--ppo.whiten-advantages", "False"], "ppo.whiten_advantages", False),
        (["--ppo.whiten-advantages=true"], "ppo.whiten_advantages", True),
        (["--trackers", "tensorboard", "wandb"], "trackers", ("tensorboard", "wandb")),
        (["--trackers", "tensorboard"], "trackers", ("tensorboard",)),
        (["--trackers", "[]"], "trackers", ()),
        (["--reference", "None"], "reference", ReferenceConfig()),
        (["--reference", "null"], "reference.kind", "copy"),
        (["--reference", "a/b"], "reference", ReferenceConfig(kind="path", path="a/b")),
        (["--out", "2024"], "out", "2024"),
        (["--out=a=b"], "out", "a=b"),
        (["--pad-token", "[PAD]"], "pad_token", "[PAD]"),
        (["--mixed-precision", "no"], "mixed_precision", "no"),
        (["--reward", "[{source: a, weight: 2}]"], "reward", (WeightedSource(source="a", weight=2.0),)),
        (["--reward", "module:function"], "reward", "module:function"),
    ],
)
def test_a_flag_overrides_its_key(file: Path, words: list[str], key: str, value: object) -> None:
    config: object = read_config(file, words)
    for part in key.split("."):
        config = getattr(config, part)
    assert config == value


def test_a_flag_leaves_its_neighbours_as_the_file_says(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**LEAST, "ppo": {"epochs": 2, "minibatches": 2}}))
    config = read_config(path, ["--ppo.epochs", "3", "--leash.beta", "1"])
    assert (config.ppo.epochs, config.ppo.minibatches, config.leash.beta) == (3, 2, 1.0)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--updates"], "found '--updates' alone"),
        (["--updates", "--seed", "1"], "found '--updates' alone"),
        (["updates", "3"], "found 'updates' alone"),
        (["--policy.x", "1"], "Expected a group of keys at policy, found 'some/policy'"),
        (
            ["--leash.bta", "1"],
            "found leash.bta; the keys there are beta, beta_end, beta_max, beta_min, decay_updates,",
        ),
        (["--leash.beta", ".nan"], "Expected for leash.beta"),
        (["--leash.beta", "nan"], "a finite number, found 'nan'"),
        (["--leash.beta", "-0.1"], "greater than or equal to 0, found -0.1"),
        (["--updates", "many"], "Expected for updates"),
    ],
)
def test_a_flag_that_cannot_be_used_is_named(file: Path, words: list[str], found: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_config(file, words)
    assert found in str(caught.value)


@pytest.mark.parametrize("form", [name for name, form in FORMS.items() if form.bias])
def test_a_biased_form_is_taken_by_whoever_says_so(form: str) -> None:
    least = {"policy": "a", "reward": "b", "prompts": "c", "out": "d"}
    assert config_from({**least, "kl": form, "allow_biased": True}, "run.yaml").kl == form


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (
            {"polcy": "x"},
            "Expected a known key in run.yaml, found polcy; the keys there are alarms, allow_biased, checkpoint,",
        ),
        ({"ppo": {"bogus": 1}}, "found ppo.bogus; the keys there are adam_betas"),
        ({"checkpoint": {"evry": 1}}, "found checkpoint.evry; the keys there are every, keep."),
        ({"reward": [{"source": "a", "wight": 2}]}, "found reward.0.wight; the keys there are source, weight."),
        ({"reward": [{"weight": 2}]}, "Expected the key reward.0.source in run.yaml, found none; add it."),
        ({"reward": [{"source": "a", "weight": float("nan")}]}, "Expected for reward.0.weight in run.yaml: a finite"),
        ({"reward": []}, "Expected for reward in run.yaml"),
        ({"reward": 5}, "Expected for reward in run.yaml: a valid string, found 5; change it."),
        ({"out": ""}, "Expected for out in run.yaml"),
        ({"kl": "full"}, "Expected for kl in run.yaml: 'exact', 'k1', 'blend', 'exact_in_loss', 'k2_in_loss', "),
        ({"kl": "k3_in_loss"}, "kl k3_in_loss is biased, since its gradient is that of KL(reference || policy)"),
        ({"kl": "k3_in_reward"}, "kl k3_in_reward is biased, since its gradient is that of KL(policy"),
        ({"kl": "exact_in_loss"}, "kl exact_in_loss is biased, since a token does not answer for the drift after it"),
        ({"kl": "k2_in_loss"}, ", and allow_biased is false; change one of them."),
        ({"kl": "exact_in_reward", "allow_biased": True}, "kl exact_in_reward is no leash, since the exact KL of a"),
        ({"kl": "k1_in_loss", "allow_biased": True}, "kl k1_in_loss is no leash, since the expected gradient of"),
        ({"leash": {"beta": -1}}, "leash.beta in run.yaml: greater than or equal to 0, found -1"),
        ({"leash": {"beta": float("nan")}}, "leash.beta in run.yaml: a finite number, found nan"),
        ({"leash": {"beta": float("inf")}}, "leash.beta in run.yaml: a finite number, found inf"),
        ({"leash": {"kind": "ziegler"}}, "found that kind ziegler needs target_kl_per_sequence"),
        ({"leash": {"horizon": 5}}, "found that horizon belongs to kind ziegler, and kind is fixed"),
        ({"leash": {"kind": "ziegler", "target_kl_per_sequence": 0}}, "greater than 0, found 0"),
        ({"ppo": {"learning_rate": float("nan")}}, "ppo.learning_rate in run.yaml"),
        ({"ppo": {"learning_rate": float("inf")}}, "ppo.learning_rate in run.yaml: a finite number, found inf"),
        ({"ppo": {"learning_rate": 0}}, "greater than 0, found 0"),
        ({"ppo": {"gamma": 1.5}}, "less than or equal to 1, found 1.5"),
        ({"ppo": {"gae_lambda": -0.1}}, "greater than or equal to 0, found -0.1"),
        ({"ppo": {"clip_range": 0}}, "greater than 0, found 0"),
        ({"ppo": {"adam_betas": [0.9, 1.0]}}, "ppo.adam_betas.1 in run.yaml: less than 1, found 1.0"),
        ({"ppo": {"epochs": 0}}, "greater than or equal to 1, found 0"),
        ({"rollout": {"temperature": 0}}, "rollout.temperature in run.yaml: greater than or equal to 0.001, found 0"),
        ({"rollout": {"max_new_tokens": 0}}, "greater than or equal to 1, found 0"),
        ({"rollout": {"prompts_per_update": 6}}, "prompts_per_update 6 must be a multiple of ppo.minibatches 4"),
        ({"updates": 0}, "greater than or equal to 1, found 0"),
        ({"updates": 2.5}, "Expected for updates in run.yaml: a valid integer"),
        ({"seed": -1}, "greater than or equal to 0, found -1"),
        ({"checkpoint": {"every": 0}}, "greater than or equal to 1, found 0"),
        ({"mixed_precision": "fp16"}, "'auto', 'no' or 'bf16', found 'fp16'"),
    ],
)
def test_a_value_that_cannot_be_used_is_named_with_what_was_expected(content: dict[str, object], found: str) -> None:
    assert found in sentence_of(content)


def test_a_key_that_must_be_there_is_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"Expected the key policy in run\.yaml, found none; add it\."):
        config_from({key: value for key, value in LEAST.items() if key != "policy"}, "run.yaml")


def test_numbers_that_yaml_reads_as_text_are_numbers_still(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(LEAST) + "ppo: {learning_rate: 1e-5}\nmixed_precision: no\n")
    config = read_config(path)
    assert (config.ppo.learning_rate, config.mixed_precision) == (1e-5, "no")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("", "Expected `key: value` lines in {path}, found NoneType"),
        ("- a\n- b\n", "found list"),
        ("policy: x\nout: [1\nkl: k1\n", "found a mistake at line"),
        (b"\xff\xfe\x00", "found none that can be read"),
    ],
)
def test_a_file_that_is_no_configuration_is_said_to_be_none(tmp_path: Path, content: str | bytes, found: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as caught:
        read_config(path)
    assert found.format(path=path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Expected a YAML file at .*nowhere\.yaml, found none"):
        read_config(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("content", "meant"),
    [
        (None, ReferenceConfig(kind="copy")),
        ({}, ReferenceConfig(kind="copy")),
        ("a/b", ReferenceConfig(kind="path", path="a/b")),
        ({"path": "a/b"}, ReferenceConfig(kind="path", path="a/b")),
        ({"kind": "moving_average"}, ReferenceConfig(kind="moving_average", decay=None)),
    ],
)
def test_a_path_alone_is_a_reference_and_nothing_is_a_copy_of_the_start(
    content: object, meant: ReferenceConfig
) -> None:
    config = config_from({**LEAST, "reference": content}, "run.yaml")
    assert config.reference == meant
    assert config_from(yaml.safe_load(config_as_yaml(config)), "config.yaml").reference == meant


def test_a_flag_of_the_reference_fills_in_what_the_file_leaves_out(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**LEAST, "reference": None}))
    config = read_config(path, ["--reference.kind", "periodic", "--reference.every", "5", "--reference.path", "2024"])
    assert config.reference == ReferenceConfig(kind="periodic", every=5, path="2024")
    path.write_text(yaml.safe_dump({**LEAST, "reference": "a/b"}))
    with pytest.raises(ConfigError, match="Expected a group of keys at reference, found 'a/b'; set reference as a"):
        read_config(path, ["--reference.kind", "copy"])


def test_a_reference_goes_towards_the_policy_as_its_kind_says() -> None:
    def shares(**reference: object) -> list[float]:
        return [ReferenceConfig(**reference).share_after(update) for update in range(1, 7)]

    assert shares() == shares(kind="path", path="p") == shares(kind="adapter_off") == [0.0] * 6
    assert shares(kind="moving_average", decay=0.75) == [0.25] * 6
    assert shares(kind="moving_average") == pytest.approx([0.01] * 6)
    assert shares(kind="periodic", every=3) == [0.0, 0.0, 1.0, 0.0, 0.0, 1.0]
    moving = {kind for kind in ("copy", "adapter_off", "moving_average") if ReferenceConfig(kind=kind).moves}
    assert moving == {"moving_average"}


@pytest.mark.parametrize(
    ("reference", "found"),
    [
        ({"kind": "path"}, "found that kind path needs reference.path; change"),
        ({"kind": "periodic"}, "found that kind periodic needs reference.every; change"),
        (
            {"kind": "copy", "path": "a"},
            "reference.path belongs to kind path or moving_average or periodic, and kind is copy",
        ),
        ({"kind": "adapter_off", "path": "a"}, "path belongs to kind path or moving_average or periodic, and kind is"),
        ({"decay": 0.5}, "found that reference.decay belongs to kind moving_average, and kind is copy"),
        (
            {"kind": "moving_average", "every": 2},
            "found that reference.every belongs to kind periodic, and kind is moving_average",
        ),
        ({"kind": "moving_average", "decay": 1}, "Expected for reference.decay in run.yaml: less than 1, found 1"),
        ({"kind": "moving_average", "decay": 0}, "reference.decay in run.yaml: greater than 0, found 0"),
        ({"kind": "periodic", "every": 0}, "reference.every in run.yaml: greater than or equal to 1, found 0"),
        ({"kind": "off"}, "Expected for reference.kind in run.yaml: 'copy', 'path', 'adapter_off', 'moving_average'"),
        ({"knd": "copy"}, "found reference.knd; the keys there are decay, every, kind, path."),
        ("", "Expected for reference.path in run.yaml"),
        (5, "Expected for reference in run.yaml"),
    ],
)
def test_a_reference_that_cannot_be_meant_is_named(reference: object, found: str) -> None:
    assert found in sentence_of({"reference": reference})


def test_the_leash_is_built_as_it_is_named() -> None:
    assert LeashConfig(beta=0.2).build() == FixedLeash(beta=0.2)
    ziegler = LeashConfig(kind="ziegler", beta=0.1, target_kl_per_sequence=6, horizon=500)
    assert ziegler.build() == ZieglerLeash(beta=0.1, target_kl_per_sequence=6.0, horizon=500.0)
    assert LeashConfig(kind="ziegler", target_kl_per_sequence=6).build().horizon == 10_000  # type: ignore[attr-defined]
    budget = LeashConfig(target_kl_per_sequence=6, beta=0.1, integral=0.2, beta_min=0.01, beta_max=2.0)
    assert budget.build() == BudgetLeash(
        beta=0.1, target_kl_per_sequence=6.0, integral=0.2, beta_min=0.01, beta_max=2.0
    )
    schedule = LeashConfig(kind="schedule", beta=0.1, warmup_updates=3, decay_updates=5, beta_end=0.0, shape="cosine")
    assert schedule.build() == ScheduledLeash(peak=0.1, final=0.0, warmup_updates=3, decay_updates=5, shape="cosine")
    assert LeashConfig(kind="schedule", beta=0.1, warmup_updates=3).build().final == 0.1  # type: ignore[attr-defined]


def test_a_target_and_nothing_else_is_a_budget_whose_beta_follows_from_the_scores() -> None:
    leash = config_from({**LEAST, "leash": {"target_kl_per_sequence": 6}}, "run.yaml").leash
    assert (leash.kind, leash.beta, leash.target_kl_per_sequence) == ("budget", "auto", 6.0)
    assert leash.build(beta=0.3) == BudgetLeash(beta=0.3, target_kl_per_sequence=6.0)
    again = config_from(yaml.safe_load(config_as_yaml(config_from({**LEAST, "leash": leash}, ""))), "")
    assert again.leash == leash


@pytest.mark.parametrize(
    ("leash", "found"),
    [
        ({"kind": "budget"}, "kind budget needs target_kl_per_sequence"),
        ({"kind": "ziegler"}, "kind ziegler needs target_kl_per_sequence"),
        ({"kind": "fixed", "target_kl_per_sequence": 6}, "belongs to kind budget or ziegler, and kind is fixed"),
        ({"beta": "auto"}, "beta auto needs target_kl_per_sequence"),
        ({"beta": 0, "target_kl_per_sequence": 6}, "kind budget multiplies beta, which cannot leave 0"),
        ({"beta": 5, "beta_max": 2}, "beta 5 lies outside 0 to 2"),
        ({"beta": 1e-9, "target_kl_per_sequence": 6}, "beta 1e-09 lies outside 1e-06 to 1000"),
        ({"beta_min": 3, "beta_max": 2}, "beta_min 3 lies above beta_max 2"),
        ({"kind": "schedule", "beta_end": 0.1}, "decay_updates and beta_end belong together"),
        ({"kind": "schedule", "decay_updates": 3}, "decay_updates and beta_end belong together"),
        (
            {"kind": "schedule", "decay_updates": 3, "beta_end": 0, "shape": "exponential"},
            "an exponential schedule needs both beta and beta_end above 0",
        ),
        ({"warmup_updates": 3}, "warmup_updates belongs to kind schedule, and kind is fixed"),
        (
            {"target_kl_per_sequence": 6, "max_kl_per_sequence": 5},
            "max_kl_per_sequence 5 must lie above target_kl_per_sequence 6",
        ),
        ({"beta": 0, "max_kl_per_sequence": 5}, "a beta of 0 cannot be tightened after a roll-back"),
    ],
)
def test_a_leash_that_does_not_fit_together_is_refused(leash: dict[str, object], found: str) -> None:
    assert found in sentence_of({"leash": leash})


def test_a_ceiling_without_a_leash_may_stop_a_run_but_not_roll_it_back() -> None:
    leash = config_from({**LEAST, "leash": {"beta": 0, "max_kl_per_sequence": 5, "max_roll_backs": 0}}, "").leash
    assert (leash.max_kl_per_sequence, leash.max_roll_backs) == (5.0, 0)


@pytest.mark.parametrize("action", ["tighten", "roll_back"])
def test_an_alarm_that_cannot_act_is_refused_before_the_run(action: str) -> None:
    alarms = {"entropy_collapse": {"action": action}}
    found = sentence_of({"alarms": alarms, "leash": {"beta": 0}})
    assert f"a beta of 0 cannot be tightened, and alarms.entropy_collapse.action is {action}" in found


@pytest.mark.parametrize(
    "content",
    [
        {"leash": {"max_kl_per_sequence": 5}},
        {"alarms": {"drift_runaway": {"action": "roll_back"}}},
    ],
)
def test_a_way_back_needs_a_checkpoint_from_before(content: dict[str, object]) -> None:
    assert "checkpoint.keep must be at least 2" in sentence_of({**content, "checkpoint": {"keep": 1}})


@pytest.mark.parametrize(
    ("alarm", "missing"),
    [("score_against_judge", "eval_reward"), ("drift_beyond_budget", "leash.target_kl_per_sequence")],
)
def test_an_alarm_that_shall_act_but_can_never_ring_is_refused(alarm: str, missing: str) -> None:
    found = sentence_of({"alarms": {alarm: "stop"}})
    assert f"alarms.{alarm} can never ring without {missing}, and its action is stop" in found
    config_from({**LEAST, "alarms": {alarm: "log"}}, "run.yaml")


def test_a_misspelt_auto_is_told_what_would_do() -> None:
    assert "Expected for leash.beta in run.yaml: a number or auto, found 'auot'" in sentence_of(
        {"leash": {"beta": "auot"}}
    )
