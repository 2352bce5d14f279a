"""The check that every model passes before it is patched: what it accepts, what it refuses, what it leaves behind."""

import dataclasses
import random
import time
import warnings

import numpy
import pytest
import torch
import transformers
from conftest import tiny_bert_config, tiny_llama_config
from families import FAMILIES, Family
from family_check import build
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BertForNextSentencePrediction,
    BertForSequenceClassification,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    masking_utils,
)
from transformers.models.llama.modeling_llama import eager_attention_forward

import tokentune.core.attention.kernels
import tokentune.core.patching
import tokentune.core.selective_layer
from tokentune import UnsupportedModelError, apply_tokentune
from tokentune.verify.tiny_copy import tiny_config, tiny_copy


@pytest.mark.parametrize(
    "model",
    [
        LlamaForCausalLM(tiny_llama_config()),
        BertModel(tiny_bert_config()),
        BertForSequenceClassification(tiny_bert_config(num_labels=3)),
        MistralForCausalLM(
            MistralConfig(**{**tiny_llama_config().to_dict(), "sliding_window": 4, "model_type": "mistral"})
        ),
    ],
    ids=lambda model: type(model).__name__,
)
def test_accepts(model: nn.Module) -> None:
    before = torch.random.get_rng_state()
    start = time.perf_counter()
    assert apply_tokentune(model) is model
    assert time.perf_counter() - start < 30  # under three seconds on an idle machine
    assert torch.equal(torch.random.get_rng_state(), before)


def test_keeps_what_changes_the_computation() -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
    config = LlamaConfig(num_hidden_layers=20, hidden_size=4096, attention_bias=True, rope_parameters=rope)
    small = tiny_config(config)
    assert (small.num_hidden_layers, small.attention_bias, small.rope_parameters) == (3, True, config.rope_parameters)
    assert small.hidden_size // small.num_attention_heads == 128
    assert config.num_hidden_layers == 20
    with torch.device("meta"):
        large = LlamaForCausalLM(config)
    assert sum(p.numel() for p in tiny_copy(large).parameters()) < 5e6


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (T5ForConditionalGeneration(T5Config(d_model=16, num_layers=1, num_heads=2, d_ff=16, vocab_size=32)), "T5"),
        (BertForNextSentencePrediction(tiny_bert_config()), "head"),
        (BloomForCausalLM(BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=32)), "attention interface"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_refuses_by_name(model: nn.Module, reason: str) -> None:
    hooks = sum(len(m._forward_hooks) for m in model.modules())
    with pytest.raises(UnsupportedModelError, match=reason):
        apply_tokentune(model)
    assert sum(len(m._forward_hooks) for m in model.modules()) == hooks


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("mask", r"LlamaForCausalLM, right padding: outputs of layer 0 differ .* by \d\.\de[+-]\d\d"),
        ("gradient", r"LlamaForCausalLM, right padding: gradient of model\.\S+ differ"),
        ("position", "LlamaForCausalLM, right padding fails on groups of tokens: RuntimeError"),
        ("scale", "outputs of layer 0 differ"),
    ],
)
def test_finds_a_wrong_implementation(broken: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks the method on purpose, one way at a time: the check has to notice."""
    attend = tokentune.core.selective_layer.attend
    if broken == "mask":
        monkeypatch.setattr(tokentune.core.selective_layer.Step, "mask_rows", lambda *_: None)
    elif broken == "position":
        monkeypatch.setattr(tokentune.core.selective_layer.Step, "rows_of", lambda self, value, group: value)
    else:

        def wrong(module, query, key, value, *rest, **options):
            if broken == "gradient":
                return attend(module, query, key, value.detach(), *rest, **options)
            return attend(module, query * 1.001, key, value, *rest, **options)

        monkeypatch.setattr(tokentune.core.selective_layer, "attend", wrong)
    with pytest.raises(UnsupportedModelError, match=message):
        apply_tokentune(LlamaForCausalLM(tiny_llama_config()))


@pytest.mark.parametrize("option", ["soft cap", "sink", "window"])
def test_finds_an_option_that_is_not_honored(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attend, recipe = tokentune.core.selective_layer.attend, tokentune.core.patching.mask_from_functions

    def without_soft_cap(*args: object, **options: object) -> object:
        return attend(*args, **options | {"softcap": None})

    def one_too_wide(*args: object, **options: object) -> object:
        wide = masking_utils.and_masks(masking_utils.sliding_window_overlay(5), masking_utils.causal_mask_function)
        return recipe(*args, **options | {"mask_function": wide})

    if option == "soft cap":
        monkeypatch.setattr(tokentune.core.selective_layer, "attend", without_soft_cap)
    elif option == "sink":
        monkeypatch.setattr(tokentune.core.attention.kernels, "eager_function", lambda module: eager_attention_forward)
    else:
        monkeypatch.setattr(tokentune.core.patching, "mask_from_functions", one_too_wide)
    model = build(family_of({"soft cap": "Gemma 2", "sink": "GPT-OSS", "window": "Mistral"}[option]))
    with pytest.raises(UnsupportedModelError, match="outputs of layer 0 differ"):
        apply_tokentune(model)


def family_of(name: str) -> Family:
    return next(family for family in FAMILIES if family.name == name)


@pytest.mark.parametrize(
    "name",
    [
        "LlamaForCausalLM",
        "Gemma3ForCausalLM",
        "GptOssForCausalLM",
        "DeepseekV3ForCausalLM",
        "ModernBertForMaskedLM",
        "Phi3ForCausalLM",
        "LlavaForConditionalGeneration",
        "Qwen2_5_VLForConditionalGeneration",
    ],
)
def test_full_sizes_on_the_meta_device_are_verified_on_a_small_copy(name: str) -> None:
    cls = getattr(transformers, name)
    with torch.device("meta"):
        model = cls._from_config(cls.config_class(), **({"attn_implementation": "eager"} if "GptOss" in name else {}))
        start = time.perf_counter()
        apply_tokentune(model)
    assert time.perf_counter() - start < 30  # under three seconds on an idle machine
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in tiny_copy(model).parameters()) < 6e7


def test_a_small_copy_has_every_kind_of_layer() -> None:
    with torch.device("meta"):
        model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config())  # three dense layers, then experts
    assert "MoE" in type(tiny_copy(model).model.layers[3].mlp).__name__
    config = transformers.Qwen3Config(
        num_hidden_layers=8, layer_types=["full_attention"] * 6 + ["sliding_attention"] * 2
    )
    assert tiny_config(config).layer_types[-1] == "sliding_attention"


def test_a_kind_of_layer_that_the_copy_lacks_is_refused() -> None:
    model = LlamaForCausalLM(tiny_llama_config())
    model.model.layers[1].mlp.act_fn = transformers.activations.GELUTanh()  # not what the configuration says
    with pytest.raises(UnsupportedModelError, match="lacks a part of its layers: GELUTanh"):
        apply_tokentune(model)


def test_leaves_nothing_behind(capfd: pytest.CaptureFixture[str]) -> None:
    model = MistralForCausalLM(MistralConfig(**tiny_llama_config().to_dict() | {"model_type": "mistral"}))
    states = [random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]
    torch.set_default_dtype(torch.bfloat16)
    try:
        with warnings.catch_warnings(record=True) as caught, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            warnings.simplefilter("always")
            apply_tokentune(model)
            assert (torch.get_default_dtype(), torch.is_grad_enabled()) == (torch.bfloat16, False)
        assert not caught
    finally:
        torch.set_default_dtype(torch.float32)
    assert states == [random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]
    assert capfd.readouterr() == ("", "")
    assert transformers.logging.get_verbosity() == transformers.logging.WARNING
    assert model.config._attn_implementation == "sdpa"


def test_an_adapted_model_is_verified_as_the_model_inside() -> None:
    model = get_peft_model(LlamaForCausalLM(tiny_llama_config()), LoraConfig(target_modules=["up_proj", "q_proj"]))
    assert apply_tokentune(model) is model


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"output_router_logits": True}, "config.output_router_logits"),
        ({"layerdrop": 0.1}, "layerdrop"),
        ({"drop_path_rate": 0.1}, "drop_path_rate"),
    ],
)
def test_chance_and_losses_over_all_tokens_are_refused(changes: dict, reason: str) -> None:
    name = {"output_router_logits": "Mixtral", "layerdrop": "OPT", "drop_path_rate": "DINOv2"}[next(iter(changes))]
    family = family_of(name)
    model = build(dataclasses.replace(family, sizes=family.sizes | changes))
    with pytest.raises(UnsupportedModelError, match=reason):
        apply_tokentune(model)


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification", "single_label_classification"])
def test_every_kind_of_sequence_label(problem: str) -> None:
    labels = 1 if problem == "regression" else 3
    apply_tokentune(BertForSequenceClassification(tiny_bert_config(num_labels=labels, problem_type=problem)))


@pytest.mark.parametrize("rope", ["yarn", "longrope", "llama3", "dynamic", "linear"])
def test_rotary_variants(rope: str) -> None:
    options = {"rope_type": rope, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
    options |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4} if rope == "longrope" else {}
    options |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if rope == "llama3" else {}
    apply_tokentune(LlamaForCausalLM(tiny_llama_config(rope_parameters=options)))
