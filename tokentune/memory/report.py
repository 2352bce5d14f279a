"""`--report_memory`, and what is said when memory runs out: what used it, and what would help most.

What `memory_report.json` holds: docs/memory.md, "What used the memory".
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedConfig

from tokentune.core.layers import inner_model
from tokentune.core.patched import settings_of
from tokentune.core.saved_tensors.saved_bytes import gib
from tokentune.environment import device_facts
from tokentune.errors import UserError
from tokentune.memory.accounting import bytes_of, fits, states_of, weights_of
from tokentune.memory.advice import advice, estimated, together
from tokentune.memory.footprint import Estimate, estimator
from tokentune.memory.longest_rows import answer_share
from tokentune.models.tasks import CAUSAL_LM, Head
from tokentune.settings.finetune import Arguments
from tokentune.training.checkpoints.saving import write_whole
from tokentune.training.trainer import SelectiveTrainer

REPORT_NAME = "memory_report.json"
_ALLOCATORS = ("DefaultCPUAllocator", "not enough memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


@dataclass
class Run:
    """A run whose memory is asked for: its flags, its base model's configuration, its trainer once that is made."""

    given: Arguments
    config: PreTrainedConfig
    trainer: SelectiveTrainer | None = None
    head: Head = CAUSAL_LM

    @property
    def arguments(self) -> Arguments:
        """The flags, with the accumulation that `auto` came to."""
        if self.trainer is None:
            return self.given
        return self.given.changed(gradient_accumulation_steps=self.trainer.args.gradient_accumulation_steps)

    def estimator(self) -> Estimate:
        """What estimates its steps, for the type of its device."""
        if self.trainer is None:
            return estimator(self.config, "cuda" if torch.cuda.is_available() else "cpu", self.head)
        patched = settings_of(inner_model(self.trainer.model))
        device = "cuda" if self.trainer.args.device.type == "cuda" else "cpu"
        share = answer_share(self.trainer.train_dataset) if self.given.selection.takes_answers else None
        return estimator(self.config, device, self.head, profile=patched and patched.profile, answer_share=share)


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
    run = Run(arguments, config, trainer, head)
    snapshot = arguments.memory.memory_snapshot if trainer is not None else None
    if snapshot is not None:
        torch.cuda.memory._record_memory_history(max_entries=200_000)
    try:
        yield
        if arguments.memory.report_memory and trainer is not None and trainer.is_world_process_zero():
            _show(build_report(run), run)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        error.__traceback__ = None  # its frames hold the tensors that filled the memory
        raise out_of_memory(run, "while the model was loaded" if trainer is None else "in training") from None
    finally:
        if snapshot is not None:
            torch.cuda.memory._dump_snapshot(snapshot)
            torch.cuda.memory._record_memory_history(enabled=None)


def out_of_memory(run: Run, when: str, *, shape: tuple[int, int] | None = None, room: int | None = None) -> UserError:
    """What is to be raised: how much is needed, and what would help; prints the report.

    Args:
        when: memory ran out, in words.
        shape: sequences and tokens of the batch that did not fit, before training; None: the run's own.
        room: bytes that a step may take, its weights among them; None: not known.
    """
    if run.trainer is not None and not run.trainer.is_world_process_zero():
        return UserError(f"out of memory {when}: the first process says what would help")
    report = build_report(run, shape=shape, room=room) | {"out_of_memory": True}
    _show(report, run)
    if not report["advice"]:
        return UserError(f"out of memory {when}: take a larger device, or a smaller model")
    best = report["advice"][0]
    there = "" if room is None else f" where {gib(room)} are available"
    message = (
        f"out of memory {when}, whose step needs about {gib(report['estimated_peak'])}{there}. "
        f"{best['change']} would save most: about {gib(best['saving'])}"
    )
    return UserError(message if room is None else f"{message}.\n{_what_fits(report)}")


def _what_fits(report: dict[str, Any]) -> str:
    alone = [f"{entry['change']} ({gib(entry['peak'])})" for entry in report["advice"] if entry["fits"]]
    if alone:
        return "Any of these makes it fit: " + "; ".join(alone)
    if (several := report["together"]) is not None:
        return f"No single flag makes it fit; together these do: {several['change']} ({gib(several['peak'])})"
    return "All of them together do not make it fit: take a larger device, or a smaller model"


def build_report(run: Run, *, shape: tuple[int, int] | None = None, room: int | None = None) -> dict[str, Any]:
    """The content of `memory_report.json`. `shape` and `room` as of `out_of_memory`."""
    measured = dict.fromkeys(("weights", "gradients", "optimizer", "activations", "rest", "peak"))
    measured["activations_by"] = {}
    if shape is None and run.trainer is not None:  # before training there is nothing to measure
        measured, shape = _measured(run.trainer), run.trainer.figures.batch_shape
    arguments = run.arguments
    shape = shape or (arguments.optimization.micro_batch_size, arguments.data.max_length)
    estimate = run.estimator()
    now = estimated(arguments, shape, estimate)
    found = [] if now is None else advice(arguments, shape, now.peak, estimate)
    for entry in found:
        entry["fits"] = None if room is None else fits(entry["peak"], room)
    combines = room is not None and not any(entry["fits"] for entry in found)
    return {
        "device": device_facts(),
        "batch": {"sequences": shape[0], "tokens": shape[1]},
        **measured,
        "estimated_peak": None if now is None else now.peak,
        "room": room,
        "advice": found,
        "together": together(arguments, shape, found, estimate, room) if combines else None,
        "out_of_memory": False,
    }


def _measured(trainer: SelectiveTrainer) -> dict[str, Any]:
    model, figures = trainer.model, trainer.figures
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # accelerate wraps it
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    parts = {
        "weights": bytes_of(weights_of(model)),
        "gradients": 0 if trainer.optim_in_backward else bytes_of(trained),
        "optimizer": 0 if optimizer is None else bytes_of(states_of(optimizer)),
        "activations": figures.saved_for_backward_bytes,
    }
    peak = figures.memory()["peak_bytes"]
    parts["rest"] = max(peak - sum(size or 0 for size in parts.values()), 0)
    return parts | {"peak": peak, "activations_by": dict(figures.saved_for_backward_by)}


def _show(report: dict[str, Any], run: Run) -> None:
    """Prints two tables, on stderr beside the log; writes `memory_report.json` where `--report_memory` is given."""
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 120, highlight=False)
    batch = f"{report['batch']['sequences']} x {report['batch']['tokens']} tokens"
    if report["peak"] is not None:
        table = Table("memory", "", title=f"Measured, {batch}, {report['device']['type']}", title_justify="left")
        table.columns[1].justify = "right"
        for name in ("weights", "gradients", "optimizer", "activations"):
            table.add_row(name, "not reached" if report[name] is None else gib(report[name]))
        for kind, size in sorted(report["activations_by"].items(), key=lambda entry: -entry[1]):
            table.add_row(f"  {kind}", gib(size))
        table.add_row("rest", gib(report["rest"]))
        table.add_row("peak", gib(report["peak"]), style="bold")
        console.print(table)
    if report["advice"]:
        title = f"What would help most: estimated for {batch}, from {gib(report['estimated_peak'])}"
        fitting = ["fits"] if report["room"] is not None else []
        table = Table("change", "saves", "peak", *fitting, title=title, title_justify="left")
        for entry in report["advice"]:
            said = ["yes" if entry["fits"] else "no"] if fitting else []
            table.add_row(entry["change"], gib(entry["saving"]), gib(entry["peak"]), *said)
        console.print(table)
    if run.given.memory.report_memory and run.trainer is not None:
        run_folder = Path(run.trainer.args.output_dir)
        run_folder.mkdir(parents=True, exist_ok=True)
        write_whole(run_folder / REPORT_NAME, json.dumps(report, indent=2) + "\n")
