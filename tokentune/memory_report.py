"""`--report_memory`, and what is said when memory runs out: where it went, and what would help most.

`memory_report.json`, in the run's folder, in bytes:

    device                  {type, name, count}, as in training_summary.json
    batch                   {sequences, tokens} of the micro-batches
    weights, gradients, optimizer, activations, rest
                            of one training step; activations: unique storages that autograd kept after the first
                            forward pass; rest: the device's peak without the others (temporary tensors, kernels'
                            workspaces; on the CPU the whole process besides). Null: it did not come so far
    peak                    GPU: the allocator's; CPU: the process's highest resident memory
    activations_by          the activations by kind of module (breakdown.py)
    estimated_peak          of the same step, by the estimator (footprint.py), on this type of device
    advice                  [{change (flags), peak, saving}], estimated, the largest saving first
    out_of_memory           whether that ended the run
"""

import copy
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedConfig

from tokentune.accounting import quantization_constants
from tokentune.arguments import Arguments
from tokentune.errors import UnsupportedModelError, UserError
from tokentune.footprint import Footprint, measure, profile_of
from tokentune.heads import CAUSAL_LM, Head
from tokentune.memory import gib
from tokentune.summary import device_facts
from tokentune.training import SelectiveTrainer

REPORT_NAME = "memory_report.json"
_CPU_ALLOCATOR = ("DefaultCPUAllocator", "not enough memory", "can't allocate memory")
_LEAST_SAVING = 0.01  # of the peak: less is no advice


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's or the CPU's allocator raised it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _CPU_ALLOCATOR)


@contextmanager
def memory_watched(
    arguments: Arguments,
    config: PreTrainedConfig,
    trainer: SelectiveTrainer | None = None,
    head: Head = CAUSAL_LM,
) -> Iterator[None]:
    """Around what may run out of memory: the loading (without a trainer) and the training of a run.

    Raises:
        UserError: out of memory, with what would help most. The report is written where `--report_memory` is given.
    """
    snapshot = arguments.memory.memory_snapshot if trainer is not None else None
    if snapshot is not None:
        torch.cuda.memory._record_memory_history(max_entries=200_000)
    try:
        yield
        if arguments.memory.report_memory and trainer is not None and trainer.is_world_process_zero():
            report = build_report(arguments, config, trainer, head)
            print_report(report)
            write_report(report, Path(trainer.args.output_dir))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        error.__traceback__ = None  # its frames hold the tensors that filled the memory
        raise UserError(_explained(arguments, config, trainer, head)) from None
    finally:
        if snapshot is not None:
            torch.cuda.memory._dump_snapshot(snapshot)
            torch.cuda.memory._record_memory_history(enabled=None)


def _explained(arguments: Arguments, config: PreTrainedConfig, trainer: SelectiveTrainer | None, head: Head) -> str:
    report = build_report(arguments, config, trainer, head) | {"out_of_memory": True}
    print_report(report)
    if arguments.memory.report_memory and trainer is not None:
        write_report(report, Path(trainer.args.output_dir))
    when = "while the model was loaded" if trainer is None else "in training"
    if not report["advice"]:
        return f"out of memory {when}: take a larger device, or a smaller model"
    best = report["advice"][0]
    estimated = "" if report["estimated_peak"] is None else f", whose step needs about {gib(report['estimated_peak'])}"
    return f"out of memory {when}{estimated}. {best['change']} would save most: about {gib(best['saving'])}"


def build_report(
    arguments: Arguments, config: PreTrainedConfig, trainer: SelectiveTrainer | None, head: Head = CAUSAL_LM
) -> dict[str, Any]:
    """The report, as the schema above has it."""
    shape = getattr(trainer, "batch_shape", None) or (
        arguments.optimization.micro_batch_size,
        arguments.data.max_length,
    )
    device = device_facts()
    kind = "cuda" if device["type"] == "cuda" else "cpu"

    attention = arguments.model.attn_implementation
    profile = cache(partial(profile_of, config, head, attention))

    def run(changed: Arguments, shape: tuple[int, int]) -> Footprint | None:
        try:
            known = profile() if changed.selection.tokentune else None
            return measure(config, changed, shape, device=kind, head=head, profile=known)
        except (UserError, UnsupportedModelError, RuntimeError, NotImplementedError):  # no such row to advise
            return None

    now = run(arguments, shape)
    parts = _measured(arguments, trainer)
    return {
        "device": device,
        "batch": {"sequences": shape[0], "tokens": shape[1]},
        **parts,
        "estimated_peak": None if now is None else now.peak,
        "advice": [] if now is None else advice(arguments, shape, now, run),
        "out_of_memory": False,
    }


def _measured(arguments: Arguments, trainer: SelectiveTrainer | None) -> dict[str, Any]:
    names = ("weights", "gradients", "optimizer", "activations", "rest", "peak")
    parts: dict[str, Any] = dict.fromkeys(names) | {"activations_by": {}}
    if trainer is None:
        return parts
    model = trainer.model
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    parts["weights"] = _bytes([*model.parameters(), *model.buffers(), *quantization_constants(model)])
    parts["gradients"] = 0 if trainer.optim_in_backward else _bytes(trained)
    states = trainer.optimizer.state if trainer.optimizer is not None else {}
    inner = getattr(getattr(trainer.optimizer, "optimizer", trainer.optimizer), "optimizers", None)
    every = [states] if inner is None else [optimizer.state for optimizer in inner.values()]
    parts["optimizer"] = _bytes(
        [value for table in every for state in table.values() for value in state.values() if isinstance(value, Tensor)]
    )
    parts["activations"] = trainer.saved_for_backward_bytes
    parts["activations_by"] = dict(trainer.saved_for_backward_by)
    parts["peak"] = trainer.memory_figures()["peak_bytes"]
    known = sum(parts[name] or 0 for name in ("weights", "gradients", "optimizer", "activations"))
    parts["rest"] = max(parts["peak"] - known, 0)
    return parts


def _bytes(tensors: list[Tensor]) -> int:
    return sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}.values())


# --- what would help --------------------------------------------------------------------------------------------------


def advice(
    arguments: Arguments, shape: tuple[int, int], now: Footprint, run: Callable[..., Footprint | None]
) -> list[dict[str, Any]]:
    """Single changes of the command line, with what each saves of the step's peak (`now`), the most first.

    `run(arguments, (sequences, tokens))` estimates a step; None where that cannot be had.
    """
    found = []
    for change, changed, changed_shape in _changes(arguments, shape):
        footprint = run(changed, changed_shape)
        if footprint is not None and now.peak - footprint.peak > _LEAST_SAVING * now.peak:
            found.append({"change": change, "peak": footprint.peak, "saving": now.peak - footprint.peak})
    return sorted(found, key=lambda entry: -entry["saving"])


def _changes(arguments: Arguments, shape: tuple[int, int]) -> Iterator[tuple[str, Arguments, tuple[int, int]]]:
    """What a user could change: (the flags in words, the command line with it, sequences and tokens)."""
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
        if not optimization.optim_in_backward and optimization.gradient_accumulation_steps == 1:
            settings = {"optim_in_backward": True, "max_grad_norm": 0.0}
            yield "--optim_in_backward --max_grad_norm 0", change("optimization", **settings), shape
    if sequences > 1:
        doubled = 2 * optimization.gradient_accumulation_steps
        yield f"--gradient_accumulation_steps {doubled}", arguments, (sequences // 2, tokens)
    if tokens >= 64:
        yield f"--max_length {tokens // 2}", arguments, (sequences, tokens // 2)


# --- what is shown ----------------------------------------------------------------------------------------------------


def print_report(report: dict[str, Any]) -> None:
    """Two tables, on stderr beside the log."""
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 120, highlight=False)
    batch = f"{report['batch']['sequences']} x {report['batch']['tokens']} tokens"
    if report["peak"] is not None:
        table = Table("memory", "", title=f"Measured, {batch}, {report['device']['type']}", title_justify="left")
        table.columns[1].justify = "right"
        for name in ("weights", "gradients", "optimizer", "activations"):
            table.add_row(name, "not reached" if report[name] is None else gib(report[name]))
            if name == "activations":
                for kind, size in sorted(report["activations_by"].items(), key=lambda entry: -entry[1]):
                    table.add_row(f"  {kind}", gib(size))
        table.add_row("rest", gib(report["rest"]))
        table.add_row("peak", gib(report["peak"]), style="bold")
        console.print(table)
    if report["advice"]:
        title = f"What would help most: estimated for {batch}, from {gib(report['estimated_peak'])}"
        table = Table("change", "saves", "peak", title=title, title_justify="left")
        for entry in report["advice"]:
            table.add_row(entry["change"], gib(entry["saving"]), gib(entry["peak"]))
        console.print(table)


def write_report(report: dict[str, Any], run_folder: Path) -> Path:
    """Writes `memory_report.json` whole or not at all."""
    run_folder.mkdir(parents=True, exist_ok=True)
    path = run_folder / REPORT_NAME
    unfinished = path.with_suffix(".json.tmp")
    unfinished.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, path)
    return path
