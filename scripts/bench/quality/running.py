"""Runs of a command in processes of their own, forked: nothing is left behind, and libraries are imported once."""

import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

from tokentune.cli.command import run_command


@dataclass(frozen=True)
class Job:
    """One run: its name on the screen, the command's `main`, the words behind it, and whatever else is to be known."""

    name: str
    command: Callable[[list[str]], None]
    words: list[str]
    about: Any = None


def run_all(jobs: Iterable[Job], processes: int, folder: Path, done: Callable[[Job, Path], None]) -> list[Job]:
    """Runs all jobs, `processes` at a time, and calls `done(job, its --model_save_path)` after each that succeeded.

    Args:
        folder: where runs are written; each is deleted when `done` returns.

    Returns:
        The jobs that failed; the end of their output is on the screen.
    """
    waiting, running, failed = list(jobs)[::-1], {}, []
    while waiting or running:
        while waiting and len(running) < processes:
            job, target = waiting.pop(), Path(tempfile.mkdtemp(dir=folder))
            print(f"== {job.name}", flush=True)
            process = multiprocessing.get_context("fork").Process(target=run, args=(job, target))
            process.start()
            running[process.sentinel] = process, job, target
        for sentinel in connection.wait(list(running)):
            process, job, target = running.pop(sentinel)
            process.join()
            if process.exitcode == 0:
                done(job, target / "models")
            else:
                print((target / "log").read_text(encoding="utf-8")[-2000:], file=sys.stderr, flush=True)
                failed.append(job)
            shutil.rmtree(target)
    return failed


def run(job: Job, target: Path) -> None:
    """In the forked process: the command, what it prints going into a file."""
    with (target / "log").open("w", encoding="utf-8") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        run_command(lambda: job.command([*job.words, "--model_save_path", str(target / "models")]))
