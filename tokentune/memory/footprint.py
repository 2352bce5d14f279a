"""The memory of one training step, found by running it on tensors without data: no weights, no GPU, seconds.

    B sequences, S tokens, K selected

What runs is the real thing: the model's own code, patched by `apply_tokentune`, with peft's adapters, under mixed
precision, its loss, its backward pass, the Trainer's optimizer. `memory/accounting.py` counts what is alive meanwhile.
"""

import copy
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils.operations import convert_to_fp32
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.quantizers import AutoHfQuantizer

from tokentune.core.checkpointing import SMALLER
from tokentune.core.layers import inner_model
from tokentune.core.patched import reference_of, settings_of
from tokentune.core.profile import Profile
from tokentune.core.saved_tensors.breakdown import KindOfModule
from tokentune.core.saved_tensors.saved_bytes import SavedForBackward
from tokentune.errors import UnsupportedModelError, UserError
from tokentune.memory.accounting import (
    ACTIVATIONS,
    GRADIENTS,
    OPTIMIZER,
    WEIGHTS,
    Footprint,
    LiveBytes,
    states_of,
    weights_of,
)
from tokentune.memory.estimated_batch import batch_without_data, unknown_answers
from tokentune.memory.fake_device import fake_device, replaced, run_backward, to_fake
from tokentune.memory.shallow import with_depth
from tokentune.memory.sharding import Sharing
from tokentune.models.builder import adapt_and_patch, autocast_dtype, base_dtype, needs_reference
from tokentune.models.pretrained import load_config, nf4
from tokentune.models.tasks import CAUSAL_LM, Head, head_modules
from tokentune.settings.finetune import Arguments
from tokentune.settings.model import RUN_WITHOUT_DATA
from tokentune.sources import first_line
from tokentune.training.trainer import SelectiveTrainer
from tokentune.training.trainer_arguments import build_training_arguments
from tokentune.verify.verification import verified_profile


class Estimate(Protocol):
    """The estimates of one model."""

    def __call__(self, arguments: Arguments, shape: tuple[int, int], depth: int | None = None) -> Footprint:
        """A step of (B, S) tokens; `depth`: of the first layers alone. Raises UserError: why it cannot be estimated."""


def estimator(
    config: PreTrainedConfig,
    device: str,
    head: Head = CAUSAL_LM,
    *,
    profile: Profile | None = None,
    processes: int = 1,
    engine: str | None = None,
    answer_share: float | None = None,
) -> Estimate:
    """`measure` for one model. `profile` None: its selective layers are verified once, when first needed."""

    @cache
    def verified(attention: str | None, trusted: bool) -> Profile | str:
        with torch.device("meta"):
            model = head.auto_class.from_config(config, attn_implementation=attention, trust_remote_code=trusted)
        try:
            return verified_profile(model)
        except UnsupportedModelError as error:
            return f"TokenTune cannot serve this model exactly: {error}"

    def estimate(arguments: Arguments, shape: tuple[int, int], depth: int | None = None) -> Footprint:
        known, model = profile, arguments.model
        if model.attn_implementation not in (None, *RUN_WITHOUT_DATA):
            raise UserError(
                f"the kernels of --attn_implementation {model.attn_implementation} run on real tensors alone, and an "
                "estimate has none; it can be made for sdpa"
            )
        options = {"device": device, "head": head, "processes": processes, "engine": engine}
        options["answer_share"] = answer_share
        try:
            if arguments.selection.tokentune and known is None:
                known = verified(model.attn_implementation, model.trust_remote_code)
            if isinstance(known, str):
                raise UserError(known)
            layers = config if depth is None else with_depth(config, depth)
            return measure(layers, arguments, shape, profile=known, **options)
        except UnsupportedModelError as error:
            raise UserError(str(error)) from error
        # Code that reads values of tensors without data, or asks for a GPU on a machine without one (AssertionError).
        except (RuntimeError, AssertionError) as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise UserError(f"cannot be run without data: {reason}") from error

    return estimate


def measure(
    config: PreTrainedConfig,
    arguments: Arguments,
    shape: tuple[int, int],
    *,
    device: str = "cuda",
    head: Head = CAUSAL_LM,
    profile: Profile | None = None,
    processes: int = 1,
    engine: str | None = None,
    answer_share: float | None = None,
) -> Footprint:
    """The footprint of a step of the model that `config` describes, trained as `arguments` say.

    Args:
        shape: (B, S) of one process's micro-batch, all tokens real.
        device: "cuda" or "cpu".
        profile: of the patched model, where `--tokentune` is given; None has it verified here.
        engine: what shares the training out between `processes` ("ddp", "zero2", "fsdp"); None: one process.
        answer_share: of the tokens, those that `--prefix_length answers` selects; None: not known.

    Raises:
        UserError: `--prefix_length answers` without `answer_share`, what cannot be adapted or patched, an optimizer
            that is not there, what the engine cannot serve.
        UnsupportedModelError: layers that TokenTune cannot serve.
    """
    if arguments.selection.takes_answers and answer_share is None:
        raise unknown_answers(arguments)
    if not arguments.selection.tokentune:  # LoRA stands for peft's activated one, whose shapes depend on token ids
        arguments = arguments.changed(invocation=None)
    model = skeleton(config, arguments, head, profile)
    sharing = None if engine is None else Sharing(model, arguments, processes, engine)
    if engine == "fsdp" and arguments.selection.tokentune and arguments.memory.checkpoint_rest == "auto":
        settings_of(inner_model(model)).checkpoint_rest = SMALLER  # as where its weights are split
    if sharing is not None and sharing.dtype is not None:
        model.to(sharing.dtype)
        arguments = arguments.changed(bf16=False, fp16=False)
    with _run_under_way_kept():
        settings = build_training_arguments(arguments, Path("unused"), use_cpu=True, bf16=False, fp16=False)
    with fake_device(device), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dtype = base_dtype(arguments, config)
        to_fake(model, device, dtype).train()
        if (reference := reference_of(model)) is not None:
            to_fake(reference, device, dtype)
        with LiveBytes(device) as live:
            live.claim(WEIGHTS, weights_of(model))
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            for parameter in trained:
                parameter.register_post_accumulate_grad_hook(lambda p: live.claim(GRADIENTS, [p.grad]))
            optimizer = _optimizer(model, arguments, settings, device)
            fill_states(optimizer, trained)
            live.claim(OPTIMIZER, states_of(optimizer))
            model.zero_grad()
            if arguments.optimization.accumulation > 1:  # those of earlier micro-batches
                for parameter in trained:
                    parameter.grad = torch.zeros_like(parameter)
            live.claim(GRADIENTS, [parameter.grad for parameter in trained if parameter.grad is not None])
            batch = batch_without_data(model, arguments, shape, device, answer_share)
            live.claim("batch", [value for value in batch.values() if isinstance(value, Tensor)])
            live.restart()
            footprint = _step(model, batch, optimizer, arguments, live)
            return footprint if sharing is None else sharing.footprint(footprint, live)


@contextmanager
def _run_under_way_kept() -> Iterator[None]:
    """Keeps accelerate's state: making the Trainer's settings resets it, also that of a run under way."""
    states = [(state._shared_state, dict(state._shared_state)) for state in (AcceleratorState, PartialState)]
    try:
        yield
    finally:
        for shared, content in states:
            if content:
                shared.clear()
                shared.update(content)


def skeleton(config: PreTrainedConfig, arguments: Arguments, head: Head, profile: Profile | None) -> nn.Module:
    """The model of a run on the meta device, adapted, patched and checkpointed as the flags say."""
    config, dtype = copy.deepcopy(config), base_dtype(arguments, config)
    if profile is not None:
        arguments = arguments.changed(skip_verification=True)
    options = {"dtype": dtype, "attn_implementation": arguments.model.attn_implementation}
    with torch.device("meta"):
        model = head.auto_class.from_config(config, trust_remote_code=arguments.model.trust_remote_code, **options)
        if arguments.adapters.qlora:
            model = _with_4bit_layers(model, autocast_dtype(arguments) or dtype, head)
        reference = None
        if needs_reference(arguments):
            other = load_config(arguments.selection.selection_reference_model)
            reference = head.auto_class.from_config(other, **options)
            reference.requires_grad_(False)
        model = adapt_and_patch(model, arguments, head, reference)
    if profile is not None and arguments.selection.tokentune:
        settings_of(inner_model(model)).profile = profile
    return model


def _with_4bit_layers(model: nn.Module, compute_dtype: torch.dtype, head: Head) -> nn.Module:
    """Replaces the layers that `load_base_model` would load in 4 bits by those of bitsandbytes."""
    quantization = nf4(compute_dtype, head_modules(model) if head.is_new else None)
    AutoHfQuantizer.from_config(quantization)._process_model_before_weight_loading(model, None)
    model.is_loaded_in_4bit = model.is_quantized = True
    model.config.quantization_config = quantization
    return model


# --- the step ---------------------------------------------------------------------------------------------------------


def _step(model: nn.Module, batch: dict[str, Any], optimizer: Any, arguments: Arguments, live: LiveBytes) -> Footprint:
    kinds = KindOfModule(model)

    def kind(tensor: Tensor) -> str:
        live.claim(ACTIVATIONS, [tensor])
        return kinds.now(tensor)

    live.begin("forward")
    with SavedForBackward(model, kind) as saved, kinds:
        loss = forward_loss(model, batch, arguments, live.device)
    live.begin("backward")
    run_backward(loss)
    gradients = live.bytes_of(GRADIENTS)
    live.begin("optimizer")
    update(model, optimizer, arguments)
    return Footprint(
        weights=live.bytes_of(WEIGHTS),
        gradients=gradients,
        optimizer=live.bytes_of(OPTIMIZER),
        activations=saved.bytes,
        peak=live.peak,
        peak_phase=live.peak_phase,
        at_peak=live.at_peak(),
        activations_by=dict(saved.bytes_by),
        host=live.bytes_of(OPTIMIZER, "cpu") if live.device != "cpu" else 0,
    )


def fill_states(optimizer: Any, trained: list[nn.Parameter]) -> None:
    """Makes the optimizer's states, as earlier steps would have, by a step with gradients of zero, which stay.

    `optimizer` None: makes the gradients only.
    """
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
        if hasattr(optimizer, "optimizers"):  # one per parameter: it is applied, and its gradient freed, at once
            optimizer.optimizers[parameter].step()
            parameter.grad = None
    if optimizer is not None:
        optimizer.step()


def forward_loss(model: nn.Module, batch: dict[str, Any], arguments: Arguments, device: str) -> Tensor:
    """The loss as the Trainer computes it: under autocast, the outputs then converted to float32 (by accelerate)."""
    dtype = autocast_dtype(arguments)
    with torch.autocast(device, dtype) if dtype is not None else nullcontext():
        output = model(**batch)
    if dtype is not None:
        output = convert_to_fp32(output)
    return output.loss


def update(model: nn.Module, optimizer: Any, arguments: Arguments) -> None:
    """After the backward pass: clips, applies and frees the gradients. `optimizer` None: does not apply them."""
    given = [parameter for parameter in model.parameters() if parameter.grad is not None]
    if given and arguments.optimization.max_grad_norm:
        nn.utils.clip_grad_norm_(given, arguments.optimization.max_grad_norm)
    if optimizer is not None:
        optimizer.step()
    model.zero_grad()


# --- the optimizer ----------------------------------------------------------------------------------------------------


def _optimizer(model: nn.Module, arguments: Arguments, settings: Any, device: str) -> Any:
    """The optimizer that the Trainer would create, by its own code."""
    trainer = object.__new__(SelectiveTrainer)
    trainer.model, trainer.args = model, settings
    trainer.optimizer = trainer.optimizer_cls_and_kwargs = None
    trainer.optim_in_backward = arguments.optimization.optim_in_backward
    with _fake_tables():
        optimizer = trainer.create_optimizer()
    for part in getattr(optimizer, "optimizers", {None: optimizer}).values():
        _run_without_kernels(part)
        for group in part.param_groups:
            # torch updates all weights in one kernel by default, but not for tensor subclasses such as fake tensors.
            if device == "cuda" and "foreach" in group and not (group["foreach"] or group.get("fused")):
                group["foreach"] = True
    return optimizer


def _fake_tables() -> AbstractContextManager:
    """Replaces bitsandbytes' tables of 8-bit numbers, which need real values, while an optimizer is made."""
    try:
        from bitsandbytes import functional
    except ImportError:
        return nullcontext()
    return replaced(functional, "create_dynamic_map", lambda **_: torch.empty(256, device="cpu"))


def _run_without_kernels(optimizer: Any) -> None:
    """Lets a bitsandbytes optimizer make its states but run no kernel: its kernels do not accept fake tensors."""
    if not type(optimizer).__module__.startswith("bitsandbytes"):
        return

    def state(like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        if optimizer.is_paged and like.numel() >= 1e5:  # its own bound
            return torch.zeros(like.shape, dtype=dtype, device="cpu")
        return torch.zeros_like(like, dtype=dtype)

    optimizer.get_state_buffer = state
    optimizer.update_step = optimizer.prefetch_state = lambda *_, **__: None
