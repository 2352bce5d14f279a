"""The processes of a run, as its launcher tells them."""

import os


def process_count() -> int:
    """Processes of a launcher such as torchrun; 1 in a plain run."""
    return int(os.environ.get("WORLD_SIZE", "1"))
