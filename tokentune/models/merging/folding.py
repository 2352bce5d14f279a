"""Folds an adapter into a base, and measures how far the result is from what was trained.

A QLoRA adapter was trained on the base in 4 bits. It can be folded into the base's own weights, which it has never
seen, or into the values that the 4-bit layers computed with. Neither is exactly what was trained: rounding a weight to
16 bits with the adapter in it gives another value than rounding the two apart. So both are measured.

There is never more than one copy of the model besides its 4-bit one, which is turned into 16 bits layer by layer.
"""

import copy
import ctypes
import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from tokentune.core.compat.four_bit import keep_4bit_layout
from tokentune.errors import UserError
from tokentune.models.merging.logit_difference import LogitDifference, logit_difference, probe_logits
from tokentune.models.merging.trained_adapter import (
    ADAPTER_FLAG,
    BASE_FLAG,
    OUTPUT_FLAG,
    Adapter,
    attach_adapter,
    check_architecture,
    check_base,
    read_adapter,
)
from tokentune.models.merging.trained_shapes import (
    check_head,
    head_of,
    is_tied,
    needed_rows,
    settle_tying,
    untie_adapted_embeddings,
    with_outputs,
)
from tokentune.models.pretrained import checkpoint_dtype, load_base_model, load_config
from tokentune.models.saved_types import hold_in
from tokentune.models.tasks import IMAGE, Head
from tokentune.sources import check_model_folder, first_line

BaseKind = Literal["16bit", "dequantized"]


@dataclass(frozen=True)
class Plan:
    """What is folded into what. All that can be refused before a weight is read has been checked."""

    base: str  # local folder or hub id
    config: PreTrainedConfig  # of the merged model: a classifier's has the trained head's outputs
    head: Head
    adapter: Adapter
    base_rows: int | None  # of the base's embedding; None for images
    rows: int | None  # of it in training, and so of the merged one
    dtype: torch.dtype  # of the merged weights
    place: torch.device
    trust: dict[str, bool]  # what is allowed to the base: trust_remote_code, allow_pickle
    base_is_same: bool | None  # as the adapter was trained on, by its content; None: not known

    def logits(self, model: torch.nn.Module, *, in_float32: bool) -> Tensor:
        """A model's logits on the fixed inputs for this kind of model."""
        return probe_logits(model, in_float32=in_float32, head=self.head)


class Reference(NamedTuple):
    """Of base + adapter, before folding."""

    in_dtype: Tensor  # logits, computed in the weights' type
    in_float32: Tensor
    effect: LogitDifference  # of the base alone from it, computed in float32: what the adapter does


def plan_fold(
    base: str, adapter_folder: str, *, dtype: str | None, device: str, trust: dict[str, bool], force: bool
) -> Plan:
    """Reads and checks everything but the base's weights. Args: as of `merge`, in `tokentune/merge.py`.

    Raises:
        UserError: no base or adapter there, adapter and base do not fit, embeddings that cannot be made as they were in
            training, a device that cannot be used, or another base than the adapter's.
    """
    check_model_folder(base, BASE_FLAG)
    adapter = read_adapter(Path(adapter_folder))
    head, trusted = head_of(adapter), trust["trust_remote_code"]
    config = load_config(base, flag=BASE_FLAG, head=head, trust_remote_code=trusted)
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"{BASE_FLAG} {base}: its weights are quantised. Give the unquantised base.")
    check_architecture(adapter, base, config)
    held = checkpoint_dtype(config) if dtype in (None, "auto") else getattr(torch, dtype)
    config = with_outputs(config, adapter, head)
    with torch.device("meta"):
        skeleton = head.auto_class.from_config(copy.deepcopy(config), trust_remote_code=trusted)
    rows = base_rows = None
    if head is not IMAGE:
        rows, base_rows = needed_rows(adapter, skeleton), skeleton.get_input_embeddings().weight.shape[0]
    size = sum(parameter.numel() for parameter in skeleton.parameters()) * held.itemsize
    place = choose_device(device, size)
    same = check_base(adapter, base, allow_pickle=trust["allow_pickle"], force=force)  # (may download the weights)
    return Plan(base, config, head, adapter, base_rows, rows, held, place, trust, same)


def choose_device(device: str, model_bytes: int) -> torch.device:
    """The named device; for "auto" the GPU if 1.5 times the model's bytes are free on it, else the CPU."""
    if device == "auto":
        roomy = torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > 1.5 * model_bytes
        return torch.device("cuda" if roomy else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: cannot be used here: {first_line(error)}") from error
    return torch.device(device)


# --- the bases --------------------------------------------------------------------------------------------------------


def load_16bit(plan: Plan) -> PreTrainedModel:
    """The base's own weights, in the plan's type, with as many embeddings as in training."""
    return _load(plan, dtype=plan.dtype, quantize_4bit=False).to(plan.place)


def load_4bit(plan: Plan) -> PreTrainedModel:
    """The base as in a QLoRA run: the same weights in NF4, the others in the same type; it computes in float32."""
    dtype = plan.adapter.base_dtype or checkpoint_dtype(plan.config)
    model = _load(plan, dtype=dtype, quantize_4bit=True, compute_dtype=torch.float32, device_map={"": str(plan.place)})
    keep_4bit_layout(model)
    return model


def _load(plan: Plan, **options: Any) -> PreTrainedModel:
    config = copy.deepcopy(plan.config) if plan.head.is_new else None
    options |= plan.trust | {"check_new": partial(check_head, adapter=plan.adapter, base=plan.base)}
    model = load_base_model(plan.base, flag=BASE_FLAG, head=plan.head, config=config, **options)
    if plan.rows != plan.base_rows:  # values of new rows are in the adapter's file
        model.resize_token_embeddings(plan.rows, mean_resizing=False)
    return model


def dequantize(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Replaces each 4-bit layer by the values that it computes with, one after another, in place.

    A 4-bit layer's forward dequantizes its NF4 weights into the type of its matrix product, so that `dtype` is exact
    for a training that computed in it, and float32 for any.
    """
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            state.dtype = dtype  # else they would pass through the type that they were quantized from
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would explain what dequantizing is
    try:
        model = model.dequantize(dtype)
    finally:
        logging.set_verbosity(verbosity)
    model.is_loaded_in_4bit = False
    hold_in(model, dtype)
    model.config.dtype = dtype
    release_memory()
    return model


# --- folding ----------------------------------------------------------------------------------------------------------


def fold(plan: Plan, base: PreTrainedModel, *, compared: bool) -> tuple[PreTrainedModel, Reference | None]:
    """Adds the adapter's change to every weight of `base`, in place.

    Args:
        compared: return the logits of base + adapter before folding, too.

    Raises:
        UserError: these logits or the folded weights exceed the range of their type, or peft refuses to merge.
    """
    was_tied, reference = is_tied(base), None
    alone = plan.logits(base, in_float32=True) if compared else None
    model = attach_adapter(base, plan.adapter)
    if compared:
        in_dtype, in_float32 = (plan.logits(model, in_float32=wide) for wide in (False, True))
        if not all(torch.isfinite(logits).all() for logits in (in_dtype, in_float32)):
            raise UserError(
                f"--dtype: base + adapter gives NaN or infinite logits in {plan.dtype}. Try --dtype float32."
            )
        reference = Reference(in_dtype, in_float32, logit_difference(in_float32, alone))
    untie_adapted_embeddings(model)
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        if "NaNs detected" in str(error):  # peft's check of the folded weights, infinite ones too
            raise UserError(f"--dtype: the folded weights exceed {plan.dtype}'s range. Try --dtype float32.") from error
        raise UserError(f"{ADAPTER_FLAG} {plan.adapter.folder}: cannot be merged: {first_line(error)}") from error
    if was_tied:
        settle_tying(merged)
    return merged, reference


def fold_all(
    plan: Plan, kinds: Sequence[BaseKind], folder: Path, *, max_shard_size: str
) -> tuple[Reference, Tensor | None, dict[BaseKind, LogitDifference]]:
    """Folds the adapter into one kind of base, or into both, one after another; the first of `kinds` is saved.

    Returns:
        The logits of base + adapter for the kind that is saved. For two kinds also the float32 logits of the 4-bit base
        + adapter, and the difference of the other kind from these.
    """
    reference, trained, others = None, None, {}
    for kind in ("dequantized", "16bit")[-len(kinds) :]:
        if kind == "dequantized":
            model = attach_adapter(load_4bit(plan), plan.adapter)
            trained = plan.logits(model, in_float32=True)
            model = dequantize(model.unload(), plan.dtype)
        else:
            model = load_16bit(plan)
        saved = kind == kinds[0]
        model, before = fold(plan, model, compared=saved)
        if saved:
            reference = before
            with write_errors_refused():
                model.save_pretrained(folder, max_shard_size=max_shard_size)
        else:
            others[kind] = logit_difference(trained, plan.logits(model, in_float32=True))
        del model  # never two copies of it
        release_memory()
    return reference, trained, others


def release_memory() -> None:
    """Gives the memory of deleted models back to the system.

    glibc keeps freed blocks of up to 32 MiB, which most weights are, in the process: a second model would be added to
    the first one's memory (measured: 1.7 GiB for a 1.3 GiB model and its 4-bit copy).
    """
    gc.collect()
    with suppress(OSError, AttributeError, TypeError):  # another system's C library
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def out_of_memory_refused(device: str, place: torch.device) -> Iterator[None]:
    """Turns a GPU's lack of memory into a UserError. `device`: the flag's value."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"--device {device}: out of memory on {place}. Merge with --device cpu.") from error


@contextmanager
def write_errors_refused() -> Iterator[None]:
    """Turns failures to write, such as on a full disk, into a UserError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{OUTPUT_FLAG}: the model could not be written: {first_line(error)}") from error
