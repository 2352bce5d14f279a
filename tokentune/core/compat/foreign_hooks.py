"""Forward hooks and forwards that others put on a model's modules: on a layer they see all rows, elsewhere a part.

    B sequences, S tokens, K selected, D hidden size

A hook on a layer itself gets what it would get in the original model, (B, S, D) (`core/patching.py`). Modules inside a
layer run once per group of tokens, and those behind the layers on the K selected rows. A hook there is right where it
acts on each token alone, as most do. Code does not tell whether it does, so the user is warned.
"""

from collections.abc import Callable, Iterable, Iterator

from torch import nn
from torch.nn.modules import module as torch_module
from transformers import PreTrainedModel
from transformers.utils import logging

from tokentune.core.compat.step_checks import has_foreign_forward
from tokentune.core.layers import Stack
from tokentune.core.profile import Pooling, Profile, Rows

logger = logging.get_logger(__name__)
_KNOWING = ("tokentune", "torch", "transformers", "accelerate", "deepspeed")  # their hooks accept groups of tokens
_PER_TOKEN = (*_KNOWING, "peft", "trl", "bitsandbytes")  # theirs inside a layer read nothing, or each token alone
_PER_TOKEN_FORWARDS = ("liger_kernel",)
_IN_FRONT = ("embed", "rotary", "rotemb", "wte", "wpe")  # parts of names of modules in front of the layers
_RISK = "one that acts by position or mixes tokens changes the result"
_GROUPS = f"is called once per group of selected and unselected tokens: {_RISK}"
_SELECTED = f"sees the selected rows alone: {_RISK}"


def have_foreign_hooks(layers: Iterable[nn.Module]) -> bool:
    """Whether hooks of others on these layers themselves see what goes in or comes out, and may change it."""
    return any(are_foreign(hooks) for layer in layers for hooks in (layer._forward_pre_hooks, layer._forward_hooks))


def are_foreign(hooks: dict[int, Callable]) -> bool:
    """Whether one of the hooks expects plain tensors, not the groups of tokens that layers pass on."""
    return bool(_foreign_names(hooks, _KNOWING))


def warn_of_partial_views(owner: PreTrainedModel, stack: Stack, profile: Profile) -> None:
    """Warns of others' hooks and forwards that a selective forward calls with a part of the tokens, once per module.

    Args:
        profile: its `rows` are those that leave the last layer.
    """
    names = {id(module): name or type(owner).__name__ for name, module in owner.named_modules()}
    of_torch = torch_module._global_forward_pre_hooks, torch_module._global_forward_hooks
    if found := [name for hooks in of_torch for name in _foreign_names(hooks, _PER_TOKEN)]:
        logger.warning_once(f"torch's global module hook {found[0]} {_GROUPS}. Put it on the layer itself.")
    for layer in stack.layers:
        for module in layer.modules():
            if _has_replaced_forward(module):
                logger.warning_once(
                    f"the forward put on {names[id(module)]} {_GROUPS}. Use a hook on the layer itself."
                )
            if module is not layer:
                hooks = (module._forward_pre_hooks, module._forward_hooks)
                _warn(hooks, names[id(module)], f"{_GROUPS}. Put it on the layer itself.")
    if profile.rows is Rows.ALL:
        return
    for module in stack.around[1:]:  # the outermost one's output is the caller's, who asked for K rows
        _warn((module._forward_hooks,), names[id(module)], f"{_SELECTED}. Put it on the last layer itself.")
    for module in _behind(owner, stack, profile.pooling):
        hooks = (module._forward_pre_hooks, module._forward_hooks)
        _warn(hooks, names[id(module)], f"{_SELECTED}. Put it on the last layer itself.")


def _warn(registries: Iterable[dict[int, Callable]], where: str, what: str) -> None:
    for hooks in registries:
        for name in _foreign_names(hooks, _PER_TOKEN)[:1]:
            logger.warning_once(f"the forward hook {name} on {where} {what}")
            return


def _behind(owner: PreTrainedModel, stack: Stack, pooling: Pooling | None) -> Iterator[nn.Module]:
    """The modules that run on what leaves the last layer: final norm, pooler, head.

    They are told by the order in which the model holds its modules, except norms and the output embeddings, which some
    models hold in front of the layers. What a head for whole sequences gets after pooling has no rows of tokens.
    """
    head = owner.get_output_embeddings()
    of_head = set() if head is None else set(head.modules())
    elsewhere = {*stack.layers.modules(), *stack.around}
    of_backbone, reached = set(stack.backbone.modules()), False
    for name, module in owner.named_modules():
        reached = reached or module is stack.layers
        in_front = any(part in name.lower() for part in _IN_FRONT)
        ordered = reached or (module in of_backbone and "norm" in type(module).__name__.lower())
        has_rows = module in of_backbone or pooling not in (Pooling.FIRST, Pooling.ALL)
        if module not in elsewhere and (module in of_head or (ordered and has_rows and not in_front)):
            yield module


def _has_replaced_forward(module: nn.Module) -> bool:
    if "forward" not in vars(module) or not has_foreign_forward(module):
        return False
    function = getattr(module.forward, "__func__", module.forward)
    return _home(function) not in _PER_TOKEN_FORWARDS


def _foreign_names(hooks: dict[int, Callable], knowing: tuple[str, ...]) -> list[str]:
    """The names of the hooks whose code is not of the packages `knowing`."""
    functions = [getattr(hook, "func", hook) for hook in hooks.values()]  # of partial ones
    foreign = [function for function in functions if _home(function) not in knowing]
    return [getattr(function, "__qualname__", type(function).__name__) for function in foreign]


def _home(function: Callable) -> str:
    """The package of its code."""
    return (getattr(function, "__module__", None) or type(function).__module__).partition(".")[0]
