"""LoRA and QLoRA: which layers get adapters, and what is trained beside them."""

import copy
import logging
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tokentune.core.compat.four_bit import keep_4bit_layout
from tokentune.errors import UserError
from tokentune.models.tasks import CAUSAL_LM, Head, head_modules
from tokentune.settings.flags import require

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)


def _linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> linear layer (`nn.Linear`, its 4-bit kind, GPT-2's transposed `Conv1D`)."""
    return {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}


def _is_named(path: str, targets: Sequence[str]) -> bool:
    return any(path == target or path.endswith(f".{target}") for target in targets)


def _check_target_modules(model: PreTrainedModel, target_modules: Sequence[str]) -> list[str] | str:
    """Each name must be the end of some layer's path: peft silently ignores unknown ones."""
    targets = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    if targets == ["all-linear"]:
        return "all-linear"  # peft's own word: every linear layer but the output head
    for path in _return_more(model):
        require(
            not _is_named(path, targets),
            f"--lora_target_modules: {path} of {type(model).__name__} returns more than a product with its weights, so "
            "that no adapter can be added to it. Leave it out.",
        )
    linear = _linear_layers(model)
    paths = [*linear, *(name for name, module in model.named_modules() if isinstance(module, nn.Embedding))]
    unknown = [target for target in targets if not any(_is_named(path, [target]) for path in paths)]
    existing = sorted({path.rpartition(".")[2] for path in linear})
    require(
        bool(targets) and not unknown,
        f"--lora_target_modules: {type(model).__name__} has no layer named {', '.join(unknown) or '(none given)'}. "
        f"Its linear layers: {', '.join(existing)}; all-linear stands for all of them but the output head.",
    )
    return targets


def _return_more(model: nn.Module) -> list[str]:
    """Paths of linear layers whose forward returns more than a product (routers), so that no adapter can be added."""
    layers = _linear_layers(model)
    by_class = {type(layer): layer for layer in layers.values()}
    more = {kind for kind, layer in by_class.items() if not _returns_product(layer)}
    return [path for path, layer in layers.items() if type(layer) in more]


@torch.no_grad()
def _returns_product(layer: nn.Module) -> bool:
    """Tried on a copy without data; torch's, bitsandbytes' and GPT-2's classes are known to."""
    kind, weight = type(layer), layer.weight
    if kind is Conv1D or kind.__module__.startswith(("torch.", "bitsandbytes.")):
        return True
    inputs = torch.empty(2, layer.in_features, dtype=weight.dtype, device="meta")
    return isinstance(copy.deepcopy(layer).to("meta")(inputs), torch.Tensor)


def add_adapters(
    model: PreTrainedModel,
    *,
    r: int,
    alpha: float,
    dropout: float,
    target_modules: Sequence[str],
    quantized: bool,
    head: Head = CAUSAL_LM,
    invocation: Sequence[int] | None = None,
) -> "PeftModel":
    """Freezes the base and adds float32 LoRA adapters to the named layers; the base keeps its types.

    peft's `prepare_model_for_kbit_training` is not used for 4-bit bases: it turns embeddings, norms and head to float32
    (2 GiB more for an 8B Llama 3), and with them the activations (measured on a 6-layer Llama under bfloat16 autocast:
    33 % more bytes saved for backward, for adapter gradients 0.8 % instead of 1.1 % away from float32's). That is what
    `--base_dtype float32` is for. Its gradient checkpointing does not work through selected tokens.

    Args:
        r, alpha, dropout: LoRA's rank, scale (adapters are multiplied by alpha / r) and dropout probability.
        target_modules: ends of layer paths (`down_proj`, `mlp.down_proj`), or `all-linear`.
        quantized: the base is in 4 bits.
        head: of the model; a new one is trained whole, and saved with the adapters.
        invocation: token ids; where they are given, adapters act from their last occurrence in a row on.

    Returns:
        The same model in peft's wrapper, with only the adapters (and a new head) trainable.

    Raises:
        UserError: a target that is no layer of this model, with the list of those that are, or one that peft refuses.
    """
    from peft import LoraConfig, get_peft_model  # adapters are optional: full training does without peft

    targets = _check_target_modules(model, target_modules)
    if quantized:
        keep_4bit_layout(model)
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=0.0,  # until it is known which of them take any
        target_modules=targets,
        bias="none",
        task_type=head.adapter_task,
        modules_to_save=head_modules(model) if head.is_new else None,
        alora_invocation_tokens=None if invocation is None else [*invocation],
        exclude_modules=(_return_more(model) or None) if targets == "all-linear" else None,
    )
    try:
        adapted = get_peft_model(model, config, autocast_adapter_dtype=True)
    except ValueError as error:  # of some of an expert's fused weights without the others, for one
        alone = "" if invocation is None else ". With --lora_on answers take linear layers alone, outside of experts"
        raise UserError(
            f"--lora_target_modules {' '.join(target_modules)}: peft refuses this: {error}{alone}"
        ) from error
    _set_dropout(adapted, dropout)
    return adapted


def _set_dropout(model: "PeftModel", dropout: float) -> None:
    """Puts dropout in front of the adapters, except those of parameters (of fused experts), for which peft has none.

    With such adapters the configuration says 0: with another number peft would not load them again.
    """
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper

    (name,) = model.peft_config
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if dropout > 0:
        for layer in layers:
            if not isinstance(layer, ParamWrapper):
                layer.lora_dropout[name] = nn.Dropout(dropout)
    if not any(isinstance(layer, ParamWrapper) for layer in layers):
        model.peft_config[name].lora_dropout = dropout


def say_adapters(model: "PeftModel", dropout: float, target_modules: Sequence[str]) -> None:
    """Logs which modules got adapters: the same targets mean different modules in each family of models."""
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper
    from peft.utils import ModulesToSaveWrapper

    adapted: Counter[str] = Counter()
    parameters, owned = set(), []
    for path, module in model.named_modules():
        name = path.replace(".base_layer", "").rpartition(".")[2]
        if isinstance(module, ParamWrapper):
            name = f"{name}.{module.parameter_name}"
            parameters.add(name)
            kind = "parameter"
        elif isinstance(module, LoraLayer):
            kind = type(module.get_base_layer()).__name__
        elif isinstance(module, ModulesToSaveWrapper):
            kind = "trained whole"
        else:
            continue
        adapted[f"{name} ({kind})"] += 1
        owned.append(f"{path}.")
    logger.info("adapters on %s", _listed(adapted))
    if parameters and dropout > 0:
        names = ", ".join(sorted(parameters))
        logger.warning("--lora_dropout %g: not on %s, as adapters of parameters take none", dropout, names)
    head = model.get_base_model().get_output_embeddings()
    every = list(target_modules) == ["all-linear"]
    # peft applies the names that a family's fused experts once had to these alone, though other layers have them too.
    left_out = Counter(
        path.rpartition(".")[2]
        for path, module in _linear_layers(model).items()
        if module is not head
        and (every or _is_named(path.removeprefix("base_model.model."), target_modules))
        and not path.startswith(tuple(owned))
    )
    if left_out:
        logger.warning("--lora_target_modules: linear layers without adapters: %s", _listed(left_out))


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
