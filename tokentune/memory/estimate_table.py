"""The table of `estimate.py`: bytes by method, bytes sent between GPUs, and the GPUs that they fit."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tokentune.core.saved_tensors.saved_bytes import BYTES_IN_GIB, BYTES_IN_MIB
from tokentune.memory.accounting import FRAGMENTATION, Footprint, fits
from tokentune.memory.presets import Subject
from tokentune.memory.sharding import NAMES
from tokentune.settings.estimate import EstimateArguments

CARDS_GB = (16, 24, 40, 48, 80, 141)  # memory of GPUs as they are sold: 1 GB is 10^9 bytes
RESERVE_BYTES = int(0.8 * BYTES_IN_GIB)  # for the driver, the CUDA context, kernels and the workspaces of cuBLAS
SHOWN = ("weights", "gradients", "optimizer", "activations", "peak")


@dataclass
class Row:
    """One line of the table."""

    method: str
    weights: str
    chosen: bool  # by the flags
    footprint: Footprint | None
    reason: str | None  # if there is no footprint
    seconds: float

    @property
    def cards(self) -> list[int] | None:
        """The GPUs that the step fits, in GB."""
        return self.footprint and [gb for gb in CARDS_GB if fits_card(self.footprint.peak, gb)]

    def as_dict(self) -> dict[str, Any]:
        return {
            **{"method": self.method, "weights": self.weights, "chosen": self.chosen, "reason": self.reason},
            **{"seconds": round(self.seconds, 1), "fits_gb": self.cards},
            "bytes": self.footprint and self.footprint.as_dict(),
        }


def room_on(gb: float) -> float:
    """Bytes for a step on a GPU of so many GB."""
    return gb * 1e9 - RESERVE_BYTES


def fits_card(peak: int, gb: float) -> bool:
    """Whether a step with this peak, in bytes, fits a GPU of so many GB, after `RESERVE_BYTES`."""
    return fits(peak, room_on(gb))


def settings_of(arguments: EstimateArguments, subject: Subject) -> dict[str, Any]:
    """The settings that the numbers belong to, for the table's title and the JSON."""
    return {
        "model": arguments.model.model_name_or_path,
        "device": arguments.estimation.device,
        "sequences": subject.sequences,
        "tokens": subject.length,
        "prefix_length": arguments.selection.prefix_length,
        "precision": "bf16" if arguments.model.bf16 else "fp16" if arguments.model.fp16 else "none",
        "optim": arguments.optimization.optim,
        "processes": arguments.estimation.num_processes,
        "sharding": arguments.estimation.sharding,
        "reserve_bytes": RESERVE_BYTES,
        "fragmentation": FRAGMENTATION,
        "torch": torch.__version__,
    }


def print_table(rows: Sequence[Row], arguments: EstimateArguments, subject: Subject) -> None:
    settings, own = settings_of(arguments, subject), arguments.estimation
    mixed = {"none": "no mixed precision"}.get(settings["precision"], settings["precision"])
    title = (
        f"{settings['model']}, {subject.sequences} x {subject.length} tokens, {mixed}, {settings['optim']}, "
        f"TokenTune with --prefix_length {settings['prefix_length']} (GiB)"
    )
    if own.sharding:
        title = f"each of {own.num_processes} GPUs with {NAMES[own.sharding]}: {title}"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("trained")
    table.add_column("method")
    for name in (*SHOWN, *(["sent per step"] if own.sharding else [])):
        table.add_column(name, justify="right")
    if own.device == "cuda":
        table.add_column("fits (GB)")
    reasons = list(dict.fromkeys(row.reason for row in rows if row.reason is not None))
    previous = None
    for row in rows:
        if previous not in (None, row.weights):
            table.add_section()
        method = f"{row.method} *" if row.chosen and not own.only else row.method
        cells = ["" if row.weights == previous else row.weights, method]
        if row.footprint is None:
            cells += [f"[{reasons.index(row.reason) + 1}]"]
        else:
            shown = (*SHOWN, "sent") if own.sharding else SHOWN
            cells += [in_gib(getattr(row.footprint, name)) for name in shown]
            if own.device == "cuda":
                cells += [" ".join(map(str, row.cards)) or "none"]
        table.add_row(*cells)
        previous = row.weights
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    console.print(table)
    for number, reason in enumerate(reasons, 1):
        console.print(f"[{number}] {reason}", markup=False)
    for note in _notes(rows, arguments):
        console.print(note)


def _notes(rows: Sequence[Row], arguments: EstimateArguments) -> Iterator[str]:
    """What is said below the table."""
    own = arguments.estimation
    if any(row.chosen for row in rows) and not own.only:
        yield "* what the flags choose"
    found = [row for row in rows if row.footprint is not None]
    hosts = {row.weights: row.footprint.host for row in found if row.footprint.host >= BYTES_IN_MIB}
    for weights, size in hosts.items():
        yield f"{weights}: {in_gib(size)} GiB of optimizer states in the CPU's memory besides"
    steps = [row.footprint for row in found if row.footprint.peak_phase == "optimizer"]
    if not own.sharding and any(step.at_peak["rest"] > 0.1 * step.peak for step in steps):
        yield (
            f"{arguments.optimization.optim} updates all weights at once and holds a copy of them meanwhile, which "
            "makes the peak of full training: --optim adamw_torch_fused needs none, --optim_in_backward no gradients "
            "either"
        )
    if own.device == "cuda":
        yield (
            f"A card fits when its 10^9 bytes hold the peak, {FRAGMENTATION:.0%} of it for fragmentation and "
            f"{RESERVE_BYTES / BYTES_IN_GIB:.1f} GiB for driver, CUDA context and cuBLAS.\nRows are full (no padding); "
            "attention as fused on Ampere or later; what kernels allocate for themselves alone is not seen."
        )


def in_gib(size: int) -> str:
    """Bytes as GiB with two decimals."""
    return f"{size / BYTES_IN_GIB:.2f}"
