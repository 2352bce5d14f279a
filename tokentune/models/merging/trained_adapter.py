"""A trained LoRA adapter read back: is it whole, was it trained, and does it belong to this base?

`read_adapter` looks at its folder alone, `check_recorded_base` at the configurations, `attach_adapter` at every weight.
"""

import copy
import json
import os
import pickle
import sys
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
import transformers
from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel

from tokentune.errors import UserError
from tokentune.models.merging.training_record import TrainingRecord, read_record
from tokentune.sources import first_line

BASE_FLAG, ADAPTER_FLAG = "--base_model_name_or_path", "--peft_model_path"
# What a folded weight could not stand for: the adapter acts on some tokens only, on pooled inputs, or is routed.
_NOT_LINEAR = ("alora_invocation_tokens", "use_qalora", "arrow_config")
# Starts (peft's init_lora_weights) that leave the base's weights as they are, and those that take something off them
# which the same decomposition of the same weights finds again. PiSSA's fast variant is random, and LoRA-GA, CorDA and
# LoftQ go by data or a quantisation that the file does not hold.
_BASE_AS_IT_WAS = ("true", "false", "gaussian", "eva", "orthogonal", "mica")
_BASE_FOUND_AGAIN = ("pissa", "olora")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter on disk."""

    folder: Path
    config: peft.LoraConfig
    shapes: dict[str, tuple[int, ...]]  # of its weights, by their names in the file
    record: TrainingRecord  # what its folder tells of its training

    @property
    def start_in_base(self) -> str | None:
        """What at the adapter's start changed the base's weights, which attaching it does again; None: nothing."""
        if getattr(self.config, "kasa_config", None) is not None:
            return "kasa_config"
        start = str(self.config.init_lora_weights).lower()
        return f"init_lora_weights={start}" if start in _BASE_FOUND_AGAIN else None


def read_adapter(folder: Path) -> Adapter:
    """An adapter's settings, and its weights checked.

    Raises:
        UserError: no such folder, no adapter in it, damaged files, not LoRA, never trained, or NaN in it.
    """
    if not folder.is_dir():
        raise UserError(f"{ADAPTER_FLAG} {folder}: no such folder.")
    if not (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{ADAPTER_FLAG} {folder}: no adapter_config.json in this folder, so it holds no adapter.{_hint(folder)}"
        )
    if not any((folder / f"adapter_model.{suffix}").is_file() for suffix in ("safetensors", "bin")):
        raise UserError(f"{ADAPTER_FLAG} {folder}: adapter_model.safetensors is missing: the adapter has no weights.")
    _check_kind(folder)
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
        weights = peft.load_peft_weights(str(folder), device="cpu")
    # (weights that are pickled are read as tensors alone: torch refuses whatever else is in them)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        raise UserError(f"{ADAPTER_FLAG} {folder}: cannot be read: {first_line(error)}") from error
    _check_trained(folder, weights)
    config.inference_mode = True
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    return Adapter(folder, config, shapes, read_record(folder))


def _hint(folder: Path) -> str:
    """Where the adapter may be instead: a run that has not ended leaves checkpoints only."""
    steps = [path for path in folder.glob("checkpoint-*") if (path / "adapter_config.json").is_file()]
    steps.sort(key=lambda path: int(digits) if (digits := path.name.removeprefix("checkpoint-")).isdigit() else -1)
    return f" Its newest checkpoint is {steps[-1]}." if steps else ""


def _check_kind(folder: Path) -> None:
    """Refuses what is not LoRA, or LoRA that no weight can stand for."""
    where = f"{ADAPTER_FLAG} {folder}"
    try:
        settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        kind = settings.get("peft_type")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{where}: cannot be read: adapter_config.json: {first_line(error)}") from error
    if kind != "LORA":
        raise UserError(
            f"{where}: holds a {kind} adapter; only LoRA adapters are merged (DoRA and rsLoRA are of that kind)."
        )
    for name in _NOT_LINEAR:
        if settings.get(name):
            raise UserError(
                f"{where}: its {name} makes the adapter more than a change of weights: it cannot be merged."
            )
    if settings.get("layer_replication"):
        raise UserError(
            f"{where}: its layer_replication makes a model of more layers, several of which share the base's weights "
            "and have adapters of their own: it cannot be merged into the base."
        )
    start = settings.get("init_lora_weights", True)
    if str(start).lower() not in (*_BASE_AS_IT_WAS, *_BASE_FOUND_AGAIN):
        raise UserError(
            f"{where}: its start (init_lora_weights={start}) changed the base's weights, as far as is known, and the "
            "file does not hold how: what was trained cannot be restored.\nWhere it was trained, save it as an "
            "ordinary LoRA: save_pretrained(..., path_initial_model_for_weight_conversion=...) of peft."
        )


def _check_trained(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """LoRA starts from zero factors (`lora_B`; for embeddings `lora_embedding_A`), so all zero means never trained."""
    starts_at_zero = [w for name, w in weights.items() if "lora_B" in name or "lora_embedding_A" in name]
    if not starts_at_zero:
        raise UserError(f"{ADAPTER_FLAG} {folder}: its weight file holds no LoRA weights.")
    if not any(torch.any(w != 0) for w in starts_at_zero):
        raise UserError(
            f"{ADAPTER_FLAG} {folder}: every lora_B of this adapter is zero, so it was never trained and merging it "
            "would return the base. Train it, or look for an error in its training."
        )
    broken = [name for name, w in weights.items() if not torch.isfinite(w).all()]
    if broken:
        raise UserError(f"{ADAPTER_FLAG} {folder}: NaN or infinite weights in it (the first: {broken[0]}).")


def check_recorded_base(recorded: str | None, base: str, base_config: PreTrainedConfig) -> None:
    """Compares the base that the adapter was trained on, by its own record, with the one given.

    Another name may be the same model elsewhere, so that is warned about. Where the recorded base is still at hand,
    another architecture is refused (shapes alone would let a Mistral adapter into a Llama).
    """
    if not recorded or recorded == base or os.path.realpath(recorded) == os.path.realpath(base):
        return
    try:
        theirs = transformers.AutoConfig.from_pretrained(recorded, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError):
        theirs = base_config  # not at hand: nothing to compare but the adapter's shapes, when it is attached
    names = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    for name in names:
        mine, other = getattr(base_config, name, None), getattr(theirs, name, None)
        if mine != other:
            raise UserError(
                f"{ADAPTER_FLAG}: the adapter was trained on {recorded} ({name} {other}), "
                f"but {BASE_FLAG} {base} has {name} {mine}. Give the adapter's own base."
            )
    print(f"warning: the adapter was trained on {recorded}; make sure that {base} is the same model", file=sys.stderr)


def attach_adapter(base: PreTrainedModel, adapter: Adapter) -> peft.PeftModel:
    """Base + adapter, in eval mode, with every weight of the file in its place and none missing.

    `PeftModel.from_pretrained` would only warn about missing weights and pass over superfluous ones in silence.
    """
    folder = adapter.folder
    misfit = f"{ADAPTER_FLAG} {folder}: does not belong to this base ({type(base).__name__}, {BASE_FLAG})"
    try:
        model = peft.PeftModel(base, copy.deepcopy(adapter.config))
        result = model.load_adapter(str(folder), "default")
    except (ValueError, KeyError, RuntimeError) as error:
        # torch lists every mismatch on a line of its own, below a general one
        lines = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
        raise UserError(f"{misfit}: {lines[0] if lines else first_line(error)}") from error
    superfluous = [name for name in result.unexpected_keys if not _is_second_copy(name, adapter)]
    if superfluous:
        count, first = len(superfluous), superfluous[0]
        raise UserError(f"{misfit}: {count} of its weights have no place there (the first: {first}).")
    if result.missing_keys:
        count, first = len(result.missing_keys), result.missing_keys[0]
        raise UserError(f"{misfit}: it lacks {count} weights for the base's layers (the first: {first}).")
    return model.eval()


def _is_second_copy(name: str, adapter: Adapter) -> bool:
    """Whether peft saved a weight twice, as it does with embeddings that were resized before they were trained."""
    single_rows = ".token_adapter.trainable_tokens_delta"
    if name.endswith(single_rows):  # of a head that is tied to the embedding, and so to its rows
        return any(other.endswith(single_rows) and other != name for other in adapter.shapes)
    copies = (name.replace(wrapper, "") for wrapper in ("modules_to_save.", "original_module.") if wrapper in name)
    return any(copy in adapter.shapes for copy in copies)
