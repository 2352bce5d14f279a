"""How far the measuring is: a bar with the time that is left, or lines of the log where there is no terminal."""

import logging
import time
from types import TracebackType
from typing import Self

from tqdm.auto import tqdm

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 30


class Progress:
    """Counts batches, each a forward and a backward pass."""

    def __init__(self, batches: int) -> None:
        self.bar = tqdm(total=batches, desc="gradients", unit=" batches", disable=None)
        self.batches, self.done = batches, 0
        self.started = self.said = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.bar.close()

    def name(self, setting: str) -> None:
        """Shows what is being measured."""
        self.bar.set_postfix_str(setting)

    def tick(self) -> None:
        """One more batch is done."""
        self.done += 1
        self.bar.update()
        now = time.monotonic()
        if self.bar.disable and now - self.said >= SECONDS_BETWEEN_LINES:
            self.said = now
            left = (now - self.started) / self.done * (self.batches - self.done)
            words = "gradients: %d of %d batches, about %s left"
            logger.info(words, self.done, self.batches, tqdm.format_interval(left))

    def told(self, setting: str, draws: int, cosine: float) -> None:
        """A setting is done: a log has no bar, and gets a line."""
        if self.bar.disable:
            logger.info("%s: %d draws, cosine %.3f", setting, draws, cosine)
