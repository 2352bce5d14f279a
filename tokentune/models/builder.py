"""The model of a run, as its flags say: precision, weights, adapters, selective layers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from tokentune.api import apply_tokentune
from tokentune.core.activated_lora import take_over_recomputation
from tokentune.core.compat.fsdp import made_whole
from tokentune.core.layers import inner_model, transformer_layers
from tokentune.core.loss import take_loss_in_chunks
from tokentune.core.patched import reference_of
from tokentune.core.scoring_pass import ScoringOptions
from tokentune.errors import UnsupportedModelError, UserError
from tokentune.models.adapters import add_adapters, say_adapters
from tokentune.models.constant_prompts import check_constant_prompts
from tokentune.models.pretrained import (
    NO_WEIGHTS,
    check_quantization,
    check_weights,
    checkpoint_dtype,
    load_base_model,
    load_config,
    warn_of_length,
)
from tokentune.models.tasks import CAUSAL_LM, Head
from tokentune.sampling.resolver import find_strategy
from tokentune.settings.finetune import Arguments
from tokentune.settings.flags import require
from tokentune.settings.low_rank import check_projected_layers
from tokentune.sources import loading_error
from tokentune.verify.verification import verify_chunked_loss

_REFERENCE = "--selection_reference_model"


def base_dtype(arguments: Arguments, config: PreTrainedConfig) -> torch.dtype:
    """How the base's weights are held in training: --base_dtype, or for "auto":

    | | |
    |---|---|
    | all weights trained | float32: 16-bit weights round small updates away (at a learning rate of 4e-5 about half of them do not move) |
    | adapters, --bf16 | bfloat16: autocast would round to it anyway, and float16 weights beside bfloat16 products make float32 activations |
    | adapters, --fp16 | float16, but a bfloat16 checkpoint as it is: its activations may exceed float16's range |
    | adapters, neither | the checkpoint's type; bfloat16 for float16, whose gradients underflow without the loss scaling of --fp16 |

    With a quantized base this is the type of the weights that are not quantized.

    Raises:
        UserError: float16 for weights that are trained.
    """  # noqa: E501 (a table's row is one line)
    held, bf16, fp16 = arguments.model.base_dtype, arguments.model.bf16, arguments.model.fp16
    adapters = arguments.adapters.lora or arguments.adapters.qlora
    require(
        adapters or held != "float16",
        "--base_dtype float16: weights that are trained cannot be held in float16 (their updates vanish or turn "
        "to NaN). Leave --base_dtype out; --fp16 alone computes in float16 over float32 weights.",
    )
    if held != "auto":
        return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[held]
    if not adapters:
        return torch.float32
    stored = checkpoint_dtype(config)
    if fp16 and not bf16:
        return torch.bfloat16 if stored is torch.bfloat16 else torch.float16
    return torch.bfloat16 if bf16 or stored is torch.float16 else stored


def autocast_dtype(arguments: Arguments) -> torch.dtype | None:
    """The type of matrix products in mixed precision; None without it."""
    return torch.bfloat16 if arguments.model.bf16 else torch.float16 if arguments.model.fp16 else None


def saved_as(arguments: Arguments, config: PreTrainedConfig, dtype: torch.dtype) -> torch.dtype:
    """The type that a fully trained model is saved in: the checkpoint's own, or `dtype` if --base_dtype was given."""
    return checkpoint_dtype(config) if arguments.model.base_dtype == "auto" else dtype


def check_structure(arguments: Arguments, config: PreTrainedConfig, head: Head = CAUSAL_LM) -> nn.Module:
    """Refuses what cannot be adapted or patched; returns the model without weights (meta device) that it was tried on.

    Raises:
        UserError: no model with this head, no such layers to adapt, or layers that TokenTune cannot serve.
    """
    name, attention = arguments.model.model_name_or_path, arguments.model.attn_implementation
    try:
        with torch.device("meta"), made_whole():
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
    check_reference(arguments, config)
    warn_of_length(config, name, arguments.data.max_length)
    return skeleton


def check_kernels(config: PreTrainedConfig) -> None:
    """Refuses a model that Liger has no kernels for, and would silently leave as it is."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    known = ", ".join(sorted(MODEL_TYPE_TO_APPLY_LIGER_FN))
    require(
        config.model_type in MODEL_TYPE_TO_APPLY_LIGER_FN,
        f"--use_liger_kernel: Liger has no kernels for {config.model_type}; it has some for {known}",
    )


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
        dtype: of the base's weights.
        config: instead of the checkpoint's own.
        from_scratch: random weights for `config`, none read.
    """
    flags, reference = arguments.model, None
    if from_scratch:
        model = head.auto_class.from_config(config, dtype=dtype, trust_remote_code=flags.trust_remote_code)
    else:
        model = load_base_model(
            flags.model_name_or_path,
            dtype=dtype,
            quantize_4bit=arguments.adapters.qlora,
            device_map="auto" if flags.model_parallel and torch.cuda.device_count() > 1 else None,
            compute_dtype=autocast_dtype(arguments),
            head=head,
            config=config,
            attn_implementation=flags.attn_implementation,
            trust_remote_code=flags.trust_remote_code,
            allow_pickle=flags.allow_pickle,
        )
        reference = load_reference(arguments, dtype) if needs_reference(arguments) else None
    model = adapt_and_patch(model, arguments, head, reference)
    if arguments.adapters.lora:
        say_adapters(model, arguments.adapters.lora_dropout, arguments.adapters.lora_target_modules)
    return model


def adapt_and_patch(
    model: nn.Module, arguments: Arguments, head: Head = CAUSAL_LM, reference: PreTrainedModel | None = None
) -> nn.Module:
    """Adds the adapters and the selective layers that the flags ask for; UserError where the model cannot have them.

    `reference`: the model whose losses the strategy compares with, if it does.
    """
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
            invocation=adapters.invocation,
        )
        if adapters.invocation is not None:
            check_constant_prompts(model, arguments.data.max_length)
    if arguments.selection.tokentune:
        make_selective(model, arguments, reference)
    elif arguments.memory.chunked_loss == "on":
        core = inner_model(model)
        try:
            if not arguments.selection.skip_verification:
                verify_chunked_loss(core)
        except UnsupportedModelError as error:
            raise UserError(f"--chunked_loss on: {error}") from error
        take_loss_in_chunks(core)
    if arguments.memory.gradient_checkpointing:
        activated = adapters.invocation is not None
        # peft forgets where adapters act in a layer whose input has no gradient.
        enable_checkpointing(model, inputs_with_gradients=activated and not arguments.selection.tokentune)
        if activated:
            model.register_forward_hook(_without_recomputation)
    return model


def make_selective(model: nn.Module, arguments: Arguments, reference: PreTrainedModel | None = None) -> nn.Module:
    """Adds the selective layers that the flags ask for; a second call, with other flags, changes their settings."""
    selection = arguments.selection
    options = {}
    if selection.scoring_pass:
        _check_look(arguments, model)
        if selection.scored:  # the model itself draws, by the scores
            options |= {"prefix_length": selection.selected, "selection": selection.selection}
        reference = reference_of(model) if reference is None else reference
        options["scoring_pass"] = ScoringOptions(selection.selection_draw, selection.selection_layers, reference)
    # ZeRO-3 gathers the head's weights in each of its calls, on all processes, whose numbers of chunks differ.
    chunked = {"auto": False if is_deepspeed_zero3_enabled() else None, "on": True, "off": False}
    with unsupported_models_refused(), made_whole():
        return apply_tokentune(
            model,
            verify=not selection.skip_verification,
            checkpoint_rest=arguments.memory.checkpoint_rest,
            offload_kv=arguments.memory.offload_kv,
            chunked_loss=chunked[arguments.memory.chunked_loss],
            gradient_correction=selection.gradient_correction,
            **options,
        )


def _check_look(arguments: Arguments, model: nn.Module) -> None:
    """Refuses flags that this model's scoring pass over all tokens cannot follow."""
    layers, rest = arguments.selection.selection_layers, arguments.memory.checkpoint_rest
    depth = inner_model(model).config.get_text_config().num_hidden_layers
    require(
        layers is None or layers < depth,
        f"--selection_layers {layers}: the model has {depth}; leave it out to look through all of them",
    )
    require(
        layers is None or not arguments.selection.selection_pass,
        f"--selection_pass looks through all layers, --selection_layers {layers} through some: give one of them",
    )
    require(
        layers is not None or not (arguments.memory.gradient_checkpointing and rest in ("hidden_states", "segments")),
        f"--checkpoint_rest {rest} keeps hidden states of tokens that are not selected, and a pass over all tokens "
        "leaves their keys and values alone: take keys_values, or auto",
    )


def needs_reference(arguments: Arguments) -> bool:
    """Whether the strategy compares losses with those of a second model."""
    selection = arguments.selection
    return selection.scoring_pass and "excess_loss" in find_strategy(selection.selection).needs


def check_reference(arguments: Arguments, config: PreTrainedConfig) -> None:
    """Refuses a reference model that is missing, has no weights or another vocabulary; UserError."""
    name = arguments.selection.selection_reference_model
    if not needs_reference(arguments):
        return
    require(
        name is not None,
        f"--selection {arguments.selection.selection} takes the loss of a reference model off: add {_REFERENCE}",
    )
    reference = load_config(name, flag=_REFERENCE)
    check_quantization(reference, name, qlora=False, flag=_REFERENCE)
    own, other = (model.get_text_config().vocab_size for model in (config, reference))
    require(
        own == other,
        f"{_REFERENCE} {name} has a vocabulary of {other:,} tokens, the model one of {own:,}: losses "
        "can be compared on the same tokens alone",
    )
    check_weights(name, hint=NO_WEIGHTS, flag=_REFERENCE, allow_pickle=arguments.model.allow_pickle)


def load_reference(arguments: Arguments, dtype: torch.dtype) -> PreTrainedModel:
    """The frozen model whose losses are subtracted."""
    reference = load_base_model(
        arguments.selection.selection_reference_model,
        dtype=dtype,
        quantize_4bit=False,
        flag=_REFERENCE,
        attn_implementation=arguments.model.attn_implementation,
        allow_pickle=arguments.model.allow_pickle,
    )
    return reference.requires_grad_(False).eval()


def enable_checkpointing(model: nn.Module, *, inputs_with_gradients: bool = False) -> None:
    """Turns gradient checkpointing on; UserError where the model has none.

    Args:
        inputs_with_gradients: of the first layer too.
    """
    core = inner_model(model)
    try:
        enable = getattr(core, "activation_checkpointing_enable", core.gradient_checkpointing_enable)
        enable()  # (the second name is that of transformers below 5.23)
    except ValueError as error:
        raise UserError(f"--gradient_checkpointing: {type(core).__name__} does not support it") from error
    if inputs_with_gradients:
        core.enable_input_require_grads()
    elif hasattr(core, "_require_grads_hook"):
        # Gradients of the embeddings' output, which transformers asks for on behalf of reentrant checkpointing.
        core.disable_input_require_grads()


def _without_recomputation(model: nn.Module, *_: Any) -> None:
    """After a forward pass without gradients, as of a validation."""
    if not torch.is_grad_enabled():
        take_over_recomputation(transformer_layers(inner_model(model)).layers)


@contextmanager
def unsupported_models_refused() -> Iterator[None]:
    """Turns a refusal of the selective layers, at patch time or in a forward pass, into a UserError."""
    try:
        yield
    except UnsupportedModelError as error:
        raise UserError(f"--tokentune cannot serve this model exactly: {error}") from error
