"""Flags that a launcher's engine (DDP, FSDP, DeepSpeed) cannot serve."""

import logging
import os
from collections.abc import Mapping
from typing import Any

from tokentune.processes import DDP, FSDP, engine, is_on
from tokentune.settings import machine
from tokentune.settings.flags import require

logger = logging.getLogger(__name__)

# Tried. Others look at whole matrices, have kernels of their own, or make their states before the weights are split.
ON_SHARDED_WEIGHTS = ("adamw_torch", "adamw_torch_fused", "sgd", "rmsprop")


def check_engine(prog: str, flags: Mapping[str, Any]) -> None:
    """Refuses flags that the launcher's engine cannot serve, before anything is read.

    Args:
        prog: the command, such as finetune.py.
        flags: every flag's value, by name.

    Raises:
        UserError: with the reason, and what to take instead.
    """
    chosen = engine()
    if chosen is None:
        return
    require(
        not flags["model_parallel"],
        f"--model_parallel spreads one process's layers over the GPUs, and {chosen} gives each process a GPU of its "
        "own: leave one of them out (FSDP splits a large model: LAUNCH=fsdp2)",
    )
    require(
        not is_on("ACCELERATE_USE_PARALLELISM_CONFIG"),
        "the launcher's parallelism_config (tensor, context or sequence parallelism) splits the tokens or heads that "
        "one selection is drawn for and attends over, which is not supported: take FSDP or DDP",
    )
    if chosen == DDP:
        return
    require(
        machine.has_accelerator(),
        f"{chosen} needs accelerators: without any, accelerate passes over it in silence, and each process would train "
        "by itself. Take torchrun, or LAUNCH=ddp, on CPUs",
    )
    require(
        prog == "finetune.py",
        f"{prog} has not been made to run with {chosen}, and its encoders fit one GPU: take DDP (LAUNCH=ddp)",
    )
    (_check_fsdp if chosen == FSDP else _check_deepspeed)(flags)


def _check_fsdp(flags: Mapping[str, Any]) -> None:
    require(
        os.environ.get("FSDP_VERSION", "1") == "2",
        "FSDP 1 flattens the weights of a layer, which the selective layers and adapters cannot take: set "
        "fsdp_version: 2 in the launcher's configuration (scripts/launch/fsdp2.yaml)",
    )
    require(
        not is_on("FSDP_ACTIVATION_CHECKPOINTING"),
        "fsdp_activation_checkpointing wraps whole layers, and would compute the tokens that are not selected twice: "
        "take it out of the launcher's configuration, and give --gradient_checkpointing",
    )
    require(
        os.environ.get("FSDP_AUTO_WRAP_POLICY", "").upper() == "TRANSFORMER_BASED_WRAP",
        "FSDP has to split the model by its transformer layers: set fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP in "
        "the launcher's configuration",
    )
    require(
        not flags["qlora"],
        "--qlora: FSDP would leave the 4-bit weights whole on every GPU, and split the adapters alone. Take DDP "
        "(LAUNCH=ddp), which does as much, or --lora with FSDP",
    )
    optim = flags["optim"]
    require(
        optim in ON_SHARDED_WEIGHTS,
        f"--optim {optim} has not been shown to work on weights that FSDP has split: take one of "
        f"{', '.join(ON_SHARDED_WEIGHTS)}",
    )


def _check_deepspeed(flags: Mapping[str, Any]) -> None:
    in_parts = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2") == "3"
    require(
        not (in_parts and flags["qlora"]),
        "--qlora with DeepSpeed ZeRO-3 has not been shown to work: take DDP (LAUNCH=ddp), or --lora",
    )
    require(
        not (in_parts and flags["chunked_loss"] == "on"),
        "--chunked_loss on with DeepSpeed ZeRO-3: each call of the output head is one of all processes, which have "
        "different numbers of chunks and would wait for each other for ever. Leave it out, or take FSDP (LAUNCH=fsdp2)",
    )
    logger.warning(
        "DeepSpeed was tested on CPUs alone, with AdamW in float32: compare the first steps with DDP or FSDP before a "
        "long run"
    )
