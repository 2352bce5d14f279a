"""From a model's name to its configuration, tokenizer and weights in memory.

Whatever a user can get wrong on the way (a missing folder, a gated repository, a damaged file) ends in a `UserError`
that names the flag and the cure. Nothing that comes with a model is executed: no Python code of its repository unless
`trust_remote_code`; weights are read from safetensors, with `allow_pickle` from pickle files too, tensors alone.
"""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from tokentune.errors import UserError
from tokentune.models.tasks import CAUSAL_LM, Head, head_modules, head_weights
from tokentune.sources import check_model_folder, is_local_path, loading_error

if TYPE_CHECKING:  # importing it takes the modelling code's seconds
    from transformers import PreTrainedModel

logger = logging.get_logger(__name__)

MODEL_FLAG = "--model_name_or_path"
# What transformers, safetensors and the hub's client raise for input that cannot be read.
LOADING_ERRORS = (OSError, ValueError, KeyError, ImportError, SafetensorError)
NO_WEIGHTS = "give a folder that has them"


def load_config(
    name_or_path: str, *, flag: str = MODEL_FLAG, head: Head = CAUSAL_LM, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """The configuration of a model that can have the head, without any weight.

    Raises:
        UserError: unknown folder or hub id, gated, unreachable, a `config.json` that cannot be used, or one of
            another kind of model, or of one that brings its own code, unless `trust_remote_code`.
    """
    check_model_folder(name_or_path, flag)
    try:
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    except LOADING_ERRORS as error:
        raise loading_error(name_or_path, error, flag) from error
    own_code = trust_remote_code and head.auto_class.__name__ in (getattr(config, "auto_map", None) or {})
    if type(config) not in head.models and not own_code:
        raise UserError(f"{flag} {name_or_path}: a {config.model_type} model is not {head.description}.")
    return config


def check_quantization(config: PreTrainedConfig, name: str, *, qlora: bool, flag: str = MODEL_FLAG) -> None:
    """Refuses weights that are quantized already (UserError), unless by bitsandbytes to 4 bits, with `qlora`.

    8-bit weights would be loaded as plain numbers, without their scales.
    """
    quantization = getattr(config, "quantization_config", None)
    if not quantization:
        return
    known = quantization if isinstance(quantization, dict) else quantization.to_dict()
    method = known.get("quant_method") or "bitsandbytes"  # whose first files do not name it
    if method != "bitsandbytes" or not known.get("load_in_4bit"):
        raise UserError(
            f"{flag} {name}: its weights are quantised already ({method}), in a way that is not trained on here. Give "
            "the unquantised model; --qlora turns that into 4 bits by itself."
        )
    if not qlora:
        cure = "Add --qlora, or give" if flag == MODEL_FLAG else "Give"
        raise UserError(f"{flag} {name}: its weights are in 4 bits (bitsandbytes). {cure} the unquantised model.")


def warn_of_length(config: PreTrainedConfig, name: str, max_length: int) -> None:
    """Warns of sequences that are longer than those that the model was made for."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and max_length > positions:
        logger.warning("--max_length %d is more than the %d positions of %s", max_length, positions, name)


def check_weights(name_or_path: str, *, hint: str, flag: str = MODEL_FLAG, allow_pickle: bool = False) -> None:
    """Refuses a local model folder without weights that may be read. `hint`: what to do without them."""
    folder = Path(name_or_path)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickles = sorted(folder.glob("pytorch_model*.bin"))
    if not pickles:
        raise UserError(f"{flag} {name_or_path}: this folder holds no weights (*.safetensors); {hint}.")
    if not allow_pickle:
        raise _only_pickle(name_or_path, pickles[0].name, flag)


def _only_pickle(name: str, file: str, flag: str) -> UserError:
    cure = " or give --allow_pickle, which reads tensors alone" if flag.endswith("model_name_or_path") else ""
    return UserError(
        f"{flag} {name}: its weights are a pickle file ({file}), which could run code. Take them as safetensors{cure}."
    )


def load_tokenizer(
    name_or_path: str, *, flag: str = MODEL_FLAG, trust_remote_code: bool = False, **options: Any
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's or adapter's folder, or of a hub id; it may lack a pad token.

    Raises:
        UserError: unknown folder or hub id, gated, unreachable, no tokenizer in it, or one that brings its own code.
    """
    if is_local_path(name_or_path) and not os.path.isdir(name_or_path):
        raise UserError(f"{flag} {name_or_path}: no such folder.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=trust_remote_code, **options)
    except LOADING_ERRORS as error:
        if "trust_remote_code" in str(error) or not os.path.isdir(name_or_path):
            raise loading_error(name_or_path, error, flag) from error
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
    head: Head = CAUSAL_LM,
    config: PreTrainedConfig | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    check_new: Callable[[list[str]], None] | None = None,
) -> "PreTrainedModel":
    """A model with every weight read from the checkpoint, but for those of a new head, which may be random.

    Args:
        name_or_path: local folder or hub id.
        dtype: of the weights; with `quantize_4bit`, of those that are not quantized.
        quantize_4bit: NF4 (see `nf4`) for all linear layers but the output head.
        device_map: as in transformers. None leaves the model on the CPU, for the Trainer to move; a quantized one is
            made on the current GPU where there is one.
        compute_dtype: of the 4-bit layers' matrix products; default `dtype`.
        config: instead of the checkpoint's own (other classes, say).
        attn_implementation: as in transformers; None: the model's own.
        trust_remote_code: run the code that comes with the model.
        allow_pickle: where there are no safetensors, read the tensors (and nothing else) of pytorch_model.bin.
        check_new: gets the names of the head's random weights, and may refuse them; default: they are logged.

    Raises:
        UserError: it cannot be found or read, is not a model with this head, its files lack weights or hold others,
            or it does not fit the GPUs.
    """
    own = config or load_config(name_or_path, flag=flag, head=head, trust_remote_code=trust_remote_code)
    check_quantization(own, name_or_path, qlora=quantize_4bit, flag=flag)
    # Without safetensors on the hub, transformers would have a service of the hub convert the weights, and use those.
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
    quantization = nf4(compute_dtype or dtype, _new_modules(head, own, trust_remote_code)) if quantize_4bit else None
    try:
        model, report = head.auto_class.from_pretrained(
            name_or_path,
            **({} if config is None else {"config": config}),
            attn_implementation=attn_implementation,
            dtype=dtype,
            device_map=device_map,
            quantization_config=quantization,
            use_safetensors=None if allow_pickle else True,
            weights_only=True,
            trust_remote_code=trust_remote_code,
            # Both are only warned about by default, and the weights in question left random: see _check_complete.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except LOADING_ERRORS as error:
        if "no file named" in str(error):
            check_weights(name_or_path, hint=NO_WEIGHTS, flag=flag, allow_pickle=allow_pickle)
        if "use_safetensors" in str(error):
            raise _only_pickle(name_or_path, "pytorch_model.bin", flag) from error
        raise loading_error(name_or_path, error, flag) from error
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamReader" not in str(error):
            raise
        raise UserError(
            f"{flag} {name_or_path}: its pickle file is damaged, or holds more than tensors; nothing in it was run. "
            "Take the weights as safetensors."
        ) from error
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(f"{flag} {name_or_path}: this repository holds an adapter, not a full model. Give its base.")
    new = _check_complete(report, f"{flag} {name_or_path}", head, model)
    if new and check_new is not None:
        check_new(new)
    elif new:
        logger.info("weights that are learnt from the start: %s", ", ".join(new))
    _check_placement(getattr(model, "hf_device_map", None) or {}, name_or_path, flag)
    _repair_generation_config(model)
    return model


def nf4(compute_dtype: torch.dtype, left_out: list[str] | None) -> BitsAndBytesConfig:
    """NF4 with double quantization, as in QLoRA (Dettmers et al. 2023, section 3).

    Args:
        compute_dtype: of the matrix products.
        left_out: modules that are not quantized; None: the output head alone.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=left_out,
    )


def _new_modules(head: Head, config: PreTrainedConfig, trust: bool) -> list[str] | None:
    """The modules of a new head, which is trained and so cannot be in 4 bits; None: the head is not new."""
    if not head.is_new:
        return None
    with torch.device("meta"):
        return head_modules(head.auto_class.from_config(config, trust_remote_code=trust))


def _check_complete(report: dict, where: str, head: Head, model: "PreTrainedModel") -> list[str]:
    """Refuses a checkpoint that left weights random, other than those of a new head; returns the names of these."""
    missing, mismatched = sorted(report["missing_keys"]), sorted(report["mismatched_keys"])
    new = head_weights(model, [*missing, *(key for key, *_ in mismatched)]) if head.is_new else []
    missing = [key for key in missing if key not in new]
    if missing:
        raise UserError(
            f"{where}: {len(missing)} weights that its config.json asks for are not in its files "
            f"(the first: {missing[0]}). It is incomplete, or not a checkpoint of {head.description}."
        )
    mismatched = [entry for entry in mismatched if entry[0] not in new]
    if mismatched:
        key, stored, wanted = mismatched[0]
        raise UserError(
            f"{where}: {len(mismatched)} weights do not have the shape that its config.json asks for "
            f"(the first: {key}, {tuple(stored)} instead of {tuple(wanted)})."
        )
    return new


def _check_placement(device_map: dict, name: str, flag: str) -> None:
    """Refuses a device map that put a part on the CPU or disk beside GPUs: it would train at a crawl, or not at all."""
    places = {str(place) for place in device_map.values()}
    if len(places) > 1 and places & {"cpu", "disk"}:
        raise UserError(
            f"{flag} {name}: does not fit the memory of the visible GPUs. "
            "Hold it in 16 bits (--base_dtype bfloat16) or 4 bits (--qlora), or take more GPUs."
        )


def _repair_generation_config(model: "PreTrainedModel") -> None:
    """Sets `do_sample` where a published generation config has sampling settings without it.

    transformers only warns when it loads such a config, but refuses to save it once the Trainer has touched it: the
    run would be lost at its very end.
    """
    generation = getattr(model, "generation_config", None)
    try:
        if generation is not None:
            generation.validate(strict=True)
    except ValueError:
        generation.do_sample = True
        logger.warning("the generation config has sampling settings without do_sample: do_sample=True is set")


def checkpoint_dtype(config: PreTrainedConfig) -> torch.dtype:
    """The type that the checkpoint's weights are stored in; float32, as in transformers, where it does not say."""
    dtype = config.dtype or config.get_text_config().dtype or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype
