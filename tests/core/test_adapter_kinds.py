"""Every kind of adapter that peft has: the definition's gradients in float64, or a refusal that says why."""

import copy
from contextlib import nullcontext

import pytest
import torch
from conftest import tiny_llama_config
from families import FAMILIES
from family_check import Float64, constants_outside
from peft import (
    AdaLoraConfig,
    AdaptionPromptConfig,
    BOFTConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PromptTuningConfig,
    XLoraConfig,
    get_peft_model,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora.config import KasaConfig, MontecloraConfig, VeloraConfig
from peft.tuners.pvera.layer import PveraLayer
from peft.utils.peft_types import PeftType
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import tokentune.core.compat.adapters
from tokentune import UnsupportedModelError, apply_tokentune, remove_tokentune
from tokentune.core.patched import last_draw
from tokentune.sampling.sampler import mask_unselected_labels

LLAMA = next(family for family in FAMILIES if family.model == "LlamaForCausalLM")
LENGTH, SELECTED = 24, 7
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OF_KIND = {  # what a kind's configuration needs beside targets, for layers of this size
    "ADALORA": {"total_step": 100},
    "ADAMSS": {"r": 8},
    "ADAPTION_PROMPT": {"adapter_len": 3, "adapter_layers": 2, "target_modules": None},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 16},
    "FOURIERFT": {"n_frequency": 20},
    "GRALORA": {"r": 8},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm", "post_attention_layernorm"]},
    "LORA": {"r": 4},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 4},
    "POLY": {"r": 4, "n_tasks": 2},
    "PSOFT": {"r": 8},
    "PVERA": {"r": 8},
    "RANDLORA": {"r": 8},
    "ROAD": {"group_size": 16},
    "SHIRA": {"r": 4},
    "TRAINABLE_TOKENS": {"token_indices": [3, 5, 9], "target_modules": None},
    "VBLORA": {"vector_length": 16, "num_vectors": 32, "topk": 2, "r": 4},
    "VERA": {"r": 8},
    "WAVEFT": {"n_frequency": 20},
    "CPT": {"cpt_token_ids": [3, 4, 5], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 1, 1]},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 3, "num_tasks": 2},
}
PROMPTS = {"PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE", "MULTITASK_PROMPT_TUNING"}
REASONS = {"LILY": "mean over all tokens", "POLY": "draws weights anew", "SHADOW": "network of its own"}
VARIANTS = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "bias": {"lora_bias": True},
    "kasa": {"kasa_config": KasaConfig()},
    "velora": {"velora_config": VeloraConfig(init_type="random")},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "tokens": {"trainable_token_indices": [3, 4, 5]},
    "activated": {"alora_invocation_tokens": [9]},
}


def base() -> nn.Module:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_key_value_heads": 2}
    return LlamaForCausalLM(tiny_llama_config(**sizes, use_cache=False))


def config_of(kind: str) -> PeftConfig:
    options = {"target_modules": list(LINEAR), "num_virtual_tokens": 3} | OF_KIND.get(kind, {})
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)]
    known = cls.__dataclass_fields__
    return cls(task_type="CAUSAL_LM", **{name: value for name, value in options.items() if name in known})


def adapted(config: PeftConfig, model: nn.Module | None = None) -> nn.Module:
    """In float64, with adapters that are no longer what they start as."""
    model = get_peft_model(base() if model is None else model, config).double().train()
    for module in model.modules():
        if vars(module).get("dtype") is torch.float32:  # in which a layer of an adapter computes
            module.dtype = torch.float64
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def batch() -> dict[str, Tensor]:
    ids = torch.randint(6, 90, (2, LENGTH))
    ids[:, ::5] = torch.tensor([3, 4, 5, 9, 3])  # tokens that some kinds train
    mask = torch.ones_like(ids)
    mask[1, -6:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def gradients(model: nn.Module, inputs: dict[str, Tensor], exactly: bool = True) -> tuple[float, dict[str, Tensor]]:
    """Of the model's own loss, regularization by the adapters included. `exactly`: casts to float32 are left out."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    with Float64() if exactly else nullcontext():
        loss = model(**inputs).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check(model: nn.Module, exactly: bool = True) -> None:
    """Of a model that is not patched yet, or never draws itself."""
    inputs = batch()
    scores = torch.rand(2, LENGTH).masked_fill(inputs["attention_mask"] == 0, -1)
    positions = scores.topk(SELECTED).indices.sort(1).values
    labels = mask_unselected_labels(inputs["labels"], positions, causal=True)
    with constants_outside(model, LLAMA, positions):
        loss, expected = gradients(model, inputs | {"labels": labels}, exactly)
    found_loss, found = gradients(apply_tokentune(model), inputs | {"selected_positions": positions}, exactly)
    assert found_loss == pytest.approx(loss, rel=1e-9 if exactly else 1e-6)
    assert found.keys() == expected.keys() and expected
    scale = max(gradient.abs().max() for gradient in expected.values())
    assert scale > 0
    for name, gradient in expected.items():
        error = (found[name] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-3 * scale)
        assert error < (1e-6 if exactly else 1e-4), f"{name}: {error:.1e}"


@pytest.mark.parametrize("kind", [kind.value for kind in PeftType])
def test_every_kind_is_exact_or_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "XLORA":
        pytest.skip("made of adapters on a disk, see below")
    if kind == "PVERA":  # draws numbers for each token, as dropout does
        monkeypatch.setattr(PveraLayer, "_reparametrize", lambda layer, mean, variance, name: mean + variance.exp())
    model = adapted(config_of(kind))
    if kind in PROMPTS or kind in REASONS:
        reason = "prompt learning puts tokens in front" if kind in PROMPTS else REASONS[kind]
        with pytest.raises(UnsupportedModelError, match=reason):
            apply_tokentune(model, 0.3)
        return
    check(model, exactly=kind != "FOURIERFT")  # whose products know no float64


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_lora_are_exact(variant: str) -> None:
    options = {"r": 4, "target_modules": LINEAR, "task_type": "CAUSAL_LM"} | VARIANTS[variant]
    check(adapted(LoraConfig(**options)))


CHANCE = {
    "rank_dropout": LoHaConfig(r=4, target_modules=LINEAR, rank_dropout=0.5),
    "module_dropout": LoKrConfig(r=4, target_modules=LINEAR, module_dropout=0.5),
    "oft_dropout": OFTConfig(oft_block_size=4, target_modules=LINEAR, module_dropout=0.5),
    "boft_dropout": BOFTConfig(boft_block_size=4, target_modules=LINEAR, boft_dropout=0.5),
    "monteclora_config": LoraConfig(r=4, target_modules=LINEAR, monteclora_config=MontecloraConfig()),
}
MEAN = "mean over all tokens"
OF_OTHERS = {MEAN: LoraConfig(r=4, target_modules=LINEAR, task_type="CAUSAL_LM", velora_config=VeloraConfig())}


@pytest.mark.parametrize("order", ["adapters first", "patched first"])
@pytest.mark.parametrize("reason", CHANCE | OF_OTHERS)
def test_what_depends_on_other_tokens_or_on_chance_per_pass_is_refused(reason: str, order: str) -> None:
    config = copy.deepcopy((CHANCE | OF_OTHERS)[reason])
    with pytest.raises(UnsupportedModelError, match=reason):
        if order == "adapters first":
            apply_tokentune(adapted(config), 0.3)
        else:
            adapted(config, apply_tokentune(base(), 0.3))(**batch())


def test_an_adapter_that_is_not_active_harms_nobody() -> None:
    model = adapted(LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.add_adapter("other", copy.deepcopy(OF_OTHERS[MEAN]))
    check(model.double())
    model.set_adapter("other")
    with pytest.raises(UnsupportedModelError, match=MEAN):
        model(**batch(), selected_positions=torch.tensor([[1, 2], [3, 4]]))
    assert model.eval()(input_ids=batch()["input_ids"]).logits.shape[1] == LENGTH
    with model.disable_adapter():
        assert model(**batch(), selected_positions=torch.tensor([[1, 2], [3, 4]])).loss.isfinite()


@pytest.mark.parametrize("order", ["adapters first", "patched first"])
def test_a_mixture_of_adapters_is_refused(order: str, tmp_path) -> None:
    """X-LoRA runs the model once more in its hooks, in the middle of a step."""
    for name in ("one", "two"):
        get_peft_model(base(), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(
            tmp_path / name
        )
    config = XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=64, adapters={name: str(tmp_path / name) for name in ("one", "two")}
    )
    with pytest.raises(UnsupportedModelError, match="runs the model a second time"):
        if order == "adapters first":
            apply_tokentune(get_peft_model(base(), config), 0.3)
        else:
            get_peft_model(apply_tokentune(base(), 0.3), config).train()(**batch())


def test_prompts_put_in_front_of_a_patched_model_are_refused() -> None:
    model = get_peft_model(
        apply_tokentune(base(), 0.3), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    with pytest.raises(UnsupportedModelError, match="prompt learning puts tokens in front"):
        model.train()(**batch())
    assert model.eval()(input_ids=batch()["input_ids"]).logits.shape[1] == LENGTH + 3


def test_a_kind_that_nobody_compared_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokentune.core.compat.adapters, "SERVED", tokentune.core.compat.adapters.SERVED - {"vera"})
    with pytest.raises(UnsupportedModelError, match=r"kind \(vera\) that was never compared"):
        apply_tokentune(adapted(config_of("VERA")))
    model = apply_tokentune(adapted(config_of("VERA")), verify=False)
    assert model(**batch(), selected_positions=torch.tensor([[1, 2], [3, 4]])).loss.isfinite()


# --- wrappers that call `forward` of the model inside ----------------------------------------------------------------

WRAPPERS = {
    "AdaLoRA": AdaLoraConfig(task_type="CAUSAL_LM", target_modules=LINEAR, total_step=100),
    "adaption prompts": AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=2),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_past_the_hooks_has_hooks_of_its_own(name: str) -> None:
    model = apply_tokentune(adapted(copy.deepcopy(WRAPPERS[name])), 0.3)
    apply_tokentune(model, 0.3)
    _, found = gradients(model, batch())
    positions = last_draw(model).positions
    assert positions.shape == (2, 7)
    plain = remove_tokentune(copy.deepcopy(model))
    assert not any(module._forward_pre_hooks for module in plain.modules())
    inputs = batch()
    _, again = gradients(plain, inputs)
    assert not torch.equal(next(iter(found.values())), next(iter(again.values())))
    evaluated = model.eval()(**inputs)
    assert evaluated.logits.shape[1] == LENGTH


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_past_the_hooks_that_came_later_is_refused_by_name(name: str) -> None:
    model = adapted(copy.deepcopy(WRAPPERS[name]), apply_tokentune(base(), 0.3))
    caller = "AdaLoraModel.forward .peft" if name == "AdaLoRA" else "PeftModelForCausalLM.forward .peft"
    with pytest.raises(UnsupportedModelError, match=f"LlamaForCausalLM.forward was called by {caller}"):
        model(**batch())
    apply_tokentune(model.get_base_model())
    with pytest.raises(RuntimeError, match=f"past the model's hooks: {caller}"):
        model(**batch(), selected_positions=torch.tensor([[1, 2], [3, 4]]))
    check(model)
