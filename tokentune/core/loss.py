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

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
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
from tokentune.core.temporary import set_until_undone
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


@dataclass(eq=False)
class WithheldRows:
    """An output head that gets no rows. Its input is stored, and its logits are then made from chunks of that."""

    head: nn.Module  # the output embeddings, whatever wraps them included
    num_supervised: int | None = None  # N, where the caller knows it on the host
    chunk_bytes: int = CHUNK_BYTES  # at most, of a chunk's logits in float32

    def __post_init__(self) -> None:
        self.hidden: Tensor | None = None
        self.behind_head = _Recorder()

    def install(self, undo: ExitStack) -> None:
        """Adds the hooks; `undo` takes them away again."""
        undo.callback(self.head.register_forward_pre_hook(self._keep_input, with_kwargs=True).remove)
        undo.callback(self.head.register_forward_hook(self._record).remove)
        undo.callback(self.behind_head.stop)

    def _keep_input(self, head: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        if self.hidden is not None:  # this is the call for a chunk
            return None
        name = next(iter(kwargs)) if not args else None
        hidden = self.hidden = kwargs[name] if name else args[0]
        empty = hidden.new_empty(len(hidden), 0, *hidden.shape[2:])  # a slice would keep all of `hidden` alive
        return ((empty, *args[1:]), kwargs) if args else (args, kwargs | {name: empty})

    def _record(self, head: nn.Module, args: tuple, logits: Tensor) -> None:
        if not self.behind_head.values:
            self.behind_head.start(logits)

    def with_loss(
        self, logits: Tensor, targets: Tensor, weights: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor, Tensor | None]:
        """The stored rows that have a loss, after the model returned its `logits` (B, 0, V).

        Args:
            targets: (B, K), what each of the stored rows predicts; -100 at rows without a loss.
            weights: (B, K), factors of the losses.

        Returns:
            Hidden states (N, D), targets (N,), and weights (N,) where there are any; which of all rows have a loss,
            (B K,) bool; and the indices (N,) of the returned ones among these, None where all are returned.
        """
        if self.hidden is None:
            raise UnsupportedModelError("the model computes its logits without calling its output embeddings")
        if self.hidden.shape[:2] != targets.shape:
            raise UnsupportedModelError(
                f"the head was handed {tuple(self.hidden.shape)}, not a row per token of {tuple(targets.shape)}"
            )
        self.behind_head.finish(logits)
        self.dtype, self.vocabulary = logits.float().dtype, logits.shape[-1]
        device = self.hidden.device
        rows = [self.hidden.flatten(0, 1), targets.to(device).flatten()]
        if weights is not None:
            rows.append(weights.to(device, self.dtype).flatten())
        supervised = rows[1] != IGNORED_LABEL
        indices = self._rows_with_loss(supervised)
        return rows if indices is None else [tensor[indices] for tensor in rows], supervised, indices

    def in_chunks(self, rows: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        """Splits tensors along their rows, so that the logits of a chunk take at most `chunk_bytes` in float32."""
        count = -(-len(rows[0]) // max(1, self.chunk_bytes // (4 * self.vocabulary)))
        return list(zip(*(tensor.tensor_split(count) for tensor in rows), strict=True))

    def _rows_with_loss(self, supervised: Tensor) -> Tensor | None:
        """Indices of rows with a loss, ascending: (B K,) bool -> (N,); None: all.

        At least one, so that all weights get a gradient. Where the host does not know N, it is read on a CPU; on an
        accelerator all rows are taken, because reading it would make the host wait.
        """
        count = self.num_supervised
        if count is None and supervised.device.type == "cpu" and not is_fake(supervised):
            count = int(supervised.sum())
        if count is None or count >= len(supervised):
            return None
        return (~supervised).to(torch.uint8).argsort(stable=True)[: max(count, 1)]

    def losses(self, hidden: Tensor, targets: Tensor, reduction: str = "none") -> Tensor:
        """The cross-entropy of rows (n, D) of a chunk: (n,), or their sum."""
        logits = self.behind_head.repeat(self._call_head(hidden[None]))[0].to(self.dtype)  # (n, V)
        return F.cross_entropy(logits, targets, ignore_index=IGNORED_LABEL, reduction=reduction)

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


def next_targets(
    labels: Tensor, shift_labels: Tensor | None = None, ignore_index: int = IGNORED_LABEL, **_: Any
) -> Tensor:
    """(B, S): what each position predicts, the next label unless the caller moved them already; -100 for no loss."""
    targets = F.pad(labels, (0, 1), value=ignore_index)[:, 1:] if shift_labels is None else shift_labels
    return targets if ignore_index == IGNORED_LABEL else targets.masked_fill(targets == ignore_index, IGNORED_LABEL)


@dataclass(eq=False)
class ChunkedLoss:
    """The loss function of one step, on the rows that `WithheldRows` stores."""

    rows: WithheldRows
    positions: Tensor  # (B, K), the selected ones
    weights: Tensor | None = None  # (B, K), factors of the rows' losses, which then stand for all supervised targets
    recompute: bool = True  # save no logits of a trained head, and compute them twice

    def __call__(
        self, logits: Tensor, labels: Tensor, *_: Any, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Tensor:
        """In place of `ForCausalLMLoss`, on the same arguments; `logits` (B, 0, V) tell what V is.

        Returns the mean over the supervised rows; given `num_items_in_batch`, their sum divided by it. Given weights,
        the weighted sum is divided by the number of all supervised targets, selected or not.
        """
        of_all = next_targets(labels, **kwargs)
        targets = of_all.gather(1, self.positions.to(of_all.device))  # (B, K)
        if self.weights is not None:  # what weighs nothing costs nothing
            targets = targets.masked_fill(self.weights.to(targets.device) == 0, IGNORED_LABEL)
        rows, supervised, _ = self.rows.with_loss(logits, targets, self.weights)
        loss = self._sum(rows)
        count = num_items_in_batch
        if count is None:
            count = supervised.sum() if self.weights is None else (of_all != IGNORED_LABEL).sum()
        return loss / (count.to(loss.device) if isinstance(count, Tensor) else count)

    def _sum(self, rows: list[Tensor]) -> Tensor:
        if torch.is_grad_enabled() and not self.rows.trained():
            return _FrozenHead.apply(rows[0], self.sum_of_chunk, self.rows.in_chunks, *rows[1:])
        chunks = self.rows.in_chunks(rows)
        if torch.is_grad_enabled() and self.recompute:
            chance = any(isinstance(module, nn.Dropout) for module in self.rows.head.modules())
            options = {"use_reentrant": False, "preserve_rng_state": chance}
            return torch.stack([checkpoint(self.sum_of_chunk, *chunk, **options) for chunk in chunks]).sum()
        return torch.stack([self.sum_of_chunk(*chunk) for chunk in chunks]).sum()

    def sum_of_chunk(self, hidden: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        if weights is None:
            return self.rows.losses(hidden, targets, "sum")
        return (self.rows.losses(hidden, targets) * weights).sum()  # a product of vectors would be rounded by autocast


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


def put_loss(undo: ExitStack, model: PreTrainedModel, loss_function: Callable) -> None:
    """Replaces the model's loss function, with the hooks of one that withholds rows, until `undo` is closed."""
    rows = getattr(loss_function, "rows", None)
    if isinstance(rows, WithheldRows):
        rows.install(undo)
    set_until_undone(undo, model, "_loss_function", loss_function)


def put_chunked_loss(
    undo: ExitStack, model: PreTrainedModel, labels: Tensor, num_supervised: int | None, chunk_bytes: int
) -> None:
    """Has the model take the loss of all tokens, with labels (B, S), in chunks, until `undo` is closed."""
    every = torch.arange(labels.shape[1], device=labels.device).expand(labels.shape)  # (B, S)
    rows = WithheldRows(model.get_output_embeddings(), num_supervised, chunk_bytes)
    put_loss(undo, model, ChunkedLoss(rows, every))


def take_loss_in_chunks(model: PreTrainedModel, chunk_bytes: int = CHUNK_BYTES) -> list[Callable[[], None]]:
    """Ordinary training, all tokens with gradients, with the loss in chunks: hooks on an unpatched model.

    They change its forward passes in training mode, with labels, alone. Returns what removes them again.
    """
    undo = ExitStack()

    def begin(model: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> None:
        labels = kwargs.get("labels")
        if model.training and labels is not None:
            put_chunked_loss(undo, model, labels, None, chunk_bytes)

    def end(*_: Any) -> None:
        undo.close()

    before = model.register_forward_pre_hook(begin, with_kwargs=True)
    after = model.register_forward_hook(end, always_call=True)
    return [before.remove, after.remove]


def row_gradients(losses_of: Callable, rows: Tensor, *more: Tensor) -> tuple[Tensor, Tensor, float]:
    """Losses of rows (n, D), summed or not; the gradient (n, D) of their sum; and the factor in that gradient."""
    kind = rows.device.type
    product = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else rows.dtype
    scale = _FLOAT16_SCALE if torch.float16 in (rows.dtype, product) else 1.0
    # Hooks of its own: this graph is freed before the backward pass, so hooks that count or move saved tensors must not
    # see its tensors.
    with torch.enable_grad(), saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        rows = rows.detach().requires_grad_()
        losses = losses_of(rows, *more)
    gradient = torch.autograd.grad(losses, rows, torch.full_like(losses, scale))[0]
    return losses.detach(), gradient, scale


class _FrozenHead(torch.autograd.Function):
    """The summed loss of all chunks; its forward also computes the gradient of the hidden rows (N, D)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss_of: Callable, in_chunks: Callable, *more: Tensor) -> Tensor:
        found = [row_gradients(loss_of, *chunk) for chunk in in_chunks((hidden, *more))]
        losses, gradients, scales = zip(*found, strict=True)
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


class _Recorder(TorchFunctionMode):
    """Records what is computed from one tensor, to compute the same from others."""

    def __init__(self) -> None:
        super().__init__()
        self.running = False
        self.values: list[Tensor] = []  # the first tensor, then the result of each call
        self.calls: list[tuple[Callable, tuple, dict[str, Any]]] = []
        self.wanted: Tensor | None = None

    def start(self, tensor: Tensor) -> None:
        self.running = True
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
        if isinstance(result, Tensor) and any(map(self._is_value, (*args, *kwargs.values()))):
            if func is Tensor.float:  # under a mode that turns casts (`tiny_copy.Float64`) it has another result type
                func, args = Tensor.to, (*args, result.dtype)
            self.calls.append((func, args, kwargs))
            self.values.append(result)
        return result

    def _is_value(self, item: Any) -> bool:
        return any(item is value for value in self.values)

    def finish(self, wanted: Tensor) -> None:
        """Ends the recording: `wanted` is the result that is to be computed from other tensors."""
        self.stop()
        if not self._is_value(wanted):
            raise UnsupportedModelError("what the model does to its logits cannot be repeated on a part of them")
        self.wanted = wanted

    def repeat(self, tensor: Tensor) -> Tensor:
        first, *results = self.values
        made = {id(first): tensor}
        for (func, args, kwargs), result in zip(self.calls, results, strict=True):
            if id(self.wanted) in made:
                break
            args = [made.get(id(item), item) for item in args]
            made[id(result)] = func(*args, **{name: made.get(id(item), item) for name, item in kwargs.items()})
        return made[id(self.wanted)]

    def tensors(self) -> list[Tensor]:
        """The tensors that the computation uses besides the first one."""
        items = [item for _, args, kwargs in self.calls for item in (*args, *kwargs.values())]
        return [item for item in items if isinstance(item, Tensor) and not self._is_value(item)]
