"""Whether prompts depend on the base's weights alone, as training with `--lora_on answers` takes for granted.

Then what is computed of a prompt is the same in every step, and no trained weight gets a gradient through it.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import nn

from tokentune.core.compat.adapters import activated_modules
from tokentune.core.compat.rotary_state import rotary_state
from tokentune.core.layers import attention_modules, inner_model, transformer_layers
from tokentune.errors import UserError

if TYPE_CHECKING:
    from peft import PeftModel


def check_constant_prompts(model: "PeftModel", max_length: int) -> None:
    """Refuses, UserError, a model whose prompts depend on what is trained, on their batch, or on chance.

    Args:
        model: with activated adapters.
        max_length: most tokens of a row.
    """
    reason = next(_reasons(model, max_length), None)
    if reason is not None:
        raise UserError(f"--lora_on answers: {reason}. Take --lora_on all")


def _reasons(model: "PeftModel", max_length: int) -> Iterator[str]:
    core, activated = inner_model(model), activated_modules(model)
    config, head = core.config.get_text_config(), core.get_output_embeddings()
    acting = {parameter for module in activated.values() for parameter in module.parameters()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter not in acting:
            yield f"{name} is trained, and acts on prompts too"
    for name, module in activated.items():
        if module is head or _holds_experts(model, name):
            yield f"an adapter on {name} cannot tell which tokens it gets; leave it out of --lora_target_modules"
    for name, value in vars(config).items():
        of_base = ("drop" in name or "jitter" in name) and not name.startswith(("summary", "classifier"))
        if of_base and isinstance(value, float) and value > 0:
            yield f"{name} {value} in the base's configuration leaves chance in what prompts are; set it to 0 there"
    if getattr(config, "output_router_logits", False):
        yield "`output_router_logits` in the base's configuration adds a loss over all tokens; set it to false there"
    if rotary_state(model) and max_length > _constant_length(config):
        yield (
            "the base's rotary frequencies change with the length of a batch beyond --max_length "
            f"{_constant_length(config)}; lower it"
        )
    if any(not getattr(module, "is_causal", True) for module in attention_modules(transformer_layers(core).layers)):
        yield f"prompts of {type(core).__name__} attend to the answers behind them"


def _constant_length(config: object) -> int:
    """Up to how many tokens rotary frequencies stay as they are."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [kind for kind in rope.values() if isinstance(kind, dict)] or [rope]
    most = config.max_position_embeddings
    return min(kind.get("original_max_position_embeddings") or most for kind in kinds)


def _holds_experts(model: nn.Module, name: str) -> bool:
    """Whether a module stands within a mixture of experts, which takes tokens without their rows."""
    parts = name.split(".")
    around = (model.get_submodule(".".join(parts[:end])) for end in range(1, len(parts)))
    return any(isinstance(module, nn.Module) and hasattr(module, "experts") for module in around)
