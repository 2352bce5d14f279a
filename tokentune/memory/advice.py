"""Advice on memory: which flags make a training step smaller, by how much, and which make it fit.

Each change is estimated on tensors without data (`memory/footprint.py`), within seconds.
"""

from collections.abc import Iterator
from typing import Any

from tokentune.errors import UserError
from tokentune.memory.accounting import Footprint, fits
from tokentune.memory.footprint import Estimate
from tokentune.processes import process_count
from tokentune.settings.engines import check_engine
from tokentune.settings.finetune import Arguments

_LEAST_SAVING = 0.01  # of the peak; smaller savings are not listed

Change = tuple[str, Arguments, tuple[int, int]]  # the flags, the changed settings, the changed (sequences, tokens)


def estimated(arguments: Arguments, shape: tuple[int, int], run: Estimate) -> Footprint | None:
    """The footprint of a step; None: it cannot be estimated, or the launcher's engine does not allow the flags."""
    try:
        check_engine(arguments.prog, arguments.settings())
        return run(arguments, shape)
    except UserError:
        return None


def advice(arguments: Arguments, shape: tuple[int, int], peak: int, run: Estimate) -> list[dict[str, Any]]:
    """Single changes of flags with their savings at the `peak` of the step as it is; the largest saving first."""
    found = []
    for change, changed, changed_shape in _changes(arguments, shape):
        footprint = estimated(changed, changed_shape, run)
        if footprint is not None and peak - footprint.peak > _LEAST_SAVING * peak:
            found.append({"change": change, "peak": footprint.peak, "saving": peak - footprint.peak})
    return sorted(found, key=lambda entry: -entry["saving"])


def together(
    arguments: Arguments, shape: tuple[int, int], ranked: list[dict[str, Any]], run: Estimate, room: int
) -> dict[str, Any] | None:
    """The first changes of `ranked` (from `advice`) that together fit into `room` bytes: {change, peak}, or None."""
    taken: list[str] = []
    peak = None
    for name in (entry["change"] for entry in ranked):
        offered = {change: (changed, at) for change, changed, at in _changes(arguments, shape)}
        if name not in offered:  # excluded by an earlier change, or part of it
            continue
        footprint = estimated(*offered[name], run)
        if footprint is None or (peak is not None and footprint.peak >= peak):
            continue
        (arguments, shape), peak = offered[name], footprint.peak
        taken.append(name)
        if fits(peak, room):
            return {"change": " ".join(taken), "peak": peak}
    return None


def _changes(arguments: Arguments, shape: tuple[int, int]) -> Iterator[Change]:
    """What could be changed."""
    sequences, tokens = shape
    selection, lora, optimization = arguments.selection, arguments.adapters.lora, arguments.optimization
    in_backward, accumulation = optimization.optim_in_backward, optimization.accumulation
    changed = arguments.changed
    if not selection.tokentune:
        yield "--tokentune --prefix_length 0.3", changed(tokentune=True, selected=0.3, prefix_length="0.3"), shape
    elif isinstance(selection.selected, float) and selection.selected > 0.2:
        half = round(selection.selected / 2, 2)
        yield f"--prefix_length {half}", changed(selected=half, prefix_length=str(half)), shape
    if not arguments.memory.gradient_checkpointing:
        yield "--gradient_checkpointing", changed(gradient_checkpointing=True), shape
    if arguments.memory.chunked_loss != "on":  # a classifier's loss cannot be taken so: no estimate, no advice
        yield "--chunked_loss on", changed(chunked_loss="on"), shape
    if not lora:
        yield "--lora", changed(lora=True), shape
    if not arguments.adapters.qlora:
        yield "--qlora", changed(lora=True, qlora=True), shape
    if not (arguments.model.bf16 or arguments.model.fp16):
        yield "--bf16", changed(bf16=True), shape
    for optim in () if lora else ("adamw_torch_fused", "adamw_bnb_8bit"):
        if optimization.optim != optim:
            yield f"--optim {optim}", changed(optim=optim), shape
    if not lora and process_count() == 1 and not in_backward and accumulation == 1:
        applied = changed(optim_in_backward=True, max_grad_norm=0.0)
        yield "--optim_in_backward --max_grad_norm 0", applied, shape
    if sequences > 1 and not in_backward:
        doubled = 2 * accumulation
        halved = sequences // 2, tokens
        yield f"--gradient_accumulation_steps {doubled}", changed(gradient_accumulation_steps=doubled), halved
    if tokens >= 64:
        yield f"--max_length {tokens // 2}", arguments, (sequences, tokens // 2)
