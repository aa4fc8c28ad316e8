"""What a run does about its own drift, after each update: the alarms, the ceiling, and the way back.

An alarm is logged, or tightens the leash, rolls the run back, or stops it, as it is configured. A KL above
`leash.max_kl_per_sequence` rolls back too: the run takes up its last checkpoint below the ceiling with a larger beta,
and goes on. Everything follows from the records, so a resumed run does the same; a roll-back counts from the moment
its checkpoint has been written again, and a run killed before that does it once more.
"""

from collections.abc import Iterator
from dataclasses import asdict

from kleash.alarms import Alarm
from kleash.checkpoint import checkpoints_in, remove_checkpoint
from kleash.drift import Record
from kleash.errors import NonFiniteError, RunStopped, first_line
from kleash.run import Run, alarm_watch, restore, write_checkpoint

REPEAT = 10  # updates after which an alarm that still stands is said, and acted upon, again


def guarded(run: Run, record: Record) -> Iterator[str]:
    """Look at an update's record and act; yields a sentence for everything that a person should know.

    Raises:
      RunStopped: an alarm is set to stop, or the run has used up its roll-backs.
    """
    run.records.append(record)
    due = [alarm for alarm in run.watch.see(record) if (alarm.update - alarm.since) % REPEAT == 0]
    if run.accelerator.is_main_process:
        run.directory.append("alarms.jsonl", [asdict(alarm) for alarm in due])
    for alarm in due:
        yield f"Alarm {alarm.name}{_stretch(alarm)}: {alarm.sentence}"
    for alarm in due:
        if alarm.action == "stop":
            raise RunStopped(f"Stopped by the alarm {alarm.name} after update {alarm.update}: {alarm.sentence}")
    ceiling = run.config.leash.max_kl_per_sequence
    kl = drift_from_start(record)
    if ceiling is not None and kl > ceiling:
        why = f"KL(policy || first reference) is {kl:.3g} nats per sequence, above its ceiling of {ceiling:g}"
        yield roll_back(run, before=run.completed, why=why)
        return
    for alarm in due:
        if alarm.action == "roll_back":
            yield roll_back(run, before=alarm.since, why=f"the alarm {alarm.name} stands since update {alarm.since}")
            return
    tightening = [alarm.name for alarm in due if alarm.action == "tighten"]
    if tightening:
        yield _tighten(run, tightening)


def rescued(run: Run, error: NonFiniteError) -> str:
    """Roll back from an update that broke down on a NaN or an infinity, where the leash has a ceiling to go back below.

    Returns:
      What was done, in a sentence.

    Raises:
      NonFiniteError: the same, for a leash without ceiling or roll-backs left, and among several processes, of which
        the others may not have failed.
      RunStopped: as roll_back does.
    """
    leash = run.config.leash
    if leash.max_kl_per_sequence is None or run.roll_backs >= leash.max_roll_backs or run.accelerator.num_processes > 1:
        raise error
    return roll_back(run, before=run.completed + 1, why=f"update {run.completed + 1} broke down ({first_line(error)})")


def drift_from_start(record: Record) -> float:
    """The exact KL to the reference that the run started with, which a moving reference cannot hide, nats."""
    kl = record["kl_policy_first_ref_per_sequence"]
    assert kl is not None, "scoring has raised for a KL that is not finite"
    return float(kl)


def _stretch(alarm: Alarm) -> str:
    return "" if alarm.since == alarm.update else f" (since update {alarm.since})"


def _tighten(run: Run, alarms: list[str]) -> str:
    before = run.leash.beta
    run.leash = run.leash.tightened(run.config.leash.tighten_factor)
    after = run.leash.beta
    if after == before:
        return f"The leash cannot be tightened: beta is at its bound {before:.3g}."
    return f"Leash tightened for {' and '.join(alarms)}: beta {before:.3g} -> {after:.3g}."


def roll_back(run: Run, *, before: int, why: str) -> str:
    """Take up the newest checkpoint whose policy was measured, and found well, before an update; tighten its leash.

    The checkpoint after update N holds the policy that update N + 1 measures. Its leash is tightened by
    leash.tighten_factor and written back, so the second roll-back to the same checkpoint tightens twice. The records
    of the updates that are given up go to roll_backs.jsonl.

    Args:
      run: its last update has been recorded.
      before: only checkpoints of updates below before - 1 come into question.
      why: what is wrong, for the sentences.

    Returns:
      What was done, in a sentence.

    Raises:
      RunStopped: no roll-back is left, no such checkpoint is kept, or its leash cannot be tightened.
    """
    most = run.config.leash.max_roll_backs
    if run.roll_backs >= most:
        raise RunStopped(
            f"Stopped after update {run.completed} and {run.roll_backs} of {most} roll-backs: {why}; start again with "
            "a larger beta or a lower learning rate."
        )
    found = [path for path in checkpoints_in(run.directory.checkpoints) if int(path.name) + 1 < before]
    if not found:
        raise RunStopped(
            f"Stopped after update {run.completed}: {why}, and no checkpoint from before is kept; raise "
            "checkpoint.keep, or start again with a larger beta or a lower learning rate."
        )
    given_up, left_off = run.records, run.completed
    run.accelerator.wait_for_everyone()
    roll_backs = run.roll_backs
    restore(run, found[-1])
    beta = run.leash.beta
    run.leash = run.leash.tightened(run.config.leash.tighten_factor)
    if run.leash.beta == beta:
        raise RunStopped(
            f"Stopped after update {left_off}: {why}, and beta {beta:.3g} of the checkpoint after update "
            f"{run.completed} is at its bound; raise leash.beta_max, or lower the learning rate."
        )
    run.roll_backs = roll_backs + 1
    run.records = given_up[: run.completed]
    run.watch = alarm_watch(run.config, run.records)
    run.accelerator.wait_for_everyone()  # only now may the files be touched that others were reading
    what = (
        f"Roll-back {run.roll_backs} of {most}: {why}; back from update {left_off} to the checkpoint after update "
        f"{run.completed}, beta {beta:.3g} -> {run.leash.beta:.3g}."
    )
    if run.accelerator.is_main_process:
        _write_down(run, what, given_up[run.completed :])
    run.accelerator.wait_for_everyone()
    return what


def _write_down(run: Run, what: str, given_up: list[Record]) -> None:
    """The main process's part of a roll-back: the line, then the checkpoint that makes it count, then the files."""
    line = {
        "roll_back": run.roll_backs,
        "from": run.completed + len(given_up),
        "to": run.completed,
        "beta": run.leash.beta,
        "why": what,
        "records": given_up,
    }
    run.directory.append("roll_backs.jsonl", [line])
    for checkpoint in checkpoints_in(run.directory.checkpoints):
        if int(checkpoint.name) > run.completed:
            remove_checkpoint(checkpoint)
    write_checkpoint(run, again=True)
    run.directory.forget_after(run.completed)
