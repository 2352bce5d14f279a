"""Models that documents in one row are tested with: full attention, a window, and both in turns."""

from conftest import tiny_llama_config
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM


def llama(**changes: object) -> nn.Module:
    return LlamaForCausalLM(tiny_llama_config(**changes))


def mistral() -> nn.Module:
    """With a window that is shorter than the documents."""
    return MistralForCausalLM(MistralConfig(**tiny_llama_config().to_dict() | {"sliding_window": 4}))


def gemma() -> nn.Module:
    """Sliding and full layers, each kind with its own rotary base."""
    config = tiny_llama_config().to_dict()
    kept = {name: config[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")}
    kinds = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(
        **kept, num_hidden_layers=2, num_key_value_heads=2, head_dim=8, sliding_window=4, layer_types=kinds
    )
    model = Gemma3ForCausalLM(config)
    for layer in model.model.layers:  # norms behind the projections, where the oracle makes its constants
        layer.self_attn.q_norm.requires_grad_(False)
        layer.self_attn.k_norm.requires_grad_(False)
    return model
