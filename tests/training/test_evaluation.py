"""The validation loss in chunks: the plain one's value, without its logits, wherever the head allows it."""

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import tiny_llama_config
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GPT2Config, LlamaForCausalLM, PreTrainedModel

from tokentune import apply_tokentune
from tokentune.memory.accounting import LiveBytes
from tokentune.models.adapters import add_adapters
from tokentune.training.evaluation import can_be_chunked, loss_in_chunks, loss_per_token
from tokentune.verify.tiny_copy import Float64

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 96}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": None}
MODELS = {
    "llama": lambda: tiny_llama_config(),
    "scaled": lambda: CohereConfig(**SIZES, **HEADS, logit_scale=0.25),
    "soft-capped": lambda: Gemma2Config(**SIZES, **HEADS, final_logit_softcapping=2.0, query_pre_attn_scalar=8),
    "tied": lambda: GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96, n_positions=64),
}


def model_of(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(MODELS[name]()).double().eval()


def batch_of(rows: int, tokens: int, vocabulary: int = 96) -> dict[str, Tensor]:
    """Rows of different lengths; the first third of each is prompt."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocabulary, (rows, tokens), generator=generator)
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[:, : tokens // 3] = -100
    for row in range(rows):
        labels[row, tokens - 2 * row :], mask[row, tokens - 2 * row :] = -100, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def trainer_of(model: nn.Module) -> Any:
    accelerator = SimpleNamespace(reduce=lambda totals, how: totals)
    return SimpleNamespace(model=model, args=SimpleNamespace(device=torch.device("cpu")), accelerator=accelerator)


def plain_loss(model: nn.Module, batches: list[dict[str, Tensor]]) -> float:
    """By hand: the logits of all rows, and every supervised target's loss."""
    total, count = 0.0, 0
    for batch in batches:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        targets = batch["labels"][:, 1:]
        total += nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
        count += int((targets != -100).sum())
    return total / count


PREPARED: dict[str, Callable[[PreTrainedModel], nn.Module]] = {
    "plain": lambda model: model,
    "patched": lambda model: apply_tokentune(model, 0.3),
    "adapters, the head's too": lambda model: adapted(model),
}


def adapted(model: PreTrainedModel) -> nn.Module:
    modules = ["q_proj", "lm_head"]
    model = add_adapters(model, r=2, alpha=4, dropout=0.1, target_modules=modules, quantized=False).double().eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize(
    ("name", "prepared"),
    [*((name, "plain") for name in MODELS), ("llama", "patched"), ("llama", "adapters, the head's too")],
)
@torch.no_grad()
def test_loss_in_chunks_is_the_plain_one(name: str, prepared: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.enable_grad():
        model = PREPARED[prepared](model_of(name)).eval()
    monkeypatch.setattr("tokentune.training.evaluation.loss_in_chunks", small_chunks)
    batches = [batch_of(4, 24), batch_of(2, 15)]
    assert can_be_chunked(model, batches[0]["input_ids"])
    own = dict(vars(model)), [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    with Float64():
        loss, plain = loss_per_token(trainer_of(model), batches)["loss"], plain_loss(model, batches)
    assert loss == pytest.approx(plain, rel=1e-12)
    assert own == (
        dict(vars(model)),
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
    )


def small_chunks(model: nn.Module, labels: Tensor, count: int, chunk_bytes: int = 0) -> Any:
    return loss_in_chunks(model, labels, count, chunk_bytes=4 * 96 * 5)  # five rows


@torch.no_grad()
def test_a_batch_without_targets_counts_for_nothing() -> None:
    model, batch = model_of("llama"), batch_of(2, 12)
    empty = batch | {"labels": torch.full_like(batch["labels"], -100)}
    alone = loss_per_token(trainer_of(model), [batch])
    assert loss_per_token(trainer_of(model), [batch, empty]) == alone


@torch.no_grad()
def test_the_logits_are_never_there_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LlamaForCausalLM(tiny_llama_config(vocab_size=4096)).eval()
    batch = batch_of(8, 64, 4096)
    logits = 4 * 4096 * 8 * 64
    peaks = {}
    for way, possible in (("chunks", True), ("whole", False)):
        monkeypatch.setattr("tokentune.training.evaluation.can_be_chunked", lambda *_, possible=possible: possible)
        monkeypatch.setattr(
            "tokentune.training.evaluation.loss_in_chunks",
            lambda model, labels, count: loss_in_chunks(model, labels, count, chunk_bytes=logits // 32),
        )
        with LiveBytes() as live:
            live.claim("weights", model.parameters())
            before = live.now
            loss_per_token(trainer_of(model), [batch])
        peaks[way] = live.peak - before
    assert peaks["whole"] > 2 * logits
    assert peaks["chunks"] < logits / 4


@torch.no_grad()
def test_a_loss_that_chunks_would_change_is_taken_whole(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, ids = model_of("llama"), batch_of(2, 12)["input_ids"]
    with caplog.at_level(logging.INFO, logger="tokentune"):
        model.lm_head.register_forward_hook(lambda head, args, logits: logits - logits.mean(dim=(0, 1), keepdim=True))
        assert not can_be_chunked(model, ids)
        assert "in chunks the loss of LlamaForCausalLM differs" in caplog.text
        broken = model_of("llama")

        def needs_rows(head: nn.Module, args: tuple, logits: Tensor) -> Tensor:
            return logits - logits[:, -1:].max(dim=1, keepdim=True).values

        broken.lm_head.register_forward_hook(needs_rows)
        assert not can_be_chunked(broken, ids)
        assert "LlamaForCausalLM needs them all" in caplog.text
    other = model_of("llama")
    other._loss_function = lambda logits, labels, vocab_size, **_: logits.float().mean()
    assert not can_be_chunked(other, ids)
    batches = [batch_of(2, 12)]
    with Float64():
        loss, plain = loss_per_token(trainer_of(model), batches)["loss"], plain_loss(model, batches)
    assert loss == pytest.approx(plain, rel=1e-12)
