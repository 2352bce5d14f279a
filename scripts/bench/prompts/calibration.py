"""Time and bytes of a step by arm, on an idle machine: the arms take turns on the same batches.

All arms of a task hold the same weights (the parameters themselves), so that many models need the memory of one.
"""

from collections.abc import Sequence
from typing import Any

import torch
from steps.report import machine
from torch import nn

from prompts.arms import ANSWERS, ARMS, FULL, MICRO_BATCH
from prompts.training import Place, Trained, optimizer_of, prepared, step_rows, timed_step
from tokentune.core.saved_tensors.saved_bytes import SavedForBackward
from tokentune.errors import UserError


def calibrate(place: Place, names: Sequence[str], rounds: int) -> tuple[dict[str, Any] | None, dict[str, str]]:
    """Measures these arms, and `FULL` always.

    Returns:
        {rounds, seconds and cpu_seconds: {arm: [by round]}, saved_bytes: {arm: of the first batch, its largest
        micro-batch}, micro_batch: rows of MICRO_BATCH, machine}, None where all of them are refused; and, of arms that
        flags or model refuse, why.
    """
    examples, models, refused = step_rows(place, 0), {}, {}
    first = next(examples)
    for name in dict.fromkeys((FULL, *names)):
        try:
            size = micro_batch(place, first) if name == MICRO_BATCH else None
            models[name] = prepared(place, ARMS[name], 0, micro_batch=size, verify=True)
        except UserError as error:
            refused[name] = str(error)
            continue
        hold_the_same(models[name].model, models[FULL].model)
    if FULL not in names and len(models) == 1:
        return None, refused
    optimizer = optimizer_of(models[FULL].model)
    found: dict[str, Any] = {"rounds": rounds, "seconds": {}, "cpu_seconds": {}, "saved_bytes": {}}
    for name, trained in models.items():
        found["saved_bytes"][name] = saved_bytes(trained, first)
        timed_step(trained, first, optimizer)  # warms up
    for _ in range(rounds):
        batch = next(examples)
        for name, trained in models.items():
            taken = timed_step(trained, batch, optimizer)[1]
            for clock, value in zip(("seconds", "cpu_seconds"), taken, strict=True):
                found[clock].setdefault(name, []).append(round(value, 4))
    if MICRO_BATCH in models:
        found["micro_batch"] = models[MICRO_BATCH].micro_batch
    return found | {"machine": machine("cpu")}, refused


def hold_the_same(model: nn.Module, other: nn.Module) -> None:
    """Puts the parameters of `other`, a model of the same modules, into `model`."""
    for module, source in zip(model.modules(), other.modules(), strict=True):
        module._parameters.update(source._parameters)


def saved_bytes(trained: Trained, examples: list[dict]) -> int:
    """What autograd keeps for the backward pass of the micro-batch that needs most."""
    most = 0
    for batch in trained.batches(examples):
        with SavedForBackward(trained.model) as saved, torch.autocast("cpu", torch.bfloat16):
            trained.model(**batch)
        most = max(most, saved.bytes)
    return most


def micro_batch(place: Place, examples: list[dict]) -> int:
    """Rows of full training's largest micro-batch, loss in chunks, that keeps no more than ANSWERS; 1 if none does."""
    allowed = saved_bytes(prepared(place, ARMS[ANSWERS], 0), examples)
    trained = prepared(place, ARMS[MICRO_BATCH], 0)
    for size in range(len(examples) // 2, 1, -1):
        trained.micro_batch = size
        if len(examples) % size == 0 and saved_bytes(trained, examples) <= allowed:
            return size
    return 1
