"""The processes of a run, and the engine that connects them, as their launcher tells in its environment."""

import os

DDP, FSDP, DEEPSPEED = "DistributedDataParallel", "FSDP", "DeepSpeed"


def process_count() -> int:
    """Processes of a launcher such as torchrun; 1 in a plain run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def engine() -> str | None:
    """The engine that the launcher's environment asks for: `DDP`, `FSDP`, `DEEPSPEED`; None in a plain run.

    `accelerate launch` hands its configuration down in these variables.
    """
    if is_on("ACCELERATE_USE_DEEPSPEED"):
        return DEEPSPEED
    if is_on("ACCELERATE_USE_FSDP"):
        return FSDP
    return DDP if process_count() > 1 else None


def is_on(variable: str) -> bool:
    """Whether an environment variable of `accelerate launch` says yes."""
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes")
