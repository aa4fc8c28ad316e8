"""The configuration of a run: a YAML file, any field of which the command line can override."""

from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails
from tyro.constructors import PrimitiveConstructorSpec

from kleash.errors import ConfigError
from kleash.kl_form import FORMS, NO_LEASH, KLName
from kleash.leash import FixedLeash, Leash, ZieglerLeash
from kleash.ppo import PPOConfig
from kleash.rollout import RolloutConfig


class LeashConfig(BaseModel):
    """What holds the policy near its reference."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Literal["fixed", "ziegler"] = "fixed"
    """fixed: beta stays; ziegler: Ziegler's controller moves beta towards the target."""
    beta: float = Field(0.05, ge=0)
    """KL coefficient, score units per nat; the first one for ziegler. 0 turns the leash off."""
    target_kl_per_sequence: float | None = Field(None, gt=0)
    """ziegler only: the KL(policy || reference) to hold, in nats per sequence."""
    horizon: float | None = Field(None, gt=0)
    """ziegler only: sequences over which the error adds up; null = 10000."""

    @model_validator(mode="after")
    def _fields_of_the_kind(self) -> Self:
        if self.kind == "ziegler" and self.target_kl_per_sequence is None:
            raise ValueError("kind ziegler needs target_kl_per_sequence")
        if self.kind == "fixed" and (self.target_kl_per_sequence is not None or self.horizon is not None):
            raise ValueError("target_kl_per_sequence and horizon belong to kind ziegler")
        return self

    def build(self) -> Leash:
        """The leash of the first update."""
        if self.target_kl_per_sequence is None:
            return FixedLeash(beta=self.beta)
        return ZieglerLeash(
            beta=self.beta, target_kl_per_sequence=self.target_kl_per_sequence, horizon=self.horizon or 10_000.0
        )


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
    reference: Name | None = None
    """The model that the KL is measured to; null = a frozen copy of the policy's start."""
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
    updates: int = Field(100, ge=1)
    """Rollouts, each followed by its PPO steps."""
    seed: int = Field(0, ge=0)
    """Every random number of the run follows from it."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When the run's state is saved."""
    samples_per_update: int = Field(4, ge=0)
    """Responses of each update kept in samples.jsonl."""
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    """auto: bfloat16 autocast on a GPU that has it, float32 elsewhere; weights stay float32."""
    trackers: tuple[str, ...] = ()
    """Experiment trackers that accelerate knows, for example tensorboard or wandb."""

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
    def _prompts_divide_into_minibatches(self) -> Self:
        if self.rollout.prompts_per_update % self.ppo.minibatches:
            raise ValueError(
                f"rollout.prompts_per_update {self.rollout.prompts_per_update} must be a multiple of "
                f"ppo.minibatches {self.ppo.minibatches}"
            )
        return self


TEXT_KEYS = frozenset({"policy", "prompts", "out", "reference", "pad_token"})
UNION_BRANCHES = ("str", "tuple[WeightedSource, ...]")


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration in a YAML file, with words of the command line laid over it: --leash.beta 0.05.

    Raises:
      ConfigError: no such file, not YAML, an unknown key, or a value out of range.
    """
    content = _read_yaml(path)
    for key, value in _pairs(overrides):
        _lay_over(content, key.split("."), value)
    return config_from(content, str(path) if not overrides else f"{path} and the command line")


def _pairs(words: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of `--dotted.key value ..`; several values make a list, each is read as YAML."""
    rest = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    while rest:
        flag, *rest = rest
        texts = list(takewhile(lambda word: not word.startswith("--"), rest))
        rest = rest[len(texts) :]
        if not flag.startswith("--") or not texts:
            raise ConfigError(f"Expected `--key value`, found {flag!r} alone; see kleash train --help.")
        key = flag.removeprefix("--").replace("-", "_")
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
        inner = content.setdefault(key, {})
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
