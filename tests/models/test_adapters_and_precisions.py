"""Everything that is to be trained gets a gradient: {full, LoRA, QLoRA} x {float32, bfloat16, autocast}."""

import pytest
import torch
from conftest import tiny_llama_config
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from tokentune import apply_tokentune
from tokentune.core.saved_tensors.saved_bytes import SavedForBackward

PRECISIONS = ["float32", "bfloat16", "autocast"]


def build(method: str, precision: str, tmp_path) -> nn.Module:
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    model = LlamaForCausalLM(tiny_llama_config(hidden_size=64, intermediate_size=64)).to(dtype)
    if method == "qlora":
        model.save_pretrained(tmp_path)
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
        model = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=dtype)
    if method != "full":
        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = get_peft_model(model, LoraConfig(r=4, target_modules=names, task_type="CAUSAL_LM"))
    return model


def train_two_steps(model: nn.Module, precision: str) -> None:
    """Two optimizer steps, then one more backward pass whose gradients stay."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.randint(3, 90, (4, 24))
    for step in range(3):
        optimizer.zero_grad()
        positions = torch.rand(4, 24).topk(8).indices.sort(1).values
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast"):
            loss = model(input_ids=ids, labels=ids, selected_positions=positions).loss
        loss.backward()
        if step < 2:
            optimizer.step()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_every_trainable_parameter_has_a_gradient(method: str, precision: str, tmp_path) -> None:
    model = apply_tokentune(build(method, precision, tmp_path)).train()
    train_two_steps(model, precision)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    for name, parameter in trainable.items():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name
    if method != "full":
        assert all(parameter.abs().sum() > 0 for name, parameter in trainable.items() if "lora_B" in name)


@pytest.mark.parametrize("first", ["adapter", "tokentune"])
def test_order_of_patching_and_adapters_does_not_matter(first: str, tmp_path) -> None:
    """The same weights, the same selection: the same gradients and the same bytes kept."""
    torch.manual_seed(3)
    reference = apply_tokentune(build("lora", "float32", tmp_path))
    torch.manual_seed(3)
    base = LlamaForCausalLM(tiny_llama_config(hidden_size=64, intermediate_size=64))
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=4, target_modules=names, task_type="CAUSAL_LM")
    model = get_peft_model(apply_tokentune(base), config) if first == "tokentune" else None
    model = model or apply_tokentune(get_peft_model(base, config))
    ids, positions = torch.randint(3, 90, (2, 24)), torch.tensor([[1, 5, 9, 22], [0, 2, 3, 20]])
    kept = []
    for each in (reference, model):
        with SavedForBackward(each) as saved:
            loss = each(input_ids=ids, labels=ids, selected_positions=positions).loss
        loss.backward()
        kept.append(saved.bytes)
    assert kept[0] == kept[1]
    for (name, one), (_, two) in zip(reference.named_parameters(), model.named_parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None), name
        assert one.grad is None or torch.equal(one.grad, two.grad), name


def test_autocast_weight_cache_keeps_gradients() -> None:
    """A no_grad pass that runs first under autocast must not leave weight casts without a graph behind."""
    linear = nn.Linear(4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            linear(torch.randn(2, 4))
        linear(torch.randn(2, 4)).sum().backward()
    assert linear.weight.grad is not None
