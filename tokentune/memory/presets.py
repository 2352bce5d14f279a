"""Models that can be estimated by a short name, without the hub: facts of their published configurations."""

import difflib
import os
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from tokentune.errors import UserError
from tokentune.models.pretrained import LOADING_ERRORS, load_config
from tokentune.models.tasks import CAUSAL_LM, TEXT, Head
from tokentune.sources import hub_error, is_local_path

_BERT = {"model_type": "bert", "vocab_size": 30522, "type_vocab_size": 2, "max_position_embeddings": 512}
_LLAMA = {"model_type": "llama", "tie_word_embeddings": False}
_LLAMA_3 = {
    **_LLAMA,
    "dtype": "bfloat16",
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


def _sizes(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int | None = None) -> dict[str, int]:
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    return sizes | {"num_attention_heads": heads} | ({} if kv_heads is None else {"num_key_value_heads": kv_heads})


# dtype: that of the published weights.
PRESETS: dict[str, dict[str, Any]] = {
    "llama-2-7b": {
        **_LLAMA, **_sizes(4096, 11008, 32, 32, 32), "vocab_size": 32000, "dtype": "float16",
        "max_position_embeddings": 4096,
    },
    "llama-2-13b": {
        **_LLAMA, **_sizes(5120, 13824, 40, 40, 40), "vocab_size": 32000, "dtype": "float16",
        "max_position_embeddings": 4096,
    },
    "llama-2-70b": {
        **_LLAMA, **_sizes(8192, 28672, 80, 64, 8), "vocab_size": 32000, "dtype": "float16",
        "max_position_embeddings": 4096,
    },
    "llama-3-8b": {
        **_LLAMA, **_sizes(4096, 14336, 32, 32, 8), "vocab_size": 128256, "dtype": "bfloat16",
        "max_position_embeddings": 8192, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "llama-3-70b": {
        **_LLAMA, **_sizes(8192, 28672, 80, 64, 8), "vocab_size": 128256, "dtype": "bfloat16",
        "max_position_embeddings": 8192, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "llama-3.2-1b": {**_LLAMA_3, **_sizes(2048, 8192, 16, 32, 8), "head_dim": 64, "tie_word_embeddings": True},
    "llama-3.2-3b": {**_LLAMA_3, **_sizes(3072, 8192, 28, 24, 8), "head_dim": 128, "tie_word_embeddings": True},
    "qwen3-8b": {
        "model_type": "qwen3", **_sizes(4096, 12288, 36, 32, 8), "head_dim": 128, "vocab_size": 151936,
        "dtype": "bfloat16", "max_position_embeddings": 40960, "tie_word_embeddings": False,
    },
    "mistral-7b": {
        "model_type": "mistral", **_sizes(4096, 14336, 32, 32, 8), "vocab_size": 32000, "dtype": "bfloat16",
        "max_position_embeddings": 32768, "sliding_window": None, "tie_word_embeddings": False,
    },
    "bert-base": {**_BERT, **_sizes(768, 3072, 12, 12), "dtype": "float32"},
    "bert-large": {**_BERT, **_sizes(1024, 4096, 24, 16), "dtype": "float32"},
}  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """What is to be estimated: a configuration, the head that it is trained with, and how large its batches are."""

    config: PreTrainedConfig
    head: Head
    sequences: int
    length: int


def load_subject(name: str, *, trust_remote_code: bool = False) -> Subject:
    """The model behind a preset's name, a configuration file, a local folder or a hub id.

    A model that can generate is a causal language model (1 x 2,048 tokens); an encoder classifies texts (32 x 128).

    Raises:
        UserError: no such file, folder, preset or model on the hub; for a misspelt preset with the nearest name.
    """
    if name in PRESETS:
        values = dict(PRESETS[name])
        config = AutoConfig.for_model(values.pop("model_type"), **values)
    elif name.endswith(".json"):
        config = _from_file(name, trust_remote_code)
    elif "/" not in name and not is_local_path(name) and not os.path.exists(name):
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(
            f"--model_name_or_path {name}: no preset of that name. {hint}Presets: {', '.join(PRESETS)}; "
            "otherwise a hub id (owner/name), a folder or a config.json"
        )
    else:
        config = _of_either_kind(name, trust_remote_code)
    own_code = (getattr(config, "auto_map", None) or {}) if trust_remote_code else {}
    causal = _serves(config, CAUSAL_LM, own_code) and not _is_encoder(config)
    if not causal and not _serves(config, TEXT, own_code):
        raise UserError(
            f"--model_name_or_path {name}: a {config.model_type} model is neither {CAUSAL_LM.description} nor an "
            "encoder that classifies texts"
        )
    return Subject(config, CAUSAL_LM, 1, 2048) if causal else Subject(config, TEXT, 32, 128)


def _serves(config: PreTrainedConfig, head: Head, own_code: dict[str, str]) -> bool:
    return type(config) in head.models or head.auto_class.__name__ in own_code


def _is_encoder(config: PreTrainedConfig) -> bool:
    """Encoders have causal variants too, as decoders of sequence-to-sequence models: their configuration says which."""
    names = config.architectures or []
    if names:
        return not any(name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for name in names)
    return hasattr(config, "is_decoder") and hasattr(config, "type_vocab_size") and not config.is_decoder


def _of_either_kind(name: str, trusted: bool) -> PreTrainedConfig:
    try:
        return load_config(name, trust_remote_code=trusted)
    except UserError as error:
        if "is not a" not in str(error):
            raise
    return load_config(name, head=TEXT, trust_remote_code=trusted)


def _from_file(name: str, trusted: bool) -> PreTrainedConfig:
    if not os.path.isfile(name):
        raise UserError(f"--model_name_or_path {name}: no such file.")
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=trusted)
    except LOADING_ERRORS as error:
        raise hub_error(name, error, "--model_name_or_path") from error
