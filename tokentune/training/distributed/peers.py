"""A run's other processes: which of them says what, and what the rest do when one has ended."""

import os
import select
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
import torch.distributed as dist
import transformers

from tokentune.processes import process_count
from tokentune.training.distributed.interruptions import interruption

_PEER_IS_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused")
# Seconds. A launcher ends all processes as soon as one has ended, which must not be a mute one.
_OTHERS_SAY_IT = 5.0


def let_first_process_speak() -> None:
    """Silences the libraries' progress bars and warnings in all processes but the first one; errors stay."""
    if os.environ.get("RANK", "0") == "0":
        return
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore")


def lost_peer(error: RuntimeError) -> str | None:
    """What to tell the user of an error that comes of waiting for a process that has ended; None: of another error."""
    said = next((words for words in _PEER_IS_GONE if words in str(error)), None)
    if process_count() == 1 or not (said or isinstance(error, dist.DistError)):
        return None
    return (
        f"another process of this run has ended, and rank {os.environ.get('RANK', '?')} with it "
        f"({said or str(error).splitlines()[0]}).\n"
        "Its last words stand above, its exit code below. --resume_from_checkpoint goes on from the last checkpoint."
    )


@contextmanager
def end_when_stuck(seconds: float = 20.0) -> Iterator[None]:
    """Within it one of several processes ends when another one has ended, or when a signal does not reach it.

    A launcher ends the others with SIGTERM when one has died. Python runs signal handlers after the current call, which
    on a GPU waits for the dead process. A thread gets the signal at once, and ends the process where no handler
    (`training/distributed/interruptions.py`) has run `seconds` later.

    Raises:
        SystemExit: 1, where another process has ended, with a message that one process gives.
    """
    if process_count() == 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_end_unless_heard, args=(reading, seconds), daemon=True).start()
    try:
        yield
        if dist.is_initialized():
            dist.destroy_process_group()  # its threads, alive at the process's end, would now and then abort it
    except RuntimeError as error:
        if (message := lost_peer(error)) is None:
            raise
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which the launcher sends by now: first the message
        say_once(f"error: {message}")
        sys.exit(1)
    finally:
        signal.set_wakeup_fd(before)
        os.close(writing)  # which ends the thread


def _end_unless_heard(reading: int, seconds: float) -> None:
    """Ends the process where a signal comes by the pipe and no handler runs in time; returns at the pipe's end."""
    number = None
    while number not in (signal.SIGTERM, signal.SIGINT):
        came = os.read(reading, 1)
        if not came:
            return
        number = came[0]
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        if select.select([reading], [], [], left)[0] and not os.read(reading, 4096):
            return
    if interruption() is None:
        rank = os.environ.get("RANK", "?")
        os.write(2, f"error: rank {rank} was told to end while it waited for another process: stopped\n".encode())
        os._exit(128 + number)


def say_once(message: str) -> None:
    """Prints what is wrong; of a launcher's processes, which mostly find the same, one does.

    Once the processes know each other it is the first to come here; before that, the first one of each machine.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        first = os.environ.get("LOCAL_RANK", "0") == "0"
        if dist.is_initialized():
            try:
                first = dist.distributed_c10d._get_default_store().add("tokentune/errors", 1) == 1
            except Exception:  # the store ended with the process that kept it
                first = True
        if not first:
            time.sleep(_OTHERS_SAY_IT)
            return
    print(message, file=sys.stderr)
