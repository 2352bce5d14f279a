"""Adapters whose start changed the base: found again where that can be, else refused."""

import json
from pathlib import Path

import peft
import pytest
import torch
from adapters_on_disk import logits_of, make_adapter, make_base, refused
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tokentune.merge import merge

TARGETS = ["q_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tiny_llama_dir, tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("models") / "base", tiny_llama_dir)


def train(base: Path, folder: Path, start: str | bool, **settings) -> torch.Tensor:
    """Three steps from that start; returns the logits of what was trained, on `logits_of`'s tokens."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    ids = torch.arange(40).view(2, 20)
    config = LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM", init_lora_weights=start, **settings)
    if start == "lora_ga":
        peft.tuners.lora.preprocess_loraga(model, config, lambda: model(input_ids=ids, labels=ids).loss.backward())
    model = get_peft_model(model, config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize("start", ["pissa", "olora", "kasa", "orthogonal", "mica", "gaussian", False])
def test_starts_that_are_found_again(base, tmp_path, start, capsys):
    settings = {"kasa_config": peft.tuners.lora.config.KasaConfig()} if start == "kasa" else {}
    trained = train(base, tmp_path / "run", True if settings else start, **settings)
    merge(str(base), str(tmp_path / "run"), str(tmp_path / "out"))
    assert (trained - logits_of(base)).abs().max() > 1e-3
    torch.testing.assert_close(logits_of(tmp_path / "out"), trained, rtol=0, atol=1e-5)
    said = "changed the base's weights; that was computed again" in capsys.readouterr().err
    assert said == (start in ("pissa", "olora", "kasa"))


@pytest.mark.parametrize("start", ["pissa_niter_4", "lora_ga"])
def test_starts_that_are_lost(base, tmp_path, start):
    settings = {"lora_ga_config": peft.LoraGAConfig()} if start == "lora_ga" else {}
    trained = train(base, tmp_path / "run", start, **settings)
    again = logits_of(base, tmp_path / "run")
    assert (again - trained).abs().max() > 1e-3  # what the libraries make of it is another model
    words = f"its start \\(init_lora_weights={start}\\) changed the base's weights"
    refused(base, tmp_path / "run", tmp_path / "out", words, tmp_path)


@pytest.mark.parametrize("start", ["corda", "loftq", "of_the_future"])
def test_starts_that_may_be_lost(base, tmp_path, start):
    adapter = make_adapter(base, tmp_path / "run")
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": start}))
    refused(base, adapter, tmp_path / "out", f"init_lora_weights={start}", tmp_path)


def test_a_changed_start_is_not_found_again_over_4_bits(base, tmp_path):
    train(base, tmp_path / "run", "pissa")
    for kind in ("dequantized", "16bit"):
        words = f"--qlora_base {kind}: the start of .*init_lora_weights=pissa.* Leave the flag out"
        refused(base, tmp_path / "run", tmp_path / "out", words, tmp_path, qlora_base=kind)
    (tmp_path / "run" / "training_summary.json").write_text(json.dumps({"settings": {"qlora": True}}))
    refused(base, tmp_path / "run", tmp_path / "out", "Trained over 4 bits, it cannot be merged", tmp_path)


def test_replicated_layers(base, tmp_path):
    make_adapter(base, tmp_path / "run", layer_replication=[[0, 2], [1, 2]])
    refused(base, tmp_path / "run", tmp_path / "out", "its layer_replication makes a model of more layers", tmp_path)
