"""The loss of a causal model at its selected supervised rows, a chunk of rows at a time.

    B sequences, K selected, D hidden size, V vocabulary, N supervised rows of the batch

The logits of a large vocabulary need more memory than the layers: at V = 128,256 each row has half a MiB in float32,
and the cross-entropy saves it for the backward pass. `ChunkedLoss` gives the output head no rows at all, so that the
model's own code runs on (B, 0, V). Then it calls the head on chunks of the rows that have a loss:

    trained head   each chunk is checkpointed: the hidden rows (N, D) are saved, the logits are computed twice
    frozen head    the gradient of the hidden rows (N, D) is computed in the forward pass and saved, nothing twice

What a family's code does to its logits behind the head (scales, soft-capping) is recorded on the empty ones and
repeated on each chunk; `verify/verification.py` tries it. The value is that of transformers' `ForCausalLMLoss`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.fsdp import FSDPModule
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from tokentune.core.compat.fsdp import gathered
from tokentune.core.profile import Profile, Rows
from tokentune.errors import UnsupportedModelError
from tokentune.sampling.sampler import IGNORED_LABEL

CHUNK_BYTES = 64 * 1024**2  # of a chunk's logits in float32; with softmax and gradient three times that, briefly
# Probabilities down to 6e-8 / 256 differ from zero in a float16 gradient; 256 x 2 x a weight is far from overflow.
_FLOAT16_SCALE = 256.0


def is_frozen(module: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in module.parameters())


def why_not_in_chunks(model: PreTrainedModel, profile: Profile) -> str | None:
    """Why a model's loss cannot be taken in chunks; None where it can."""
    name = type(model).__name__
    if not model.can_generate() or model.get_output_embeddings() is None:
        return f"{name} is no language model with an output head"
    if profile.rows is Rows.ALL:
        return f"the head of {name} needs the rows of all tokens"
    if model.loss_function is not ForCausalLMLoss:
        return f"{name} has a loss function of its own"
    return profile.whole_logits


class WithheldRows:
    """The output head, which gets no rows: hooks that store its input, and the logits of a part of that input."""

    def __init__(self, head: nn.Module) -> None:
        self.head = head  # the output embeddings, whatever wraps them included
        self.hidden: Tensor | None = None
        self.behind_head = _Recorder()

    def install(self) -> list[Callable[[], None]]:
        """Adds the hooks; returns what takes them away again."""
        before = self.head.register_forward_pre_hook(self._keep_input, with_kwargs=True)
        after = self.head.register_forward_hook(self._record)
        return [before.remove, after.remove, self.behind_head.stop]

    def _keep_input(self, head: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        if self.hidden is not None:  # this is the call for a chunk
            return None
        name = next(iter(kwargs)) if not args else None
        hidden = self.hidden = kwargs[name] if name else args[0]
        empty = hidden.new_empty(len(hidden), 0, *hidden.shape[2:])  # a slice would keep all of `hidden` alive
        return ((empty, *args[1:]), kwargs) if args else (args, kwargs | {name: empty})

    def _record(self, head: nn.Module, args: tuple, logits: Tensor) -> None:
        if not self.behind_head.started:
            self.behind_head.start(logits)

    def finish(self, logits: Tensor, shape: tuple[int, int]) -> Tensor:
        """The stored rows (B, K, D), after the model returned its `logits` (B, 0, V); `shape` is (B, K)."""
        if self.hidden is None:
            raise UnsupportedModelError("the model computes its logits without calling its output embeddings")
        if self.hidden.shape[:2] != shape:
            raise UnsupportedModelError(
                f"the head was handed {tuple(self.hidden.shape)}, not a row per token of {shape}"
            )
        self.behind_head.finish(logits)
        return self.hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits of some of the rows: (n, D) -> (n, V)."""
        return self.behind_head.repeat(self._call_head(hidden[None]))[0]

    def trained(self) -> bool:
        """Whether any parameter after the rows is trained."""
        return not is_frozen(self.head) or any(tensor.requires_grad for tensor in self.behind_head.tensors())

    def _call_head(self, hidden: Tensor) -> Tensor:
        if not isinstance(self.head, FSDPModule):
            return self.head(hidden)
        # FSDP's hooks would reduce the gradients of each chunk over the processes. Without them it reduces all at once:
        # the weights stay gathered from the head's call on no rows to its gradients.
        with gathered(self.head):
            return self.head.forward(hidden)


def next_targets(labels: Tensor, shift_labels: Tensor | None, ignore_index: int = IGNORED_LABEL) -> Tensor:
    """(B, S): what each position predicts, the next label unless the caller moved them already."""
    return F.pad(labels, (0, 1), value=ignore_index)[:, 1:] if shift_labels is None else shift_labels


def rows_with_loss(supervised: Tensor, count: int | None) -> Tensor | None:
    """Indices of rows with a loss, ascending: (B K,) bool -> (N,); None: all. At least one, so that all weights get a
    gradient.

    `count` is N, where the caller knows it on the host. Otherwise it is read from `supervised` on a CPU; on an
    accelerator all rows are taken, because reading it would make the host wait.
    """
    if count is None and supervised.device.type == "cpu" and not is_fake(supervised):
        count = int(supervised.sum())
    if count is None or count >= len(supervised):
        return None
    return (~supervised).to(torch.uint8).argsort(stable=True)[: max(count, 1)]


def in_chunks(chunk_bytes: int, vocabulary: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Splits tensors along their rows, so that the logits of a chunk take at most `chunk_bytes` in float32."""
    chunks = -(-len(tensors[0]) // max(1, chunk_bytes // (4 * vocabulary)))
    return list(zip(*(tensor.tensor_split(chunks) for tensor in tensors), strict=True))


class ChunkedLoss:
    """The loss function of one step, on the rows that `WithheldRows` stores."""

    def __init__(
        self,
        head: nn.Module,
        positions: Tensor,
        num_supervised: int | None = None,
        chunk_bytes: int = CHUNK_BYTES,
        weights: Tensor | None = None,
        recompute: bool = True,
    ) -> None:
        """
        Args:
            head: the output embeddings, whatever wraps them included.
            positions: (B, K), the selected ones.
            num_supervised: N, see `rows_with_loss`.
            chunk_bytes: most bytes of a chunk's logits in float32.
            weights: (B, K), factors of the rows' losses, which then stand for all supervised targets.
            recompute: save no logits of a trained head, and compute them twice.
        """
        self.rows, self.positions = WithheldRows(head), positions
        self.num_supervised, self.chunk_bytes = num_supervised, chunk_bytes
        self.weights, self.recompute = weights, recompute
        self.install = self.rows.install

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = IGNORED_LABEL,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """In place of `ForCausalLMLoss`, on the same arguments; `logits` (B, 0, V) tell what V is.

        Returns the mean over the supervised rows; given `num_items_in_batch`, their sum divided by it. Given weights,
        the weighted sum is divided by the number of all supervised targets, selected or not.
        """
        hidden = self.rows.finish(logits, self.positions.shape)
        of_all = next_targets(labels, shift_labels, ignore_index)
        targets = of_all.gather(1, self.positions.to(of_all.device)).to(hidden.device)  # (B, K)
        supervised, wide = (targets != ignore_index).flatten(), logits.float().dtype
        rows = [hidden.flatten(0, 1), targets.flatten()]  # (N, D), (N,)
        if self.weights is not None:
            rows.append(self.weights.to(hidden.device, wide).flatten())
        if (numbers := rows_with_loss(supervised, self.num_supervised)) is not None:
            rows = [tensor[numbers] for tensor in rows]

        def summed(hidden: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
            logits = self.rows.logits(hidden).to(wide)  # (n, V)
            if weights is None:
                return F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum")
            losses = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="none")
            return (losses * weights).sum()  # not a product of vectors, which autocast would round to 16 bits

        loss = self._of_all(summed, in_chunks(self.chunk_bytes, logits.shape[-1], *rows), rows)
        if num_items_in_batch is not None:
            count = num_items_in_batch
        else:
            count = supervised.sum() if self.weights is None else (of_all != ignore_index).sum()
        return loss / (count.to(loss.device) if isinstance(count, Tensor) else count)

    def _of_all(self, summed: Callable, pieces: list[tuple[Tensor, ...]], rows: list[Tensor]) -> Tensor:
        if torch.is_grad_enabled() and not self.rows.trained():
            return _FrozenHead.apply(rows[0], summed, [len(piece[0]) for piece in pieces], *rows[1:])
        if torch.is_grad_enabled() and self.recompute:
            chance = any(isinstance(module, nn.Dropout) for module in self.rows.head.modules())
            options = {"use_reentrant": False, "preserve_rng_state": chance}
            return torch.stack([checkpoint(summed, *piece, **options) for piece in pieces]).sum()
        return torch.stack([summed(*piece) for piece in pieces]).sum()


def selected_loss(
    loss_function: Callable, positions: Tensor, logits: Tensor, labels: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """A causal model's own loss, on logits (B, K, V) of the selected rows and labels (B, S) of the whole sequence.

    Each selected position predicts the next token of the original sequence.
    """
    targets = next_targets(labels, kwargs.pop("shift_labels", None))
    targets = targets.gather(1, positions.to(targets.device))
    if logits.shape[1] != targets.shape[1]:
        raise UnsupportedModelError(f"the head returned {logits.shape[1]} rows for {targets.shape[1]} selected tokens")
    return loss_function(logits, labels, *args, shift_labels=targets, **kwargs)


def put_loss(model: PreTrainedModel, loss_function: Callable) -> list[Callable[[], None]]:
    """Replaces the model's loss function, and adds the new one's hooks. Returns what undoes it, last first."""
    undo = loss_function.install() if hasattr(loss_function, "install") else []
    if "_loss_function" in model.__dict__:
        undo.append(partial(setattr, model, "_loss_function", model._loss_function))
    else:
        undo.append(partial(delattr, model, "_loss_function"))
    model._loss_function = loss_function
    return undo


def row_gradients(losses_of: Callable, rows: Tensor, *more: Tensor) -> tuple[Tensor, Tensor, float]:
    """Losses of rows (n, D), summed or not; the gradient (n, D) of their sum; and the factor in that gradient."""
    scale = _FLOAT16_SCALE if torch.float16 in (rows.dtype, _product_dtype(rows)) else 1.0
    # Hooks of its own: this graph is freed before the backward pass, so hooks that count or move saved tensors must not
    # see its tensors.
    with torch.enable_grad(), saved_tensors_hooks(_as_it_is, _as_it_is):
        rows = rows.detach().requires_grad_()
        losses = losses_of(rows, *more)
    gradient = torch.autograd.grad(losses, rows, torch.full_like(losses, scale))[0]
    return losses.detach(), gradient, scale


class _FrozenHead(torch.autograd.Function):
    """The summed loss of all chunks; its forward also computes the gradient of the hidden rows (N, D)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, summed: Callable, sizes: list[int], *more: Tensor) -> Tensor:
        pieces = zip(*(tensor.split(sizes) for tensor in (hidden, *more)), strict=True)
        losses, gradients, scales = zip(*(row_gradients(summed, *piece) for piece in pieces), strict=True)
        ctx.scale = scales[0]
        ctx.save_for_backward(torch.cat(gradients))
        return torch.stack(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        (of_hidden,) = ctx.saved_tensors
        # Multiplied in the loss's own type: a factor rounded to 16 bits would change the length of every gradient.
        of_hidden = (of_hidden.to(gradient.dtype) * (gradient / ctx.scale)).to(of_hidden.dtype)
        return of_hidden, *(None for _ in ctx.needs_input_grad[1:])


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _product_dtype(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


class _Recorder(TorchFunctionMode):
    """Records what is computed from one tensor, to compute the same from others."""

    def __init__(self) -> None:
        super().__init__()
        self.started = self.running = False
        self.values: list[Tensor] = []  # the first tensor, then each result
        self.calls: list[tuple[Callable, list, dict[str, Any]]] = []  # in which a _Place stands for a value
        self.end = 0  # index of the value that is wanted

    def start(self, tensor: Tensor) -> None:
        self.started = self.running = True
        self.values.append(tensor)
        self.__enter__()

    def stop(self) -> None:
        """Has no effect the second time."""
        if self.running:
            self.running = False
            self.__exit__(None, None, None)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        marked, named = [self._mark(value) for value in args], {k: self._mark(value) for k, value in kwargs.items()}
        if isinstance(result, Tensor) and any(isinstance(value, _Place) for value in (*marked, *named.values())):
            if func is Tensor.float:  # under a mode that turns casts (`tiny_copy.Float64`) it has another result type
                func, marked = Tensor.to, [*marked, result.dtype]
            self.calls.append((func, marked, named))
            self.values.append(result)
        return result

    def _mark(self, value: Any) -> Any:
        return next((_Place(i) for i, known in enumerate(self.values) if known is value), value)

    def finish(self, wanted: Tensor) -> None:
        """Ends the recording: `wanted` is the result that is to be computed from other tensors."""
        self.stop()
        place = self._mark(wanted)
        if not isinstance(place, _Place):
            raise UnsupportedModelError("what the model does to its logits cannot be repeated on a part of them")
        self.end = place.index

    def repeat(self, tensor: Tensor) -> Tensor:
        values = [tensor]

        def value(item: Any) -> Any:
            return values[item.index] if isinstance(item, _Place) else item

        for func, args, kwargs in self.calls[: self.end]:
            values.append(func(*map(value, args), **{name: value(item) for name, item in kwargs.items()}))
        return values[self.end]

    def tensors(self) -> list[Tensor]:
        """The tensors that the computation uses besides the first one."""
        items = [item for _, args, kwargs in self.calls for item in (*args, *kwargs.values())]
        return [item for item in items if isinstance(item, Tensor)]


@dataclass
class _Place:
    index: int
