"""Permissions of files that libraries write."""

from contextlib import suppress
from pathlib import Path


def with_usual_modes(folder: Path) -> None:
    """Gives the files in a folder the permissions of any new file: safetensors' are for their owner's eyes alone.

    Where a file system has no permissions, or the disk no room for a file to look at, they stay as they are.
    """
    new = folder / ".mode"
    with suppress(OSError):
        new.touch()
        mode = new.stat().st_mode & 0o777
        new.unlink()
        for path in folder.rglob("*"):
            if path.is_file():
                path.chmod(mode)
