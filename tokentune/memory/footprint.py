"""The memory of one training step, found by running it on tensors without data: no weights, no GPU, seconds.

    B sequences, S tokens, K selected

What runs is the real thing: the model's own code, patched by `apply_tokentune`, with peft's adapters, under mixed
precision, its loss, its backward pass, the Trainer's optimizer. `memory/accounting.py` counts what is alive meanwhile.
"""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils.operations import convert_to_fp32
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import PreTrainedConfig
from transformers.quantizers import AutoHfQuantizer

from tokentune.core.layers import inner_model
from tokentune.core.patched import reference_of, settings_of
from tokentune.core.profile import Profile
from tokentune.core.saved_tensors.breakdown import KindOfModule
from tokentune.core.saved_tensors.saved_bytes import SavedForBackward
from tokentune.errors import UnsupportedModelError, UserError
from tokentune.memory.accounting import LiveBytes, claim_model
from tokentune.memory.fake_device import fake_device, replaced, run_backward, to_fake
from tokentune.models.builder import adapt_and_patch, autocast_dtype, base_dtype, needs_reference
from tokentune.models.pretrained import load_config, nf4
from tokentune.models.tasks import CAUSAL_LM, Head, head_modules
from tokentune.sampling.sampler import selected_count
from tokentune.settings.finetune import Arguments
from tokentune.training.trainer import SelectiveTrainer
from tokentune.training.trainer_arguments import build_training_arguments
from tokentune.verify.verification import verified_profile

WEIGHTS, GRADIENTS, OPTIMIZER, ACTIVATIONS = "weights", "gradients", "optimizer", "activations"
FRAGMENTATION = 0.03  # of the peak: memory that an allocator holds and cannot use
# What `measure` raises for a model that cannot be estimated. RuntimeError: its code reads values that are not there.
NOT_MEASURED = (UserError, UnsupportedModelError, RuntimeError)


@dataclass
class Footprint:
    """Bytes of one training step on its device, the optimizer's states of earlier steps included.

    Attributes:
        weights: parameters, buffers and quantisation constants.
        gradients: after the backward pass.
        optimizer: its states.
        activations: unique storages that autograd keeps after the forward pass (`memory.SavedForBackward`).
        peak: most that is alive at once.
        peak_phase: when that is: "forward", "backward" or "optimizer".
        at_peak: the peak by kind; "rest" is what is there for a moment.
        activations_by: `activations` by the kind of module that kept them (`core/saved_tensors/breakdown.py`).
        host: bytes in the CPU's memory beside the device (paged optimizer states, offloaded keys and values).
        sent: to other processes, in an optimizer step (`memory/sharding.py`).
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    peak: int
    peak_phase: str
    at_peak: dict[str, int]
    activations_by: dict[str, int] = field(default_factory=dict)
    host: int = 0
    sent: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def profile_of(
    config: PreTrainedConfig, head: Head, attention: str | None = None, *, trust_remote_code: bool = False
) -> Profile:
    """What the selective layers do with this model, once compared with the definition (`verify/verification.py`)."""
    with torch.device("meta"):
        skeleton = head.auto_class.from_config(
            config, attn_implementation=attention, trust_remote_code=trust_remote_code
        )
    return verified_profile(skeleton)


def measure(
    config: PreTrainedConfig,
    arguments: Arguments,
    shape: tuple[int, int],
    *,
    device: str = "cuda",
    head: Head = CAUSAL_LM,
    profile: Profile | None = None,
    all_in: torch.dtype | None = None,
    inspect: Callable[[LiveBytes], None] | None = None,
) -> Footprint:
    """The footprint of a step of the model that `config` describes, trained as `arguments` say.

    Args:
        shape: (B, S), all tokens real.
        device: "cuda" or "cpu".
        profile: of the patched model, where `--tokentune` is given; None has it verified here.
        all_in: the type of all weights and products, instead of what the flags say.
        inspect: gets the counter after the step.

    Raises:
        UserError: what cannot be adapted or patched, an optimizer that is not there.
        UnsupportedModelError: layers that TokenTune cannot serve.
    """
    model = skeleton(config, arguments, head, profile)
    if all_in is not None:
        model.to(all_in)
        arguments = copy.deepcopy(arguments)
        arguments.model.bf16 = arguments.model.fp16 = False
    with _run_under_way_kept():
        settings = build_training_arguments(arguments, Path("unused"), use_cpu=True, bf16=False, fp16=False)
    with fake_device(device), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        to_fake(model, device, base_dtype(arguments, config)).train()
        with LiveBytes(device) as live:
            claim_model(live, model)
            if (reference := reference_of(model)) is not None:
                claim_model(live, to_fake(reference, device, base_dtype(arguments, config)))
            optimizer = _optimizer(model, arguments, settings, device)
            _make_states(optimizer, model, live)
            if arguments.optimization.gradient_accumulation_steps > 1:  # those of earlier micro-batches
                for parameter in model.parameters():
                    parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
                live.claim(GRADIENTS, [p.grad for p in model.parameters() if p.grad is not None])
            batch = _batch(model, arguments, shape, device)
            live.claim("batch", [value for value in batch.values() if isinstance(value, Tensor)])
            live.restart()
            footprint = _step(model, batch, optimizer, arguments, live)
            if inspect is not None:
                inspect(live)
            return footprint


def measure_run(
    trainer: SelectiveTrainer, arguments: Arguments, config: PreTrainedConfig, shape: tuple[int, int]
) -> Footprint:
    """`measure` for the model of a trainer, on its type of device; raises one of `NOT_MEASURED`."""
    device = "cuda" if trainer.args.device.type == "cuda" else "cpu"
    settings = settings_of(inner_model(trainer.model))
    return measure(config, arguments, shape, device=device, profile=None if settings is None else settings.profile)


def fits(peak: int, room: float) -> bool:
    """Whether a step with this peak fits into `room`, both in bytes."""
    return peak * (1 + FRAGMENTATION) <= room


@contextmanager
def _run_under_way_kept() -> Iterator[None]:
    """The Trainer's settings make accelerate forget what it was set up for, when they are made."""
    states = [(state._shared_state, dict(state._shared_state)) for state in (AcceleratorState, PartialState)]
    try:
        yield
    finally:
        for shared, content in states:
            if content:
                shared.clear()
                shared.update(content)


def skeleton(
    config: PreTrainedConfig, arguments: Arguments, head: Head = CAUSAL_LM, profile: Profile | None = None
) -> nn.Module:
    """The model of a run on the meta device, adapted, patched and checkpointed as the flags say."""
    config, arguments = copy.deepcopy(config), copy.deepcopy(arguments)
    dtype, autocast = base_dtype(arguments, config), autocast_dtype(arguments)
    arguments.selection.skip_verification |= profile is not None
    with torch.device("meta"):
        attention = arguments.model.attn_implementation
        trusted = arguments.model.trust_remote_code
        model = head.auto_class.from_config(
            config, dtype=dtype, attn_implementation=attention, trust_remote_code=trusted
        )
        if arguments.adapters.qlora:
            model = _with_4bit_layers(model, autocast or dtype, head)
        reference = None
        if needs_reference(arguments):
            other = load_config(arguments.selection.selection_reference_model)
            reference = head.auto_class.from_config(other, dtype=dtype, attn_implementation=attention)
            reference.requires_grad_(False)
        model = adapt_and_patch(model, arguments, head, reference)
    if profile is not None and arguments.selection.tokentune:
        settings_of(inner_model(model)).profile = profile
    return model


def _with_4bit_layers(model: nn.Module, compute_dtype: torch.dtype, head: Head) -> nn.Module:
    """bitsandbytes' layers where loading with `loading.load_base_model` would put them."""
    quantization = nf4(compute_dtype, head_modules(model) if head.is_new else None)
    quantizer = AutoHfQuantizer.from_config(quantization)
    quantizer._process_model_before_weight_loading(model, None)
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
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    if parameters and arguments.optimization.max_grad_norm:
        torch.nn.utils.clip_grad_norm_(parameters, arguments.optimization.max_grad_norm)
    optimizer.step()
    model.zero_grad()
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


def forward_loss(model: nn.Module, batch: dict[str, Any], arguments: Arguments, device: str) -> Tensor:
    """The loss, as the Trainer has it: under autocast, with outputs turned to float32 outside of it (accelerate)."""
    dtype = autocast_dtype(arguments)
    with torch.autocast(device, dtype) if dtype is not None else nullcontext():
        output = model(**batch)
    if dtype is not None:
        output = convert_to_fp32(output)
    return output.loss


def _batch(model: nn.Module, arguments: Arguments, shape: tuple[int, int], device: str) -> dict[str, Any]:
    """A batch of full rows. On the CPU its values are real: there, code looks at them."""
    core = inner_model(model)
    rows, length = shape
    text = core.config.get_text_config()
    with unset_fake_temporarily() if device == "cpu" else nullcontext():
        ids = torch.ones(rows, length, dtype=torch.int64, device=device)
        batch: dict[str, Any] = {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}
        if core.main_input_name == "pixel_values":
            raise NotImplementedError
        if not core.can_generate():
            batch["labels"] = ids[:, 0].clone() if _classifies_whole(core) else batch["labels"].zero_()
        else:
            batch["num_items_in_batch"] = rows * (length - 1)
        if getattr(text, "type_vocab_size", 0):
            batch["token_type_ids"] = torch.zeros_like(ids)
        if arguments.selection.scoring_pass and arguments.selection.scored:  # the model draws, after a scoring pass
            batch["selection_draws"] = torch.linspace(0, 0.99, length, device=device).expand(rows, -1).clone()
        elif arguments.selection.tokentune:
            count = selected_count(arguments.selection.selected, length)
            positions = torch.arange(count, device=device) * length // count
            batch["selected_positions"] = positions.expand(rows, -1).clone()
        elif device != "cpu" and not getattr(text, "sliding_window", None):
            # transformers reads the mask, finds no padding and goes without; of a fake one it cannot read that.
            del batch["attention_mask"]
    return batch


def _classifies_whole(core: Any) -> bool:
    return core.loss_type in ("ForSequenceClassification", "ForImageClassification")


# --- the optimizer ----------------------------------------------------------------------------------------------------


def _optimizer(model: nn.Module, arguments: Arguments, settings: Any, device: str) -> Any:
    """What the Trainer would make, by its own code."""
    trainer = object.__new__(SelectiveTrainer)
    trainer.model, trainer.args = model, settings
    trainer.optimizer = trainer.optimizer_cls_and_kwargs = None
    trainer.optim_in_backward = arguments.optimization.optim_in_backward
    with _fake_tables():
        optimizer = trainer.create_optimizer()
    for part in getattr(optimizer, "optimizers", {None: optimizer}).values():
        _run_without_kernels(part)
        for group in part.param_groups:
            # Torch takes the kernel over all weights at once for tensors of its own types, which fake ones are not.
            if device == "cuda" and "foreach" in group and not (group["foreach"] or group.get("fused")):
                group["foreach"] = True
    return optimizer


def _fake_tables() -> AbstractContextManager:
    """bitsandbytes works its tables of 8-bit numbers out from real ones, when an optimizer is made."""
    try:
        from bitsandbytes import functional
    except ImportError:
        return nullcontext()
    return replaced(functional, "create_dynamic_map", lambda **_: torch.empty(256, device="cpu"))


def _run_without_kernels(optimizer: Any) -> None:
    """Of a bitsandbytes optimizer its states are made, by its own rules; its kernels, in place, have no fake form."""
    if not type(optimizer).__module__.startswith("bitsandbytes"):
        return

    def paged(like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        if optimizer.is_paged and like.numel() >= 1e5:  # its own bound
            return torch.zeros(like.shape, dtype=dtype, device="cpu")
        return torch.zeros_like(like, dtype=dtype)

    optimizer.get_state_buffer = paged
    optimizer.update_step = optimizer.prefetch_state = lambda *_, **__: None


def _make_states(optimizer: Any, model: nn.Module, live: LiveBytes) -> None:
    """One step ahead, so that the states are there from the beginning, as in every step but the first."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
            for part in getattr(optimizer, "optimizers", {}):
                if part is parameter:
                    optimizer.optimizers[part].step()
    optimizer.step()
    model.zero_grad()
    live.claim(OPTIMIZER, _state_tensors(optimizer))


def _state_tensors(optimizer: Any) -> Iterator[Tensor]:
    for part in getattr(optimizer, "optimizers", {None: optimizer}).values():
        for state in part.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))
