"""The configuration of a run: a YAML file, any field of which the command line can override."""

from collections.abc import Iterator, Sequence
from itertools import chain, takewhile
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails
from tyro.constructors import PrimitiveConstructorSpec

from kleash.alarms import AlarmsConfig
from kleash.errors import ConfigError
from kleash.kl_form import FORMS, NO_LEASH, KLName
from kleash.leash import BETA_MAX, BETA_MIN, BudgetLeash, FixedLeash, Leash, ScheduledLeash, Shape, ZieglerLeash
from kleash.ppo import PPOConfig
from kleash.rollout import RolloutConfig


class LeashConfig(BaseModel):
    """What holds the policy near its reference."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Literal["fixed", "budget", "ziegler", "schedule"] = "fixed"
    """fixed: beta stays; budget: a controller holds the drift at target_kl_per_sequence; ziegler: Ziegler's
    controller does so slowly; schedule: beta follows the update's number. Left out, a target means budget."""
    beta: Annotated[float, Field(ge=0)] | Literal["auto"] = 0.05
    """KL coefficient, score units per nat; a controller's first one, a schedule's highest. 0 turns the leash off.
    auto = sigma / sqrt(2 target), sigma the spread of the reference's scores on a prompt; what a budget starts from."""
    target_kl_per_sequence: float | None = Field(None, gt=0)
    """budget and ziegler: the KL(policy || reference) to hold, in nats per sequence."""
    integral: float | None = Field(None, gt=0)
    """budget: nats of log beta per update and unit of relative error; null = 0.35."""
    proportional: float | None = Field(None, ge=0)
    """budget: nats of log beta per change of the relative error; null = 3."""
    horizon: float | None = Field(None, gt=0)
    """ziegler: sequences over which the error adds up; null = 10000."""
    warmup_updates: int | None = Field(None, ge=0)
    """schedule: updates over which beta rises from 0; null = none."""
    decay_updates: int | None = Field(None, ge=1)
    """schedule: updates from beta to beta_end, after the warm-up; null = none, beta stays."""
    beta_end: float | None = Field(None, ge=0)
    """schedule: beta after the decay."""
    shape: Shape | None = None
    """schedule: of the decay; null = linear."""
    beta_min: float = Field(BETA_MIN, gt=0)
    """No controller goes below."""
    beta_max: float = Field(BETA_MAX, gt=0)
    """Nothing goes above: no controller, no tightening."""
    max_kl_per_sequence: float | None = Field(None, gt=0)
    """Ceiling of KL(policy || first reference), nats per sequence: beyond it the run rolls back to its last checkpoint
    below it and tightens the leash; null = none."""
    max_roll_backs: int = Field(3, ge=0)
    """Roll-backs before the run stops itself instead."""
    tighten_factor: float = Field(2.0, gt=1)
    """What beta is multiplied by when the leash is tightened."""

    @model_validator(mode="before")
    @classmethod
    def _a_target_means_a_budget(cls, content: object) -> object:
        if not isinstance(content, dict):
            return content
        kind = content.get("kind") or ("budget" if content.get("target_kl_per_sequence") is not None else "fixed")
        return {**({"beta": "auto"} if kind == "budget" else {}), **content, "kind": kind}

    @model_validator(mode="after")
    def _fields_of_the_kind(self) -> Self:
        own = {name: kinds for name, kinds in KINDS_OF_LEASH_KEYS.items() if getattr(self, name) is not None}
        for name, kinds in own.items():
            if self.kind not in kinds:
                raise ValueError(f"{name} belongs to kind {' or '.join(kinds)}, and kind is {self.kind}")
        if self.kind in CONTROLLERS and self.target_kl_per_sequence is None:
            raise ValueError(f"kind {self.kind} needs target_kl_per_sequence")
        if self.beta == "auto" and self.target_kl_per_sequence is None:
            raise ValueError("beta auto needs target_kl_per_sequence")
        if self.kind == "schedule" and (self.decay_updates is None) != (self.beta_end is None):
            raise ValueError("decay_updates and beta_end belong together")
        return self

    @model_validator(mode="after")
    def _a_ceiling_that_can_be_held(self) -> Self:
        ceiling, target = self.max_kl_per_sequence, self.target_kl_per_sequence
        if ceiling is not None and target is not None and ceiling <= target:
            raise ValueError(f"max_kl_per_sequence {ceiling:g} must lie above target_kl_per_sequence {target:g}")
        if ceiling is not None and self.beta == 0 and self.max_roll_backs:
            raise ValueError("a beta of 0 cannot be tightened after a roll-back, so max_roll_backs must be 0")
        return self

    @model_validator(mode="after")
    def _a_beta_within_its_bounds(self) -> Self:
        if self.beta_min > self.beta_max:
            raise ValueError(f"beta_min {self.beta_min:g} lies above beta_max {self.beta_max:g}")
        if self.kind in CONTROLLERS and self.beta == 0:
            raise ValueError(f"kind {self.kind} multiplies beta, which cannot leave 0")
        lowest = self.beta_min if self.kind in CONTROLLERS else 0.0
        for name in ("beta", "beta_end"):
            value = getattr(self, name)
            if isinstance(value, float) and not lowest <= value <= self.beta_max:
                raise ValueError(f"{name} {value:g} lies outside {lowest:g} to {self.beta_max:g}")
        if self.shape == "exponential" and not (self.beta and self.beta_end):
            raise ValueError("an exponential schedule needs both beta and beta_end above 0")
        return self

    def build(self, *, beta: float | None = None) -> Leash:
        """The leash of the first update.

        Args:
          beta: in place of the configured one, which may be auto.
        """
        start = self.beta if beta is None else beta
        assert start != "auto"
        bounds = {"beta_min": self.beta_min, "beta_max": self.beta_max}
        match self.kind:
            case "fixed":
                return FixedLeash(beta=start, beta_max=self.beta_max)
            case "schedule":
                return ScheduledLeash(
                    peak=start,
                    final=start if self.beta_end is None else self.beta_end,
                    beta_max=self.beta_max,
                    **self._given("warmup_updates", "decay_updates", "shape"),
                )
            case "budget":
                return BudgetLeash(
                    beta=start, **bounds, **self._given("target_kl_per_sequence", "integral", "proportional")
                )
            case "ziegler":
                return ZieglerLeash(beta=start, **bounds, **self._given("target_kl_per_sequence", "horizon"))

    def _given(self, *names: str) -> dict[str, Any]:
        """The fields that are set, so that the leash's own defaults stand for the others."""
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


CONTROLLERS = ("budget", "ziegler")
KINDS_OF_LEASH_KEYS = {
    "target_kl_per_sequence": CONTROLLERS,
    "integral": ("budget",),
    "proportional": ("budget",),
    "horizon": ("ziegler",),
    **dict.fromkeys(("warmup_updates", "decay_updates", "beta_end", "shape"), ("schedule",)),
}


class ReferenceConfig(BaseModel):
    """What the KL is measured to."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["copy", "path", "adapter_off", "moving_average", "periodic"] = "copy"
    """copy: a frozen copy of the policy's start; path: another model; adapter_off: the base under the policy's adapter;
    moving_average and periodic follow the policy, and the KL to where they began is recorded beside the one to them.
    Left out, a path means path."""
    path: Annotated[str, Field(min_length=1)] | None = None
    """path: the model; moving_average and periodic: where the reference starts, null = a copy of the policy's start."""
    decay: float | None = Field(None, gt=0, lt=1)
    """moving_average: reference <- decay reference + (1 - decay) policy after each update; null = 0.99."""
    every: int | None = Field(None, ge=1)
    """periodic: reference <- policy after every so many updates."""

    @model_validator(mode="before")
    @classmethod
    def _a_path_alone_means_path(cls, content: object) -> object:
        if content is None:
            return {}
        if isinstance(content, str):
            return {"kind": "path", "path": content}
        if isinstance(content, dict) and content.get("kind") is None:
            return {**content, "kind": "copy" if content.get("path") is None else "path"}
        return content

    @model_validator(mode="after")
    def _fields_of_the_kind(self) -> Self:
        own = {name: kinds for name, kinds in KINDS_OF_REFERENCE_KEYS.items() if getattr(self, name) is not None}
        for name, kinds in own.items():
            if self.kind not in kinds:
                raise ValueError(f"reference.{name} belongs to kind {' or '.join(kinds)}, and kind is {self.kind}")
        for kind, needed in (("path", "path"), ("periodic", "every")):
            if self.kind == kind and getattr(self, needed) is None:
                raise ValueError(f"kind {kind} needs reference.{needed}")
        return self

    @property
    def moves(self) -> bool:
        """Whether the reference follows the policy."""
        return self.kind in MOVING_REFERENCES

    def share_after(self, update: int) -> float:
        """How much of the way to the policy the reference goes after an update: 0 stays, 1 arrives.

        >>> periodic = ReferenceConfig(kind="periodic", every=2)
        >>> [periodic.share_after(update) for update in (1, 2, 3, 4)]
        [0.0, 1.0, 0.0, 1.0]
        """
        if self.kind == "moving_average":
            return 1 - (REFERENCE_DECAY if self.decay is None else self.decay)
        return float(self.every is not None and update % self.every == 0)


REFERENCE_DECAY = 0.99
MOVING_REFERENCES = ("moving_average", "periodic")
KINDS_OF_REFERENCE_KEYS = {
    "path": ("path", *MOVING_REFERENCES),
    "decay": ("moving_average",),
    "every": ("periodic",),
}


class WeightedSource(BaseModel):
    """One part of a reward that is a weighted sum."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    source: str
    """Path or hub name of a reward model, or module:function."""
    weight: float = 1.0
    """Its weight in the sum."""


class CheckpointConfig(BaseModel):
    """When the run's state is saved."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    every: int = Field(10, ge=1)
    """Updates between two checkpoints; there is always one at the start and one at the end."""
    keep: int = Field(2, ge=1)
    """The newest ones that stay on disk."""


_source_in_help: PrimitiveConstructorSpec[Any] = PrimitiveConstructorSpec(
    nargs=1,
    metavar="PATH|MODULE:FUNCTION|LIST",
    instance_from_str=lambda words: words[0],
    is_instance=lambda source: isinstance(source, str | tuple),
    str_from_instance=lambda source: [str(source)],
)

Source = Annotated[str | Annotated[tuple[WeightedSource, ...], Field(min_length=1)], _source_in_help]
Name = Annotated[str, Field(min_length=1)]


class RunConfig(BaseModel):
    """Everything that a run is made from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy: Name
    """Path or hub name of the causal language model to train."""
    reward: Source
    """A sequence-classification model with one label, module:function, or a weighted list of them."""
    prompts: Name
    """A jsonl, json, parquet or csv file, or a data set's name, with a column `prompt`."""
    out: Name
    """Directory of the run; must not hold another one."""
    reference: ReferenceConfig = ReferenceConfig()
    """What the KL is measured to; null = a frozen copy of the policy's start, and a path alone means that model."""
    eval_reward: Source | None = None
    """The held-out judge, in the same forms: scores every rollout and trains nothing."""
    pad_token: Name | None = None
    """Token to pad with, for a tokenizer that has none; padding is masked, so EOS will do."""
    kl: KLName = "exact"
    """How the KL enters training: exact = the whole vocabulary's, own step in the loss and later ones in the reward;
    k1 = the one-token estimate in the reward, the InstructGPT form; blend = exact with as much of k1 as lessens the
    noise. The others are biased."""
    allow_biased: bool = False
    """Also take a form of the KL whose gradient is not that of score - beta * KL."""
    leash: LeashConfig = LeashConfig()
    """What holds the policy near its reference."""
    rollout: RolloutConfig = RolloutConfig()
    """How responses are sampled."""
    ppo: PPOConfig = PPOConfig()
    """The clipped policy and value steps."""
    alarms: AlarmsConfig = AlarmsConfig()
    """What the run is watched for, and what it does then."""
    updates: int = Field(100, ge=1)
    """Rollouts, each followed by its PPO steps."""
    seed: int = Field(0, ge=0)
    """Every random number of the run follows from it."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When the run's state is saved."""
    samples_per_update: int = Field(4, ge=0)
    """Responses of each update kept in samples.jsonl."""
    mapped_responses: int = Field(16, ge=0)
    """Responses kept token by token in token_maps.jsonl: of the first update, and of the last one or the last with a
    checkpoint."""
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    """auto: bfloat16 autocast on a GPU that has it, float32 elsewhere; weights stay float32."""
    trackers: tuple[str, ...] = ()
    """Experiment trackers that accelerate knows, for example tensorboard or wandb."""
    preflight: bool = True
    """Try everything out on a few responses before the first update, as kleash check does, and stop on a FAIL."""

    @field_validator("kl", mode="before")
    @classmethod
    def _a_leash_that_pulls(cls, value: object) -> object:
        if isinstance(value, str) and value in NO_LEASH:
            raise ValueError(f"kl {value} is no leash, since {NO_LEASH[value]}")
        return value

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _no_is_a_word(cls, value: object) -> object:
        return "no" if value is False else value  # YAML reads a bare `no` as false

    @field_validator("trackers", mode="before")
    @classmethod
    def _one_tracker_is_a_list_of_one(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _an_unbiased_gradient(self) -> Self:
        bias = FORMS[self.kl].bias
        if bias and not self.allow_biased:
            raise ValueError(f"kl {self.kl} is biased, since {bias}, and allow_biased is false")
        return self

    @model_validator(mode="after")
    def _a_way_back(self) -> Self:
        actions = {name: alarm.action for name, alarm in self.alarms.by_name.items()}
        blind = {
            "score_against_judge": (self.eval_reward, "eval_reward"),
            "drift_beyond_budget": (self.leash.target_kl_per_sequence, "leash.target_kl_per_sequence"),
        }
        for name, (needed, key) in blind.items():
            if needed is None and actions[name] not in ("off", "log"):
                raise ValueError(f"alarms.{name} can never ring without {key}, and its action is {actions[name]}")
        for name, action in actions.items():
            if action in ("tighten", "roll_back") and self.leash.beta == 0:
                raise ValueError(f"a beta of 0 cannot be tightened, and alarms.{name}.action is {action}")
        goes_back = "roll_back" in actions.values() or self.leash.max_kl_per_sequence is not None
        if goes_back and self.leash.max_roll_backs and self.checkpoint.keep < 2:
            raise ValueError("a roll-back needs a checkpoint from before, so checkpoint.keep must be at least 2")
        return self

    @model_validator(mode="after")
    def _prompts_divide_into_minibatches(self) -> Self:
        if self.rollout.prompts_per_update % self.ppo.minibatches:
            raise ValueError(
                f"rollout.prompts_per_update {self.rollout.prompts_per_update} must be a multiple of "
                f"ppo.minibatches {self.ppo.minibatches}"
            )
        return self


TEXT_KEYS = frozenset({"policy", "prompts", "out", "reference", "reference.path", "pad_token"})
UNION_BRANCHES = ("str", "tuple[WeightedSource, ...]", "constrained-float", "literal['auto']")


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration in a YAML file, with words of the command line laid over it: --leash.beta 0.05.

    Raises:
      ConfigError: no such file, not YAML, an unknown key, or a value out of range.
    """
    content = _read_yaml(path)
    for key, value in _pairs(overrides):
        _lay_over(content, key.split("."), value)
    return config_from(content, str(path) if not overrides else f"{path} and the command line")


def flags_of(words: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """(dotted key, its words) of `--dotted.key value ..`; `--dotted.key=value` is the same.

    Raises:
      ConfigError: a word that belongs to no key, or a key without a value.
    """
    rest = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    while rest:
        flag, *rest = rest
        texts = list(takewhile(lambda word: not word.startswith("--"), rest))
        rest = rest[len(texts) :]
        if not flag.startswith("--") or not texts:
            raise ConfigError(f"Expected `--key value`, found {flag!r} alone; see kleash train --help.")
        yield flag.removeprefix("--").replace("-", "_"), texts


def as_words(flags: Sequence[tuple[str, list[str]]]) -> list[str]:
    """Flags as the words of a command line; what flags_of reads back."""
    return list(chain.from_iterable((f"--{key}", *texts) for key, texts in flags))


def _pairs(words: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of the words; several values make a list, each is read as YAML."""
    for key, texts in flags_of(words):
        values = [_flag_value(text, as_it_is=key in TEXT_KEYS) for text in texts]
        yield key, values[0] if len(values) == 1 else values


def _read_yaml(path: str | Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Expected a YAML file at {path}, found none that can be read; check the path.") from error
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        where = f" at line {place.line + 1}" if place else ""
        raise ConfigError(f"Expected YAML in {path}, found a mistake{where}; mend the file.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"Expected `key: value` lines in {path}, found {type(content).__name__}; mend the file.")
    return content


def _flag_value(text: str, *, as_it_is: bool) -> Any:
    """A value of the command line: None is null, the rest is read as YAML unless its key holds text."""
    if text in ("None", "null"):
        return None
    if as_it_is:
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _lay_over(content: dict[str, Any], keys: list[str], value: Any) -> None:
    """Set content[k1][k2].. = value; what stands in the way of a deeper key is an error."""
    *outer, last = keys
    for key in outer:
        inner = content[key] = {} if content.get(key) is None else content[key]
        if not isinstance(inner, dict):
            raise ConfigError(f"Expected a group of keys at {key}, found {inner!r}; set {key} as a whole.")
        content = inner
    content[last] = value


def config_from(content: dict[str, Any], source: str) -> RunConfig:
    """A validated configuration; the first thing wrong with it is the error.

    Raises:
      ConfigError: an unknown or missing key, or a value out of range.
    """
    try:
        return RunConfig.model_validate(content)
    except ValidationError as error:
        raise ConfigError(_sentence(error, source)) from error


def _sentence(error: ValidationError, source: str) -> str:
    first = _most_telling(error)
    key = ".".join(str(part) for part in first["loc"] if part not in UNION_BRANCHES) or "the configuration"
    match first["type"]:
        case "extra_forbidden":
            known = ", ".join(_known_keys(first["loc"][:-1]))
            return f"Expected a known key in {source}, found {key}; the keys there are {known}."
        case "missing":
            return f"Expected the key {key} in {source}, found none; add it."
        case "value_error":
            return f"Expected {source} to fit together, found that {first['ctx']['error']}; change one of them."
        case "float_parsing" if "literal['auto']" in {part for one in error.errors() for part in one["loc"]}:
            return f"Expected for {key} in {source}: a number or auto, found {first['input']!r}; change it."
    found = first["input"]
    return (
        f"Expected for {key} in {source}: {first['msg'].removeprefix('Input should be ')}, found {found!r}; change it."
    )


def _most_telling(error: ValidationError) -> ErrorDetails:
    """The first thing that is wrong; where a value may have several forms, the form it comes closest to."""
    errors = error.errors()
    of_first_key = [one for one in errors if one["loc"][:1] == errors[0]["loc"][:1]]
    return max(of_first_key, key=lambda one: (len(one["loc"]), not one["type"].endswith("_type")))


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    """Keys of the part of the configuration that a location points into."""
    fields = RunConfig.model_fields
    for part in location:
        annotation = fields[str(part)].annotation if part in fields else WeightedSource
        fields = getattr(annotation, "model_fields", WeightedSource.model_fields)
    return sorted(fields)


def config_as_yaml(config: RunConfig) -> str:
    """The resolved configuration as YAML, keys in the order of their definition."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
