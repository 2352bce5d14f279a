"""A trained LoRA adapter read back: is it whole, was it trained, how, and does it belong to this base?

`read_adapter` looks at its folder alone, `check_architecture` at the configurations, `check_base` at the base's files,
`attach_adapter` at every weight.
"""

import copy
import json
import os
import pickle
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
import yaml
from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel

from tokentune.errors import UserError
from tokentune.file_names import BASE_FINGERPRINT_NAME, RUN_CONFIG_NAME, SCORES_NAME, SUMMARY_NAME
from tokentune.models.fingerprint import Fingerprint, fingerprint_of_checkpoint
from tokentune.settings.flags import require
from tokentune.sources import first_line

BASE_FLAG, ADAPTER_FLAG = "--base_model_name_or_path", "--peft_model_path"
OUTPUT_FLAG, QLORA_FLAG, FORCE_FLAG = "--output_dir", "--qlora_base", "--force"
# What a folded weight could not stand for: the adapter acts on some tokens only, on pooled inputs, or is routed.
ACTIVATED = "alora_invocation_tokens"
_NOT_LINEAR = {
    ACTIVATED: " It acts on answers, whose prompts run through the base as it is.\nServe it beside its "
    "base (peft's PeftModel.from_pretrained), or train with --lora_on all.",
    "use_qalora": "",
    "arrow_config": "",
}
# Initial values (peft's init_lora_weights) that leave the base's weights as they are, and those that subtract something
# from them which the same decomposition of the same weights finds again. PiSSA's fast variant is random, and LoRA-GA,
# CorDA and LoftQ depend on data or a quantization that the file does not hold.
_BASE_AS_IT_WAS = ("true", "false", "gaussian", "eva", "orthogonal", "mica")
_BASE_FOUND_AGAIN = ("pissa", "olora")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter on disk, and what its run's folder tells of the training; None for what is not known."""

    folder: Path
    config: peft.LoraConfig
    shapes: dict[str, tuple[int, ...]]  # of its weights, by their names in the file
    summary: dict[str, Any] | None  # training_summary.json
    qlora: bool | None  # whether the base was in 4 bits
    base_dtype: torch.dtype | None  # of the weights that were not quantized
    classes: list[str] | None  # the names of a classifier's outputs
    base: Fingerprint | None  # of the base's weight files

    @property
    def base_name(self) -> str | None:
        """The base that it was trained on, as it was called there."""
        return self.config.base_model_name_or_path

    @property
    def start_in_base(self) -> str | None:
        """The setting by which the adapter's start changed the base's weights, as attaching it does again, or None."""
        if getattr(self.config, "kasa_config", None) is not None:
            return "kasa_config"
        start = str(self.config.init_lora_weights).lower()
        return f"init_lora_weights={start}" if start in _BASE_FOUND_AGAIN else None


def read_adapter(folder: Path, flag: str = ADAPTER_FLAG, *, to_merge: bool = True) -> Adapter:
    """An adapter's settings, and its weights checked.

    Args:
        flag: that the folder comes from, for messages.
        to_merge: False: it is used beside its base, and may act on some tokens only.

    Raises:
        UserError: no such folder, no adapter in it, damaged files, not LoRA, never trained, or NaN in it.
    """
    where = f"{flag} {folder}:"
    require(folder.is_dir(), f"{where} no such folder.")
    require(
        (folder / "adapter_config.json").is_file(),
        f"{where} no adapter_config.json in this folder, so it holds no adapter.{newest_checkpoint(folder)}",
    )
    require(
        any((folder / f"adapter_model.{suffix}").is_file() for suffix in ("safetensors", "bin")),
        f"{where} adapter_model.safetensors is missing: the adapter has no weights.",
    )
    try:
        settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        _check_kind(settings if to_merge else settings | {ACTIVATED: None}, where)
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{where} cannot be read: adapter_config.json: {first_line(error)}") from error
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
        weights = peft.load_peft_weights(str(folder), device="cpu")
    # (weights that are pickled are read as tensors alone: torch refuses whatever else is in them)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        raise UserError(f"{where} cannot be read: {first_line(error)}") from error
    _check_trained(weights, where)
    config.inference_mode = True
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    return Adapter(folder, config, shapes, **_training_record(folder))


def newest_checkpoint(folder: Path, file: str = "adapter_config.json") -> str:
    """Where the adapter may be instead: a run that has not ended leaves checkpoints only. `file`: one of it."""
    steps = [path for path in folder.glob("checkpoint-*") if (path / file).is_file()]
    steps.sort(key=lambda path: int(digits) if (digits := path.name.removeprefix("checkpoint-")).isdigit() else -1)
    return f" Its newest checkpoint is {steps[-1]}." if steps else ""


def _check_kind(settings: dict[str, Any], where: str) -> None:
    """Refuses what is not LoRA, or LoRA that no weight can stand for. `settings`: adapter_config.json."""
    kind, start = settings.get("peft_type"), settings.get("init_lora_weights", True)
    require(
        kind == "LORA",
        f"{where} holds a {kind} adapter; only LoRA adapters are merged (DoRA and rsLoRA are of that kind).",
    )
    for name, cure in _NOT_LINEAR.items():
        require(
            not settings.get(name),
            f"{where} its {name} makes the adapter more than a change of weights: it cannot be merged.{cure}",
        )
    require(
        not settings.get("layer_replication"),
        f"{where} its layer_replication makes a model of more layers, several of which share the base's weights "
        "and have adapters of their own: it cannot be merged into the base.",
    )
    require(
        str(start).lower() in (*_BASE_AS_IT_WAS, *_BASE_FOUND_AGAIN),
        f"{where} its start (init_lora_weights={start}) changed the base's weights, as far as is known, and the "
        "file does not hold how: what was trained cannot be restored.\nWhere it was trained, save it as an "
        "ordinary LoRA: save_pretrained(..., path_initial_model_for_weight_conversion=...) of peft.",
    )


def _check_trained(weights: dict[str, torch.Tensor], where: str) -> None:
    """LoRA starts from zero factors (`lora_B`; for embeddings `lora_embedding_A`), so all zero means never trained."""
    starts_at_zero = [w for name, w in weights.items() if "lora_B" in name or "lora_embedding_A" in name]
    require(bool(starts_at_zero), f"{where} its weight file holds no LoRA weights.")
    require(
        any(torch.any(w != 0) for w in starts_at_zero),
        f"{where} every lora_B of this adapter is zero, so it was never trained and merging it "
        "would return the base. Train it, or look for an error in its training.",
    )
    broken = [name for name, w in weights.items() if not torch.isfinite(w).all()]
    require(not broken, f"{where} NaN or infinite weights in it (the first: {''.join(broken[:1])}).")


def _training_record(folder: Path) -> dict[str, Any]:
    """What is known of the run whose folder, checkpoint or seed this is. A damaged file counts as missing."""
    summary = next(_found(folder, SUMMARY_NAME), None)
    settings = (summary or {}).get("settings") or next(_found(folder, RUN_CONFIG_NAME), {})  # there from the beginning
    dtype = ((summary or {}).get("model") or {}).get("base_dtype")
    classes = next(_found(folder, SCORES_NAME), {}).get("classes")
    qlora = settings.get("qlora") if isinstance(settings, dict) else None
    return {
        "summary": summary,
        "qlora": qlora if isinstance(qlora, bool) else None,
        "base_dtype": getattr(torch, dtype) if dtype in ("float32", "float16", "bfloat16") else None,
        "classes": list(map(str, classes)) if isinstance(classes, list) else None,
        "base": Fingerprint.from_dict(next(_found(folder, BASE_FINGERPRINT_NAME), None)),
    }


def _found(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    """The file's content, in the folder itself or in those above it that the run made."""
    folder = folder.resolve()
    while True:
        try:
            text = (folder / name).read_text(encoding="utf-8")
            content = json.loads(text) if name.endswith(".json") else yaml.safe_load(text)
        except (OSError, ValueError, yaml.YAMLError):
            content = None
        if isinstance(content, dict):
            yield content
        if not folder.name.startswith(("checkpoint-", "seed-")):
            return
        folder = folder.parent


def is_named(adapter: Adapter, base: str) -> bool:
    """Whether the adapter's record of its base, if it has one, names this one."""
    name = adapter.base_name
    return not name or name == base or os.path.realpath(name) == os.path.realpath(base)


def check_architecture(adapter: Adapter, base: str, base_config: PreTrainedConfig) -> None:
    """Refuses a base of another architecture than that which the adapter's record names, where that is still at hand:
    shapes alone would let a Mistral adapter into a Llama."""
    if is_named(adapter, base):
        return
    try:
        theirs = transformers.AutoConfig.from_pretrained(
            adapter.base_name, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError):
        return  # nothing to compare but the adapter's shapes, when it is attached
    names = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    for name in names:
        mine, other = getattr(base_config, name, None), getattr(theirs, name, None)
        require(
            mine == other,
            f"{ADAPTER_FLAG}: the adapter was trained on {adapter.base_name} ({name} {other}), "
            f"but {BASE_FLAG} {base} has {name} {mine}. Give the adapter's own base.",
        )


def check_base(adapter: Adapter, base: str, *, allow_pickle: bool, force: bool | None = None) -> bool | None:
    """Compares the base's weights with those that the adapter was trained on, by the record in its folder.

    `force`: None for a command that has no such flag.

    Returns:
        Whether they are the same (False: only by `force`, with a warning); None: there is no record of them, or it is
        of weights in 4 bits. Another name than the recorded one is then warned about.

    Raises:
        UserError: they are others.
    """
    found = None
    if adapter.base is not None and "uint8" not in adapter.base.dtypes:
        found = fingerprint_of_checkpoint(base, allow_pickle=allow_pickle)
    if found is None:
        if not is_named(adapter, base):
            warning = f"the adapter was trained on {adapter.base_name}; make sure that {base} is the same model"
            print(f"warning: {warning}", file=sys.stderr)
        return None
    difference = adapter.base.difference(found)
    if difference is None:
        return True
    named = "" if is_named(adapter, base) else f" ({adapter.base_name})"
    said = f"{BASE_FLAG} {base} is not the base that the adapter was trained on{named}: {difference}"
    retyped = found.dtypes.keys() != adapter.base.dtypes.keys()
    when = ", which is right if it is the same model saved in another type" if retyped else ""
    forced = "" if force is None else f"; {FORCE_FLAG} merges all the same{when}"
    require(bool(force), f"{said}.\nGive that base{forced}.")
    print(f"warning: {said}; merged all the same ({FORCE_FLAG})", file=sys.stderr)
    return False


def attach_adapter(base: PreTrainedModel, adapter: Adapter) -> peft.PeftModel:
    """Base + adapter, in eval mode, with every weight of the file in its place and none missing.

    `PeftModel.from_pretrained` would only warn about missing weights and pass over superfluous ones in silence.
    """
    misfit = f"{ADAPTER_FLAG} {adapter.folder}: does not belong to this base ({type(base).__name__}, {BASE_FLAG})"
    try:
        wrapper = peft.PeftModelForCausalLM if getattr(adapter.config, ACTIVATED, None) else peft.PeftModel
        model = wrapper(base, copy.deepcopy(adapter.config))
        result = model.load_adapter(str(adapter.folder), "default")
    except (ValueError, KeyError, RuntimeError) as error:
        # torch lists every mismatch on a line of its own, below a general one
        lines = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
        raise UserError(f"{misfit}: {lines[0] if lines else first_line(error)}") from error
    superfluous = [name for name in result.unexpected_keys if not _is_second_copy(name, adapter)]
    for names, words in (
        (superfluous, "{} of its weights have no place there"),
        (result.missing_keys, "it lacks {} weights for the base's layers"),
    ):
        require(not names, f"{misfit}: {words.format(len(names))} (the first: {''.join(names[:1])}).")
    return model.eval()


def _is_second_copy(name: str, adapter: Adapter) -> bool:
    """Whether peft saved a weight twice, as it does with embeddings that were resized before they were trained."""
    single_rows = ".token_adapter.trainable_tokens_delta"
    if name.endswith(single_rows):  # of a head that is tied to the embedding, and so to its rows
        return any(other.endswith(single_rows) and other != name for other in adapter.shapes)
    copies = (name.replace(wrapper, "") for wrapper in ("modules_to_save.", "original_module.") if wrapper in name)
    return any(copy in adapter.shapes for copy in copies)
