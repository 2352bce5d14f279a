"""The two groups of a batch's tokens: from sequence order to groups, and back.

B sequences, S tokens, K selected, R = S - K unselected, D hidden size
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.autograd.function import once_differentiable


class TokenGroups(NamedTuple):
    """The hidden states between two layers. A tuple, because FSDP and DDP search tuples for tensors."""

    selected: Tensor  # (B, K, D), with gradients
    unselected: Tensor  # (B, R, D), constants


def token_order(positions: Tensor, length: int) -> Tensor:
    """(B, K) selected positions -> (B, S): those first, then all others, both ascending.

    Raises ValueError for a position outside the sequence, twice in a row, or out of order; on an accelerator a
    device-side assertion fails instead, because the host does not wait for the result.
    """
    require((positions >= 0) & (positions < length), f"selected_positions must lie between 0 and {length - 1}")
    chosen = torch.zeros(positions.shape[0], length, dtype=torch.bool, device=positions.device)
    order = torch.argsort(~chosen.scatter_(1, positions, True), dim=1, stable=True)
    in_order = order[:, : positions.shape[1]] == positions
    require(in_order, "selected_positions must be distinct and ascending in each row")
    return order


def gather_tokens(tokens: Tensor, indices: Tensor) -> Tensor:
    """Rows of `tokens` (B, S, ...) at `indices` (B, N) -> (B, N, ...)."""
    batch, length = tokens.shape[:2]
    flat = (indices + torch.arange(batch, device=indices.device)[:, None] * length).flatten().to(tokens.device)
    return tokens.flatten(0, 1).index_select(0, flat).unflatten(0, indices.shape)


def in_sequence_order(selected: Tensor, unselected: Tensor, flat_indices: tuple[Tensor, Tensor]) -> Tensor:
    """Keys or values (B, G, K, d) and (B, G, R, d) of the groups -> (B, G, S, d).

    `flat_indices` are the groups' rows, (B K) and (B R), among the B S rows of the result. Gradients
    reach `selected` alone. One copy, laid out (B, S, G, d), as projections write and kernels read.
    """
    return _Join.apply(selected, unselected.detach(), *flat_indices)


class _Join(torch.autograd.Function):
    """Two `index_copy_`. Those of torch would save their inputs for the backward pass, which needs only the indices."""

    @staticmethod
    def forward(
        ctx, selected: Tensor, unselected: Tensor, selected_indices: Tensor, unselected_indices: Tensor
    ) -> Tensor:
        batch, heads, count, size = selected.shape
        rows = selected.new_empty(batch * (count + unselected.shape[2]), heads, size)
        rows.index_copy_(0, selected_indices, selected.transpose(1, 2).flatten(0, 1))
        rows.index_copy_(0, unselected_indices, unselected.transpose(1, 2).flatten(0, 1).to(rows.dtype))
        ctx.save_for_backward(selected_indices)
        return rows.unflatten(0, (batch, -1)).transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows = gradient.transpose(1, 2).flatten(0, 1).index_select(0, ctx.saved_tensors[0])
        return rows.unflatten(0, (len(gradient), -1)).transpose(1, 2), None, None, None


def require(condition: Tensor, message: str) -> None:
    """Raises ValueError with `message` unless `condition` holds everywhere. The host does not wait for a device."""
    if is_fake(condition):  # it has no value: memory is being estimated
        return
    if condition.device.type != "cpu":
        torch._assert_async(condition.all(), message)
    elif not bool(condition.all()):
        raise ValueError(message)
