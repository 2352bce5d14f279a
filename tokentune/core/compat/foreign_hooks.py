"""Forward hooks that others put on a layer itself, as for steering a model: they get what they would get without us.

Such a hook gets all rows, (B, S, D) in sequence order, as in the unmodified model. For that our own hooks stand between
it and the layer's forward.
"""

from collections.abc import Callable, Iterable

from torch import nn

from tokentune.core.selective_layer import enter_layer, leave_layer

_KNOWING = ("tokentune", "torch", "transformers", "accelerate", "deepspeed")  # their hooks accept groups of tokens


def have_foreign_hooks(layers: Iterable[nn.Module]) -> bool:
    """Whether hooks of others on these layers themselves see what goes in or comes out, and may change it."""
    return any(_foreign(hooks) for layer in layers for hooks in (layer._forward_pre_hooks, layer._forward_hooks))


def move_own_hooks_inside(layers: Iterable[nn.Module]) -> None:
    """Where a layer has foreign hooks, ours run last before its forward, and first after it."""
    for layer in layers:
        for hooks, own, at_end in (
            (layer._forward_pre_hooks, enter_layer, True),
            (layer._forward_hooks, leave_layer, False),
        ):
            if _foreign(hooks):
                key = next(key for key, hook in hooks.items() if hook is own)
                hooks.move_to_end(key, last=at_end)


def _foreign(hooks: dict[int, Callable]) -> bool:
    return any(_home(hook) not in _KNOWING for hook in hooks.values())


def _home(hook: Callable) -> str:
    hook = getattr(hook, "func", hook)  # of a partial one
    return (getattr(hook, "__module__", None) or type(hook).__module__).partition(".")[0]
