"""The check that every model passes before it is patched: what it accepts, what it refuses, what it leaves behind."""

import time

import pytest
import torch
from conftest import tiny_bert_config, tiny_llama_config
from torch import nn
from transformers import (
    BertForQuestionAnswering,
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
)

import tokentune.selective
from tokentune import UnsupportedModelError, apply_tokentune
from tokentune.verification import tiny_config, tiny_copy


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
        (BertForQuestionAnswering(tiny_bert_config()), "head"),
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
    ],
)
def test_finds_a_wrong_implementation(broken: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks the method on purpose, one way at a time: the check has to notice."""
    if broken == "mask":
        monkeypatch.setattr(tokentune.selective.Step, "mask_rows", lambda *_: None)
    elif broken == "gradient":
        attend = tokentune.selective.attend
        monkeypatch.setattr(
            tokentune.selective,
            "attend",
            lambda module, q, k, v, *rest, **options: attend(module, q, k, v.detach(), *rest, **options),
        )
    else:
        monkeypatch.setattr(tokentune.selective.Step, "rows_of", lambda self, value, group: _first_rows(self, value))
    with pytest.raises(UnsupportedModelError, match=message):
        apply_tokentune(LlamaForCausalLM(tiny_llama_config()))


def _first_rows(step: object, value: object) -> object:
    return value
