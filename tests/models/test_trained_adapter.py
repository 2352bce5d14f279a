"""Does an adapter belong to this base? Starts that changed the base: found again where that can be, else refused."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from adapters_on_disk import logits_of, make_adapter, make_base, refused
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tokentune.merge import merge
from tokentune.models.fingerprint import fingerprint_of_checkpoint
from tokentune.models.merging.merge_result import SUMMARY

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


# The base by its fingerprint


def with_fingerprint(adapter: Path, base: Path) -> Path:
    """The adapter's folder as a run leaves it."""
    fingerprint_of_checkpoint(str(base)).save(adapter)
    return adapter


def test_another_base_of_the_same_shape_is_refused(tiny_llama_dir, tmp_path, capsys):
    base = make_base(tmp_path / "base", tiny_llama_dir)
    sibling = Path(shutil.copytree(base, tmp_path / "sibling"))
    weights = load_file(sibling / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] *= 1.01  # as another adapter, merged, would change it
    save_file(weights, sibling / "model.safetensors", metadata={"format": "pt"})
    adapter = with_fingerprint(make_adapter(base, tmp_path / "trained"), base)
    words = "sibling is not the base that .* was trained on .*base.: it has as many weights of the same type"
    refused(sibling, adapter, tmp_path / "out", words, tmp_path)
    refused(sibling, adapter, tmp_path / "out", "Give that base; --force merges all the same.$", tmp_path)
    merge(str(sibling), str(adapter), str(tmp_path / "out"), force=True)
    assert "merged all the same (--force)" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / SUMMARY).read_text())["base_is_same"] is False
    torch.testing.assert_close(logits_of(tmp_path / "out"), logits_of(sibling, adapter), rtol=0, atol=1e-5)
    # the name does not help: the base's own folder may have been trained further
    shutil.copy(sibling / "model.safetensors", base / "model.safetensors")
    words = "base is not the base that the adapter was trained on: it has as many"
    refused(base, adapter, tmp_path / "new", words, tmp_path)


def test_a_base_saved_again_is_the_same_in_its_type_alone(tiny_llama_dir, tmp_path, capsys):
    adapter = with_fingerprint(make_adapter(tiny_llama_dir, tmp_path / "run"), tiny_llama_dir)
    for folder, dtype in (("shards", torch.float32), ("half", torch.bfloat16)):
        model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=dtype)
        model.save_pretrained(tmp_path / folder, max_shard_size="20KB")
        AutoTokenizer.from_pretrained(tiny_llama_dir).save_pretrained(tmp_path / folder)
    merge(str(tmp_path / "shards"), str(adapter), str(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / SUMMARY).read_text())["base_is_same"] is True
    assert "warning: the adapter was trained on" not in capsys.readouterr().err  # under another name
    words = "its weights are of type bfloat16, not float32.\n.*--force .* if it is the same model saved in another type"
    refused(tmp_path / "half", adapter, tmp_path / "other", words, tmp_path)


def test_a_checkpoint_without_a_record_of_its_own_has_the_runs(tiny_llama_dir, tmp_path):
    adapter = make_adapter(tiny_llama_dir, tmp_path / "run" / "checkpoint-3")
    with_fingerprint(tmp_path / "run", tiny_llama_dir)
    merge(str(tiny_llama_dir), str(adapter), str(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / SUMMARY).read_text())["base_is_same"] is True
