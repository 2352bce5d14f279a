"""Counts live storages, operation by operation: how many bytes, of which kind, and when there were most of them.

The same counter works on real and on fake tensors, so an estimate (`memory/footprint.py`) can be compared with a
measurement. It sees every tensor that an operation returns. Memory that a kernel allocates and frees within itself is
seen only if `WORKSPACES` lists the operation.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

REST = "rest"  # the kind of storages that nobody claimed: temporary tensors


def _dequantized_copy(args: tuple) -> int:
    """`gemm_4bit(A, B, shape, ...)` dequantizes the weight into the type of A, if A has more than a few rows."""
    rows, columns = args[2]
    return rows * columns * args[0].element_size()


# Operation -> bytes that its kernel needs while it runs, computed from its arguments.
WORKSPACES: dict[str, Callable[[tuple], int]] = {"bitsandbytes::gemm_4bit": _dequantized_copy}


@dataclass(eq=False)
class Block:
    """One storage: its device, its kind, and the operations that made and freed it (None: still alive)."""

    size: int
    device: str
    born: int
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
        """`device`: the device type whose peak is counted; bytes on others are known to `bytes_of` alone."""
        super().__init__()
        self.device = device
        self.now = self.peak = self.operations = self.peak_at = 0
        self.phase = self.peak_phase = ""
        self.phases: list[tuple[int, str]] = []  # (first operation, name)
        self.extra = 0  # of the workspace at the peak
        self.blocks: list[Block] = []
        self._live: dict[int, tuple[weakref.ref, Block]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        if isinstance(result, Tensor):
            self.block_of(result)
        elif result is not None:
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self.block_of(leaf)
        workspace = WORKSPACES.get(func.name() if hasattr(func, "name") else "")
        if workspace is not None:
            self._top(workspace(args))
        return result

    def block_of(self, tensor: Tensor) -> Block:
        """The block of this tensor's storage; a new one if the storage is seen for the first time."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._live.get(key)
        if known is not None:
            return known[1]
        block = Block(storage.nbytes(), tensor.device.type, self.operations)

        def freed(_: weakref.ref) -> None:
            del self._live[key]
            block.freed = self.operations
            if block.device == self.device:
                self.now -= block.size

        self._live[key] = weakref.ref(storage, freed), block
        self.blocks.append(block)
        if block.device == self.device:
            self.now += block.size
            self._top()
        return block

    def _top(self, workspace: int = 0) -> None:
        if self.now + workspace > self.peak:
            self.peak, self.peak_at, self.peak_phase = self.now + workspace, self.operations, self.phase
            self.extra = workspace

    def claim(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Gives the storages of these tensors a kind. The first claim counts."""
        for tensor in tensors:
            block = self.block_of(tensor)
            if block.kind == REST:
                block.kind = kind

    def begin(self, phase: str) -> None:
        """Starts a phase, for `peak_phase`."""
        self.phase = phase
        self.phases.append((self.operations + 1, phase))

    def restart(self) -> None:
        """Forgets the peak so far, and all storages that were freed."""
        self.blocks = [block for block in self.blocks if block.freed is None]
        self.peak, self.peak_at, self.peak_phase, self.extra = self.now, self.operations, self.phase, 0

    def bytes_of(self, kind: str, device: str | None = None) -> int:
        """Bytes of this kind that are alive now on `device` (default: the counted one)."""
        device = device or self.device
        return sum(b.size for b in self.blocks if b.freed is None and b.kind == kind and b.device == device)

    def at_peak(self) -> dict[str, int]:
        """Bytes by kind at the peak; their sum is `peak`."""
        sizes = Counter({REST: self.extra})
        for block in self.blocks:
            alive = block.born <= self.peak_at and (block.freed is None or block.freed >= self.peak_at)
            if alive and block.device == self.device:
                sizes[block.kind] += block.size
        # Temporary tensors freed within the operation of the peak may have been freed before or after it.
        sizes[REST] += self.peak - sizes.total()
        return dict(sizes)

    def highest(
        self, factors: Callable[[str], dict[str, float]], fixed: Callable[[str], dict[str, int]]
    ) -> tuple[str, dict[str, int]]:
        """The peak if the bytes of each kind were multiplied by a factor, and fixed ones were added.

        Args:
            factors: phase -> {kind: factor}; 1 for kinds that are missing.
            fixed: phase -> {kind: bytes to add}.

        Returns:
            The phase of the peak, and its bytes by kind.
        """
        changes: list[tuple[int, str, int]] = []
        for block in self.blocks:
            if block.device == self.device:
                changes.append((block.born, block.kind, block.size))
                if block.freed is not None:  # still alive within this operation
                    changes.append((block.freed + 1, block.kind, -block.size))
        starts = [(0, ""), *self.phases]
        changes += [(start, REST, 0) for start, _ in self.phases]
        sizes, best = Counter(), ("", {})
        for operation, kind, size in sorted(changes, key=lambda change: (change[0], change[2])):
            sizes[kind] += size
            phase = next(name for start, name in reversed(starts) if start <= operation)
            if phase and size >= 0:
                weights = factors(phase)
                scaled = {kind: round(count * weights.get(kind, 1.0)) for kind, count in sizes.items()}
                total = {kind: scaled.get(kind, 0) + fixed(phase).get(kind, 0) for kind in scaled | fixed(phase)}
                best = max(best, (phase, total), key=lambda found: sum(found[1].values()))
        return best


def claim_model(live: LiveBytes, model: nn.Module) -> None:
    """Claims the weights now, and the gradients when they are made."""
    live.claim("weights", (*model.parameters(), *model.buffers(), *quantization_constants(model)))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: live.claim("gradients", [p.grad]))


def quantization_constants(model: nn.Module) -> list[Tensor]:
    """The tensors that bitsandbytes keeps beside 4-bit weights: scales, the scales of scales, tables."""
    found = []
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        while state is not None:
            found += [value for value in vars(state).values() if isinstance(value, Tensor)]
            state = getattr(state, "state2", None)
    return found
