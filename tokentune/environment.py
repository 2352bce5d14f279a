"""What a run computes on and with: the device, and versions of libraries."""

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from tokentune.posix import resource
from tokentune.version import __version__

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes", "tokenizers")


def device_facts() -> dict[str, Any]:
    """Type, name and count of what the run computed on."""
    if torch.cuda.is_available():
        return {"type": "cuda", "name": torch.cuda.get_device_name(), "count": torch.cuda.device_count()}
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None:
        return {"type": accelerator.type, "name": platform.machine(), "count": torch.accelerator.device_count()}
    return {"type": "cpu", "name": cpu_name(), "count": torch.get_num_threads()}


def cpu_name() -> str:
    """The processor's model; its architecture where the system does not tell (only Linux has /proc)."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def library_versions() -> dict[str, str | None]:
    """Versions of Python and of the libraries a run depends on; null where one is not installed."""
    versions: dict[str, str | None] = {"tokentune": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return versions


def memory_usage(device: torch.device | str) -> dict[str, int]:
    """Bytes in use: `allocated_bytes`, `reserved_bytes`, `peak_bytes`.

    On CUDA as torch's allocator counts them (peak: of what was allocated since `reset_peak`). On the CPU there is no
    allocator to ask: the process's resident set stands for the first two, its highest value so far for the peak.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return {
            "allocated_bytes": torch.cuda.memory_allocated(device),
            "reserved_bytes": torch.cuda.memory_reserved(device),
            "peak_bytes": torch.cuda.max_memory_allocated(device),
        }
    resident = psutil.Process().memory_info().rss
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts kibibytes, on macOS bytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"allocated_bytes": resident, "reserved_bytes": resident, "peak_bytes": max(peak, resident)}


def reset_peak(device: torch.device | str) -> None:
    """Start a new peak on CUDA. A process's own peak on the CPU cannot be reset."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
