"""The method by its definition, independent of the implementation: plain autograd through the unmodified model.

Module hooks alone: they replace what is outside of the selection by constants, at the input of each layer and at the
outputs of its query, key and value projections (a token's rotary embedding and its norms act on that token alone, so
that constants stay constants up to the attention, unless that norm has weights of its own). No attention interface,
nothing of `tokentune` is involved.

    B sequences, S tokens, K selected, D hidden size
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# (suffix of the layers' module list, names of the projections inside a layer)
LLAMA = ("layers", ("q_proj", "k_proj", "v_proj"))
BERT = ("encoder.layer", ("query", "key", "value"))


def chosen_mask(positions: Tensor, length: int) -> Tensor:
    """(B, K) -> (B, S) bool."""
    return torch.stack([torch.tensor([t in row for t in range(length)]) for row in positions.tolist()])


@contextmanager
def constants_outside(model: nn.Module, positions: Tensor, family: tuple[str, tuple[str, ...]]) -> Iterator[None]:
    """Within it, `model` back-propagates through the selected rows alone; its forward values are untouched."""
    stack_name, projections = family
    stack = next(m for n, m in model.named_modules() if n.endswith(stack_name) and isinstance(m, nn.ModuleList))

    def keep(tensor: Tensor) -> Tensor:  # (B, S, D)
        chosen = chosen_mask(positions, tensor.shape[1])
        return torch.where(chosen[..., None], tensor, tensor.detach())

    handles = []
    for layer in stack:
        handles.append(layer.register_forward_pre_hook(lambda module, args: (keep(args[0]), *args[1:])))
        for name, module in layer.named_modules():
            if name.split(".")[-1] in projections:
                handles.append(module.register_forward_hook(lambda module, args, output: keep(output)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def next_token_loss(logits: Tensor, labels: Tensor, positions: Tensor) -> Tensor:
    """Mean cross-entropy at the selected positions whose next token is supervised: logits (B, S, V), labels (B, S)."""
    losses = [
        nn.functional.cross_entropy(logits[row, t], labels[row, t + 1])
        for row in range(len(positions))
        for t in positions[row].tolist()
        if t + 1 < labels.shape[1] and labels[row, t + 1] != -100
    ]
    return torch.stack(losses).mean()


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Gradients of all parameters that the loss depends on."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
