"""What makes a prompt depend on more than the base's weights is refused with `--lora_on answers`."""

import pytest
from conftest import tiny_bert_config, tiny_llama_config
from families import MOE, ROUTED, SIZES
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BertLMHeadModel,
    GPT2Config,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
)

from tokentune.errors import UserError
from tokentune.models.constant_prompts import check_constant_prompts

DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LONG |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
MIXTURE = MixtralConfig(**SIZES, **ROUTED)
SHARED = Qwen2MoeConfig(**SIZES, **MOE, shared_expert_intermediate_size=24)


def check(config: PreTrainedConfig, max_length: int = 32, **options: object) -> None:
    settings = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "alora_invocation_tokens": [5]} | options
    check_constant_prompts(get_peft_model(AutoModelForCausalLM.from_config(config), LoraConfig(**settings)), max_length)


@pytest.mark.parametrize(
    ("config", "options", "reason"),
    [
        (tiny_llama_config(), {"modules_to_save": ["norm"]}, "norm.* is trained, and acts on prompts too"),
        (tiny_llama_config(attention_bias=True), {"bias": "all"}, "bias is trained, and acts on prompts too"),
        (tiny_llama_config(), {"use_dora": True, "alora_invocation_tokens": None}, "acts on prompts too"),
        (tiny_llama_config(), {"target_modules": ["lm_head"]}, "lm_head cannot tell which tokens it gets"),
        (SHARED, {"target_modules": ["shared_expert.up_proj"]}, "cannot tell which tokens it gets"),
        (tiny_llama_config(attention_dropout=0.1), {}, "attention_dropout 0.1 in the base's configuration"),
        (MixtralConfig(**SIZES, **ROUTED, output_router_logits=True), {}, "adds a loss over all tokens"),
        (tiny_llama_config(rope_parameters=DYNAMIC, max_position_embeddings=16), {}, "--max_length 16; lower it"),
        (tiny_llama_config(rope_parameters=LONG), {}, "--max_length 16; lower it"),
    ],
)
def test_reasons(config: PreTrainedConfig, options: dict, reason: str) -> None:
    with pytest.raises(UserError, match=f"--lora_on answers: .*{reason}.*Take --lora_on all"):
        check(config, **options)


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (tiny_llama_config(), {"target_modules": "all-linear"}),
        (MIXTURE, {}),
        (tiny_llama_config(rope_parameters=LONG), {"max_length": 16}),
        (GPT2Config(n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
         {"target_modules": ["c_attn"]}),
    ],
)  # fmt: skip
def test_served(config: PreTrainedConfig, options: dict) -> None:
    check(config, **options)


def test_prompts_that_see_later_tokens() -> None:
    options = {"task_type": "CAUSAL_LM", "target_modules": ["query"], "alora_invocation_tokens": [5]}
    model = get_peft_model(BertLMHeadModel(tiny_bert_config()), LoraConfig(**options))
    with pytest.raises(UserError, match="attend to the answers behind them"):
        check_constant_prompts(model, 32)
