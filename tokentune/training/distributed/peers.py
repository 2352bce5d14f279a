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

from tokentune.errors import say_once
from tokentune.settings.flags import process_count
from tokentune.training.distributed.interruptions import interruption

_PEER_IS_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused")
# Seconds. A launcher ends all processes as soon as one has ended, which must not be a mute one.
_OTHERS_SAY_IT = 5.0


def let_first_process_speak() -> None:
    """Silences the libraries' progress bars and notes in all processes but the first one; their errors stay."""
    if os.environ.get("RANK", "0") == "0":
        return
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore")


def lost_peer(error: RuntimeError) -> str | None:
    """What to tell the user where this is what a process finds when it waits for another one that has ended."""
    said = next((words for words in _PEER_IS_GONE if words in str(error)), None)
    if process_count() == 1 or not (said or isinstance(error, dist.DistError)):
        return None
    return (
        f"another process of this run has ended, and rank {os.environ.get('RANK', '?')} with it "
        f"({said or str(error).splitlines()[0]}).\n"
        "Its last words stand above, its exit code below. --resume_from_checkpoint goes on from the last checkpoint."
    )


def leave_it_to_others() -> bool:
    """Whether another process tells the user of an error. Lets it, before it returns True.

    Once the processes know each other it is the first to come here; before that, the first one of each machine.
    """
    mine = os.environ.get("LOCAL_RANK", "0") == "0"
    if dist.is_initialized():
        try:
            mine = dist.distributed_c10d._get_default_store().add("tokentune/errors", 1) == 1
        except Exception:  # it ended with the process that kept it
            mine = True
    if not mine:
        time.sleep(_OTHERS_SAY_IT)
    return not mine


@contextmanager
def end_when_stuck(seconds: float = 20.0) -> Iterator[None]:
    """Within it a process ends that has lost another one, or that a signal does not reach. For one of several.

    A launcher ends the others with SIGTERM when one has died. Python's handlers then wait for the call that is under
    way, and on a GPU that is the one that waits for the dead process. A thread hears of the signal at once, and ends
    the process where no handler (`training/distributed/interruptions.py`) has run `seconds` later.

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
    number = None
    while number not in (signal.SIGTERM, signal.SIGINT):
        came = os.read(reading, 1)
        if not came:
            return
        number = came[0]
    time.sleep(seconds)
    if interruption() is not None or not _still_inside(reading):
        return
    text = f"error: rank {os.environ.get('RANK', '?')} was told to end while it waited for another process: stopped\n"
    os.write(2, text.encode())
    os._exit(128 + number)


def _still_inside(reading: int) -> bool:
    """Whether `end_when_stuck` goes on: its end of the pipe is open. Takes what else has come."""
    while select.select([reading], [], [], 0)[0]:
        if not os.read(reading, 4096):
            return False
    return True
