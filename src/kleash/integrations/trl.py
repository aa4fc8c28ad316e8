"""The exact KL and the drift record inside TRL's trainers, and inside any other transformers Trainer of a causal model.

    trainer = GRPOTrainer(..)
    trainer.add_callback(DriftCallback(trainer, prompts=prompts, every=10))
    trainer.train()

Before the first step, after every so many and after the last, the policy answers the prompts by kleash's own sampler,
and the drift from the reference is measured as `kleash measure` does it: exact, with a 95 % interval, k1 beside it. The
figures go to the trainer's log, and so to its trackers, and line by line to output_dir/drift.jsonl. Training goes on as
if nothing had been there: to the same weights, bit for bit.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kleash.errors import CheckpointError, ConfigError, ModelError
from kleash.generators import untouched_generators
from kleash.integrations.drift_record import ADVICE, DriftRecord
from kleash.integrations.fixed_reference import given_reference, start_again
from kleash.integrations.view import is_sharded, view_of
from kleash.measured import MeasuredDrift
from kleash.measurement import MeasureConfig, measure
from kleash.models import fingerprint, learning_names
from kleash.pair import ModelOrPath
from kleash.prompts import as_rows, load_prompts, require_prompts
from kleash.reference import frozen_copy


class DriftCallback(TrainerCallback):
    """Measures KL(policy || reference) of a trainer's model while it trains, in nats.

    The reference is frozen when training first begins, and stays for the life of the callback: a second `train` goes
    on measuring to where the first one started. A run that is resumed from a checkpoint is measured to the start of
    the run, not to the checkpoint: the start of what learns (of a LoRA policy the adapter, else the model) is kept in
    output_dir, unless save_strategy is "no" or the reference was given, and then has to be given again.

    Every measurement answers the same prompts with the same random numbers, so that steps differ by the policy alone.
    The weights count as they are, without autocast. One process measures; the others wait for it at their next step.

    Args:
      trainer: a transformers Trainer of a causal model, such as TRL's GRPO, RLOO, SFT or DPO trainer. A model may be
        sharded in none of them.
      prompts: strings, rows with a key `prompt` (text or chat messages) such as a data set has, a file, or the name of
        a data set.
      every: how many steps lie between two measurements.
      reference: None = a copy of the policy's start, which of a LoRA policy shares the base; or a model, such as the
        trainer's ref_model, or where to load one.
      config: how to measure; None = one response to each prompt, at the trainer's temperature and completion length
        where it has them.

    Raises:
      InputError: something given cannot be used; on `train`, before the first step.
    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        prompts: Sequence[str] | Sequence[dict[str, Any]] | str | Path,
        every: int,
        reference: "ModelOrPath | None" = None,
        config: MeasureConfig | None = None,
    ) -> None:
        require_trainer(trainer)
        if every < 1:
            raise ConfigError(f"Expected every to be at least 1 step, found {every}; raise it.")
        self.trainer = trainer
        self.rows = load_prompts(prompts) if isinstance(prompts, str | Path) else as_rows(prompts)
        require_prompts(self.rows, "the prompts")
        self.every = every
        self.given = reference
        self.config = config or config_like(trainer.args, prompts=len(self.rows))
        self.reference: PreTrainedModel | None = None
        self.reference_fingerprint = ""
        self._measured: int | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **of_trainer: Any
    ) -> None:
        """Freeze the reference, or make it again for a run that is resumed, and measure."""
        self._require_whole_model()
        if not state.is_world_process_zero:
            return
        self._measured = None
        policy = view_of(self._model)
        with untouched_generators(policy.device):
            if state.global_step:
                self._resume(policy, state.global_step)
            else:
                self._start(policy, args)
        self._measure(state, control)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **of_trainer: Any
    ) -> None:
        """Measure after every so many steps, and after the last one."""
        ends = control.should_training_stop or state.global_step >= state.max_steps
        if ends or state.global_step % self.every == 0:
            self._measure(state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **of_trainer: Any
    ) -> None:
        """Measure where training was ended after the step's end; trackers listen here, but not at the train's end."""
        if control.should_training_stop:
            self._measure(state, control)

    @property
    def record(self) -> DriftRecord:
        """The files of the measurements, in the trainer's output directory."""
        return DriftRecord(directory=Path(str(self.trainer.args.output_dir)))

    @property
    def _model(self) -> nn.Module:
        """The model in training, perhaps inside wrappers."""
        model = self.trainer.model
        assert model is not None
        return model

    def _require_whole_model(self) -> None:
        """Raise ModelError unless this process holds the whole model."""
        if self.trainer.is_fsdp_enabled or is_sharded(self._model):
            raise ModelError(
                "Expected a model that every process holds as a whole, found a sharded one (FSDP, ZeRO-3 or tensor "
                "parallel); leave the callback out, and measure what was saved by kleash measure."
            )

    def _start(self, policy: PreTrainedModel, args: TrainingArguments) -> None:
        """Freeze the reference of a run from its first step; a retry with smaller batches starts its record again."""
        if args.auto_find_batch_size and self.reference is not None:
            self.record.forget_after(-1)
            return
        self.record.require_none()
        reference = self.reference or self._given(policy) or frozen_copy(policy)
        if self.given is None and args.save_strategy != "no":
            self.record.keep({name: reference.get_parameter(name) for name in learning_names(policy)})
        self._freeze(reference)

    def _resume(self, policy: PreTrainedModel, step: int) -> None:
        """Make the reference of a resumed run again: it lies where the run started, not where it is resumed."""
        lines = self.record.lines()
        self._freeze(self.reference or self._given(policy) or start_again(policy, self.record))
        if lines and lines[0]["reference_fingerprint"] != self.reference_fingerprint:
            raise CheckpointError(
                f"Expected the reference that {self.record.lines_file} measures to, found another; {ADVICE}"
            )
        self.record.forget_after(step)
        self._measured = step if any(line["step"] == step for line in lines) else None

    def _given(self, policy: PreTrainedModel) -> PreTrainedModel | None:
        """The reference that was given; None if none was."""
        if self.given is None:
            return None
        ref_model = getattr(self.trainer, "ref_model", None)
        if self.given is ref_model and getattr(self.trainer.args, "sync_ref_model", False):
            raise ModelError(
                "Expected a reference that stays, found a ref_model that sync_ref_model moves; leave the reference out "
                "for a copy of the start."
            )
        return given_reference(self.given, policy)

    def _freeze(self, reference: PreTrainedModel) -> None:
        self.reference, self.reference_fingerprint = reference, fingerprint(reference)

    def _measure(self, state: TrainerState, control: TrainerControl) -> None:
        """Measure once for this step, add a line to the record, and log."""
        if self.reference is None or self._measured == state.global_step:
            return
        processing: Any = self.trainer.processing_class
        policy = view_of(self._model)
        with untouched_generators(policy.device):
            found = measure(
                policy,
                self.reference,
                prompts=self.rows,
                tokenizer=getattr(processing, "tokenizer", processing),
                config=self.config,
            )
        self._measured = state.global_step
        self.record.append(
            {"step": state.global_step, "reference_fingerprint": self.reference_fingerprint, **found.figures}
        )
        due = control.should_log
        # Not the trainer's own `log`: TRL's takes the figures of its step along, which would be missing from its line.
        Trainer.log(self.trainer, figures_to_log(found))
        control.should_log = due  # which logging just took as done


def require_trainer(trainer: object) -> None:
    """Raise ConfigError unless it is a transformers Trainer, as those of TRL are."""
    if not isinstance(trainer, Trainer):
        kind = type(trainer).__name__
        raise ConfigError(
            f"Expected the trainer, found {kind}; write trainer.add_callback(DriftCallback(trainer, ..))."
        )


def config_like(args: TrainingArguments, *, prompts: int) -> MeasureConfig:
    """One response to each prompt, at the trainer's temperature and to its completion length where it has them."""
    given = {
        "temperature": getattr(args, "temperature", None),
        "max_new_tokens": getattr(args, "max_completion_length", None),
    }
    return MeasureConfig(samples=prompts, **{name: value for name, value in given.items() if value is not None})


def figures_to_log(found: MeasuredDrift) -> dict[str, float]:
    """A measurement under the names of the glossary; the ends of an interval that has none are left out."""
    figures = found.figures
    logged = {
        **_with_ends("kl_policy_ref_per_sequence", figures),
        **_with_ends("kl_policy_ref_per_sequence_k1", figures),
        "kl_policy_ref_per_token": figures["kl_policy_ref_per_token"]["mean"],
        **{
            f"kl_policy_ref_per_sequence_{name}": part["kl_policy_ref_per_sequence"]
            for name, part in figures["by_class"].items()
        },
        "entropy_per_token": figures["policy_entropy_per_token"]["mean"],
        "response_length_mean": figures["response_length"]["mean"],
        "eos_share": figures["finished_share"],
    }
    return {name: value for name, value in logged.items() if value is not None}


def _with_ends(name: str, figures: dict[str, Any]) -> dict[str, float | None]:
    interval = figures[name]
    return {name: interval["mean"], f"{name}_low": interval["low"], f"{name}_high": interval["high"]}
