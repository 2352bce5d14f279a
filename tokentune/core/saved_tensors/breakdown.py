"""Which part of a model saves what for the backward pass: the kind of module that runs when autograd saves a tensor."""

from types import TracebackType
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

    Kinds follow the structure of the model. In a layer, the child that holds the attention is attention, a module with
    "norm" in its class is a norm, and everything else is the MLP. Outside of the layers are embeddings, and the head
    with the loss.
    """

    def __init__(self, model: nn.Module):
        self._kinds = kinds_of_modules(model)
        self._stack: list[nn.Module] = []
        self._handles: list[Any] = []

    def __enter__(self) -> "KindOfModule":
        self._handles = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._stack.clear()

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._stack.append(module)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        while self._stack and self._stack.pop() is not module:  # no hook ran for modules of a pass that ended early
            pass

    def now(self, tensor: Tensor) -> str:
        """The kind of a tensor that autograd saves now."""
        if _is_cast_weight(tensor):
            return CASTS
        for module in reversed(self._stack):
            kind = self._kinds.get(id(module))
            if kind is not None:
                return kind
        return HEAD


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
    kinds: dict[int, str] = {}
    for module in core.modules():
        if isinstance(module, nn.Embedding) or "Embeddings" in type(module).__name__:
            kinds[id(module)] = EMBEDDINGS
    try:
        layers = transformer_layers(core).layers
    except UnsupportedModelError:
        layers = []
    for layer in layers:
        found = {id(module) for module in attention_modules(layer)}
        holders = [child for child in layer.children() if any(id(module) in found for module in child.modules())]
        for name, module in layer.named_modules():
            if name == "":
                kinds[id(module)] = BETWEEN
            elif "lora_" in name:
                kinds[id(module)] = ADAPTERS
            elif "norm" in type(module).__name__.lower():
                kinds[id(module)] = NORMS
            elif any(module is inner for holder in holders for inner in holder.modules()):
                kinds[id(module)] = ATTENTION
            else:
                kinds[id(module)] = MLP
    return kinds
