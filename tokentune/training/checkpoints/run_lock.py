"""One run at a time in a folder: a lock that ends with its process, however that ends.

It is a kernel lock on a file beside the run's folder (`.<folder>.lock`): after a SIGKILL the file stays, unlocked.
POSIX record locks (fcntl.lockf) belong to their process; flock's are inherited by data loader workers, which may
outlive it. They are dropped when the process closes any descriptor of the file, so it is not in the run's folder, whose
files are read and uploaded. The package filelock reports a folder that cannot be written to as locked, and on a file
system without locks takes the file's existence for one, which outlives a SIGKILL.
"""

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tokentune.errors import UserError
from tokentune.posix import fcntl
from tokentune.training.checkpoints.run_folder import check_writable, no_empty_folders


@contextmanager
def locked(run_folder: Path) -> Iterator[None]:
    """Holds the lock of a run's folder, which need not exist, in the first of a launcher's processes.

    Raises:
        UserError: another run holds it, named by process and host, or the folder cannot be written.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    check_writable(run_folder)
    parent = run_folder.absolute().parent
    path = parent / f".{run_folder.name}.lock"
    with no_empty_folders(parent):
        try:
            parent.mkdir(parents=True, exist_ok=True)
            descriptor = _take(path, run_folder)
        except OSError as error:
            raise UserError(f"{path}: cannot be locked: {error.strerror}. Give another --model_save_path.") from error
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # before it is unlocked: `_take` checks that its file still exists
            os.close(descriptor)


def _take(path: Path, run_folder: Path) -> int:
    """An open descriptor of the locked file. Raises UserError where another process has it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            held = error.errno in (errno.EACCES, errno.EAGAIN)
            owner = os.pread(descriptor, 4096, 0).decode() or "a process that began just now"  # not written yet
            os.close(descriptor)
            if not held:
                raise
            raise UserError(
                f"another run is writing to {run_folder}: {owner}.\n"
                "Wait for it, end it, or give this one a name of its own with --run_name."
            ) from None
        with suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(descriptor).st_ino:
                break
        os.close(descriptor)  # a run that ended removed the file between our opening and locking it
    os.truncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    return descriptor
