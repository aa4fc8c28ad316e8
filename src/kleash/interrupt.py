"""Ctrl-C and SIGTERM: a run ends after its update, with a checkpoint, and not in the middle of a step."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(kw_only=True)
class Stop:
    """Set by the first Ctrl-C or SIGTERM; the loop looks at it after each update."""

    requested: bool = False


@contextmanager
def stop_on_signals(say: Callable[[str], None]) -> Iterator[Stop]:
    """The first signal lets the update finish and a checkpoint be saved; the second interrupts at once.

    Signals reach the main thread only: anywhere else this changes nothing.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def request(number: int, frame: object) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True
        say("Finishing this update, then saving a checkpoint; once more stops at once.")

    previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
