"""Which part of a model saves what for the backward pass: the kind of module that runs when autograd saves a tensor."""

from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from tokentune.core.layers import attention_modules, inner_model, transformer_layers
from tokentune.errors import UnsupportedModelError

ATTENTION, MLP, NORMS, BETWEEN = "attention", "mlp", "norms", "layer inputs and residuals"
EMBEDDINGS, HEAD, CASTS, ADAPTERS = "embeddings", "head and loss", "weights in 16 bits", "adapters"
KINDS = (ATTENTION, MLP, NORMS, BETWEEN, ADAPTERS, EMBEDDINGS, HEAD, CASTS)


class KindOfModule:
    """Within it, `now(tensor)` tells the kind of the innermost module that is running.

    In a layer, the child that holds the attention is attention, a module with "norm" in its class is a norm, and
    everything else is the MLP. Outside of the layers are embeddings, and the head with the loss.
    """

    def __init__(self, model: nn.Module):
        self._kinds = kinds_of_modules(model)
        self._running: list[nn.Module] = []
        self._undo = ExitStack()

    def __enter__(self) -> "KindOfModule":
        self._undo.callback(self._running.clear)
        self._undo.enter_context(register_module_forward_pre_hook(lambda module, _: self._running.append(module)))
        self._undo.enter_context(register_module_forward_hook(self._leave, always_call=True))
        return self

    def __exit__(self, *_: Any) -> None:
        self._undo.close()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        while self._running and self._running.pop() is not module:  # no hook ran for modules of a pass that ended early
            pass

    def now(self, tensor: Tensor) -> str:
        """The kind of a tensor that autograd saves now."""
        if _is_cast_weight(tensor):
            return CASTS
        kinds = (self._kinds.get(id(module)) for module in reversed(self._running))
        return next((kind for kind in kinds if kind is not None), HEAD)


def _is_cast_weight(tensor: Tensor) -> bool:
    """Whether the tensor is a weight in another type (or with other strides)."""
    node, cast = tensor.grad_fn, False
    while node is not None:
        name = node.name().split("::")[-1]
        if name == "AccumulateGrad":
            return cast
        if not name.startswith(("ToCopy", "TBackward", "Transpose", "View", "Unsafe", "Alias")):
            return False
        cast |= name.startswith("ToCopy")
        node = node.next_functions[0][0] if node.next_functions else None
    return False


def kinds_of_modules(model: nn.Module) -> dict[int, str]:
    """The kind of each module, by its id; modules that are in no layer and embed nothing are left out."""
    core = inner_model(model)
    embeds = lambda module: isinstance(module, nn.Embedding) or "Embeddings" in type(module).__name__  # noqa: E731
    kinds = {id(module): EMBEDDINGS for module in core.modules() if embeds(module)}
    try:
        layers = transformer_layers(core).layers
    except UnsupportedModelError:
        layers = []
    for layer in layers:
        inside = {id(part) for child in layer.children() if attention_modules(child) for part in child.modules()}
        for name, module in layer.named_modules():
            if name == "":
                kind = BETWEEN
            elif "lora_" in name:
                kind = ADAPTERS
            elif "norm" in type(module).__name__.lower():
                kind = NORMS
            else:
                kind = ATTENTION if id(module) in inside else MLP
            kinds[id(module)] = kind
    return kinds
