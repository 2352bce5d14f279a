"""The model of a run, as its flags say: precision, weights, adapters, selective layers."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from tokentune import UnsupportedModelError, apply_tokentune
from tokentune.arguments import Arguments
from tokentune.errors import UserError
from tokentune.loading import add_adapters, checkpoint_dtype, load_base_model, resolve_base_dtype
from tokentune.sources import loading_error

logger = logging.getLogger(__name__)


def base_dtype(arguments: Arguments, config: PreTrainedConfig) -> torch.dtype:
    """The type that the base's weights are held in while training."""
    return resolve_base_dtype(
        arguments.model.base_dtype,
        adapters=arguments.adapters.lora,
        quantized=arguments.adapters.qlora,
        bf16=arguments.model.bf16,
        fp16=arguments.model.fp16,
        model_config=config,
    )


def saved_as(arguments: Arguments, config: PreTrainedConfig, dtype: torch.dtype) -> torch.dtype:
    """The type that a fully trained model is saved in: as it was held where --base_dtype says, else as it came."""
    return checkpoint_dtype(config) if arguments.model.base_dtype == "auto" else dtype


def check_structure(arguments: Arguments, config: PreTrainedConfig) -> None:
    """Refuses what cannot be adapted or patched, tried on a model without weights (torch's meta device).

    Raises:
        UserError: no causal language model, no such layers to adapt, or layers that TokenTune cannot serve.
    """
    name = arguments.model.model_name_or_path
    try:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise loading_error(name, error, "--model_name_or_path") from error
    adapt_and_patch(skeleton, arguments)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and arguments.data.max_length > positions:
        logger.warning(
            "--max_length %d is more than the %d positions of %s", arguments.data.max_length, positions, name
        )


def prepare_model(arguments: Arguments, dtype: torch.dtype) -> nn.Module:
    """The base with its weights, adapted and patched as the flags say."""
    spread = arguments.model.model_parallel and torch.cuda.device_count() > 1
    autocast = torch.bfloat16 if arguments.model.bf16 else torch.float16 if arguments.model.fp16 else None
    model = load_base_model(
        arguments.model.model_name_or_path,
        dtype=dtype,
        quantize_4bit=arguments.adapters.qlora,
        device_map="auto" if spread else None,
        compute_dtype=autocast or dtype,
    )
    return adapt_and_patch(model, arguments)


def adapt_and_patch(model: nn.Module, arguments: Arguments) -> nn.Module:
    """Adds the adapters and the selective layers that the flags ask for; UserError where the model has no place."""
    adapters = arguments.adapters
    if adapters.lora:
        model = add_adapters(
            model,
            r=adapters.lora_r,
            alpha=adapters.lora_alpha,
            dropout=adapters.lora_dropout,
            target_modules=adapters.lora_target_modules,
            quantized=adapters.qlora,
        )
    if arguments.selection.tokentune:
        with unsupported_models_refused():
            apply_tokentune(model, verify=not arguments.selection.skip_verification)
    return model


@contextmanager
def unsupported_models_refused() -> Iterator[None]:
    """Turns a refusal of the selective layers, at patch time or in a forward pass, into a UserError."""
    try:
        yield
    except UnsupportedModelError as error:
        raise UserError(f"--tokentune cannot serve this model exactly: {error}") from error
