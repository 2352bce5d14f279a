"""How long the parts of a run take: a line in the log when each ends, and `phases` in the training summary.

    with phase("tokenize"):
        ...

A phase within another one (a validation during training) counts for itself alone, and is told with the outer one.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

logger = logging.getLogger(__name__)

_seconds: dict[str, float] = {}  # by phase, since the clock was started
_open: list[dict[str, float]] = []  # the same of each phase that has not ended, the outermost first
_started = time.perf_counter()


def start_clock() -> None:
    """Forgets what was measured. To be called where a command begins."""
    global _started
    _started = time.perf_counter()
    _seconds.clear()
    _open.clear()


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Measures what is within it."""
    started = time.perf_counter()
    _open.append({name: 0.0})
    try:
        yield
    finally:
        found = _open.pop()
        found[name] += time.perf_counter() - started - sum(found.values())
        outer = _open[-1] if _open else _seconds
        for key, seconds in found.items():
            outer[key] = outer.get(key, 0.0) + seconds
    if not _open:
        logger.info("time: %s", ", ".join(f"{key} {_duration(seconds)}" for key, seconds in found.items()))


def times() -> dict[str, Any]:
    """For a summary: `phases` {name: seconds}, and `wall_seconds` since the clock was started. Starts it anew."""
    found = {"phases": dict(_seconds), "wall_seconds": time.perf_counter() - _started}
    start_clock()
    return found


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))
