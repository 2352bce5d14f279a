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
    room                    what a step may take, as far as it is known
    advice                  [{change (flags), peak, saving, fits (null where the room is not known)}], estimated, the
                            largest saving first
    together                {change (flags), peak}: the first of them that fit when made together; null where one alone
                            fits, where all do not, or where the room is not known
    out_of_memory           whether that ended the run
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedConfig

from tokentune.core.saved_tensors.saved_bytes import gib
from tokentune.environment import device_facts
from tokentune.errors import UserError
from tokentune.memory.accounting import quantization_constants
from tokentune.memory.advice import advice, estimator, together
from tokentune.memory.footprint import fits
from tokentune.models.tasks import CAUSAL_LM, Head
from tokentune.settings.finetune import Arguments
from tokentune.training.checkpoints.saving import write_whole
from tokentune.training.trainer import SelectiveTrainer

REPORT_NAME = "memory_report.json"
_ALLOCATORS = ("DefaultCPUAllocator", "not enough memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's or the CPU's allocator raised it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _ALLOCATORS)


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
        when = "while the model was loaded" if trainer is None else "in training"
        raise out_of_memory(arguments, config, trainer, head, when=when) from None
    finally:
        if snapshot is not None:
            torch.cuda.memory._dump_snapshot(snapshot)
            torch.cuda.memory._record_memory_history(enabled=None)


def out_of_memory(
    arguments: Arguments,
    config: PreTrainedConfig,
    trainer: SelectiveTrainer | None,
    head: Head = CAUSAL_LM,
    *,
    when: str,
    shape: tuple[int, int] | None = None,
    room: int | None = None,
) -> UserError:
    """What is to be raised: how much is needed, and what would help; prints the report.

    Args:
        when: memory ran out, in words.
        shape: sequences and tokens of the batch that did not fit, before training; None: the run's own.
        room: bytes that a step may take, its weights among them; None: not known.
    """
    if trainer is not None and not trainer.is_world_process_zero():
        return UserError(f"out of memory {when}: the first process says what would help")
    report = build_report(arguments, config, trainer, head, shape=shape, room=room) | {"out_of_memory": True}
    print_report(report)
    if arguments.memory.report_memory and trainer is not None:
        write_report(report, Path(trainer.args.output_dir))
    if not report["advice"]:
        return UserError(f"out of memory {when}: take a larger device, or a smaller model")
    best = report["advice"][0]
    needed = "" if report["estimated_peak"] is None else f", whose step needs about {gib(report['estimated_peak'])}"
    needed += f" where {gib(room)} are to be had" if needed and room is not None else ""
    message = f"out of memory {when}{needed}. {best['change']} would save most: about {gib(best['saving'])}"
    return UserError(message if room is None else f"{message}.\n{_what_fits(report)}")


def _what_fits(report: dict[str, Any]) -> str:
    alone = [entry for entry in report["advice"] if entry["fits"]]
    if alone:
        return "Any of these makes it fit: " + "; ".join(f"{e['change']} ({gib(e['peak'])})" for e in alone)
    if report["together"] is not None:
        return f"No single flag makes it fit; together these do: {report['together']['change']} " + (
            f"({gib(report['together']['peak'])})"
        )
    return "All of them together do not make it fit: take a larger device, or a smaller model"


def build_report(
    arguments: Arguments,
    config: PreTrainedConfig,
    trainer: SelectiveTrainer | None,
    head: Head = CAUSAL_LM,
    *,
    shape: tuple[int, int] | None = None,
    room: int | None = None,
) -> dict[str, Any]:
    """The report, as the schema above has it. `shape` and `room` as of `out_of_memory`."""
    measured = shape is None  # in training: there is nothing to measure before it
    shape = (
        shape
        or getattr(trainer, "batch_shape", None)
        or (arguments.optimization.micro_batch_size, arguments.data.max_length)
    )
    device = device_facts()
    run = estimator(arguments, config, "cuda" if device["type"] == "cuda" else "cpu", head)
    now = run(arguments, shape)
    found = [] if now is None else advice(arguments, shape, now, run)
    for entry in found:
        entry["fits"] = None if room is None else fits(entry["peak"], room)
    combined = room is not None and not any(entry["fits"] for entry in found)
    return {
        "device": device,
        "batch": {"sequences": shape[0], "tokens": shape[1]},
        **_measured(arguments, trainer if measured else None),
        "estimated_peak": None if now is None else now.peak,
        "room": room,
        "advice": found,
        "together": together(arguments, shape, found, run, room) if combined else None,
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
    parts["activations"] = trainer.figures.saved_for_backward_bytes
    parts["activations_by"] = dict(trainer.figures.saved_for_backward_by)
    parts["peak"] = trainer.figures.memory()["peak_bytes"]
    known = sum(parts[name] or 0 for name in ("weights", "gradients", "optimizer", "activations"))
    parts["rest"] = max(parts["peak"] - known, 0)
    return parts


def _bytes(tensors: list[Tensor]) -> int:
    """Of their storages; where FSDP has split a tensor, of this process's part."""
    tensors = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    return sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}.values())


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
        known = report["room"] is not None
        table = Table("change", "saves", "peak", *(["fits"] if known else []), title=title, title_justify="left")
        for entry in report["advice"]:
            said = ["yes" if entry["fits"] else "no"] if known else []
            table.add_row(entry["change"], gib(entry["saving"]), gib(entry["peak"]), *said)
        console.print(table)


def write_report(report: dict[str, Any], run_folder: Path) -> None:
    """Writes `memory_report.json`."""
    run_folder.mkdir(parents=True, exist_ok=True)
    write_whole(run_folder / REPORT_NAME, json.dumps(report, indent=2) + "\n")
