"""How much memory this process may still use.

On a GPU the driver knows. On the CPU the smallest of several limits counts: the machine's memory, the limit of a
container (cgroups), which kills a process without a message, or `ulimit -v`, which lets an allocation fail.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from tokentune.posix import resource

CGROUPS = Path("/sys/fs/cgroup")


def available_bytes(device: torch.device | str) -> int:
    """Bytes that can still be allocated on this device, including the unused ones that torch's CUDA allocator holds."""
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes of a launcher on this machine
    return min([psutil.virtual_memory().available // sharing, *_limits()])


def _limits() -> Iterator[int]:
    """The bytes that each limit of this process leaves."""
    own = psutil.Process().memory_info()
    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    if most != resource.RLIM_INFINITY:
        yield max(most - own.vms, 0)
    if sys.platform == "linux":
        yield from _cgroup_limits()


def _cgroup_limits() -> Iterator[int]:
    """The same of its control groups (versions 1 and 2) and their parents."""
    for line in _lines(Path("/proc/self/cgroup")):
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            top, limit, usage, cache = CGROUPS, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top, limit, usage = CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        folder = top / name.lstrip("/")
        # In a container the group may be mounted as the root, so the path that the process knows may not exist.
        for group in (group for group in (folder, *folder.parents) if group.is_relative_to(top)):
            most, used = "".join(_lines(group / limit)), "".join(_lines(group / usage))
            if most.isdigit() and used.isdigit():  # not "max", which means no limit
                cached = (line.split()[1] for line in _lines(group / "memory.stat") if line.startswith(cache))
                yield max(int(most) - int(used) + int(next(cached, 0)), 0)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
