"""The table of `estimate.py`: bytes by method, bytes sent between GPUs, and the GPUs that they fit."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tokentune.core.saved_tensors.saved_bytes import BYTES_IN_GIB, BYTES_IN_MIB
from tokentune.memory.footprint import FRAGMENTATION, Footprint, fits
from tokentune.memory.presets import Subject
from tokentune.memory.sharding import describe
from tokentune.settings.finetune import Arguments

CARDS_GB = (16, 24, 40, 48, 80, 141)  # memory of GPUs as they are sold: 1 GB is 10^9 bytes
RESERVE_BYTES = int(0.8 * BYTES_IN_GIB)  # for the driver, the CUDA context, kernels and the workspaces of cuBLAS
SHOWN = ("weights", "gradients", "optimizer", "activations", "peak")


@dataclass
class Request:
    """The parsed command line of `estimate.py`."""

    arguments: Arguments
    subject: Subject
    shape: tuple[int, int]  # sequences and tokens of a micro-batch
    device: str
    only: bool
    find: str | None
    memory_gb: float | None
    json: str | None
    processes: int
    sharding: str | None  # None: one process


@dataclass
class Row:
    """One line of the table."""

    method: str
    weights: str
    chosen: bool  # by the flags
    footprint: Footprint | None
    reason: str | None  # if there is no footprint
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        numbers = None if self.footprint is None else self.footprint.as_dict()
        fits = None if self.footprint is None else [gb for gb in CARDS_GB if fits_card(self.footprint.peak, gb)]
        return {
            **{"method": self.method, "weights": self.weights, "chosen": self.chosen, "reason": self.reason},
            **{"seconds": round(self.seconds, 1), "fits_gb": fits, "bytes": numbers},
        }


def fits_card(peak: int, gb: float) -> bool:
    """Whether a step with this peak, in bytes, fits a GPU of so many GB, after `RESERVE_BYTES`."""
    return fits(peak, gb * 1e9 - RESERVE_BYTES)


def settings_of(request: Request) -> dict[str, Any]:
    """The settings that the numbers belong to, for the table's title and the JSON."""
    arguments, (sequences, length) = request.arguments, request.shape
    return {
        "model": arguments.model.model_name_or_path,
        "device": request.device,
        "sequences": sequences,
        "tokens": length,
        "prefix_length": arguments.selection.prefix_length,
        "precision": "bf16" if arguments.model.bf16 else "fp16" if arguments.model.fp16 else "none",
        "optim": arguments.optimization.optim,
        "processes": request.processes,
        "sharding": request.sharding,
        "reserve_bytes": RESERVE_BYTES,
        "fragmentation": FRAGMENTATION,
        "torch": torch.__version__,
    }


def print_table(rows: Sequence[Row], request: Request) -> None:
    settings = settings_of(request)
    mixed = {"none": "no mixed precision"}.get(settings["precision"], settings["precision"])
    title = (
        f"{settings['model']}, {settings['sequences']} x {settings['tokens']} tokens, {mixed}, {settings['optim']}, "
        f"TokenTune with --prefix_length {settings['prefix_length']} (GiB)"
    )
    if request.sharding is not None:
        title = f"{describe(request.sharding, request.processes)}: {title}"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("trained")
    table.add_column("method")
    for name in SHOWN:
        table.add_column(name, justify="right")
    if request.sharding is not None:
        table.add_column("sent per step", justify="right")
    if request.device == "cuda":
        table.add_column("fits (GB)")
    previous, reasons = None, []
    for row in rows:
        if previous not in (None, row.weights):
            table.add_section()
        method = f"{row.method} *" if row.chosen and not request.only else row.method
        cells = ["" if row.weights == previous else row.weights, method]
        if row.footprint is None:
            if row.reason not in reasons:
                reasons.append(row.reason)
            cells += [f"[{reasons.index(row.reason) + 1}]"]
        else:
            cells += [in_gib(getattr(row.footprint, name)) for name in SHOWN]
            cells += [in_gib(row.footprint.sent)] if request.sharding is not None else []
            if request.device == "cuda":
                smallest = next((gb for gb in CARDS_GB if fits_card(row.footprint.peak, gb)), None)
                cells += ["none" if smallest is None else " ".join(str(gb) for gb in CARDS_GB if gb >= smallest)]
        table.add_row(*cells)
        previous = row.weights
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    console.print(table)
    for number, reason in enumerate(reasons, 1):
        console.print(f"[{number}] {reason}", markup=False)
    if any(row.chosen for row in rows) and not request.only:
        console.print("* what the flags choose")
    hosts = {row.weights: row.footprint.host for row in rows if row.footprint and row.footprint.host >= BYTES_IN_MIB}
    for weights, size in hosts.items():
        console.print(f"{weights}: {in_gib(size)} GiB of optimizer states in the CPU's memory besides")
    found = [row.footprint for row in rows if row.footprint is not None]
    updates = [f for f in found if f.peak_phase == "optimizer" and f.at_peak["rest"] > 0.1 * f.peak]
    if updates and request.sharding is None:
        console.print(
            f"{settings['optim']} updates all weights at once and holds a copy of them meanwhile, which makes the peak "
            "of full training: --optim adamw_torch_fused needs none, --optim_in_backward no gradients either"
        )
    if request.device == "cuda":
        console.print(
            f"A card fits when its 10^9 bytes hold the peak, {FRAGMENTATION:.0%} of it for fragmentation and "
            f"{RESERVE_BYTES / BYTES_IN_GIB:.1f} GiB for driver, CUDA context and cuBLAS.\nRows are full (no padding); "
            "attention as fused on Ampere or later; what kernels allocate for themselves alone is not seen."
        )


def in_gib(size: int) -> str:
    """Bytes as GiB with two decimals."""
    return f"{size / BYTES_IN_GIB:.2f}"
