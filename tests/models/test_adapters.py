"""Which modules get adapters, with and without dropout, and what the log says of them. More on them: test_loading."""

import logging

import pytest
import torch
from families import LATENT, MOE, ROUTED, SIZES
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    LlamaConfig,
    MixtralConfig,
    PhimoeConfig,
    Qwen3MoeConfig,
)

from tokentune import apply_tokentune
from tokentune.errors import UserError
from tokentune.models.adapters import add_adapters, say_adapters

MIXTURES = {
    "mixtral": MixtralConfig(**SIZES, **ROUTED),
    "qwen3": Qwen3MoeConfig(**SIZES, **MOE, head_dim=16),
    "deepseek": DeepseekV3Config(**SIZES | LATENT),
}
ALL = ["all-linear"]


def made(config):
    return AutoModelForCausalLM.from_config(config)


def adapt(model, targets=ALL, dropout=0.05):
    return add_adapters(model, r=2, alpha=4, dropout=dropout, target_modules=targets, quantized=False)


def dropouts(model) -> dict[bool, set[float]]:
    """Whether an adapter is one of a parameter -> the dropout in front of such."""
    found = {True: set(), False: set()}
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            found[isinstance(layer, ParamWrapper)].add(getattr(layer.lora_dropout["default"], "p", 0.0))
    return found


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_get_adapters_without_dropout(family, tmp_path, caplog):
    model = adapt(made(MIXTURES[family]))
    assert dropouts(model) == {True: {0.0}, False: {0.05}}
    say_adapters(model, 0.05, ALL)
    assert "--lora_dropout 0.05: not on experts.down_proj, experts.gate_up_proj, gate.weight" in caplog.text
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(made(MIXTURES[family]), tmp_path)  # which reads the dropout of its configuration


def test_experts_train_as_without_a_selection():
    """All tokens selected: each gradient is that of the model without selective layers."""
    gradients = []
    for selective in (False, True):
        torch.manual_seed(0)
        model = adapt(made(MIXTURES["mixtral"]), dropout=0.0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        if selective:
            apply_tokentune(model, prefix_length=12)
        ids = torch.arange(24).view(2, 12) + 3
        model.train()(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(gradient.abs().max() > 0 for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_other_models_keep_their_dropout(dropout):
    model = adapt(made(LlamaConfig(**SIZES)), dropout=dropout)
    assert dropouts(model) == {True: set(), False: {dropout}}
    assert model.peft_config["default"].lora_dropout == dropout


def said(model, targets, caplog) -> str:
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="tokentune"):
        say_adapters(adapt(model, targets), 0.05, targets)
    return caplog.text


def test_which_modules_got_adapters_is_logged(caplog):
    text = said(made(LlamaConfig(**SIZES)), ["down_proj", "q_proj", "embed_tokens"], caplog)
    assert "adapters on 4 down_proj (Linear), 1 embed_tokens (Embedding), 4 q_proj (Linear)\n" in text
    text = said(made(MIXTURES["qwen3"]), ALL, caplog)
    assert (
        "4 experts.down_proj (parameter), 4 experts.gate_up_proj (parameter), 4 gate.weight (parameter), 4 k_p" in text
    )
    assert "without adapters" not in text


def test_layers_that_are_named_and_left_out_are_logged(caplog):
    """Dense layers and shared experts have the names that peft takes for the fused experts'."""
    text = said(made(MIXTURES["deepseek"]), ["gate_proj", "up_proj", "down_proj"], caplog)
    assert "adapters on 2 experts.down_proj (parameter), 2 experts.gate_up_proj (parameter)\n" in text
    assert "linear layers without adapters: 4 down_proj, 4 gate_proj, 4 up_proj\n" in text


def test_routers_that_return_more_than_a_product(caplog):
    """Their class is a linear layer's, but nothing can be added to what they return."""
    config = PhimoeConfig(**SIZES, **ROUTED)
    text = said(made(config), ALL, caplog)
    assert "adapters on 4 k_proj (Linear), 4 o_proj (Linear), 4 q_proj (Linear), 4 v_proj (Linear)\n" in text
    assert "linear layers without adapters: 4 router\n" in text
    ids = torch.arange(20).view(2, 10)
    adapt(made(config)).train()(input_ids=ids, labels=ids).loss.backward()
    with pytest.raises(UserError, match=r"router of PhimoeForCausalLM returns more .* Leave it out"):
        adapt(made(config), ["q_proj", "router"])


def test_a_part_of_fused_weights_is_refused():
    with pytest.raises(UserError, match=r"--lora_target_modules gate_proj: peft refuses .*also targeting up_proj"):
        adapt(made(MIXTURES["deepseek"]), ["gate_proj"])
