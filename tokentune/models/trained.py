"""A trained model as it is used: one with all its weights, or an adapter over its base."""

import logging
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tokentune.file_names import TOKENIZER_FILES
from tokentune.models.merging.folding import choose_device
from tokentune.models.merging.trained_adapter import (
    ACTIVATED,
    BASE_FLAG,
    attach_adapter,
    check_base,
    newest_checkpoint,
    read_adapter,
)
from tokentune.models.merging.trained_shapes import head_of
from tokentune.models.pretrained import MODEL_FLAG, checkpoint_dtype, load_base_model, load_config, load_tokenizer
from tokentune.models.tasks import CAUSAL_LM
from tokentune.settings.flags import require
from tokentune.sources import check_model_folder, first_line

logger = logging.getLogger(__name__)


def load_trained(
    name: str, *, base: str | None = None, device: str = "auto", trust_remote_code: bool = False, allow_pickle: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in evaluation mode, with the tokenizer that it was trained with.

    Args:
        name: folder of a run, of one of its checkpoints, of a merged model or of an adapter; or a full model's hub id.
        base: of an adapter; None: the one that its folder names.
        device: "auto" or a torch device.
        trust_remote_code, allow_pickle: as of `load_base_model`.

    Raises:
        UserError: nothing of the kind there, an adapter that does not fit its base, or a device that cannot be used.
    """
    folder, place = Path(name).expanduser(), choose_device(device, 0)
    trust = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
    if (folder / "adapter_config.json").is_file():
        return _load_adapter(folder, base, place, trust)
    require(base is None, f"{BASE_FLAG} {base}: {MODEL_FLAG} {name} is no adapter's folder. Leave it out.")
    if folder.is_dir() and not (folder / "config.json").is_file():
        hint = newest_checkpoint(folder) or newest_checkpoint(folder, "config.json")
        require(not hint, f"{MODEL_FLAG} {name}: holds no model yet.{hint}")
    check_model_folder(name, MODEL_FLAG)
    config = load_config(name, trust_remote_code=trust_remote_code)
    model = load_base_model(name, dtype=checkpoint_dtype(config), quantize_4bit=False, **trust)
    return model.to(place).eval(), load_tokenizer(name, trust_remote_code=trust_remote_code)


def _load_adapter(
    folder: Path, base: str | None, place: torch.device, trust: dict[str, bool]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    adapter = read_adapter(folder, MODEL_FLAG, to_merge=False)
    require(head_of(adapter) is CAUSAL_LM, f"{MODEL_FLAG} {folder}: a classifier's adapter, which writes no answers.")
    base = base or adapter.config.base_model_name_or_path
    require(bool(base), f"{MODEL_FLAG} {folder}: does not name the base of this adapter. Give it: {BASE_FLAG}.")
    check_model_folder(base, BASE_FLAG)
    check_base(adapter, base, allow_pickle=trust["allow_pickle"])
    trusted = {"trust_remote_code": trust["trust_remote_code"]}
    dtype = adapter.base_dtype or checkpoint_dtype(load_config(base, flag=BASE_FLAG, **trusted))
    four_bit = bool(adapter.qlora) and _quantizes(place)
    options = {"dtype": dtype, "quantize_4bit": four_bit, "device_map": {"": str(place)} if four_bit else None}
    model = load_base_model(base, flag=BASE_FLAG, **options, **trust)
    adapted = attach_adapter(model if four_bit else model.to(place), adapter)
    if getattr(adapter.config, ACTIVATED, None):  # only peft's wrapper tells its layers where the adapter acts
        model = adapted
    own = any((folder / name).is_file() for name in TOKENIZER_FILES)
    source, flag = (str(folder), MODEL_FLAG) if own else (base, BASE_FLAG)
    return model.eval(), load_tokenizer(source, flag=flag, **trusted)


def _quantizes(place: torch.device) -> bool:
    """Whether the base can be had in 4 bits, as the adapter was trained over; a warning where it cannot."""
    try:
        import bitsandbytes  # noqa: F401 (may be missing, or lack a library that it loads)

        reason = None if place.type in ("cpu", "cuda") else f"not on {place.type}"
    except (ImportError, OSError, RuntimeError) as error:
        reason = first_line(error)
    if reason is not None:
        logger.warning("the adapter was trained over 4 bits, here its base is used as it is: bitsandbytes: %s", reason)
    return reason is None
