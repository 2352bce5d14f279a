"""What a 16-bit checkpoint holds in float32 is saved so: by a training, by FSDP, by a merge of dequantised weights."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config, Ernie4_5_MoeConfig, GptOssConfig, LlamaConfig

from tokentune.models.merging.folding import dequantize
from tokentune.models.pretrained import load_base_model
from tokentune.models.saved_types import hold_in, kept_in_float32
from tokentune.training import result
from tokentune.training.result import save_result

SIZES = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 4, "intermediate_size": 96, "max_position_embeddings": 64, "pad_token_id": 0}
DEEPSEEK = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "qk_nope_head_dim": 8}
DEEPSEEK |= {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "n_shared_experts": 1}
DEEPSEEK |= {"first_k_dense_replace": 1, "moe_intermediate_size": 32}
# family -> its configuration, and a tensor that 16 bits would round
FAMILIES = {
    "buffer": (DeepseekV3Config(**SIZES, **DEEPSEEK), "model.layers.1.mlp.gate.e_score_correction_bias"),
    "parameter": (
        Ernie4_5_MoeConfig(**SIZES, moe_num_experts=4, moe_k=2, moe_intermediate_size=32, moe_layer_start_index=0),
        "model.layers.1.mlp.gate.weight",
    ),
}


def made(config, dtype=torch.float32):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def close_together(model, name: str) -> torch.Tensor:
    """Gives a tensor values that 16 bits would make alike."""
    tensor = dict([*model.named_parameters(), *model.named_buffers()])[name]
    values = 4 + 1e-4 * torch.arange(tensor.numel()).view(tensor.shape).float() % 0.01
    tensor.data = values
    return values.clone()


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_transformers_keeps_in_float32(kind, dtype, tmp_path):
    config, name = FAMILIES[kind]
    model = made(config)
    values = close_together(model, name)
    hold_in(model, dtype)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    types = {key: tensor.dtype for key, tensor in again.state_dict().items()}
    assert {key: tensor.dtype for key, tensor in model.state_dict().items()} == types
    assert set(types.values()) == {torch.float32, dtype}
    assert torch.equal(again.state_dict()[name], values)
    assert model.dtype is dtype


def test_norms_that_float16_alone_keeps():
    config = GptOssConfig(**SIZES, head_dim=16, num_local_experts=4)
    assert "model.norm.weight" in kept_in_float32(made(config), torch.float16)
    assert "model.norm.weight" not in kept_in_float32(made(config), torch.bfloat16)
    model = made(LlamaConfig(**SIZES))
    hold_in(model, torch.bfloat16)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}
    assert kept_in_float32(model, torch.float32) == set()


def test_a_training_s_result_keeps_them(tmp_path):
    config, name = FAMILIES["buffer"]
    model = made(config)
    values = close_together(model, name)
    settings = SimpleNamespace(should_save=True)
    trainer = SimpleNamespace(model=model, use_cache=None, args=settings, base_fingerprint=None)
    trainer.average_weights, trainer.save_model = lambda: None, model.save_pretrained
    save_result(trainer, tmp_path, torch.bfloat16)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype is torch.bfloat16 and torch.equal(again.state_dict()[name], values)


def test_a_split_model_keeps_them_too(monkeypatch, tmp_path):
    config, name = FAMILIES["buffer"]
    model = made(config)
    values = close_together(model, name)
    monkeypatch.setattr(result, "whole_state", lambda model, *, trained_only: model.state_dict())
    kept = kept_in_float32(model, torch.bfloat16)
    result.save_split_model(model, tmp_path, torch.bfloat16, kept, writes=True)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype is torch.bfloat16 and torch.equal(again.state_dict()[name], values)


@pytest.mark.parametrize("kind", FAMILIES)
def test_dequantised_models_keep_them(kind, tmp_path):
    config, name = FAMILIES[kind]
    model = made(config)
    hold_in(model, torch.bfloat16)
    values = close_together(model, name)
    model.save_pretrained(tmp_path)
    model = load_base_model(str(tmp_path), dtype=torch.bfloat16, quantize_4bit=True)
    assert torch.equal(dequantize(model, torch.bfloat16).state_dict()[name], values)
