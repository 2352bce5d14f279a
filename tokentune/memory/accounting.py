"""Counts the memory of a training step, storage by storage: how many bytes, of which kind, and when most were alive.

`LiveBytes` works alike on real tensors and on those without data, so that an estimate (`memory/footprint.py`) can be
compared with a measurement. It sees every tensor that an operation returns. Memory that a kernel allocates and frees
within itself is seen only if `WORKSPACES` lists the operation.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tokentune.core.patched import reference_of

WEIGHTS, GRADIENTS, OPTIMIZER, ACTIVATIONS = "weights", "gradients", "optimizer", "activations"
REST = "rest"  # the kind of all other storages: temporary tensors
FRAGMENTATION = 0.03  # of the peak: memory that an allocator holds and cannot use


@dataclass
class Footprint:
    """Bytes of one training step on its device; the optimizer has made steps before.

    Attributes:
        weights: parameters, buffers and quantisation constants.
        gradients: after the backward pass.
        optimizer: its states.
        activations: unique storages that autograd keeps after the forward pass (`SavedForBackward`).
        peak: most that is alive at once.
        peak_phase: when that is: "forward", "backward" or "optimizer".
        at_peak: the peak by kind; "rest" are temporary tensors.
        activations_by: `activations` by the kind of module that kept them (`core/saved_tensors/breakdown.py`).
        host: bytes in the CPU's memory beside the device (paged optimizer states, offloaded keys and values).
        sent: to other processes, in an optimizer step (`memory/sharding.py`).
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    peak: int
    peak_phase: str
    at_peak: dict[str, int]
    activations_by: dict[str, int] = field(default_factory=dict)
    host: int = 0
    sent: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def fits(peak: int, room: float) -> bool:
    """Whether a step with this peak fits into `room`, both in bytes."""
    return peak * (1 + FRAGMENTATION) <= room


# --- what a step holds ------------------------------------------------------------------------------------------------


def weights_of(model: nn.Module) -> list[Tensor]:
    """Parameters, buffers and the constants of 4-bit weights (scales, their scales, tables), and those of the
    reference model whose losses the selection uses.
    """
    constants = []
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        while state is not None:
            constants += [value for value in vars(state).values() if isinstance(value, Tensor)]
            state = getattr(state, "state2", None)
    reference = reference_of(model)
    return [*model.parameters(), *model.buffers(), *constants, *([] if reference is None else weights_of(reference))]


def states_of(optimizer: Any) -> Iterator[Tensor]:
    """The tensors of an optimizer's states, or of all optimizers of an `OptimizerInBackward`."""
    for part in getattr(optimizer, "optimizers", {None: optimizer}).values():
        for state in part.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of these tensors' storages, each counted once; of a tensor that FSDP has split, of this process's part."""
    storages = ((tensor.to_local() if hasattr(tensor, "to_local") else tensor).untyped_storage() for tensor in tensors)
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


# --- what is alive ----------------------------------------------------------------------------------------------------


def _dequantized_copy(args: tuple) -> int:
    """`gemm_4bit(A, B, shape, ...)` dequantizes the weight into the type of A, if A has more than a few rows."""
    rows, columns = args[2]
    return rows * columns * args[0].element_size()


# Operation -> bytes that its kernel needs while it runs, computed from its arguments.
WORKSPACES: dict[str, Callable[[tuple], int]] = {"bitsandbytes::gemm_4bit": _dequantized_copy}


@dataclass(eq=False)
class Block:
    """One storage: its kind, its device, the operations that made and freed it (None: still alive), and its phase."""

    size: int
    device: str
    born: int
    phase: str
    kind: str = REST
    freed: int | None = None


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that are made within it, and of those that are claimed.

    >>> with LiveBytes() as live:
    ...     live.claim("weights", model.parameters())
    ...     model(**batch).loss.backward()
    >>> live.peak, live.at_peak()
    """

    def __init__(self, device: str = "cpu"):
        """`device`: the type of device whose peak is counted; only `bytes_of` tells bytes on others."""
        super().__init__()
        self.device = device
        self.now = self.peak = self.operations = self.peak_at = 0
        self.phase = self.peak_phase = ""
        self.workspace = 0  # of the operation at the peak
        self.blocks: list[Block] = []
        self._live: dict[int, tuple[weakref.ref, Block]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        for leaf in [result] if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.block_of(leaf)
        workspace = WORKSPACES.get(func.name() if hasattr(func, "name") else "")
        if workspace is not None:
            self._note_peak(workspace(args))
        return result

    def block_of(self, tensor: Tensor) -> Block:
        """The block of this tensor's storage; a new one if the storage is seen for the first time."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._live.get(key)
        if known is not None:
            return known[1]
        block = Block(storage.nbytes(), tensor.device.type, self.operations, self.phase)

        def freed(_: weakref.ref) -> None:
            del self._live[key]
            block.freed = self.operations
            if block.device == self.device:
                self.now -= block.size

        self._live[key] = weakref.ref(storage, freed), block
        self.blocks.append(block)
        if block.device == self.device:
            self.now += block.size
            self._note_peak()
        return block

    def _note_peak(self, workspace: int = 0) -> None:
        if self.now + workspace > self.peak:
            self.peak, self.peak_at, self.peak_phase = self.now + workspace, self.operations, self.phase
            self.workspace = workspace

    def claim(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Gives the storages of these tensors a kind. The first claim counts."""
        for tensor in tensors:
            block = self.block_of(tensor)
            if block.kind == REST:
                block.kind = kind

    def begin(self, phase: str) -> None:
        """Starts a phase, for `peak_phase` and `highest`."""
        self.phase = phase
        self.blocks.append(Block(0, self.device, self.operations + 1, phase))

    def restart(self) -> None:
        """Forgets the peak so far, and all storages that were freed."""
        self.blocks = [block for block in self.blocks if block.freed is None]
        self.peak = self.workspace = 0
        self._note_peak()

    def bytes_of(self, kind: str, device: str | None = None) -> int:
        """Bytes of this kind that are alive now on `device` (default: the counted one)."""
        device = device or self.device
        return sum(b.size for b in self.blocks if b.freed is None and b.kind == kind and b.device == device)

    def at_peak(self) -> dict[str, int]:
        """Bytes by kind at the peak; their sum is `peak`."""
        sizes = Counter({REST: self.workspace})
        for block in self.blocks:
            alive = block.born <= self.peak_at and (block.freed is None or block.freed >= self.peak_at)
            if alive and block.device == self.device:
                sizes[block.kind] += block.size
        # Temporary tensors freed within the operation of the peak may have been freed before or after it.
        sizes[REST] += self.peak - sizes.total()
        return dict(sizes)

    def highest(self, change: Callable[[str, dict[str, int]], dict[str, int]]) -> tuple[str, dict[str, int]]:
        """The peak if other bytes were alive, which `change` computes from the phase and the bytes by kind.

        Returns:
            The phase of the peak, and its bytes by kind.
        """
        counted = [block for block in self.blocks if block.device == self.device]
        events = [(block.born, block.size, block) for block in counted]
        # A storage is still alive within the operation that frees it.
        events += [(block.freed + 1, -block.size, block) for block in counted if block.freed is not None]
        sizes, best = Counter(), ("", {})
        for operation, size, block in sorted(events, key=lambda event: event[:2]):
            sizes[block.kind] += size
            if block.phase and operation == block.born:
                best = max(best, (block.phase, change(block.phase, sizes)), key=lambda found: sum(found[1].values()))
        return best
