"""Advice on memory: which flags make a training step smaller, by how much, and which make it fit.

Each change is estimated on tensors without data (`memory/footprint.py`), within seconds.
"""

import copy
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from transformers import PreTrainedConfig

from tokentune.core.profile import Profile
from tokentune.memory.footprint import NOT_MEASURED, Footprint, fits, measure, profile_of
from tokentune.models.tasks import CAUSAL_LM, Head
from tokentune.processes import process_count
from tokentune.settings.engines import check_engine
from tokentune.settings.finetune import Arguments

_LEAST_SAVING = 0.01  # of the peak; smaller savings are not listed

# (settings, (sequences, tokens) of a micro-batch) -> the footprint of a step; None: it cannot be estimated.
Estimate = Callable[[Arguments, tuple[int, int]], Footprint | None]


def estimator(arguments: Arguments, config: PreTrainedConfig, device: str, head: Head = CAUSAL_LM) -> Estimate:
    """An `Estimate` for the model of `config`, on "cuda" or "cpu"; it verifies the selective layers only once."""

    @cache
    def profile() -> Profile:
        return profile_of(config, head, arguments.model.attn_implementation)

    def run(changed: Arguments, shape: tuple[int, int]) -> Footprint | None:
        try:
            check_engine(changed.prog, changed.settings())  # which may not allow the change
            known = profile() if changed.selection.tokentune else None
            return measure(config, changed, shape, device=device, head=head, profile=known)
        except NOT_MEASURED:
            return None

    return run


def advice(arguments: Arguments, shape: tuple[int, int], now: Footprint, run: Estimate) -> list[dict[str, Any]]:
    """Single changes of flags with their savings at the peak of the step `now`; the largest saving first."""
    found = []
    for change, changed, changed_shape in _changes(arguments, shape):
        footprint = run(changed, changed_shape)
        if footprint is not None and now.peak - footprint.peak > _LEAST_SAVING * now.peak:
            found.append({"change": change, "peak": footprint.peak, "saving": now.peak - footprint.peak})
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
        footprint = run(*offered[name])
        if footprint is None or (peak is not None and footprint.peak >= peak):
            continue
        (arguments, shape), peak = offered[name], footprint.peak
        taken.append(name)
        if fits(peak, room):
            return {"change": " ".join(taken), "peak": peak}
    return None


def _changes(arguments: Arguments, shape: tuple[int, int]) -> Iterator[tuple[str, Arguments, tuple[int, int]]]:
    """Possible changes: (the flags, the changed settings, the changed (sequences, tokens))."""
    sequences, tokens = shape
    selection, adapters, optimization = arguments.selection, arguments.adapters, arguments.optimization

    def change(group: str, **values: Any) -> Arguments:
        changed = copy.deepcopy(arguments)
        for name, value in values.items():
            setattr(getattr(changed, group), name, value)
        return changed

    if not selection.tokentune:
        settings = {"tokentune": True, "selected": 0.3, "prefix_length": "0.3"}
        yield "--tokentune --prefix_length 0.3", change("selection", **settings), shape
    elif isinstance(selection.selected, float) and selection.selected > 0.2:
        half = round(selection.selected / 2, 2)
        yield f"--prefix_length {half}", change("selection", selected=half, prefix_length=str(half)), shape
    if not arguments.memory.gradient_checkpointing:
        yield "--gradient_checkpointing", change("memory", gradient_checkpointing=True), shape
    if not adapters.lora:
        yield "--lora", change("adapters", lora=True), shape
    if not adapters.qlora:
        yield "--qlora", change("adapters", lora=True, qlora=True), shape
    if not (arguments.model.bf16 or arguments.model.fp16):
        yield "--bf16", change("model", bf16=True), shape
    if not adapters.lora:
        for optim in ("adamw_torch_fused", "adamw_bnb_8bit"):
            if optimization.optim != optim:
                yield f"--optim {optim}", change("optimization", optim=optim), shape
        alone = process_count() == 1
        if alone and not optimization.optim_in_backward and optimization.gradient_accumulation_steps == 1:
            settings = {"optim_in_backward": True, "max_grad_norm": 0.0}
            yield "--optim_in_backward --max_grad_norm 0", change("optimization", **settings), shape
    if sequences > 1 and not optimization.optim_in_backward:
        doubled = 2 * optimization.gradient_accumulation_steps
        changed = change("optimization", gradient_accumulation_steps=doubled)
        yield f"--gradient_accumulation_steps {doubled}", changed, (sequences // 2, tokens)
    if tokens >= 64:
        yield f"--max_length {tokens // 2}", arguments, (sequences, tokens // 2)
