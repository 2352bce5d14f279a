"""The definition of the method, by plain autograd through the unmodified model (EMNLP 2024, section 3).

B sequences, S tokens, K selected, H heads, d head size
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokentune.core.attention.replaced import replaced_attention
from tokentune.core.layers import transformer_layers


@contextmanager
def definition_of_the_method(
    model: PreTrainedModel, positions: Tensor, *, last_output: bool = False, scales: Tensor | None = None
) -> Iterator[None]:
    """Within it, the unmodified model computes what the method is defined to compute for `positions` (B, K).

    `last_output`: the unselected rows of the last layer's output are constants too (for a head that uses all rows).
    `scales` (B, K): factors of the gradient of each selected token's key and value in the attention of the others.
    """
    stack = transformer_layers(model)
    calls = 0

    def hold(tensor: Tensor, dim: int) -> Tensor:
        keep = torch.zeros(tensor.shape[0], tensor.shape[dim], dtype=torch.bool).scatter_(1, positions, True)
        keep = keep.view(tensor.shape[0], *(-1 if d == dim else 1 for d in range(1, tensor.ndim)))
        return torch.where(keep, tensor, tensor.detach())

    def attention(own: Callable, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        query, key, value = (hold(tensor, 2) for tensor in args[:3])
        attend = lambda q, k, v: own(module, q, k, v, *args[3:], **kwargs)  # noqa: E731
        if scales is None:
            return attend(query, key, value)
        return _scaled_attention(attend, query, key, value, positions, scales), None

    def hold_input(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple:
        if args:
            return (hold(args[0], 1), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": hold(kwargs["hidden_states"], 1)}

    def hold_output(layer: nn.Module, args: tuple, output: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls < stack.calls or not last_output:
            return None
        return (hold(output[0], 1), *output[1:]) if isinstance(output, tuple) else hold(output, 1)

    with replaced_attention(stack.configs, attention), ExitStack() as handles:
        for layer in stack.layers:
            handles.enter_context(layer.register_forward_pre_hook(hold_input, with_kwargs=True))
            handles.enter_context(layer.register_forward_hook(hold_output))
        yield


def _scaled_attention(
    attend: Callable, query: Tensor, key: Tensor, value: Tensor, positions: Tensor, scales: Tensor
) -> Tensor:
    """Attention (B, S, H, d); gradients of selected keys and values are scaled in the attention of the others alone."""
    index = torch.arange(key.shape[2])[:, None]  # (S, 1)
    factors = torch.ones_like(key[:, 0, :, 0]).scatter_(1, positions, scales)[:, None, :, None]  # (B, 1, S, 1)
    scaled = [tensor.detach() + factors * (tensor - tensor.detach()) for tensor in (key, value)]
    output = attend(query, *scaled)[0]
    for own in positions.T[..., None, None]:  # again for each selected token, with its own unscaled key and value
        at = own == index  # (B, S, 1)
        pairs = [torch.where(at[:, None], *pair) for pair in zip((key, value), scaled, strict=True)]
        output = torch.where(at[..., None], attend(query, *pairs)[0], output)
    return output
