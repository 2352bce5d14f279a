"""Merging every kind of adapter: types, tied and resized embeddings, 4-bit bases, shards, classifiers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from adapters_on_disk import MLP, files_below, logits_of, make_adapter, make_base, of_training, refused, train_by_hand
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
)

from tokentune.merge import merge
from tokentune.models.adapters import add_adapters
from tokentune.models.merging.logit_difference import float32_arithmetic, probe_logits
from tokentune.models.merging.merge_result import SUMMARY
from tokentune.models.pretrained import load_base_model


@pytest.fixture(scope="module")
def tied_base(tiny_llama_dir, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tied"
    return make_base(folder, tiny_llama_dir, torch.bfloat16, tie_word_embeddings=True)


@pytest.mark.parametrize("dtype", [None, "auto", "float32", "float16", "bfloat16"])
def test_types(tied_base, tmp_path, dtype, capsys):
    adapter = make_adapter(tied_base, tmp_path / "run", ["q_proj", *MLP])
    merge(str(tied_base), str(adapter), str(tmp_path / "out"), dtype=dtype)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    expected = torch.bfloat16 if dtype in (None, "auto") else getattr(torch, dtype)  # the base's own by default
    assert {p.dtype for p in merged.parameters()} == {expected}
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert merged.config.tie_word_embeddings
    relative = json.loads((tmp_path / "out" / SUMMARY).read_text())["logit_difference"]["in_float32"]["relative"]
    limits = {torch.float32: 1e-5, torch.float16: 0.02, torch.bfloat16: 0.16}  # rounding of the adapted weights
    assert relative < limits[expected]
    assert relative > limits[expected] / 1000 or expected is torch.float32  # else it was not computed from the file
    printed = capsys.readouterr().out
    assert ("the same weights, computed in float32" in printed) == (expected is not torch.float32)
    assert "verdict: fine: rounding the merged weights to" in printed  # by far the less for what this adapter does


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens", "down_proj"]])
def test_adapters_on_tied_embeddings(tied_base, tmp_path, targets):
    """Folded into the shared weights, the change of one side would reach the other."""
    adapter = make_adapter(tied_base, tmp_path / "run", targets)
    merge(str(tied_base), str(adapter), str(tmp_path / "out"), dtype="float32")
    torch.testing.assert_close(logits_of(tmp_path / "out"), logits_of(tied_base, adapter), rtol=0, atol=1e-4)
    assert not LlamaConfig.from_pretrained(tmp_path / "out").tie_word_embeddings


def test_modules_saved_whole(tied_base, tmp_path):
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(tied_base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=MLP, modules_to_save=["lm_head"]))
    train_by_hand(model)
    nn.init.normal_(model.get_output_embeddings().modules_to_save["default"].weight)
    model.save_pretrained(tmp_path / "run")
    merge(str(tied_base), str(tmp_path / "run"), str(tmp_path / "out"), dtype="float32")
    expected = logits_of(tied_base, tmp_path / "run")
    torch.testing.assert_close(logits_of(tmp_path / "out"), expected, rtol=0, atol=1e-4)


def test_a_head_saved_whole_that_still_equals_the_embedding_stays_tied(tied_base, tmp_path):
    adapter = make_adapter(tied_base, tmp_path / "run", modules_to_save=["lm_head"])
    merge(str(tied_base), str(adapter), str(tmp_path / "out"), dtype="float32")
    torch.testing.assert_close(logits_of(tmp_path / "out"), logits_of(tied_base, adapter), rtol=0, atol=1e-4)
    assert LlamaConfig.from_pretrained(tmp_path / "out").tie_word_embeddings


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"use_rslora": True}, {"rank_pattern": {"down_proj": 2}}])
def test_kinds_of_lora(tied_base, tmp_path, settings):
    adapter = make_adapter(tied_base, tmp_path / "run", **settings)
    merge(str(tied_base), str(adapter), str(tmp_path / "out"), dtype="float32")
    torch.testing.assert_close(logits_of(tmp_path / "out"), logits_of(tied_base, adapter), rtol=0, atol=1e-4)
    merge(str(tied_base), str(adapter), str(tmp_path / "out"), dtype="bfloat16")  # in float32 for comparing


def test_tokenizer_of_the_adapter_comes_first(tiny_llama_dir, tmp_path):
    adapter = make_adapter(tiny_llama_dir, tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    tokenizer.pad_token = "<unk>"
    tokenizer.save_pretrained(adapter)
    merge(str(tiny_llama_dir), str(adapter), str(tmp_path / "out"))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").pad_token == "<unk>"


def test_float32_arithmetic_leaves_the_weights_as_they_were(tied_base):
    model = load_base_model(str(tied_base), dtype=torch.bfloat16, quantize_4bit=False)
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    widened = probe_logits(model, in_float32=True)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(widened, probe_logits(model.float(), in_float32=False), rtol=0, atol=1e-6)
    with pytest.raises(IndexError), float32_arithmetic(model.bfloat16()):
        model(input_ids=torch.tensor([[10**6]]))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}  # after an error too


# Embeddings that the run resized, and those that an adapter unties


def grown_tokenizer(base: Path, folder: Path, tokens: int) -> None:
    """The base's tokenizer with new tokens, in the adapter's folder."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([f"<new{n}>" for n in range(tokens)])
    tokenizer.save_pretrained(folder)


def resized_adapter(base: Path, folder: Path, rows: int, **settings) -> torch.Tensor:
    """Trains (by hand) an adapter on the base with so many embeddings; returns its logits of the last tokens."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(rows, mean_resizing=False)
    model = get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM", **{"target_modules": MLP, **settings}))
    for parameter in (p for p in model.parameters() if p.requires_grad):
        nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return logits_of_last(model, rows)


@torch.no_grad()
def logits_of_last(model, rows: int) -> torch.Tensor:
    return model.eval()(input_ids=torch.arange(rows - 20, rows).view(1, 20)).logits


BOTH = ["embed_tokens", "lm_head"]
RESIZED = {
    "adapter on other layers": ({}, True),
    "both trained whole": ({"modules_to_save": BOTH}, False),
    "both trained whole, kept tied": ({"modules_to_save": BOTH, "ensure_weight_tying": True}, True),
    "one trained whole": ({"modules_to_save": ["embed_tokens"]}, False),
    "new tokens trained": ({"trainable_token_indices": "new"}, True),
    "old tokens trained": ({"trainable_token_indices": [3, 5]}, True),
    "adapters on both": ({"target_modules": [*BOTH, "down_proj"]}, False),
    "adapter on the embedding": ({"target_modules": ["embed_tokens", "down_proj"]}, False),
    "adapter on the head": ({"target_modules": ["lm_head", "down_proj"]}, False),
}


@pytest.mark.parametrize("name", RESIZED)
@pytest.mark.parametrize("more", [0, 4, -6])
def test_resized_embeddings(tied_base, tmp_path, name, more):
    settings, stays_tied = RESIZED[name]
    own = AutoModelForCausalLM.from_pretrained(tied_base).config.vocab_size
    if settings.get("trainable_token_indices") == "new":
        settings = {"trainable_token_indices": list(range(own + more - 4, own + more))}
    expected = resized_adapter(tied_base, tmp_path / "run", own + more, **settings)
    if more > 0:
        grown_tokenizer(tied_base, tmp_path / "run", more)
    merge(str(tied_base), str(tmp_path / "run"), str(tmp_path / "out"), dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits_of_last(merged, own + more), expected, rtol=0, atol=2e-5)
    assert merged.config.vocab_size == merged.lm_head.out_features == own + more
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == stays_tied
    assert merged.config.tie_word_embeddings == stays_tied
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == own + max(more, 0)
    vocabulary = json.loads((tmp_path / "out" / SUMMARY).read_text())["vocabulary"]
    assert vocabulary == {"base": own, "merged": own + more, "tied": stays_tied}


def test_resized_embeddings_of_an_untied_base(tiny_llama_dir, tmp_path, capsys):
    own = AutoModelForCausalLM.from_pretrained(tiny_llama_dir).config.vocab_size
    expected = resized_adapter(tiny_llama_dir, tmp_path / "run", own + 4, modules_to_save=["embed_tokens"])
    merge(str(tiny_llama_dir), str(tmp_path / "run"), str(tmp_path / "out"), dtype="bfloat16")  # compared in float32
    merge(str(tiny_llama_dir), str(tmp_path / "run"), str(tmp_path / "out"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits_of_last(merged, own + 4), expected, rtol=0, atol=2e-5)
    assert f"embeddings: {own + 4} rows, as in training (the base has {own})" in capsys.readouterr().out


@pytest.mark.parametrize("target", BOTH)
def test_rows_that_are_lost(tiny_llama_dir, tmp_path, target):
    """peft saves one of two resized embeddings where only that one has an adapter."""
    own = AutoModelForCausalLM.from_pretrained(tiny_llama_dir).config.vocab_size
    resized_adapter(tiny_llama_dir, tmp_path / "run", own + 4, target_modules=[target, "down_proj"])
    words = f"was trained on embeddings of {own + 4} rows, but --base_model_name_or_path has {own}"
    refused(tiny_llama_dir, tmp_path / "run", tmp_path / "out", words, tmp_path)


def test_tokens_without_rows(tiny_llama_dir, tmp_path):
    adapter = make_adapter(tiny_llama_dir, tmp_path / "run")
    own = len(AutoTokenizer.from_pretrained(tiny_llama_dir))
    grown_tokenizer(tiny_llama_dir, adapter, 3)
    words = f"its tokenizer has {own + 3} tokens, but --base_model_name_or_path has embeddings for {own}"
    refused(tiny_llama_dir, adapter, tmp_path / "out", words, tmp_path)
    # a base whose own tokenizer is as large is as it was published
    base = Path(shutil.copytree(tiny_llama_dir, tmp_path / "base"))
    grown_tokenizer(tiny_llama_dir, base, 3)
    merge(str(base), str(adapter), str(tmp_path / "out"))


# Adapters of 4-bit bases


@pytest.fixture(scope="module")
def four_bit(tiny_llama_dir, tmp_path_factory) -> tuple[Path, Path]:
    """A bfloat16 base, and an adapter trained (by hand) over it in 4 bits, with the run's summary."""
    folder = tmp_path_factory.mktemp("models")
    base = make_base(folder / "base", tiny_llama_dir, torch.bfloat16, hidden_size=64, intermediate_size=64)
    quantized = load_base_model(str(base), dtype=torch.bfloat16, quantize_4bit=True)
    model = add_adapters(quantized, r=4, alpha=8, dropout=0.1, target_modules=["all-linear"], quantized=True)
    train_by_hand(model)
    model.save_pretrained(folder / "run")
    summary = {"settings": {"qlora": True, "lora": True}, "model": {"base_dtype": "bfloat16"}}
    (folder / "run" / "training_summary.json").write_text(json.dumps(summary))
    return base, folder / "run"


def four_bit_logits(base: Path, adapter: Path) -> torch.Tensor:
    """Of what was trained, straight from the libraries, in float32: (2, 20, V)."""
    model = load_base_model(str(base), dtype=torch.float32, quantize_4bit=True)
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False  # it would round the block scales
    model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(40).view(2, 20)).logits


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_qlora_adapter_goes_into_either_base(four_bit, tmp_path, dtype, capsys):
    base, adapter = four_bit
    trained = four_bit_logits(base, adapter)
    measured = {}
    for kind in ("16bit", "dequantized"):
        output = tmp_path / kind
        merge(str(base), str(adapter), str(output), qlora_base=kind, dtype=dtype)
        deviation = (logits_of(output) - trained).square().mean().sqrt().item() / trained.std().item()
        measured[kind] = of_training(output)
        assert measured[kind][kind] == pytest.approx(deviation, rel=0.5, abs=1e-5)  # on other inputs than the summary's
        assert not hasattr(LlamaConfig.from_pretrained(output), "quantization_config")
        summary = json.loads((output / SUMMARY).read_text())
        assert summary["qlora"]["base"] == kind and summary["qlora"]["recorded"] is True
    rounding = {"float32": 1e-5, "auto": 0.02}[dtype]
    for figures in measured.values():
        assert figures["dequantized"] < rounding < 0.03 < figures["16bit"]
    printed = capsys.readouterr().out
    assert printed.count("verdict on QLoRA: merged by --qlora_base 16bit (the default) into the base's own") == 1
    assert printed.count("verdict on QLoRA: merged by --qlora_base dequantized into the 4-bit weights") == 1
    assert printed.count("--qlora_base dequantized is closer to what was trained than what was saved") == 1


def test_the_default_is_the_16_bit_base(four_bit, tmp_path):
    base, adapter = four_bit
    merge(str(base), str(adapter), str(tmp_path / "out"), dtype="float32")
    torch.testing.assert_close(logits_of(tmp_path / "out"), logits_of(base, adapter), rtol=0, atol=1e-4)
    assert json.loads((tmp_path / "out" / SUMMARY).read_text())["qlora"]["base"] == "16bit"


def test_how_an_adapter_was_trained_is_found_or_said(four_bit, tmp_path, capsys):
    base, run = four_bit
    # a checkpoint, of a run that has not ended: only its settings are there
    checkpoint = Path(shutil.copytree(run, tmp_path / "run" / "checkpoint-2"))
    (checkpoint / "training_summary.json").unlink()
    (tmp_path / "run" / "run.yaml").write_text("qlora: true\n")
    merge(str(base), str(checkpoint), str(tmp_path / "out"))
    assert of_training(tmp_path / "out")["dequantized"] < of_training(tmp_path / "out")["16bit"]
    assert "does not tell" not in capsys.readouterr().err
    # copied alone: the flag decides
    (tmp_path / "run" / "run.yaml").unlink()
    merge(str(base), str(checkpoint), str(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / SUMMARY).read_text())["qlora"] is None
    assert "does not tell whether it was trained over a 4-bit base" in capsys.readouterr().err
    merge(str(base), str(checkpoint), str(tmp_path / "out"), qlora_base="16bit")
    summary = json.loads((tmp_path / "out" / SUMMARY).read_text())
    assert summary["qlora"]["recorded"] is None
    assert summary["qlora"]["from_training"].keys() == {"16bit", "dequantized"}


def test_a_base_that_was_never_in_4_bits_is_not_dequantized(tiny_llama_dir, tmp_path):
    adapter = make_adapter(tiny_llama_dir, tmp_path / "run")
    (adapter / "training_summary.json").write_text(json.dumps({"settings": {"qlora": False}}))
    words = "--qlora_base dequantized: .*run was trained on an unquantised base"
    refused(tiny_llama_dir, adapter, tmp_path / "out", words, tmp_path, qlora_base="dequantized")
    merge(str(tiny_llama_dir), str(adapter), str(tmp_path / "out"), qlora_base="16bit")
    assert json.loads((tmp_path / "out" / SUMMARY).read_text())["qlora"] is None


def test_4_bit_base_with_modules_trained_whole(four_bit, tmp_path):
    base, _ = four_bit
    quantized = load_base_model(str(base), dtype=torch.bfloat16, quantize_4bit=True)
    quantized.resize_token_embeddings(quantized.config.vocab_size + 4, mean_resizing=False)
    model = get_peft_model(
        quantized, LoraConfig(r=2, target_modules=MLP, modules_to_save=["embed_tokens"], task_type="CAUSAL_LM")
    )
    for parameter in (p for p in model.parameters() if p.requires_grad):
        nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "run")
    merge(str(base), str(tmp_path / "run"), str(tmp_path / "out"), dtype="float32", qlora_base="dequantized")
    assert of_training(tmp_path / "out")["dequantized"] < 1e-5 < of_training(tmp_path / "out")["16bit"]


# Files


def test_shards(tied_base, tmp_path):
    """In and out: a base in several files, a merged model in several files."""
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tied_base).save_pretrained(base, max_shard_size="20KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tied_base / name, base)
    adapter = make_adapter(base, tmp_path / "run")
    merge(str(base), str(adapter), str(tmp_path / "out"), dtype="float32", max_shard_size="50KB")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert len(shards) > 1 and shards <= files_below(tmp_path / "out")
    assert max((tmp_path / "out" / name).stat().st_size for name in shards) < 70_000  # one weight may be larger
    torch.testing.assert_close(logits_of(tmp_path / "out"), logits_of(base, adapter), rtol=0, atol=1e-4)
    refused(base, adapter, tmp_path / "o", "--max_shard_size 5: give a number with", tmp_path, max_shard_size="5")


@pytest.mark.slow
def test_evaluation_loads_the_merged_model(tied_base, tmp_path):
    """lm-eval's own loading; its import alone takes seconds."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    adapter = make_adapter(tied_base, tmp_path / "run")
    merge(str(tied_base), str(adapter), str(tmp_path / "out"), max_shard_size="50KB")
    model = huggingface.HFLM(pretrained=str(tmp_path / "out"), dtype="float32", device="cpu")
    logits = model._model_call(torch.arange(40).view(2, 20))
    torch.testing.assert_close(logits, logits_of(tmp_path / "out"), rtol=0, atol=1e-5)
