"""The bytes that autograd saves for the backward pass: the activation memory of a training step."""

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules.module import register_module_forward_hook

BYTES_IN_GIB = 1024**3
BYTES_IN_MIB = 1024**2


class SavedForBackward:
    """Counts the bytes that autograd saves for the backward pass.

    >>> with SavedForBackward(model) as saved:
    ...     loss = model(**batch).loss
    >>> saved.bytes

    Each storage counts once, however many operations save it. Parameters and buffers do not count, as they are in
    memory anyway (those that FSDP gathers for a layer are freed after it). The count is exact, and the same on every
    device. Temporary memory of kernels is not in it.

    Args:
        kind: tells the kind of a tensor when it is first saved; `bytes_by` then has the bytes by kind.
    """

    def __init__(self, model: nn.Module, kind: Callable[[Tensor], str] | None = None):
        self.bytes = 0
        self.bytes_by: Counter[str] = Counter()
        self._kind = kind
        # Kept alive, like all tensors that are counted. A buffer that the forward pass replaces (rotary frequencies
        # that follow the length) would be freed, and its address reused by a storage that then would not count.
        self._alive = [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]
        self._seen = {_address(tensor) for tensor in self._alive}
        self._counted: dict[int, tuple[int, str | None]] = {}  # address -> its bytes and kind
        self._model = model
        self._undo = ExitStack()

    def _pack(self, tensor: Tensor) -> Tensor:
        if self._is_new(tensor):
            kind = None if self._kind is None else self._kind(tensor)
            self._counted[_address(tensor)] = tensor.untyped_storage().nbytes(), kind
            self._add(tensor, 1)
        return tensor

    def _is_new(self, tensor: Tensor) -> bool:
        """Whether its storage was not seen before; from now on it was."""
        if _address(tensor) in self._seen:
            return False
        self._seen.add(_address(tensor))
        self._alive.append(tensor.detach())
        return True

    def _add(self, tensor: Tensor, sign: int) -> None:
        size, kind = self._counted[_address(tensor)]
        self.bytes += sign * size
        if kind is not None:
            self.bytes_by[kind] += sign * size

    def _leave_out_gathered(self, module: nn.Module, *_: Any) -> None:
        """Forward hook of all modules: FSDP gives a running module whole parameters, which autograd may have saved."""
        for tensor in module._parameters.values():
            if tensor is not None and not self._is_new(tensor) and _address(tensor) in self._counted:
                self._add(tensor, -1)
                del self._counted[_address(tensor)]

    def __enter__(self) -> "SavedForBackward":
        self._undo.callback(self._alive.clear)
        if any(isinstance(module, FSDPModule) for module in self._model.modules()):
            self._undo.enter_context(register_module_forward_hook(self._leave_out_gathered))
        self._undo.enter_context(saved_tensors_hooks(self._pack, lambda tensor: tensor))
        return self

    def __exit__(self, *_: Any) -> None:
        self._undo.close()


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # of the storage's own object: fake tensors have no data to point to


def in_own_storage(tensor: Tensor) -> Tensor:
    """The tensor without other data in its storage: a saved slice of a fused projection would keep all of it alive."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def gib(count: int) -> str:
    """Bytes as text: "1.23 GiB", or "45.6 MiB" below a tenth of a GiB."""
    return f"{count / BYTES_IN_GIB:.2f} GiB" if count >= BYTES_IN_GIB / 10 else f"{count / BYTES_IN_MIB:.1f} MiB"
