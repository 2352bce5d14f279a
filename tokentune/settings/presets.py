"""Models that can be estimated by a short name, without the hub: facts of their published configurations."""

from typing import Any

_BERT = {"model_type": "bert", "vocab_size": 30522, "type_vocab_size": 2, "max_position_embeddings": 512}
_LLAMA = {"model_type": "llama", "tie_word_embeddings": False}
_LLAMA_2 = {**_LLAMA, "dtype": "float16", "vocab_size": 32000, "max_position_embeddings": 4096}
_LLAMA_3 = {
    **_LLAMA,
    "dtype": "bfloat16",
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}


def _longer_llama_3(factor: float) -> dict[str, Any]:
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {**_LLAMA_3, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "rope_parameters": rope}


_LLAMA_3_2 = _longer_llama_3(32.0)


def _sizes(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int | None = None) -> dict[str, int]:
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    return sizes | {"num_attention_heads": heads} | ({} if kv_heads is None else {"num_key_value_heads": kv_heads})


# dtype: that of the published weights.
PRESETS: dict[str, dict[str, Any]] = {
    "llama-2-7b": {**_LLAMA_2, **_sizes(4096, 11008, 32, 32, 32)},
    "llama-2-13b": {**_LLAMA_2, **_sizes(5120, 13824, 40, 40, 40)},
    "llama-2-70b": {**_LLAMA_2, **_sizes(8192, 28672, 80, 64, 8)},
    "llama-3-8b": {**_LLAMA_3, **_sizes(4096, 14336, 32, 32, 8)},
    "llama-3.1-8b": {**_longer_llama_3(8.0), **_sizes(4096, 14336, 32, 32, 8)},
    "llama-3-70b": {**_LLAMA_3, **_sizes(8192, 28672, 80, 64, 8)},
    "llama-3.2-1b": {**_LLAMA_3_2, **_sizes(2048, 8192, 16, 32, 8), "head_dim": 64, "tie_word_embeddings": True},
    "llama-3.2-3b": {**_LLAMA_3_2, **_sizes(3072, 8192, 28, 24, 8), "head_dim": 128, "tie_word_embeddings": True},
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
