"""Processes that start with torch, transformers and peft imported: 7 s of one core less for each of them.

They are forked by a server that has imported everything and has no threads, which a fork would lose.
"""

import gc
import multiprocessing
import os
from pathlib import Path

CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(
    [
        *("tokentune.finetune", "tokentune.classify", "peft", "pytest", "transformers.models.llama.modeling_llama"),
        *("accelerate.utils", "torch.distributed.fsdp", "torch.distributed.launcher.api"),
    ]
)


def begin_child(output: Path) -> None:
    """First thing in such a process: what it says on both streams goes into a file."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    gc.freeze()
    multiprocessing.set_start_method("fork", force=True)  # for data loader workers, as anywhere else
