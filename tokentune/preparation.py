"""The model of a run, as its flags say: precision, weights, adapters, selective layers."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedConfig

from tokentune import UnsupportedModelError, apply_tokentune
from tokentune.adapters import add_adapters
from tokentune.arguments import Arguments
from tokentune.data.sources import loading_error
from tokentune.errors import UserError
from tokentune.heads import CAUSAL_LM, Head
from tokentune.loading import checkpoint_dtype, load_base_model, resolve_base_dtype
from tokentune.runs.optimizers import check_projected_layers

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


def check_structure(arguments: Arguments, config: PreTrainedConfig, head: Head = CAUSAL_LM) -> nn.Module:
    """Refuses what cannot be adapted or patched, tried on a model without weights (torch's meta device), returned.

    Raises:
        UserError: no model with this head, no such layers to adapt, or layers that TokenTune cannot serve.
    """
    name, attention = arguments.model.model_name_or_path, arguments.model.attn_implementation
    try:
        with torch.device("meta"):
            skeleton = head.auto_class.from_config(
                config, attn_implementation=attention, trust_remote_code=arguments.model.trust_remote_code
            )
    except (ValueError, ImportError) as error:
        if attention is not None and "ttention" in str(error):
            raise UserError(f"--attn_implementation {attention}: {error}") from error
        raise loading_error(name, error, "--model_name_or_path") from error
    if arguments.model.use_liger_kernel:
        check_kernels(config)
    check_projected_layers(skeleton, arguments.optimization.optim)
    skeleton = adapt_and_patch(skeleton, arguments, head)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and arguments.data.max_length > positions:
        logger.warning(
            "--max_length %d is more than the %d positions of %s", arguments.data.max_length, positions, name
        )
    return skeleton


def check_kernels(config: PreTrainedConfig) -> None:
    """Refuses a model that Liger has no kernels for, which it would leave as it is without a word."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        known = ", ".join(sorted(MODEL_TYPE_TO_APPLY_LIGER_FN))
        raise UserError(f"--use_liger_kernel: Liger has no kernels for {config.model_type}; it has some for {known}")


def prepare_model(
    arguments: Arguments,
    dtype: torch.dtype,
    head: Head = CAUSAL_LM,
    config: PreTrainedConfig | None = None,
    *,
    from_scratch: bool = False,
) -> nn.Module:
    """The base with its weights, adapted and patched as the flags say.

    Args:
        dtype: how the base's weights are held.
        head: what the model ends in.
        config: instead of the checkpoint's own.
        from_scratch: random weights for `config`, none read.
    """
    trusted = arguments.model.trust_remote_code
    if from_scratch:
        model = head.auto_class.from_config(config, dtype=dtype, trust_remote_code=trusted)
        return adapt_and_patch(model, arguments, head)
    spread = arguments.model.model_parallel and torch.cuda.device_count() > 1
    autocast = torch.bfloat16 if arguments.model.bf16 else torch.float16 if arguments.model.fp16 else None
    model = load_base_model(
        arguments.model.model_name_or_path,
        dtype=dtype,
        quantize_4bit=arguments.adapters.qlora,
        device_map="auto" if spread else None,
        compute_dtype=autocast or dtype,
        head=head,
        config=config,
        attn_implementation=arguments.model.attn_implementation,
        trust_remote_code=trusted,
        allow_pickle=arguments.model.allow_pickle,
    )
    return adapt_and_patch(model, arguments, head)


def adapt_and_patch(model: nn.Module, arguments: Arguments, head: Head = CAUSAL_LM) -> nn.Module:
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
            head=head,
        )
    if arguments.selection.tokentune:
        with unsupported_models_refused():
            apply_tokentune(
                model,
                verify=not arguments.selection.skip_verification,
                checkpoint_rest=arguments.memory.checkpoint_rest,
                offload_kv=arguments.memory.offload_kv,
                chunked_loss={"auto": None, "on": True, "off": False}[arguments.memory.chunked_loss],
            )
    if arguments.memory.gradient_checkpointing:
        enable_checkpointing(model)
    return model


def enable_checkpointing(model: nn.Module) -> None:
    """Turns gradient checkpointing on; UserError where the model has none."""
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    try:
        core.activation_checkpointing_enable()
    except ValueError as error:
        raise UserError(f"--gradient_checkpointing: {type(core).__name__} does not support it") from error
    if hasattr(core, "_require_grads_hook"):
        # Gradients of the embeddings' output, which transformers asks for on behalf of reentrant checkpointing.
        core.disable_input_require_grads()


@contextmanager
def unsupported_models_refused() -> Iterator[None]:
    """Turns a refusal of the selective layers, at patch time or in a forward pass, into a UserError."""
    try:
        yield
    except UnsupportedModelError as error:
        raise UserError(f"--tokentune cannot serve this model exactly: {error}") from error
