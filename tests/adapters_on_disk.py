"""Bases and LoRA adapters on disk that the tests of merging make, and what both libraries say of a result."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama_config
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from tokentune.errors import UserError
from tokentune.merge import merge
from tokentune.models.merging.merge_result import SUMMARY
from tokentune.models.pretrained import load_base_model

MLP = ["gate_proj", "down_proj", "up_proj"]


def train_by_hand(model: PeftModel) -> None:
    """Gives the zero factors values, as training would."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:
            nn.init.normal_(parameter, std=0.2)


def make_adapter(base: Path, folder: Path, targets=MLP, *, trained: bool = True, **settings) -> Path:
    torch.manual_seed(1)
    model = load_base_model(str(base), dtype=torch.float32, quantize_4bit=False)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=list(targets), task_type="CAUSAL_LM", **settings))
    if trained:
        train_by_hand(model)
    model.save_pretrained(folder)
    return folder


def make_base(folder: Path, tokenizer_from: Path, dtype=torch.float32, **changes) -> Path:
    torch.manual_seed(2)
    vocabulary = len(AutoTokenizer.from_pretrained(tokenizer_from))
    LlamaForCausalLM(tiny_llama_config(**{"vocab_size": vocabulary, **changes})).to(dtype).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_from / name, folder)
    return folder


def logits_of(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    """Straight from the libraries, in float32: (2, 20, V)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter) if adapter else model
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def of_training(folder: Path) -> dict[str, float]:
    """A merge's own measure of how far each kind of base is from the 4-bit base + adapter."""
    summary = json.loads((folder / SUMMARY).read_text())
    return {kind: difference["relative_rms"] for kind, difference in summary["qlora"]["from_training"].items()}


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def refused(base, adapter, output, words, watched: Path, **settings) -> None:
    """The merge is refused with these words, and nothing below `watched` has changed."""
    before = files_below(watched)
    with pytest.raises(UserError, match=words) as refusal:
        merge(str(base), str(adapter), str(output), **settings)
    assert len(str(refusal.value).splitlines()) <= 3
    assert files_below(watched) == before
