"""Loading: every message of a name that leads nowhere, the precision rules, 4-bit bases and adapters."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from conftest import tiny_llama_config
from huggingface_hub.errors import GatedRepoError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    T5Config,
)

from tokentune import sources
from tokentune.errors import UserError
from tokentune.models.adapters import add_adapters
from tokentune.models.builder import base_dtype
from tokentune.models.pretrained import (
    _check_placement,
    checkpoint_dtype,
    load_base_model,
    load_config,
    load_tokenizer,
)
from tokentune.settings.model import AdapterArguments, SelectionArguments
from tokentune.sources import hub_error, is_local_path
from tokentune.training.checkpoints.run_folder import run_folder_name

FLAG = "--model_name_or_path"
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load(folder, dtype=torch.float32, **settings):
    return load_base_model(str(folder), dtype=dtype, **{"quantize_4bit": False, **settings})


def adapt(model, target_modules=("gate_proj", "down_proj"), *, quantized=False, dropout=0.0):
    return add_adapters(model, r=4, alpha=8, dropout=dropout, target_modules=list(target_modules), quantized=quantized)


@pytest.fixture
def model_copy(tiny_llama_dir, tmp_path) -> Path:
    """A copy of the tiny model's folder, to be damaged."""
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "copy"))


@pytest.fixture(scope="module")
def quantizable_dir(tmp_path_factory) -> Path:
    """A bfloat16 Llama with tied embeddings whose sizes bitsandbytes' blocks and CPU layout accept."""
    folder = tmp_path_factory.mktemp("models") / "quantizable"
    config = tiny_llama_config(hidden_size=64, intermediate_size=128, tie_word_embeddings=True)
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


# Names that lead nowhere


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/model", "a/b/c", "nowhere/", "../x"])
@pytest.mark.parametrize("loader", [load, load_config, load_tokenizer])
def test_missing_local_folder(loader, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"{FLAG} {name}: no such folder"):
        loader(name)


@pytest.mark.parametrize("loader", [load, load_config, load_tokenizer])
def test_unknown_hub_id_while_offline(loader, monkeypatch):
    monkeypatch.setattr(sources.hub_constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=f"{FLAG} nobody/nothing: .*HF_HUB_OFFLINE=1.*local folder"):
        loader("nobody/nothing")


def http_error(kind: type, text: str) -> Exception:
    return kind(text, response=SimpleNamespace(headers={}, request=None))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (http_error(GatedRepoError, "403"), "gated.*HF_TOKEN"),
        (OSError("You are trying to access a gated repo.\nMake sure to have access"), "gated.*HF_TOKEN"),
        (http_error(RepositoryNotFoundError, "404"), "no such public repository.*spelling"),
        (HFValidationError("Repo id must"), "nor spelt like a hub id"),
        (LocalEntryNotFoundError("no connection"), "huggingface.co cannot be reached"),
        (ConnectionError("reset"), "huggingface.co cannot be reached"),
        (OSError("org/delegated has no file\nsecond line"), "cannot be loaded: org/delegated has no file$"),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_hub_errors_become_sentences(error, words, wrapped, monkeypatch):
    monkeypatch.setattr(sources.hub_constants, "HF_HUB_OFFLINE", False)
    if wrapped and "cannot be loaded" not in words:  # as transformers does it
        outer = OSError("something went wrong")
        outer.__cause__ = error
        error = outer
    message = str(hub_error("org/model", error, "--some_flag"))
    assert message.startswith("--some_flag org/model: ")
    assert len(message.splitlines()) == 1
    assert re.search(words, message), message


def test_folder_without_config(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        load(tmp_path)


def test_file_instead_of_folder(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(UserError, match="is a file"):
        load(file)


def test_adapter_instead_of_model(model_copy):
    # With both configs in the folder, transformers would silently load the recorded base instead.
    (model_copy / "adapter_config.json").write_text("{}")
    for loader in (load, load_config):
        with pytest.raises(UserError, match="holds an adapter, not a full model"):
            loader(str(model_copy))


@pytest.mark.parametrize(
    ("text", "words"),
    [("{broken", "not a valid JSON"), ('{"model_type": "unheard_of"}', "unheard_of"), ("{}", "model_type")],
)
def test_unusable_config(tmp_path, text, words):
    (tmp_path / "config.json").write_text(text)
    for loader in (load, load_config):
        with pytest.raises(UserError, match=words):
            loader(str(tmp_path))


def test_other_kind_of_model(tmp_path):
    T5Config().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="t5 model is not a causal language model"):
        load_config(str(tmp_path))


@pytest.mark.parametrize("damage", ["truncated", "garbage"])
def test_damaged_weights(model_copy, damage):
    weights = model_copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000] if damage == "truncated" else b"not a weight file")
    with pytest.raises(UserError, match="weight file is damaged"):
        load(model_copy)


def test_weights_absent(model_copy):
    (model_copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match="this folder holds no weights"):
        load(model_copy)


def test_incomplete_weights_are_not_left_random(model_copy):
    weights = load_file(model_copy / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, model_copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 weights .* not in its files .*layers\.1\.mlp\.up_proj"):
        load(model_copy)


def test_weights_of_another_shape(model_copy):
    config = json.loads((model_copy / "config.json").read_text())
    (model_copy / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    with pytest.raises(UserError, match=r"6 weights do not have the shape .*\(32, 48\) instead of \(32, 64\)"):
        load(model_copy)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_folder_without_tokenizer(tmp_path, model_type):
    config = tiny_llama_config() if model_type == "llama" else GPT2Config()
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no tokenizer could be read"):
        load_tokenizer(str(tmp_path))


def test_tokenizer_without_pad_token_loads(tiny_llama_dir):
    tokenizer = load_tokenizer(str(tiny_llama_dir))
    assert tokenizer.pad_token is None
    assert tokenizer.eos_token == "</s>"


# The base model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_base_is_held_in_the_type_asked_for(tiny_llama_dir, dtype):
    model = load(tiny_llama_dir, dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.config.dtype == dtype


def test_a_generation_config_that_could_not_be_saved_is_repaired(model_copy, tmp_path):
    text = json.dumps({"temperature": 0.6, "top_p": 0.9, "transformers_version": "4.31.0"})
    (model_copy / "generation_config.json").write_text(text)
    model = load(model_copy)
    model.generation_config.pad_token_id = 0  # the Trainer touches it in this way
    model.save_pretrained(tmp_path / "saved")
    saved = GenerationConfig.from_pretrained(tmp_path / "saved")
    assert (saved.do_sample, saved.temperature, saved.top_p) == (True, 0.6, 0.9)


def test_offloading_beside_gpus_is_refused():
    _check_placement({"model.layers.0": 0, "model.layers.1": 1}, "m", FLAG)
    _check_placement({"": "cpu"}, "m", FLAG)
    for place in ("cpu", "disk"):
        with pytest.raises(UserError, match="does not fit the memory of the visible GPUs"):
            _check_placement({"model.layers.0": 0, "model.layers.1": place}, "m", FLAG)


@pytest.mark.parametrize(
    ("settings", "stored", "expected"),
    [
        ({}, "bfloat16", "float32"),  # full training: float32 masters
        ({"bf16": True}, "bfloat16", "float32"),
        ({"fp16": True}, "float16", "float32"),
        ({"lora": True}, "float32", "float32"),
        ({"lora": True}, "bfloat16", "bfloat16"),
        ({"lora": True}, "float16", "bfloat16"),  # float16 without loss scaling loses gradients
        ({"lora": True, "bf16": True}, "float32", "bfloat16"),
        ({"lora": True, "bf16": True}, "float16", "bfloat16"),
        ({"lora": True, "fp16": True}, "float32", "float16"),
        ({"lora": True, "fp16": True}, "float16", "float16"),
        ({"lora": True, "fp16": True}, "bfloat16", "bfloat16"),
        ({"qlora": True, "bf16": True}, "float16", "bfloat16"),
        ({"base_dtype": "float32", "lora": True, "bf16": True}, "bfloat16", "float32"),
        ({"base_dtype": "float16", "lora": True}, "bfloat16", "float16"),
        ({"base_dtype": "bfloat16"}, "float32", "bfloat16"),
    ],
)
def test_base_dtype(settings, stored, expected):
    assert base_dtype(flags(**settings), tiny_llama_config(dtype=stored)) is getattr(torch, expected)


def flags(**settings):
    chosen = {"base_dtype": "auto", "bf16": False, "fp16": False, "lora": False, "qlora": False} | settings
    return SimpleNamespace(model=SimpleNamespace(**chosen), adapters=SimpleNamespace(**chosen))


def test_float16_masters_are_refused():
    with pytest.raises(UserError, match="--base_dtype float16"):
        base_dtype(flags(base_dtype="float16", fp16=True), tiny_llama_config())


def test_checkpoint_dtype_where_the_config_does_not_say():
    assert checkpoint_dtype(tiny_llama_config(dtype=None)) is torch.float32


# Adapters


def test_adapters_leave_a_16_bit_base_alone(tiny_llama_dir):
    base = load(tiny_llama_dir, torch.bfloat16)
    base_bytes = base.get_memory_footprint(return_buffers=False)
    model = adapt(base)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    assert {p.dtype for p in frozen.values()} == {torch.bfloat16}
    assert sum(p.numel() * p.element_size() for p in frozen.values()) == base_bytes
    assert {p.dtype for p in trainable.values()} == {torch.float32}
    assert len(trainable) == 2 * 2 * 2  # two factors, two target modules, two layers
    assert all("lora_" in name for name in trainable)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert not model.get_input_embeddings()._forward_hooks  # no input gradients


def test_targets_by_path_and_all_linear(tiny_llama_dir):
    by_path = adapt(load(tiny_llama_dir), ["mlp.down_proj", "layers.0.self_attn.q_proj"])
    adapted = {n.split(".lora_")[0].split("model.layers.")[1] for n, p in by_path.named_parameters() if p.requires_grad}
    assert adapted == {"0.mlp.down_proj", "1.mlp.down_proj", "0.self_attn.q_proj"}
    everything = adapt(load(tiny_llama_dir), ["all-linear"])
    adapted = {n.split(".lora_")[0].rpartition(".")[2] for n, p in everything.named_parameters() if p.requires_grad}
    assert adapted == set(ALL_LINEAR)


@pytest.mark.parametrize("targets", [["nonsense"], ["down_proj", "nonsense"], ["mlp", "nonsense"], ["proj"], []])
def test_unknown_targets_are_named_with_what_exists(tiny_llama_dir, targets):
    # peft accepts a list in which any one name matches
    with pytest.raises(UserError) as refusal:
        adapt(load(tiny_llama_dir), targets)
    message = str(refusal.value)
    assert message.startswith("--lora_target_modules: LlamaForCausalLM has no layer named")
    assert all(name in message for name in ALL_LINEAR)
    assert all(name in message.split("Its linear layers")[0] for name in targets if name != "down_proj")


def test_transposed_linear_layers_count():
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50))
    assert any("c_attn.lora_A" in name for name, _ in adapt(model, ["c_attn"]).named_parameters())


# 4-bit bases


def gradients(model, ids):
    model.train().zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def fill_adapters(model) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_4_bit_base(quantizable_dir, dtype):
    base = load(quantizable_dir, dtype, quantize_4bit=True)
    quantised = {name: m for name, m in base.named_modules() if isinstance(m, Linear4bit)}
    assert len(quantised) == 2 * 7
    assert "lm_head" not in quantised
    assert base.lm_head.weight is base.model.embed_tokens.weight
    for layer in quantised.values():
        state = layer.weight.quant_state
        assert (state.quant_type, state.nested, layer.compute_dtype) == ("nf4", True, dtype)
        assert layer.weight.dtype == torch.uint8
    assert {p.dtype for p in base.parameters()} == {torch.uint8, dtype}

    model = adapt(base, ALL_LINEAR, quantized=True)
    fill_adapters(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.uint8, dtype}  # nothing turned wider
    for name, gradient in gradients(model, torch.randint(0, 96, (2, 12))).items():
        assert gradient.isfinite().all(), name
        assert gradient.abs().sum() > 0, name


def test_a_base_that_comes_in_4_bits(quantizable_dir, tmp_path):
    quantized = load(quantizable_dir, torch.bfloat16, quantize_4bit=True)
    quantized.save_pretrained(tmp_path / "4-bit")
    again = load(tmp_path / "4-bit", torch.bfloat16, quantize_4bit=True)
    ids = torch.arange(12)[None]
    torch.testing.assert_close(again(ids).logits, quantized(ids).logits, rtol=0, atol=0)
    with pytest.raises(UserError, match=re.escape(f"{FLAG} {tmp_path}/4-bit: its weights are in 4 bits")):
        load(tmp_path / "4-bit")


def test_8_bit_weights_are_not_taken_for_numbers_without_scales(quantizable_dir, tmp_path):
    config = BitsAndBytesConfig(load_in_8bit=True)
    AutoModelForCausalLM.from_pretrained(quantizable_dir, quantization_config=config).save_pretrained(tmp_path / "8")
    for quantize_4bit in (False, True):
        with pytest.raises(UserError, match="its weights are quantised already"):
            load(tmp_path / "8", quantize_4bit=quantize_4bit)


def test_4_bit_compute_dtype(quantizable_dir):
    base = load(quantizable_dir, torch.float32, quantize_4bit=True, compute_dtype=torch.bfloat16)
    assert {m.compute_dtype for m in base.modules() if isinstance(m, Linear4bit)} == {torch.bfloat16}


def test_4_bit_values_are_close_to_the_base(quantizable_dir):
    ids = torch.randint(0, 96, (2, 12))
    with torch.no_grad():
        exact = load(quantizable_dir)(input_ids=ids).logits
        quantised = load(quantizable_dir, quantize_4bit=True)(input_ids=ids).logits
    assert 0 < (quantised - exact).norm() / exact.norm() < 0.3


def test_4_bit_training_goes_on_after_an_evaluation(quantizable_dir):
    """Without the remedy an evaluation repacks the weights on some CPUs, for a product without a backward."""
    model = adapt(load(quantizable_dir, quantize_4bit=True), ALL_LINEAR, quantized=True)
    fill_adapters(model)
    layers = [m for m in model.modules() if isinstance(m, Linear4bit)]
    assert layers
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)  # on every CPU, as the rest needs such a one
    ids = torch.randint(0, 96, (2, 12))
    before = gradients(model, ids)
    with torch.no_grad():
        model.eval()(input_ids=ids)
    for name, gradient in gradients(model, ids).items():
        torch.testing.assert_close(gradient, before[name], rtol=0, atol=0, msg=name)


def test_real_model_in_4_bits(shared):
    """The quantised base's loss on its own kind of text stays near the base's."""
    folder = str(shared / "models" / "llama-tiny")
    text = "Once upon a time there was a king who had three sons, and the youngest of them was the wisest."
    ids = load_tokenizer(folder)(text, return_tensors="pt").input_ids
    with torch.no_grad():
        base = load(folder)(input_ids=ids, labels=ids).loss.item()
        quantised = load(folder, quantize_4bit=True)(input_ids=ids, labels=ids).loss.item()
    assert base < 4.5
    assert abs(quantised - base) < 0.2


# The run's folder


@pytest.mark.parametrize(
    ("model", "dataset", "settings", "expected"),
    [
        (
            "meta-llama/Llama-2-7b-hf",
            "garage-bAInd/Open-Platypus",
            {"lora": True, "qlora": True, "tokentune": True, "prefix_length": 0.3},
            "meta-llama-Llama-2-7b-hf-garage-bAInd-Open-Platypus-lora-qlora-tokentune-0.3",
        ),
        ("o/m", "o/d", {"qlora": True}, "o-m-o-d-lora-qlora"),
        ("o/m", "o/d", {"lora": True}, "o-m-o-d-lora"),
        ("o/m", "o/d", {"tokentune": True, "prefix_length": 16}, "o-m-o-d-tokentune-16"),
        ("o/m", "o/d", {"tokentune": True, "prefix_length": 1.0}, "o-m-o-d-tokentune-1.0"),
        ("gpt2", "o/d", {}, "gpt2-o-d"),
        ("/models/Llama-3.2-1B", "data/alpaca_en.train.jsonl", {}, "Llama-3.2-1B-alpaca_en.train"),
        ("./Llama-3.2-1B/", "../d/x.csv", {}, "Llama-3.2-1B-x"),
        ("/a/b/c", "/d/x.json.parquet", {}, "c-x.json"),
        ("/a/b/c/.", "/d/folder.txt", {}, "c-folder.txt"),
    ],
)
def test_run_folder_name(model, dataset, settings, expected):
    adapters = AdapterArguments(**{name: value for name, value in settings.items() if name in ("lora", "qlora")})
    chosen = {name: str(value) for name, value in settings.items() if name == "prefix_length"}
    selection = SelectionArguments(tokentune="tokentune" in settings, **chosen)
    assert run_folder_name(model, dataset, adapters, selection) == expected


def test_existing_folder_that_reads_like_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not is_local_path("owner/name")
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert is_local_path("owner/name")
    assert run_folder_name("owner/name", "o/d", AdapterArguments(), SelectionArguments()) == "name-o-d"
