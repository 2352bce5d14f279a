"""Ctrl-C and SIGTERM: a run that is asked to end finishes its step, saves a checkpoint and says how to go on.

Before training begins there is nothing to save, and the command ends at once. In training the first signal is noted,
and looked at after each optimizer step and between the batches of a validation; the second one ends the process on the
spot, which a run survives as it survives a SIGKILL. Exit codes are the shells': 130 after SIGINT, 143 after SIGTERM.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

from tokentune.settings.flags import process_count

# A launcher hands a Ctrl-C on to processes that got it from the terminal already: a second signal that comes sooner is
# the first one's echo.
_ECHO_SECONDS = 5.0


class Interrupted(KeyboardInterrupt):
    """A run was asked to end, and ends. The message says what was saved and how to go on."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class _Noted:
    """What the handler knows. One for the process, as its signals are."""

    number: int | None = None
    at: float = 0.0
    deferred = False
    process: int = 0
    cure: str = ""


_noted = _Noted()


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
    _noted.number, _noted.deferred, _noted.process, _noted.cure = None, False, os.getpid(), cure
    before = {number: signal.signal(number, _handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _noted.number, _noted.deferred = None, False


def defer_interruptions() -> None:
    """From now on, up to the end of `interruptible`, a first signal is noted instead of raised."""
    _noted.deferred = True


def interruption() -> int | None:
    """The signal that asked this process to end; None: none did."""
    return _noted.number


def signal_name(number: int) -> str:
    """As a user knows it: "Ctrl-C" or "SIGTERM"."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


Batch = TypeVar("Batch")


def until_interrupted(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches, as long as nobody asks this process to end; raises `Interrupted` then.

    Several processes go on to the end: each would stop at another batch, and they wait for one another.
    """
    for batch in batches:
        if interruption() is not None and process_count() == 1:
            raise Interrupted(interruption(), f"interrupted by {signal_name(interruption())}")
        yield batch


def _handle(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _noted.process:  # a data loader's worker: its parent decides when it ends
        if number == signal.SIGTERM:
            os._exit(128 + number)
        return
    if not _noted.deferred:
        raise Interrupted(number, f"interrupted by {signal_name(number)}. {_noted.cure}")
    if _noted.number is None:
        _noted.number, _noted.at = number, time.monotonic()
        _say("ending after this step, with a checkpoint (once more: at once, without one)")
    elif process_count() == 1 or time.monotonic() - _noted.at > _ECHO_SECONDS:
        _say("ended at once; the checkpoints written before are whole")
        os._exit(128 + number)


def _say(text: str) -> None:
    if os.environ.get("RANK", "0") != "0":  # a launcher's other processes get the same signal
        return
    # Not print: the signal may have come in the middle of one.
    os.write(sys.__stderr__.fileno() if sys.__stderr__ is not None else 2, f"\n{text}\n".encode())
