"""Saved tensors in the CPU's memory: copied there during the forward pass, and back one layer before they are needed.

Not run on a GPU yet.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class _Stored:
    """One tensor in pinned memory, and its copy on the way back."""

    host: Tensor
    index: int
    fetched: Tensor | None = None


class HostMemory:
    """Pack and unpack functions for `saved_tensors_hooks`, of tensors that are needed in the reverse order."""

    AHEAD = 2  # tensors: the keys and the values of the layer that comes next in the backward pass

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.stored: list[_Stored] = []

    def store(self, tensor: Tensor) -> _Stored:
        host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(self.stream)  # the allocator must not hand its memory out before it was copied
        self.stored.append(_Stored(host, len(self.stored)))
        return self.stored[-1]

    def fetch(self, stored: _Stored) -> Tensor:
        tensor = self._start(stored)
        stored.fetched = None
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        tensor.record_stream(torch.cuda.current_stream(self.device))
        if stored.index >= self.AHEAD:
            self._start(self.stored[stored.index - self.AHEAD])
        return tensor

    def _start(self, stored: _Stored) -> Tensor:
        if stored.fetched is None:
            with torch.cuda.stream(self.stream):
                stored.fetched = stored.host.to(self.device, non_blocking=True)
        return stored.fetched
