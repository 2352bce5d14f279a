"""Exact attention over blocks of queries: memory that grows with the sequence, not with its square.

B sequences, S tokens, Q queries of one group, H heads, G key-value heads, d head size, n queries in a block.

Each block is one call of a fused kernel, over the keys up to the last one that any of its queries sees. So a causal
mask costs about half of the Q x S rectangle, and a sliding window costs its width. The part of the mask that a block
needs is made from the deferred mask when it is needed, and again in the backward pass. Saved for the backward pass are
queries, keys, values, output and the logarithms of the softmax's sums, (B, H, Q), and nothing else.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokentune.core.attention.masks import GroupMask, Span

# Queries in a block. In larger blocks, most queries do not see many of the keys; smaller ones need more calls.
# Measured on a CPU by scripts/bench/long_sequence.py.
CPU_BLOCK, CPU_LONG_BLOCK, CPU_LONG = 64, 128, 2048  # the second size from CPU_LONG queries on
CUDA_BLOCK = 1024  # fills a GPU with tiles of queries x heads; not measured
CUDA_MASK_NUMBERS = 2**25  # below that many, both groups' masks are made once per step there and kept (64 MiB)


Operands = tuple[Tensor, Tensor, Tensor]  # a block's query (B, H, n, d), and key and value (B, G, keys, d)


class Kernel(NamedTuple):
    """A fused kernel: `forward(operands, mask, scale)` -> output and what its backward pass needs besides;
    `backward(gradient, operands, mask, scale, output, state)` -> gradients of the operands."""

    forward: Callable[..., tuple[Tensor, tuple[Tensor, ...]]]
    backward: Callable[..., Operands]
    returns_sums: bool  # its state is the logarithms of the softmax's sums (B, H, n)


def attend_by_blocks(
    query: Tensor, key: Tensor, value: Tensor, mask: GroupMask, scale: float | None, *, with_sums: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Attention of `query` (B, H, Q, d) over `key`, `value` (B, G, S, d), in sequence order -> (B, Q, H, d).

    Head sizes of keys and values may differ. Grouped heads are not repeated. CPU and CUDA only. `with_sums`: returns
    the logarithms of the softmax's sums (B, H, Q) too, without gradients; None where the kernel does not return them.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    width, own = max(query.shape[-1], value.shape[-1]), value.shape[-1]
    if query.shape[-1] != own:  # the kernels need one size; zeros change neither scores nor outputs
        query, key, value = (F.pad(tensor, (0, width - tensor.shape[-1])) for tensor in (query, key, value))
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    output, sums = _BlockAttention.apply(query, key, value, mask, scale, with_sums)
    return output[..., :own], sums


def block_size(query: Tensor) -> int:
    """Queries (B, H, Q, d) that one call of the kernel takes."""
    if query.device.type == "cuda":
        return CUDA_BLOCK
    return CPU_BLOCK if query.shape[2] < CPU_LONG else CPU_LONG_BLOCK


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, query: Tensor, key: Tensor, value: Tensor, mask: GroupMask, scale: float, with_sums: bool
    ) -> tuple[Tensor, Tensor | None]:
        kernel, spans = KERNELS[query.device.type], mask.spans(block_size(query))
        batch, heads, count, size = query.shape
        output = query.new_empty(batch, count, heads, size)
        states = []
        for span in spans:
            found, state = kernel.forward(_cut(query, key, value, span), mask.piece(span, query.dtype), scale)
            output[:, span.start : span.stop] = found.transpose(1, 2)
            states.extend(state)
        ctx.mask, ctx.scale, ctx.kernel, ctx.spans = mask, scale, kernel, spans
        ctx.save_for_backward(query, key, value, output, *states)
        if not (with_sums and kernel.returns_sums):
            return output, None
        sums = torch.cat(states, dim=2)
        ctx.mark_non_differentiable(sums)
        return output, sums

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, value, output, *states = ctx.saved_tensors
        each = len(states) // len(ctx.spans)  # tensors of a block's state
        gradient, output = gradient.contiguous().transpose(1, 2), output.transpose(1, 2)
        of_query, of_key, of_value = torch.empty_like(query), _sum_like(key), _sum_like(value)
        for number, span in enumerate(ctx.spans):
            rows, keys = slice(span.start, span.stop), slice(span.first, span.last)
            piece = ctx.mask.piece(span, query.dtype)
            state = states[number * each : (number + 1) * each]
            operands = _cut(query, key, value, span)
            found = ctx.kernel.backward(gradient[:, :, rows], operands, piece, ctx.scale, output[:, :, rows], state)
            of_query[:, :, rows] = found[0]
            of_key[:, :, keys] += found[1]
            of_value[:, :, keys] += found[2]
        return of_query, of_key.to(key.dtype), of_value.to(value.dtype), None, None, None


def _cut(query: Tensor, key: Tensor, value: Tensor, span: Span) -> Operands:
    keys = slice(span.first, span.last)
    return query[:, :, span.start : span.stop], key[:, :, keys], value[:, :, keys]


def _sum_like(tensor: Tensor) -> Tensor:
    """Zeros (B, G, S, d), laid out (B, S, G, d). Sums of many small numbers need more than 16 bits."""
    batch, heads, length, size = tensor.shape
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.new_zeros(batch, length, heads, size, dtype=dtype).transpose(1, 2)


def _cpu_forward(operands: Operands, mask: Tensor | None, scale: float) -> tuple[Tensor, tuple[Tensor]]:
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output, sums = kernel(*operands, attn_mask=mask, scale=scale)
    return output, (sums,)


def _cpu_backward(
    gradient: Tensor, operands: Operands, mask: Tensor | None, scale: float, output: Tensor, state: list[Tensor]
) -> Operands:
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return kernel(gradient, *operands, output, *state, 0.0, False, attn_mask=mask, scale=scale)


def _sdpa_forward(operands: Operands, mask: Tensor | None, scale: float) -> tuple[Tensor, tuple[()]]:
    """The kernel that torch chooses. Where none takes grouped heads with a mask, one call per head of a group."""
    query, key, value = operands
    heads = query.shape[1] // key.shape[1]
    if heads == 1 or takes_grouped_heads(query, key, value, mask):
        return F.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=heads > 1), ()
    parts = []
    for head in range(heads):
        own = mask[:, head::heads] if mask is not None and mask.shape[1] > 1 else mask
        parts.append(F.scaled_dot_product_attention(query[:, head::heads], key, value, own, scale=scale))
    return torch.stack(parts, dim=2).flatten(1, 2), ()


def _sdpa_backward(
    gradient: Tensor, operands: Operands, mask: Tensor | None, scale: float, output: Tensor, state: list[Tensor]
) -> Operands:
    """Runs the block's forward again, because a kernel's backward needs other state in each version of torch."""
    leaves = [tensor.detach().requires_grad_() for tensor in operands]
    with torch.enable_grad():
        again, _ = _sdpa_forward(leaves, mask, scale)
    return torch.autograd.grad(again, leaves, gradient)


KERNELS = {
    "cpu": Kernel(_cpu_forward, _cpu_backward, returns_sums=True),
    "cuda": Kernel(_sdpa_forward, _sdpa_backward, returns_sums=False),
}


def takes_grouped_heads(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether a fused kernel takes grouped heads with this mask; torch's fallback would have all scores in memory.

    On CPUs yes. On CUDA it depends on the card and on torch: FlashAttention takes no masks, cuDNN's kernel (Hopper,
    16 bits) takes both, and the memory-efficient one takes grouped heads in versions after 2.13 only.
    """
    if query.device.type == "cpu":
        return True
    if query.device.type != "cuda" or not torch.cuda.is_available():
        return False
    params = torch.backends.cuda.SDPAParams(query, key, value, mask, 0.0, False, True)
    kernels = ("can_use_flash_attention", "can_use_cudnn_attention", "can_use_efficient_attention")
    return any(getattr(torch.backends.cuda, can_use)(params) for can_use in kernels)
