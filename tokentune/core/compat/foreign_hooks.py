"""Forward hooks that others put on a layer itself, as for steering a model: they get what they would get without us."""

from collections.abc import Callable, Iterable

from torch import nn

from tokentune.core.selective_layer import enter_layer, leave_layer

_ABIDING = ("tokentune", "torch", "transformers", "accelerate", "deepspeed")  # whose hooks know pairs, or leave them be


def have_hooks_of_others(layers: Iterable[nn.Module]) -> bool:
    """Whether somebody's forward hooks on these layers themselves look at what goes in or comes out, and may change it.

    They get it whole then, (B, S, D) in sequence order, as in the unmodified model: ours are moved to the inside.
    """
    found = False
    for layer in layers:
        for hooks, own, at_end in (
            (layer._forward_pre_hooks, enter_layer, True),
            (layer._forward_hooks, leave_layer, False),
        ):
            if all(hook is own or _home(hook) in _ABIDING for hook in hooks.values()):
                continue
            found = True
            key = next(key for key, hook in hooks.items() if hook is own)
            hooks.move_to_end(key, last=at_end)
    return found


def _home(hook: Callable) -> str:
    hook = getattr(hook, "func", hook)  # of a partial one
    return (getattr(hook, "__module__", None) or type(hook).__module__).partition(".")[0]
