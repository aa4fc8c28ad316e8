"""The main job. Its loop is the sentence

prompts -> rollout -> log-probs (policy, reference) -> KL -> adjusted rewards -> advantages -> PPO update
-> leash -> drift -> report
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kleash.alarms import AlarmsConfig
from kleash.batch import Prompts, Rollout
from kleash.config import CheckpointConfig, LeashConfig, ReferenceConfig, RunConfig, config_from
from kleash.drift import (
    Record,
    SequenceFigures,
    TokenFigures,
    explained_variance,
    record_of,
    sequence_figures,
    token_figures,
)
from kleash.drift_map import drift_map, special_token_ids
from kleash.errors import ModelError, NonFiniteError, RewardError, RunStopped
from kleash.guard import guarded, rescued
from kleash.interrupt import Stop, stop_on_signals
from kleash.kl_form import FORMS, KLName
from kleash.leash import Measurement
from kleash.models import causal_model, load_tokenizer
from kleash.pair import ModelOrPath, source_of
from kleash.parts import Given
from kleash.ppo import PPOConfig, minibatches_of, ppo_update
from kleash.progress import RunProgress, silent_libraries
from kleash.prompts import as_rows, prompts_of_update
from kleash.report import write_report
from kleash.rollout import RolloutConfig
from kleash.run import Run, run_from, save, write_checkpoint
from kleash.samples import Rows, samples_of, token_maps_of
from kleash.scorers import FunctionScorer, RewardFunction, Scorer, model_scorer
from kleash.scoring import Scored, score_rollout
from kleash.seeds import derived_seed, generator_for
from kleash.targets import targets_of


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a finished or interrupted run left behind.

    interrupted says that updates are left to do; stop_requested that a signal came, perhaps during the last of them.
    """

    out: Path
    completed_updates: int
    interrupted: bool
    stop_requested: bool
    checkpoint: Path


@dataclass(kw_only=True)
class Clock:
    """Seconds by phase of one update."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[f"seconds_{name}"] = round(time.perf_counter() - start, 4)


def train_run(config: RunConfig, given: Given, *, resume: bool = False, quiet: bool = False) -> RunResult:
    """Run the updates of a configuration; see `train` for what it may raise.

    Whatever stops the run between two updates, or before the steps of one, leaves a checkpoint behind; a first update
    that fails leaves nothing, as input does that is refused before it.
    """
    with silent_libraries():
        run = run_from(config, given, resume=resume)
    main = run.accelerator.is_main_process
    run.accelerator.init_trackers("kleash", config=_flat(config))
    title = Path(config.out).name
    with (
        silent_libraries(),
        RunProgress(title=title, updates=config.updates, completed=run.completed, quiet=quiet or not main) as progress,
        stop_on_signals(progress.say) as stop,
    ):
        try:
            _loop(run, progress, stop)
        except BaseException as error:
            if main and isinstance(error, Exception) and run.has_come_to_nothing:
                run.directory.take_back()
            elif main and run.weights_are_between_updates:
                write_checkpoint(run)
            if main and run.records and isinstance(error, RunStopped):
                write_report([run.directory.path], run.directory.report)
            raise
        checkpoint = save(run)
    if main and run.records:
        write_report([run.directory.path], run.directory.report)
    for tracker in run.accelerator.trackers:
        tracker.finish()  # not end_training, which parts the processes for good: the next run of a sweep needs them
    return RunResult(
        out=run.directory.path,
        completed_updates=run.completed,
        interrupted=run.completed < config.updates,
        stop_requested=_anyone(run, stop.requested),
        checkpoint=checkpoint,
    )


def _loop(run: Run, progress: RunProgress, stop: Stop) -> None:
    while run.completed < run.config.updates:
        try:
            record, drift, timings, samples, maps = update(run, run.completed + 1)
        except NonFiniteError as error:
            progress.say(rescued(run, error))
            continue
        if run.accelerator.is_main_process:
            run.directory.append("records.jsonl", [record])
            run.directory.append("drift.jsonl", [drift])
            run.directory.append("timings.jsonl", [timings])
            run.directory.append("samples.jsonl", samples)
            if maps:
                run.directory.renew("token_maps.jsonl", maps, kept=1)
        run.accelerator.log({key: value for key, value in record.items() if value is not None}, step=run.completed)
        progress.show(record, timings)
        _guard(run, record, progress)
        if _anyone(run, stop.requested):
            return
        if run.completed % run.config.checkpoint.every == 0:
            save(run)


def _guard(run: Run, record: Record, progress: RunProgress) -> None:
    """Let the alarms and the ceiling act; only then may a checkpoint count the update."""
    try:
        for sentence in guarded(run, record):
            progress.say(sentence)
    except RunStopped:
        run.weights_are_between_updates = True
        raise
    run.weights_are_between_updates = True


def _anyone(run: Run, flag: bool) -> bool:
    """Whether the flag is set on any process."""
    return bool(run.add_up(torch.tensor(float(flag), device=run.accelerator.device)) > 0)


def update(run: Run, number: int) -> tuple[Record, dict[str, Any], dict[str, Any], Rows, Rows]:
    """One update, from prompts to drift.

    Returns its record, its drift map, its seconds by phase, some samples, and some of them token by token.

    A reference that follows the policy moves after the PPO steps, so the next update is the first to be measured to it.
    """
    config, form, clock = run.config, FORMS[run.config.kl], Clock()
    set_seed(derived_seed(config.seed, "update", number, run.accelerator.process_index) % 2**32)
    with clock.phase("total"):
        with clock.phase("sampling"), run.accelerator.autocast():
            prompts, rollout = sampled(run, number)
        with clock.phase("rewarding"), run.accelerator.autocast():
            scores, eval_scores = judged(run, prompts, rollout)
        epochs = _epochs(run, number)
        first_epoch = next(epochs)
        with clock.phase("scoring"), run.accelerator.autocast():
            micro_batches = [rows for minibatch in first_epoch for rows in minibatch]
            scored = score_rollout(
                run.models,
                rollout,
                micro_batches,
                temperature=config.rollout.temperature,
                keep_ref_states=form.in_loss == "exact",
            )
        figures, tokens = _gathered(run, rollout, scored, scores, eval_scores)
        samples = samples_of(number, prompts, rollout, figures, count=config.samples_per_update)
        maps = token_maps_of(run, number, prompts, rollout, figures, tokens)
        aim = targets_of(rollout, scored, scores, config.ppo, form=form, beta=run.leash.beta, reduce=run.add_up)
        with clock.phase("optimising"):
            run.weights_are_between_updates = False
            stats = ppo_update(
                run.models,
                rollout,
                aim.targets,
                chain([first_epoch], epochs),
                config.ppo,
                temperature=config.rollout.temperature,
                optimizer=run.optimizer,
                accelerator=run.accelerator,
            )
        run.move_reference(number)
        record = record_of(
            number,
            figures,
            tokens,
            stats,
            missing_eos_penalty=config.ppo.missing_eos_penalty,
            beta=run.leash.beta,
            learning_rate=float(run.scheduler.get_last_lr()[0]),
            advantage_std=aim.scale,
            share_of_k1=aim.share_of_k1,
            explained=explained_variance(
                aim.targets.old_values, aim.targets.returns, rollout.response_mask, reduce=run.add_up
            ),
        )
        run.leash = run.leash.after(
            Measurement(
                update=number,
                kl_policy_ref_per_sequence=figures.kl_interval.mean,
                sequences=figures.kl_interval.n,
            )
        )
        run.scheduler.step()
        run.completed = number
        drift = drift_map(number, tokens, run.parts.tokenizer)
    return record, drift, {"update": number, **clock.seconds}, samples, maps


def sampled(run: Run, number: int) -> tuple[Prompts, Rollout]:
    """This process's share of the update's prompts, and the policy's responses to them."""
    config = run.config
    count = config.rollout.prompts_per_update
    own = run.share(count)
    prompts = prompts_of_update(run.parts.prompts, number, per_update=count, seed=config.seed)
    shape = (count, config.rollout.max_new_tokens)
    uniforms = torch.rand(shape, dtype=torch.float64, generator=generator_for(config.seed, "sampling", number))
    prompts = prompts.rows(own.start, own.stop)
    return prompts, run.parts.rollout(run.parts.policy, prompts, uniforms[own], config.rollout)


def judged(run: Run, prompts: Prompts, rollout: Rollout) -> tuple[Tensor, Tensor | None]:
    """Scores by the reward and by the judge; where either fails on one process, every process stops with it."""
    failure: RewardError | None = None
    try:
        scores = [scorer(prompts, rollout) for scorer in filter(None, (run.parts.scorer, run.parts.eval_scorer))]
    except RewardError as error:
        failure = error
        if not run.has_come_to_nothing:
            failure = RewardError(f"{str(error).rstrip('.')}, then go on with --resume.")
            failure.__cause__ = error
    if _anyone(run, failure is not None):
        raise failure or RewardError("Expected scores on every process, found that another one failed; see its error.")
    own = [values.to(run.accelerator.device) for values in scores]
    return own[0], own[1] if run.parts.eval_scorer else None


def _epochs(run: Run, number: int) -> Iterator[list[list[Tensor]]]:
    """The minibatches of each epoch, shuffled afresh."""
    rows = run.config.rollout.prompts_per_update // run.accelerator.num_processes
    for epoch in range(run.config.ppo.epochs):
        generator = generator_for(run.config.seed, "minibatches", number, epoch, run.accelerator.process_index)
        yield minibatches_of(rows, run.config.ppo, generator)


def _gathered(
    run: Run, rollout: Rollout, scored: Scored, scores: Tensor, eval_scores: Tensor | None
) -> tuple[SequenceFigures, TokenFigures]:
    """The figures of all processes, per sequence and per token, in the order of the prompts."""

    def gather(columns: dict[str, Tensor]) -> dict[str, Any]:
        return {name: run.accelerator.gather(column).cpu() for name, column in columns.items()}

    of_tokens = token_figures(
        rollout,
        scored,
        time=run.config.rollout.max_new_tokens,
        eos_token_ids=run.parts.eos_token_ids,
        special_token_ids=special_token_ids(run.parts.tokenizer),
    )
    of_sequences = gather(sequence_figures(rollout, scored, scores, eval_scores))
    return SequenceFigures(**{"eval_scores": None, **of_sequences}), TokenFigures(**gather(of_tokens))


def _flat(config: RunConfig) -> dict[str, Any]:
    """The configuration as one level of dotted keys, for trackers."""
    flat: dict[str, Any] = {}
    for key, value in config.model_dump(mode="json").items():
        flat |= (
            {f"{key}.{name}": str(part) for name, part in value.items()}
            if isinstance(value, dict)
            else {key: str(value)}
        )
    return flat


Reward: TypeAlias = RewardFunction | PreTrainedModel | str | Path


def train(
    *,
    policy: ModelOrPath,
    reward: Reward,
    prompts: list[str] | list[dict[str, Any]] | str | Path,
    out: str | Path,
    reference: "ModelOrPath | ReferenceConfig | None" = None,
    eval_reward: Reward | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    kl: KLName = "exact",
    allow_biased: bool = False,
    leash: LeashConfig | None = None,
    rollout: RolloutConfig | None = None,
    ppo: PPOConfig | None = None,
    alarms: AlarmsConfig | None = None,
    updates: int = 100,
    seed: int = 0,
    checkpoint: CheckpointConfig | None = None,
    preflight: bool = True,
    resume: bool = False,
    quiet: bool = False,
) -> RunResult:
    """Train a policy against a reward on a KL leash: `kleash train` with models, paths or functions.

    Args:
      policy: a causal model, perhaps with an adapter (trained in place), or where to load one.
      reward: `f(prompts, completions, **columns) -> list[float]`, a reward model, a path, or "module:function".
      prompts: strings, rows with a key `prompt`, a file, or a data set's name.
      out: directory of the run; must not hold another one unless `resume`.
      reference: what the KL is measured to: a model, a path, or a ReferenceConfig; None = a frozen copy of the policy
        as it comes in, its adapter included.
      eval_reward: the held-out judge, in the same forms as reward; trains nothing.
      tokenizer: of the policy; None = loaded from where the policy came from.
      kl: how the KL enters training: "exact", "k1", "blend", or a biased form by its name if allow_biased.
      allow_biased: also take a form whose gradient is not that of score - beta * KL.
      leash: None = a fixed beta of 0.05.
      rollout, ppo, alarms, checkpoint: None = their defaults.
      updates, seed: length of the run, and what every random number follows from.
      preflight: try everything out on a few responses before the first update, and stop on a fault.
      resume: go on from the newest checkpoint in `out`.
      quiet: no progress on stderr.

    Returns:
      RunResult: where the run lies, its last checkpoint, and whether a signal interrupted it.

    Raises:
      InputError: something given cannot be used; found before the first step wherever possible.
      RunStopped: the run stopped itself: on a failed check, a loss that is not finite, an alarm, or its ceiling.
    """
    content = {
        "policy": _name(policy),
        "reward": _name(reward),
        "prompts": "given as a list" if isinstance(prompts, list) else str(prompts),
        "out": str(out),
        "reference": reference if reference is None or isinstance(reference, ReferenceConfig) else _name(reference),
        "eval_reward": None if eval_reward is None else _name(eval_reward),
        "kl": kl,
        "allow_biased": allow_biased,
        "leash": leash or LeashConfig(),
        "rollout": rollout or RolloutConfig(),
        "ppo": ppo or PPOConfig(),
        "alarms": alarms or AlarmsConfig(),
        "updates": updates,
        "seed": seed,
        "checkpoint": checkpoint or CheckpointConfig(),
        "preflight": preflight,
    }
    config = config_from(content, "the arguments of kleash.train")
    tokenizer = tokenizer or _tokenizer_of(policy)
    given = Given(
        policy=None if isinstance(policy, str | Path) else causal_model(policy),
        tokenizer=tokenizer,
        reference=None
        if reference is None or isinstance(reference, str | Path | ReferenceConfig)
        else causal_model(reference),
        scorer=_scorer(reward, tokenizer),
        eval_scorer=None if eval_reward is None else _scorer(eval_reward, tokenizer),
        rows=as_rows(prompts) if isinstance(prompts, list) else None,
    )
    return train_run(config, given, resume=resume, quiet=quiet)


def _tokenizer_of(policy: ModelOrPath) -> PreTrainedTokenizerBase:
    source = source_of(policy)
    if not str(source):
        raise ModelError("Expected a tokenizer for a policy that was loaded from nowhere, found none; give tokenizer.")
    return load_tokenizer(source)


def _name(thing: "ModelOrPath | Reward") -> str:
    """How a configuration names what was handed over as an object."""
    if isinstance(thing, str | Path):
        return str(thing)
    if isinstance(thing, nn.Module):
        return f"given as a {type(thing).__name__}"
    return f"given as the function {getattr(thing, '__qualname__', type(thing).__name__)}"


def _scorer(reward: Reward, tokenizer: PreTrainedTokenizerBase) -> Scorer | None:
    """A scorer for what was handed over as an object; None for a name, which the configuration resolves."""
    if isinstance(reward, str | Path):
        return None
    if isinstance(reward, PreTrainedModel):
        return model_scorer(reward, _name(reward), tokenizer)
    return FunctionScorer(function=reward, name=_name(reward))
