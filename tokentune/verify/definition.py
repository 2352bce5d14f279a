"""The definition of the method, by plain autograd through the unmodified model (EMNLP 2024, section 3).

B sequences, S tokens, K selected, H heads, d head size
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tokentune.core.attention.kernels import eager_function
from tokentune.core.layers import transformer_layers
from tokentune.verify.tiny_copy import implementation

_DEFINITION = "tokentune_definition"  # the name of its attention, registered with transformers


@contextmanager
def definition_of_the_method(
    model: PreTrainedModel, positions: Tensor, *, last_output: bool = False, scales: Tensor | None = None
) -> Iterator[None]:
    """Within it, the unmodified model computes what the method is defined to compute for `positions` (B, K).

    `last_output`: the unselected rows of the last layer's output are constants too (for a head that uses all rows).
    `scales` (B, K): factors of the gradient of each selected token's key and value in the attention of the others.
    """
    own = implementation(model)
    stack = transformer_layers(model)
    calls = 0

    def hold(tensor: Tensor, dim: int) -> Tensor:
        keep = torch.zeros(tensor.shape[0], tensor.shape[dim], dtype=torch.bool).scatter_(1, positions, True)
        keep = keep.view(tensor.shape[0], *(-1 if d == dim else 1 for d in range(1, tensor.ndim)))
        return torch.where(keep, tensor, tensor.detach())

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        function = eager_function(module) if own == "eager" else ALL_ATTENTION_FUNCTIONS[own]
        groups = hold(query, 2), hold(key, 2), hold(value, 2)
        if scales is None:
            return function(module, *groups, *args, **kwargs)
        return _scaled_attention(partial(function, module), *groups, positions, scales)(*args, **kwargs)

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

    AttentionInterface.register(_DEFINITION, attention)
    AttentionMaskInterface.register(_DEFINITION, ALL_MASK_ATTENTION_FUNCTIONS[own])
    handles = [layer.register_forward_pre_hook(hold_input, with_kwargs=True) for layer in stack.layers]
    handles += [layer.register_forward_hook(hold_output) for layer in stack.layers]
    try:
        for config in stack.configs:
            config._attn_implementation_internal = _DEFINITION
        yield
    finally:
        for config in stack.configs:
            config._attn_implementation_internal = own
        for handle in handles:
            handle.remove()


def _scaled_attention(
    attention: Callable, query: Tensor, key: Tensor, value: Tensor, positions: Tensor, scales: Tensor
) -> Callable:
    """`attention` on these, gradients of selected keys and values scaled in the attention of the others alone."""
    index = torch.arange(key.shape[2])[:, None]  # (S, 1)
    factors = torch.ones_like(key[:, 0, :, 0]).scatter_(1, positions, scales)[:, None, :, None]  # (B, 1, S, 1)
    scaled = [tensor.detach() + factors * (tensor - tensor.detach()) for tensor in (key, value)]

    def attend(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        output = attention(query, *scaled, *args, **kwargs)[0]  # (B, S, H, d)
        for own in positions.T[..., None, None]:  # again for each selected token, with its own unscaled key and value
            at = own == index  # (B, S, 1)
            pairs = [torch.where(at[:, None], *pair) for pair in zip((key, value), scaled, strict=True)]
            output = torch.where(at[..., None], attention(query, *pairs, *args, **kwargs)[0], output)
        return output, None

    return attend
