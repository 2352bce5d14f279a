"""Everything between a model's name and a model that can be trained: config, tokenizer, weights, precision, adapters.

The main path is `load_config` -> `resolve_base_dtype` -> `load_base_model` -> `add_adapters`. Whatever a user can get
wrong on the way (a folder that is not there, a gated repository, a damaged file, a layer that does not exist) ends in
a `UserError` that names the flag and the cure.
"""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from tokentune.errors import UserError
from tokentune.sources import DATA_SUFFIXES, check_model_folder, hub_error, is_local_path, loading_error

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.get_logger(__name__)

MODEL_FLAG = "--model_name_or_path"
# What transformers, safetensors and the hub's client raise for input that cannot be read.
LOADING_ERRORS = (OSError, ValueError, KeyError, ImportError, SafetensorError)


def run_folder_name(
    model: str, dataset: str, *, lora: bool, qlora: bool, tokentune: bool, prefix_length: int | float
) -> str:
    """The run's folder, as the released scripts name it: `<model>-<data set>[-lora][-qlora][-tokentune-<selected>]`.

    A hub id keeps its owner (`/` becomes `-`); of a local path only the last component counts, without a data file's
    suffix. An integer `prefix_length` prints as `16`, a proportion as `0.3`. `qlora` implies adapters.
    """

    def short(name: str) -> str:
        if not is_local_path(name):
            return name.replace("/", "-")
        last = os.path.basename(os.path.abspath(name))
        return next((last.removesuffix(suffix) for suffix in DATA_SUFFIXES if last.endswith(suffix)), last)

    parts = [short(model), short(dataset)]
    parts += ["lora"] if lora or qlora else []
    parts += ["qlora"] if qlora else []
    parts += [f"tokentune-{prefix_length}"] if tokentune else []
    return "-".join(parts)


# ------------------------------------------------------------------------------------------- config, tokenizer, weights


def load_config(name_or_path: str, *, flag: str = MODEL_FLAG) -> PreTrainedConfig:
    """A causal language model's configuration, without any weight.

    Raises:
        UserError: unknown folder or hub id, gated, unreachable, a `config.json` that cannot be used, or one of
            another kind of model.
    """
    check_model_folder(name_or_path, flag)
    try:
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    except LOADING_ERRORS as error:
        raise loading_error(name_or_path, error, flag) from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{flag} {name_or_path}: a {config.model_type} model is not a causal language model.")
    return config


def load_tokenizer(name_or_path: str, *, flag: str = MODEL_FLAG) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's or adapter's folder, or of a hub id. A missing pad token is the collation's matter.

    Raises:
        UserError: unknown folder or hub id, gated, unreachable, or no tokenizer in it.
    """
    if is_local_path(name_or_path) and not os.path.isdir(name_or_path):
        raise UserError(f"{flag} {name_or_path}: no such folder.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
    except LOADING_ERRORS as error:
        if not os.path.isdir(name_or_path):
            raise hub_error(name_or_path, error, flag) from error
        tokenizer = None
    # Some classes build an empty vocabulary, with special tokens at most, where their files are missing.
    if tokenizer is None or tokenizer.vocab_size <= len(tokenizer.all_special_tokens):
        raise UserError(
            f"{flag} {name_or_path}: no tokenizer could be read from it. "
            "It needs tokenizer.json or tokenizer.model, and tokenizer_config.json."
        )
    return tokenizer


def load_base_model(
    name_or_path: str,
    *,
    dtype: torch.dtype,
    quantize_4bit: bool,
    device_map: str | dict | None = None,
    compute_dtype: torch.dtype | None = None,
    flag: str = MODEL_FLAG,
) -> PreTrainedModel:
    """A causal language model with every weight read from the checkpoint.

    Args:
        name_or_path: local folder or hub id; safetensors files only, and no code from the repository is run.
        dtype: how the weights are held; with `quantize_4bit`, those that stay unquantised.
        quantize_4bit: NF4 with double quantisation (QLoRA's, Dettmers et al. 2023, section 3) for all linear layers
            but the output head.
        device_map: e.g. "auto", to spread the layers over the visible GPUs. None leaves the model on the CPU, for
            the Trainer to move; a quantised one is made on the current GPU where there is one.
        compute_dtype: of the 4-bit layers' matrix products; default `dtype`.

    Raises:
        UserError: it cannot be found or read, is not a causal language model, its files lack weights or hold others,
            or it does not fit the GPUs.
    """
    check_model_folder(name_or_path, flag)
    quantization = None
    if quantize_4bit:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype or dtype,
        )
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            name_or_path,
            dtype=dtype,
            device_map=device_map,
            quantization_config=quantization,
            use_safetensors=True,
            trust_remote_code=False,
            # Both are only warned about by default, and the weights in question left random: see _check_complete.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except LOADING_ERRORS as error:
        raise loading_error(name_or_path, error, flag) from error
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(f"{flag} {name_or_path}: this repository holds an adapter, not a full model. Give its base.")
    _check_complete(report, name_or_path, flag)
    _check_placement(getattr(model, "hf_device_map", None) or {}, name_or_path, flag)
    _repair_generation_config(model)
    return model


def _check_complete(report: dict, name: str, flag: str) -> None:
    """Refuses a checkpoint that left weights at their random initial values."""
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(
            f"{flag} {name}: {len(missing)} weights that its config.json asks for are not in its files "
            f"(the first: {missing[0]}). It is incomplete, or not a causal language model's checkpoint."
        )
    mismatched = sorted(report["mismatched_keys"])
    if mismatched:
        key, stored, wanted = mismatched[0]
        raise UserError(
            f"{flag} {name}: {len(mismatched)} weights do not have the shape that its config.json asks for "
            f"(the first: {key}, {tuple(stored)} instead of {tuple(wanted)})."
        )


def _check_placement(device_map: dict, name: str, flag: str) -> None:
    """Refuses a device map that put a part on the CPU or disk beside GPUs: it would train at a crawl, or not at all."""
    places = {str(place) for place in device_map.values()}
    if len(places) > 1 and places & {"cpu", "disk"}:
        raise UserError(
            f"{flag} {name}: does not fit the memory of the visible GPUs. "
            "Hold it in 16 bits (--base_dtype bfloat16) or 4 bits (--qlora), or take more GPUs."
        )


def _repair_generation_config(model: PreTrainedModel) -> None:
    """Sets `do_sample` where a published generation config has sampling settings without it.

    transformers only warns when it loads such a config, but refuses to save it once the Trainer has touched it: the
    run would be lost at its very end.
    """
    generation = getattr(model, "generation_config", None)
    if generation is None:
        return
    try:
        generation.validate(strict=True)
    except ValueError:
        generation.do_sample = True
        logger.warning("the generation config has sampling settings without do_sample: do_sample=True is set")


# ----------------------------------------------------------------------------------------------- precision and adapters


def checkpoint_dtype(config: PreTrainedConfig) -> torch.dtype:
    """The type that the checkpoint's weights are stored in; float32, as in transformers, where it does not say."""
    dtype = config.dtype or config.get_text_config().dtype or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def resolve_base_dtype(
    base_dtype: str, *, adapters: bool, quantized: bool, bf16: bool, fp16: bool, model_config: PreTrainedConfig
) -> torch.dtype:
    """How the base's weights are held: `base_dtype` as given, or for "auto":

    | | |
    |---|---|
    | all weights trained | float32 masters: 16-bit weights round small updates away (at a learning rate of 4e-5 about half of them do not move) |
    | adapters, `bf16` | bfloat16: autocast would round to it anyway, and float16 weights beside bfloat16 products make float32 activations |
    | adapters, `fp16` | float16, but a bfloat16 checkpoint as it is: its activations may exceed float16's range |
    | adapters, neither | the checkpoint's type; bfloat16 for float16, whose gradients vanish without the loss scaling of `fp16` |

    A quantised base is one with adapters; then this is the type of what stays unquantised.

    Raises:
        UserError: float16 for weights that are trained.
    """  # noqa: E501 (a table's row is one line)
    adapters = adapters or quantized
    if base_dtype == "float16" and not adapters:
        raise UserError(
            "--base_dtype float16: weights that are trained cannot be held in float16 (their updates vanish or turn "
            "to NaN). Leave --base_dtype out; --fp16 alone computes in float16 over float32 weights."
        )
    if base_dtype != "auto":
        return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[base_dtype]
    stored = checkpoint_dtype(model_config)
    if not adapters:
        return torch.float32
    if bf16:
        return torch.bfloat16
    if fp16:
        return torch.bfloat16 if stored is torch.bfloat16 else torch.float16
    return torch.bfloat16 if stored is torch.float16 else stored


def _linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> linear layer (`nn.Linear`, its 4-bit kind, GPT-2's transposed `Conv1D`)."""
    return {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}


def _check_target_modules(model: PreTrainedModel, target_modules: Sequence[str]) -> list[str] | str:
    """Each name must be the end of some layer's path: peft leaves out the unknown ones without a word."""
    targets = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    if targets == ["all-linear"]:
        return "all-linear"  # peft's own word: every linear layer but the output head
    linear = _linear_layers(model)
    paths = [*linear, *(name for name, module in model.named_modules() if isinstance(module, nn.Embedding))]
    unknown = [t for t in targets if not any(path == t or path.endswith(f".{t}") for path in paths)]
    if unknown or not targets:
        existing = sorted({path.rpartition(".")[2] for path in linear})
        raise UserError(
            f"--lora_target_modules: {type(model).__name__} has no layer named {', '.join(unknown) or '(none given)'}. "
            f"Its linear layers: {', '.join(existing)}; all-linear stands for all of them but the output head."
        )
    return targets


def _keep_4bit_layout(model: nn.Module) -> None:
    """Stops bitsandbytes from repacking 4-bit weights for inference.

    On CPUs with AVX512-BF16 the first forward in eval mode repacks them for a product that has no backward. Training
    on after an evaluation then loses every gradient that passes through such a layer, at most with a warning
    (measured: relative error 2.1 of the adapters' gradients), and the block scales are rounded to bfloat16.
    """
    for layer in _linear_layers(model).values():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def add_adapters(
    model: PreTrainedModel,
    *,
    r: int,
    alpha: float,
    dropout: float,
    target_modules: Sequence[str],
    quantized: bool,
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

    Returns:
        The same model in peft's wrapper, with only the adapters trainable.

    Raises:
        UserError: a target that is no layer of this model, with the list of those that are.
    """
    from peft import LoraConfig, get_peft_model  # adapters are optional: full training does without peft

    targets = _check_target_modules(model, target_modules)
    if quantized:
        _keep_4bit_layout(model)
    config = LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, bias="none", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config, autocast_adapter_dtype=True)
