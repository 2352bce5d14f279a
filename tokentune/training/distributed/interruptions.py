"""Ctrl-C and SIGTERM: a run that is asked to end finishes its step, saves a checkpoint and says how to go on.

Before training there is nothing to save, and the command ends at once. In training the first signal is noted, and
checked after each optimizer step and between the batches of a validation; a second one ends the process at once, after
which the run can be resumed as after a SIGKILL. Exit codes are the shells': 130 after SIGINT, 143 after SIGTERM.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from tokentune.processes import process_count

# A launcher passes a Ctrl-C on to processes that got it from the terminal already: a second signal that comes sooner
# is the same one.
_ECHO_SECONDS = 5.0


class Interrupted(KeyboardInterrupt):
    """A run was asked to end, and ends. The message says what was saved and how to go on."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class _Noted:  # one for the process, as its signals are
    """What the handler knows."""

    number: int | None = None
    at: float = 0.0
    deferred = False
    process: int = 0
    cure: str = ""


@contextmanager
def interruptible(cure: str = "Training had not begun: start it again.") -> Iterator[None]:
    """Within it, SIGINT and SIGTERM raise `Interrupted`, or are noted where `defer_interruptions` was called.

    Does nothing outside of the process's main thread, where Python sets no handlers.

    Args:
        cure: what to say when one raises it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _Noted.number, _Noted.deferred, _Noted.process, _Noted.cure = None, False, os.getpid(), cure
    before = {number: signal.signal(number, _handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _Noted.number, _Noted.deferred = None, False


def defer_interruptions() -> None:
    """From now on, up to the end of `interruptible`, a first signal is noted instead of raised."""
    _Noted.deferred = True


def interruption() -> int | None:
    """The signal that asked this process to end; None: none did."""
    return _Noted.number


def signal_name(number: int) -> str:
    """As a user knows it: "Ctrl-C" or "SIGTERM"."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def until_interrupted(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches; raises `Interrupted` once this process is asked to end.

    Several processes go on to the end: each would stop at another batch, and they wait for one another.
    """
    for batch in batches:
        if interruption() is not None and process_count() == 1:
            raise Interrupted(interruption(), f"interrupted by {signal_name(interruption())}")
        yield batch


def _handle(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _Noted.process:  # a data loader's worker: its parent decides when it ends
        if number == signal.SIGTERM:
            os._exit(128 + number)
        return
    if not _Noted.deferred:
        raise Interrupted(number, f"interrupted by {signal_name(number)}. {_Noted.cure}")
    if _Noted.number is None:
        _Noted.number, _Noted.at = number, time.monotonic()
        _say("ending after this step, with a checkpoint (once more: at once, without one)")
    elif process_count() == 1 or time.monotonic() - _Noted.at > _ECHO_SECONDS:
        _say("ended at once; the checkpoints written before are whole")
        os._exit(128 + number)


def _say(text: str) -> None:
    if os.environ.get("RANK", "0") != "0":  # a launcher's other processes get the same signal
        return
    # Not print: the signal may have come in the middle of one.
    os.write(sys.__stderr__.fileno() if sys.__stderr__ is not None else 2, f"\n{text}\n".encode())
