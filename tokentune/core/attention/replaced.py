"""Another function in place of a model's attention, for a time. It gets the model's own one to call."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tokentune.core.attention.kernels import eager_function
from tokentune.core.temporary import set_until_undone
from tokentune.errors import UnsupportedModelError

Implementations = list[tuple[PreTrainedConfig, str]]  # each configuration, and its own attention implementation


_REPLACEMENT: ContextVar[tuple[Callable, Implementations]] = ContextVar("tokentune_replaced_attention")


def implementation_of(module: nn.Module, implementations: Implementations) -> str:
    """The model's own attention implementation in one of its attention modules."""
    for config, name in implementations:
        if config is module.config:
            return name
    raise UnsupportedModelError(f"{type(module).__name__} has a configuration of its own")


@contextmanager
def replaced_attention(
    configs: list[PreTrainedConfig], attention: Callable, *, own: str | None = None
) -> Iterator[None]:
    """Within it the model's attention calls `attention(own_function, module, query, key, value, mask, **options)`.

    Args:
        configs: those that name the attention of masks and layers (`layers.Stack`).
        own: the implementation of `own_function` and of the masks; None: the model's.
    """
    implementations = [(config, own or config._attn_implementation) for config in configs]
    with ExitStack() as undo:
        undo.callback(_REPLACEMENT.reset, _REPLACEMENT.set((attention, implementations)))
        for config, implementation in implementations:
            name = f"tokentune_around_{implementation}"  # a name per implementation, because masks are made by name
            AttentionInterface.register(name, _call_replacement)
            AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
            set_until_undone(undo, config, "_attn_implementation_internal", name)
        yield


def _call_replacement(module: nn.Module, *args: Any, **options: Any) -> Any:
    attention, implementations = _REPLACEMENT.get()
    name = implementation_of(module, implementations)
    own_function = eager_function(module) if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
    return attention(own_function, module, *args, **options)
