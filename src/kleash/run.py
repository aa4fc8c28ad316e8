"""The state of a run: how it is put together, saved, and taken up again."""

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from torch import Tensor
from transformers import get_scheduler

from kleash.alarms import AlarmContext, AlarmWatch
from kleash.checkpoint import (
    CheckpointState,
    Learners,
    checkpoints_in,
    clear_up,
    load_learners,
    read_checkpoint_state,
    require_same_run,
    save_checkpoint,
)
from kleash.config import CONTROLLERS, RunConfig, config_as_yaml
from kleash.drift import Record
from kleash.errors import ConfigError, InputError, KleashWarning, PreflightError, RunDirectoryError
from kleash.first_beta import first_beta
from kleash.kl_form import FORMS
from kleash.language_model import Models
from kleash.leash import Leash
from kleash.models import fingerprint, trainable_parameters
from kleash.parts import Given, Parts, load_parts
from kleash.preflight.check import Check, failed_with, of_loading
from kleash.preflight.checks import preflight
from kleash.prompts import prompts_fingerprint
from kleash.reference import move_towards
from kleash.run_directory import RunDirectory


@dataclass(kw_only=True)
class Run:
    """The state of a run: what learns, what stays, and how far it is."""

    config: RunConfig
    directory: RunDirectory
    accelerator: Accelerator
    parts: Parts
    models: Models
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    leash: Leash
    reference_fingerprint: str
    watch: AlarmWatch
    records: list[Record] = field(default_factory=list)
    completed: int = 0
    roll_backs: int = 0
    weights_are_between_updates: bool = True
    resumed: bool = False

    @property
    def has_come_to_nothing(self) -> bool:
        """Whether this start has not completed an update, and took up nothing that another had."""
        return not (self.resumed or self.completed or self.roll_backs)

    @property
    def learners(self) -> Learners:
        return Learners(
            policy=self.parts.policy,
            value=self.parts.value,
            optimizer=self.optimizer,
            moving_reference=None if self.parts.first_reference is None else self.parts.reference,
        )

    def share(self, rows: int) -> slice:
        """The rows of this process."""
        own = rows // self.accelerator.num_processes
        return slice(self.accelerator.process_index * own, (self.accelerator.process_index + 1) * own)

    def move_reference(self, update: int) -> None:
        """Let a reference that follows the policy take its step after an update; any other stays."""
        share = self.config.reference.share_after(update)
        if self.parts.first_reference is not None and share:
            move_towards(self.parts.reference, self.parts.policy, share)

    def add_up(self, tensor: Tensor) -> Tensor:
        """The sum over processes."""
        total: Tensor = self.accelerator.reduce(tensor, "sum")
        return total


def run_from(config: RunConfig, given: Given, *, resume: bool) -> Run:
    """Check and load everything, then start or restore the run.

    Raises:
      InputError: anything that cannot be used, before a file is written.
    """
    directory = RunDirectory(path=Path(config.out))
    going_on = resume and directory.holds_a_run()
    if going_on:
        _require_same_config(directory, config)
    else:
        directory.require_free()
    bias = FORMS[config.kl].bias
    if bias:
        warnings.warn(f"The leash {config.kl} is biased, since {bias}.", KleashWarning, stacklevel=2)
    accelerator = _accelerator(config)
    _require_even_shares(config, accelerator.num_processes)
    parts = load_parts(config, given)
    models = _on_the_device(parts, accelerator)
    if config.preflight:
        _require_sound(_checks(parts, models, config, accelerator), accelerator)
    run = _assembled(config, directory, accelerator, parts, models)
    run.resumed = going_on
    if going_on and accelerator.is_main_process:
        clear_up(directory.checkpoints)
    accelerator.wait_for_everyone()
    found = checkpoints_in(directory.checkpoints)
    if found:
        restore(run, found[-1])
    elif config.leash.beta == "auto":
        with accelerator.autocast():
            run.leash = config.leash.build(beta=_first_beta(run))
    if accelerator.is_main_process:
        directory.start(config_as_yaml(config))
        directory.forget_after(run.completed)
        directory.forget_roll_backs_after(run.roll_backs)
        if not found:
            write_checkpoint(run)
    accelerator.wait_for_everyone()
    run.records = directory.lines("records.jsonl")
    run.watch = alarm_watch(config, run.records)
    return run


def check_run(config: RunConfig, given: Given) -> list[Check]:
    """The self-test of a configuration, `kleash check`; what does not load is a FAIL like any other.

    Raises:
      ConfigError: processes or trackers that cannot be had.
    """
    accelerator = _accelerator(config)
    _require_even_shares(config, accelerator.num_processes)
    place = _place(config)
    try:
        parts = load_parts(config, given)
    except InputError as error:
        return [*place, of_loading(error)]
    return [*place, *_checks(parts, _on_the_device(parts, accelerator), config, accelerator)]


def _place(config: RunConfig) -> list[Check]:
    """A failed check where nothing can be written to `out`; none where a run may begin or go on there."""
    try:
        RunDirectory(path=Path(config.out)).require_place()
    except RunDirectoryError as error:
        return [failed_with("place to write", error)]
    return []


def _on_the_device(parts: Parts, accelerator: Accelerator) -> Models:
    for model in parts.every_model:
        model.to(accelerator.device)
    return parts.models()


def _checks(parts: Parts, models: Models, config: RunConfig, accelerator: Accelerator) -> list[Check]:
    return preflight(parts, models, config, autocast=accelerator.autocast, processes=accelerator.num_processes)


def _require_sound(checks: list[Check], accelerator: Accelerator) -> None:
    """Say what is doubtful, and raise what failed, on every process if on one.

    Raises:
      InputError: a failure that the caller's input has caused, in its own words.
      PreflightError: any other.
    """
    if accelerator.is_main_process:
        for check in checks:
            if check.status == "WARN":
                words = f"Before the first update, {check.name}: {check.found}; {check.remedy}."
                warnings.warn(words, KleashWarning, stacklevel=3)
    failing = [check for check in checks if check.status == "FAIL"]
    anywhere = accelerator.reduce(torch.tensor(float(len(failing)), device=accelerator.device), "sum")
    if not bool(anywhere > 0):
        return
    if not failing:
        raise PreflightError(
            "Expected every check before the first update to pass, found that one failed on another process; see its "
            "error."
        )
    known = [check.error for check in failing if check.error is not None]
    if known:
        raise known[0]
    names = ", ".join(check.name for check in failing)
    raise PreflightError(
        f"Expected every check before the first update to pass, found that {names} failed ({failing[0].found}); "
        f"{failing[0].remedy} (kleash check RUN.yaml shows the whole table; preflight: false trains regardless)."
    )


def _first_beta(run: Run) -> float:
    own = run.share(run.config.rollout.prompts_per_update)
    return first_beta(run.parts, run.config, own=own, reduce=run.add_up)


def alarm_watch(config: RunConfig, records: Sequence[Record]) -> AlarmWatch:
    """A watch that has seen the records so far."""
    leash = config.leash
    bounds = (leash.beta_min, leash.beta_max) if leash.kind in CONTROLLERS else (None, None)
    context = AlarmContext(target_kl_per_sequence=leash.target_kl_per_sequence, beta_min=bounds[0], beta_max=bounds[1])
    watch = AlarmWatch(config.alarms, context)
    for record in records:
        watch.see(record)
    return watch


def _accelerator(config: RunConfig) -> Accelerator:
    bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    _require_trackers(config.trackers)
    precision = ("bf16" if bf16 else "no") if config.mixed_precision == "auto" else config.mixed_precision
    launched = int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1
    accelerator = Accelerator(
        mixed_precision=precision,
        log_with=list(config.trackers) or None,
        project_dir=config.out,
        cpu=launched > 1 and not torch.accelerator.is_available(),
    )
    if accelerator.num_processes != launched:
        raise ConfigError(
            f"Expected {launched} processes that work together, found that each would run alone on "
            f"{accelerator.device}; launch one process, or set ACCELERATE_USE_CPU=true."
        )
    return accelerator


def _require_trackers(names: tuple[str, ...]) -> None:
    """Raise ConfigError for a tracker that accelerate does not know, or would drop silently as not installed."""
    known, installed = LoggerType.list(), [*map(str, get_available_trackers()), "all"]
    for name in names:
        if name not in known:
            raise ConfigError(f"Expected trackers among {', '.join(sorted(known))}, found {name}; choose one of them.")
        if name not in installed:
            raise ConfigError(f"Expected the tracker {name} to be installed, found it is not; install it with pip.")


def _require_even_shares(config: RunConfig, processes: int) -> None:
    if config.rollout.prompts_per_update % (processes * config.ppo.minibatches):
        raise ConfigError(
            f"Expected rollout.prompts_per_update to be a multiple of {processes} processes x "
            f"{config.ppo.minibatches} ppo.minibatches, found {config.rollout.prompts_per_update}; change one of them."
        )


def _assembled(
    config: RunConfig, directory: RunDirectory, accelerator: Accelerator, parts: Parts, models: Models
) -> Run:
    ppo = config.ppo
    optimizer = torch.optim.AdamW(
        list(trainable_parameters(parts.policy, parts.value)),
        lr=ppo.learning_rate,
        betas=ppo.adam_betas,
        eps=ppo.adam_epsilon,
        weight_decay=ppo.weight_decay,
        fused=True,
    )
    shape = {"constant": "constant_with_warmup"}.get(ppo.learning_rate_schedule, ppo.learning_rate_schedule)
    scheduler = get_scheduler(shape, optimizer, num_warmup_steps=ppo.warmup_updates, num_training_steps=config.updates)
    policy, value, prepared_optimizer = accelerator.prepare(models.policy, models.value, optimizer)
    return Run(
        config=config,
        directory=directory,
        accelerator=accelerator,
        parts=parts,
        models=replace(models, policy=policy, value=value),
        optimizer=prepared_optimizer,
        scheduler=scheduler,
        leash=config.leash.build(beta=config.leash.beta_min if config.leash.beta == "auto" else None),
        watch=alarm_watch(config, []),
        reference_fingerprint=fingerprint(parts.reference),  # where it begins: nothing has moved yet
    )


def _require_same_config(directory: RunDirectory, config: RunConfig) -> None:
    """Raise RunDirectoryError unless the run was started with this configuration.

    `updates` may grow while the learning rate is constant, checkpoints may come at other times, and the checks before
    the first update may be left out: none of it changes what an update does.
    """
    if not directory.config.exists():
        raise RunDirectoryError(f"Expected {directory.config} of the run to resume, found none; start a new run.")
    saved = yaml.safe_load(directory.config.read_text(encoding="utf-8"))
    asked = yaml.safe_load(config_as_yaml(config))
    free = {"out", "checkpoint", "trackers", "preflight"}
    if config.ppo.learning_rate_schedule == "constant":
        free.add("updates")
    different = sorted(key for key in asked if key not in free and asked[key] != saved.get(key))
    if different:
        raise RunDirectoryError(
            f"Expected the configuration that the run in {directory.path} started with, found another "
            f"{', '.join(different)}; resume with the same values, or start a new run."
        )


def restore(run: Run, checkpoint: Path) -> None:
    """Put the run back to a checkpoint: learners, schedule, leash, and how far it is.

    Raises:
      CheckpointError: it is damaged, or was made with another reference or other prompts.
    """
    state = read_checkpoint_state(checkpoint)
    require_same_run(
        state,
        reference_fingerprint=run.reference_fingerprint,
        prompts_fingerprint=prompts_fingerprint(run.parts.prompts),
    )
    load_learners(checkpoint, run.learners)
    run.scheduler.load_state_dict(state.scheduler)
    run.leash = run.leash.restored(state.leash)
    run.completed = state.update
    run.roll_backs = state.roll_backs


def save(run: Run) -> Path:
    """Write a checkpoint of the updates completed so far, unless it is there; returns its directory."""
    run.accelerator.wait_for_everyone()
    if run.accelerator.is_main_process:
        write_checkpoint(run)
    run.accelerator.wait_for_everyone()
    return run.directory.checkpoints / f"{run.completed:06d}"


def write_checkpoint(run: Run, *, again: bool = False) -> None:
    """The part of `save` that the main process does, waiting for nobody: also right while an error is on its way.

    Args:
      run: the run.
      again: also where the checkpoint is there already, as after a roll-back, whose leash is another one.
    """
    if (run.directory.checkpoints / f"{run.completed:06d}").exists() and not again:
        return
    state = CheckpointState(
        update=run.completed,
        seed=run.config.seed,
        leash=run.leash.state,
        scheduler=run.scheduler.state_dict(),
        reference_fingerprint=run.reference_fingerprint,
        prompts_fingerprint=prompts_fingerprint(run.parts.prompts),
        roll_backs=run.roll_backs,
    )
    save_checkpoint(
        run.directory.checkpoints, run.learners, run.parts.tokenizer, state, keep=run.config.checkpoint.keep
    )
