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

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)


def _linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> linear layer (`nn.Linear`, its 4-bit kind, GPT-2's transposed `Conv1D`)."""
    return {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}


def _is_named(path: str, targets: Sequence[str]) -> bool:
    return any(path == target or path.endswith(f".{target}") for target in targets)


def _check_target_modules(model: PreTrainedModel, target_modules: Sequence[str]) -> list[str] | str:
    """Each name must be the end of some layer's path: peft leaves out the unknown ones without a word."""
    targets = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    if targets == ["all-linear"]:
        return "all-linear"  # peft's own word: every linear layer but the output head
    for path in _return_more(model):
        if _is_named(path, targets):
            raise UserError(
                f"--lora_target_modules: {path} of {type(model).__name__} returns more than a product with its "
                "weights, so that no adapter can be added to it. Leave it out."
            )
    linear = _linear_layers(model)
    paths = [*linear, *(name for name, module in model.named_modules() if isinstance(module, nn.Embedding))]
    unknown = [target for target in targets if not any(_is_named(path, [target]) for path in paths)]
    if unknown or not targets:
        existing = sorted({path.rpartition(".")[2] for path in linear})
        raise UserError(
            f"--lora_target_modules: {type(model).__name__} has no layer named {', '.join(unknown) or '(none given)'}. "
            f"Its linear layers: {', '.join(existing)}; all-linear stands for all of them but the output head."
        )
    return targets


def _return_more(model: nn.Module) -> list[str]:
    """Paths of linear layers whose forward returns something else than a product (routers), which no adapter adds to.

    Tried on a copy without data. torch's and bitsandbytes' classes are known to be plain.
    """
    plain: dict[type, bool] = {nn.Linear: True, Conv1D: True}
    found = []
    for path, layer in _linear_layers(model).items():
        kind = type(layer)
        if kind not in plain:
            plain[kind] = kind.__module__.startswith(("torch.", "bitsandbytes.")) or _returns_tensor(layer)
        found += [] if plain[kind] else [path]
    return found


def _returns_tensor(layer: nn.Module) -> bool:
    with torch.no_grad():
        weight = layer.weight
        result = copy.deepcopy(layer).to("meta")(torch.empty(2, layer.in_features, dtype=weight.dtype, device="meta"))
    return isinstance(result, torch.Tensor)


def add_adapters(
    model: PreTrainedModel,
    *,
    r: int,
    alpha: float,
    dropout: float,
    target_modules: Sequence[str],
    quantized: bool,
    head: Head = CAUSAL_LM,
) -> "PeftModel":
    """Freezes the base and adds LoRA adapters (float32, whatever type a 16-bit base has) to the named layers.

    The base's own types stay. peft's `prepare_model_for_kbit_training` is not used for 4-bit bases: it turns all that
    is not quantised to float32 (embeddings and head of an 8B Llama 3: 2 GiB more), and with it the activations
    (measured on a 6-layer Llama under bfloat16 autocast: 33 % more bytes saved for backward, for adapter gradients
    0.8 % instead of 1.1 % away from float32's). `--base_dtype float32` gives exactly that to whoever wants it. Its
    gradient checkpointing does not work through selected tokens, and input gradients are not needed without it.

    Args:
        r, alpha, dropout: LoRA's rank, scale (adapters are multiplied by alpha / r) and dropout probability.
        target_modules: ends of layer paths (`down_proj`, `mlp.down_proj`), or `all-linear`.
        quantized: the base is in 4 bits.
        head: of the model; one that is new is trained whole, and saved with the adapters.

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
        exclude_modules=(_return_more(model) or None) if targets == "all-linear" else None,
    )
    try:
        adapted = get_peft_model(model, config, autocast_adapter_dtype=True)
    except ValueError as error:  # of some of an expert's fused weights without the others, for one
        raise UserError(f"--lora_target_modules {' '.join(target_modules)}: peft refuses this: {error}") from error
    _set_dropout(adapted, dropout)
    return adapted


def _set_dropout(model: "PeftModel", dropout: float) -> None:
    """Puts dropout in front of the adapters, but for those of parameters (of fused experts), which peft gives none.

    Where there are such, the configuration says 0: with another number peft would not load the adapter again.
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
    """Logs which modules got adapters, by their names' ends: the same targets mean others in each family of models."""
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper
    from peft.utils import ModulesToSaveWrapper

    adapted: Counter[str] = Counter()
    parameters, owned = set(), []
    for path, module in model.named_modules():
        name = path.replace(".base_layer", "").rpartition(".")[2]
        if isinstance(module, ParamWrapper):
            parameters.add(f"{name}.{module.parameter_name}")
            adapted[f"{name}.{module.parameter_name} (parameter)"] += 1
        elif isinstance(module, LoraLayer):
            adapted[f"{name} ({type(module.get_base_layer()).__name__})"] += 1
        elif isinstance(module, ModulesToSaveWrapper):
            adapted[f"{name} (trained whole)"] += 1
        else:
            continue
        owned.append(f"{path}.")
    logger.info("adapters on %s", _listed(adapted))
    if parameters and dropout > 0:
        names = ", ".join(sorted(parameters))
        logger.warning("--lora_dropout %g: not on %s, as adapters of parameters take none", dropout, names)
    head = model.get_base_model().get_output_embeddings()
    every = list(target_modules) == ["all-linear"]
    # peft takes names that a family's fused experts once had for theirs alone, though other layers have them too.
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
