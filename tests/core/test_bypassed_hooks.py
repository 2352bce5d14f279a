"""`model.forward(...)` in place of `model(...)`: never training on all tokens without a word."""

import copy

import pytest
import torch
from conftest import tiny_bert_config, tiny_llama_config
from torch import nn
from transformers import BertForSequenceClassification, LlamaForCausalLM

import tokentune.core.compat.bypassed_hooks
from tokentune import UnsupportedModelError, apply_tokentune, remove_tokentune

IDS = torch.arange(3, 33).reshape(2, 15)


class Distiller:
    """Somebody's trainer, with a method that knows better than to call the model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def loss(self, **inputs: object) -> object:
        return self.model.forward(**inputs).loss


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    messages: list[str] = []
    monkeypatch.setattr(tokentune.core.compat.bypassed_hooks.logger, "warning_once", messages.append)
    return messages


def llama() -> nn.Module:
    return apply_tokentune(LlamaForCausalLM(tiny_llama_config()).train(), 0.3)


@pytest.mark.parametrize("copied", [False, True])
def test_a_training_pass_with_labels_is_refused_by_the_callers_name(copied: bool, told: list[str]) -> None:
    model = copy.deepcopy(llama()) if copied else llama()
    with pytest.raises(
        UnsupportedModelError, match=r"called by Distiller\.loss \(test_bypassed_hooks\) past the hooks"
    ):
        Distiller(model).loss(input_ids=IDS, labels=IDS)
    assert model(input_ids=IDS, labels=IDS).loss.isfinite()  # nothing is left behind
    assert Distiller(remove_tokentune(model)).loss(input_ids=IDS, labels=IDS).isfinite()
    assert told == []


def test_heads_for_whole_sequences_too() -> None:
    model = apply_tokentune(BertForSequenceClassification(tiny_bert_config()).train(), 0.3)
    with pytest.raises(UnsupportedModelError, match=r"BertForSequenceClassification\.forward was called by Distiller"):
        Distiller(model).loss(input_ids=IDS, labels=torch.tensor([0, 1]))


def test_selected_positions_past_the_hooks(told: list[str]) -> None:
    model = apply_tokentune(LlamaForCausalLM(tiny_llama_config()).train())
    with pytest.raises(RuntimeError, match=r"Distiller\.loss \(test_bypassed_hooks\) called `forward`"):
        Distiller(model).loss(input_ids=IDS, labels=IDS, selected_positions=torch.tensor([[1], [2]]))


def test_without_labels_it_is_said(told: list[str]) -> None:
    model = llama()
    model.forward(input_ids=IDS)
    assert len(told) == 1 and "LlamaForCausalLM.forward was called by" in told[0] and "without labels" in told[0]
    model.model(input_ids=IDS)
    assert len(told) == 2 and told[1].startswith("LlamaModel was called by itself")


def test_what_was_to_have_no_selection_goes_on(told: list[str]) -> None:
    model = llama()
    model(input_ids=IDS[:, :5], labels=IDS[:, :5], selected_positions=torch.arange(5).expand(2, 5))  # every token
    model(input_ids=IDS)  # of which the model's own hooks know
    with torch.no_grad():
        model.forward(input_ids=IDS, labels=IDS)
    model.eval().forward(input_ids=IDS, labels=IDS)
    model.generate(IDS, max_new_tokens=2, do_sample=False, pad_token_id=0)
    plain = apply_tokentune(model.train())
    plain.forward(input_ids=IDS, labels=IDS).loss.backward()
    assert told == []


def test_an_interrupted_pass_leaves_the_check_as_it_was(told: list[str]) -> None:
    model = llama()
    handle = model.model.norm.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(input_ids=IDS, labels=IDS)
    handle.remove()
    with pytest.raises(UnsupportedModelError, match="past the hooks"):
        model.forward(input_ids=IDS, labels=IDS)
