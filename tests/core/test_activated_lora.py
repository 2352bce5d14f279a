"""peft's activated LoRA in patched models: what is computed is peft's own, and with all that it acts on selected the
gradient is that of the full backward pass.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import selective_cases
import torch
from conftest import tiny_llama_config
from families import MOE, ROUTED, Family
from family_check import Float64, build
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from tokentune import UnsupportedModelError, apply_tokentune, remove_tokentune
from tokentune.core.checkpointing import CHECKPOINT_REST
from tokentune.core.scoring_pass import ScoringOptions
from tokentune.models.builder import enable_checkpointing
from tokentune.sampling.sampler import Selection, select_tokens, target_mask
from tokentune.sampling.schedule import Answers

INVOCATION = (50, 51)
LENGTH = 16
# Real tokens of each row, and where its invocation begins. Padding cannot fill the last row up: it has fillers.
ROWS = [(16, 9), (11, 4), (8, 5), (16, 12)]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
FAMILIES = {
    "Llama": Family("", "LlamaForCausalLM"),
    "Llama, eager": Family("", "LlamaForCausalLM", attention="eager"),
    "Mistral": Family("", "MistralForCausalLM", {"sliding_window": 4}),
    "Mixtral": Family("", "MixtralForCausalLM", ROUTED),
    "Qwen3": Family("", "Qwen3ForCausalLM", {"head_dim": 16}),
    "Qwen3-MoE": Family("", "Qwen3MoeForCausalLM", {**MOE, "head_dim": 16}),
    "Gemma 2": Family("", "Gemma2ForCausalLM", {"head_dim": 16, "sliding_window": 4}, "eager"),
    "Phi-3": Family("", "Phi3ForCausalLM", {"sliding_window": 4}),
    "OLMo-2": Family("", "Olmo2ForCausalLM"),
    "Cohere": Family("", "CohereForCausalLM"),
    "GPT-2": Family("", "GPT2LMHeadModel", layers="h"),
    "GPT-OSS": Family("", "GptOssForCausalLM", {**ROUTED, "head_dim": 16, "sliding_window": 4}, "eager"),
}


def adapted(name: str = "Llama", *, recomputed: bool = False, **options: Any) -> nn.Module:
    """In float64, with adapters away from zero; with `recomputed` no code casts to float32 in the backward pass."""
    family = FAMILIES[name]
    targets = ATTENTION if family.sizes.keys() & (ROUTED | MOE).keys() else "all-linear"
    settings = {"r": 4, "target_modules": targets, "alora_invocation_tokens": list(INVOCATION)}
    base = selective_cases.build("llama") if recomputed else build(family)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings | options)).double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batch_of(side: str = "right", rows: list[tuple[int, int]] = ROWS) -> dict[str, Tensor]:
    """Rows with an invocation in front of the supervised tokens; the prompt of the first holds one too."""
    ids = torch.randint(3, 50, (len(rows), LENGTH), generator=torch.Generator().manual_seed(1))
    mask, labels = torch.ones_like(ids), torch.full_like(ids, -100)
    for row, (length, begin) in enumerate(rows):
        first = LENGTH - length if side == "left" else 0
        mask[row] = 0
        mask[row, first : first + length] = 1
        ids[row, first + begin : first + begin + 2] = torch.tensor(INVOCATION)
        answer = slice(first + begin + 2, first + length)
        labels[row, answer] = ids[row, answer]
    ids[0, 2:4] = torch.tensor(INVOCATION)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def selected(batch: dict[str, Tensor], invocation: tuple[int, ...] = INVOCATION) -> Selection:
    targets = target_mask(batch["labels"], causal=True)
    options = {"targets": targets, "input_ids": batch["input_ids"], "strategy": "supervised"}
    return select_tokens(batch["attention_mask"], Answers(invocation=invocation), **options)


def chosen(drawn: Selection) -> dict[str, Tensor]:
    given = {"selected_positions": drawn.positions}
    return given | ({} if drawn.fillers is None else {"selection_fillers": drawn.fillers})


def gradients_of(model: nn.Module, *batches: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the sum of the batches' losses."""
    model.zero_grad(set_to_none=True)
    total = 0.0
    for batch in batches:
        with Float64():
            loss = model(**batch).loss
            loss.backward()
        total = total + loss.detach()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None} | {"loss": total}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert found.keys() == expected.keys() and any("lora_A" in name for name in found)
    scale = max(value.abs().max() for value in expected.values())
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= tolerance * max(value.abs().max(), 1e-3 * scale), name


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_gradient_is_that_of_the_full_backward_pass(name: str, side: str) -> None:
    model, batch = adapted(name), batch_of(side)
    expected = gradients_of(model, batch)
    drawn = selected(batch)
    assert drawn.positions.shape[1] == 7 and drawn.fillers is not None
    found = gradients_of(apply_tokentune(model, chunked_loss=False), batch | chosen(drawn))
    assert_same(found, expected)
    assert_same(gradients_of(remove_tokentune(model), batch), expected, tolerance=0)


def test_the_targets_alone_lose_a_part_of_it() -> None:
    model, batch = adapted(), batch_of()
    expected = gradients_of(model, batch)
    found = gradients_of(apply_tokentune(model), batch | chosen(selected(batch, invocation=())))
    assert found["loss"] == pytest.approx(expected["loss"].item(), rel=1e-12)
    with pytest.raises(AssertionError, match="lora"):
        assert_same(found, expected, tolerance=1e-6)


@pytest.mark.parametrize("rest", CHECKPOINT_REST)
def test_checkpointing(rest: str) -> None:
    model, batch = adapted(recomputed=True), batch_of()
    expected = gradients_of(model, batch)
    apply_tokentune(model, checkpoint_rest=rest)
    model.get_base_model().activation_checkpointing_enable()
    for _ in range(2):
        assert_same(gradients_of(model, batch | chosen(selected(batch))), expected)
    model.eval()
    for _ in range(2):  # without gradients there is no backward pass that removes peft's hooks
        with torch.no_grad(), Float64():
            assert model(**batch).loss.item() == pytest.approx(expected["loss"].item(), rel=1e-12)


def test_accumulated_micro_batches() -> None:
    model, batch = adapted(), batch_of()
    items = int((batch["labels"] != -100).sum())
    expected = gradients_of(model, batch)
    apply_tokentune(model)
    parts = [{name: value[rows] for name, value in batch.items()} for rows in (slice(0, 3), slice(3, 4))]
    found = gradients_of(model, *(part | chosen(selected(part)) | {"num_items_in_batch": items} for part in parts))
    assert_same(found, expected)


def test_rows_that_are_selected_whole() -> None:
    """No token is left to the other group, and checkpointing has to recompute all."""
    model, batch = adapted(recomputed=True), batch_of(rows=[(16, 0), (9, 0)])
    batch["input_ids"][0, 2:4] = 5
    expected = gradients_of(model, batch)
    model.get_base_model().activation_checkpointing_enable()
    drawn = selected(batch)
    assert drawn.positions.shape[1] == LENGTH
    assert_same(gradients_of(apply_tokentune(model), batch | chosen(drawn)), expected)


def test_a_scoring_pass_before_the_step() -> None:
    model, batch = adapted(), batch_of()
    expected = gradients_of(model, batch)
    apply_tokentune(model, scoring_pass=ScoringOptions())
    assert_same(gradients_of(model, batch | chosen(selected(batch))), expected)


def test_the_model_draws_them_itself() -> None:
    model, batch = adapted(), batch_of()
    expected = gradients_of(model, batch)
    apply_tokentune(model, Answers(invocation=INVOCATION))
    assert_same(gradients_of(model, batch), expected)


def test_rows_without_an_invocation_run_through_the_base() -> None:
    model, batch = adapted(), batch_of()
    batch["input_ids"][0].masked_fill_(batch["input_ids"][0] >= 50, 5)
    expected = gradients_of(model, batch)
    assert_same(gradients_of(apply_tokentune(model), batch | chosen(selected(batch))), expected)
    batch["input_ids"].clamp_(max=49)
    found = gradients_of(model, batch | chosen(selected(batch)))
    assert not any(gradient.any() for name, gradient in found.items() if name != "loss")


@pytest.mark.parametrize("precision", ["bfloat16", "autocast", "4 bits"])
def test_precisions(precision: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = LlamaForCausalLM(tiny_llama_config(hidden_size=64, intermediate_size=64))
    if precision == "4 bits":
        base.save_pretrained(tmp_path)
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        base = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32)
    elif precision == "bfloat16":
        base.bfloat16()
    settings = {"task_type": "CAUSAL_LM", "target_modules": "all-linear", "alora_invocation_tokens": [50, 51]}
    model, batch = get_peft_model(base, LoraConfig(r=4, **settings)).train(), batch_of()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)

    def of(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            loss = model(**inputs).loss
        loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None} | {"loss": loss.detach()}

    expected = of(batch)
    apply_tokentune(model)
    assert_same(of(batch | chosen(selected(batch))), expected, tolerance=1e-4 if precision == "4 bits" else 0.1)


def test_modules_that_get_tokens_without_their_rows_are_refused() -> None:
    model = adapted(target_modules=["q_proj", "lm_head"])
    batch = batch_of()
    with pytest.raises(UnsupportedModelError, match="tokens without their rows"):
        apply_tokentune(model, chunked_loss=True)(**batch, **chosen(selected(batch)))


def test_a_saved_adapter_answers_as_the_trained_one(tmp_path: Path) -> None:
    """Also behind a cache of the prompt that the base made."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(tiny_llama_config()).eval()
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", alora_invocation_tokens=[50, 51])
    model = apply_tokentune(get_peft_model(copy.deepcopy(base), config).train())
    batch = batch_of()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        model(**batch, **chosen(selected(batch))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path)
    served = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    prompt = batch["input_ids"][:1, :11]
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    model.eval()
    with torch.no_grad():
        assert torch.equal(served(**batch).logits, model(**batch).logits)
        assert not torch.allclose(served(**batch).logits, base(**batch).logits, atol=1e-2)
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        text = served.generate(**inputs, **options)
        assert torch.equal(model.generate(**inputs, **options), text)
        with served.disable_adapter():
            cache = served.get_base_model()(prompt[:, :9], use_cache=True).past_key_values
        assert torch.equal(served.generate(**inputs, past_key_values=cache, **options), text)
        assert not torch.equal(base.generate(**inputs, **options), text)


def test_peft_s_own_recomputation_needs_gradients_of_the_inputs() -> None:
    models, batch = [adapted(recomputed=True) for _ in range(2)], batch_of()
    expected = gradients_of(models[0], batch)
    enable_checkpointing(models[0], inputs_with_gradients=True)
    assert_same(gradients_of(models[0], batch), expected)
    enable_checkpointing(models[1])
    with pytest.raises(CheckpointError):
        gradients_of(models[1], batch)
