"""Models and tokenizers that cannot be trained: the sentence that each ends with."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bad_input import check_sentence, filled, refusal
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MambaConfig, T5Config, ViTConfig

from tokentune import finetune


def other_kind(config: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config.save_pretrained(folder)

    return change


def without(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def text(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content, encoding="utf-8") and None


def configured(name: str, **changes: object) -> Callable[[Path], None]:
    """A JSON file of the folder with some keys changed; None removes one."""

    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text(encoding="utf-8")) | changes
        content = {key: value for key, value in content.items() if value is not None}
        (folder / name).write_text(json.dumps(content), encoding="utf-8")

    return change


def adapter(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def emptied(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


MAMBA = MambaConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2, state_size=4)
T5 = T5Config(vocab_size=400, d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4)
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
HERE = "--model_name_or_path {tmp}/model"
CASES = [  # name, change of a good folder, words, sentence
    (
        "no such folder",
        None,
        "--model_name_or_path {tmp}/none",
        "--model_name_or_path {tmp}/none: no such folder. Give a model's folder, or a hub id such as owner/name.",
    ),
    (
        "a file",
        None,
        "--model_name_or_path {data}",
        "--model_name_or_path {data}: is a file; give the folder that holds the model.",
    ),
    (
        "an empty folder",
        emptied,
        HERE,
        "--model_name_or_path {tmp}/model: no config.json in this folder, so it holds no model. Check the path.",
    ),
    (
        "a hub id, offline",
        None,
        "--model_name_or_path owner/name",
        "--model_name_or_path owner/name: no local folder of this name, not in the hub's cache, and "
        "--offline or HF_HUB_OFFLINE=1 forbids to download it. Give a local folder, or go online once.",
    ),
    (
        "a name of no hub id",
        None,
        "--model_name_or_path a--b..c",
        "--model_name_or_path a--b..c: neither a local folder nor spelt like a hub id (owner/name).",
    ),
    (
        "an adapter",
        adapter,
        HERE,
        "--model_name_or_path {tmp}/model: holds an adapter, not a full model. Give its base, or merge it "
        "first (tokentune/merge.py).",
    ),
    (
        "a broken configuration",
        text("config.json", "{broken"),
        HERE,
        "--model_name_or_path {tmp}/model: cannot be loaded: ...",
    ),
    (
        "a configuration of nobody",
        configured("config.json", model_type="unheard_of"),
        HERE,
        "--model_name_or_path {tmp}/model: cannot be loaded: The checkpoint you are trying to load has model "
        "type `unheard_of`...",
    ),
    (
        "a configuration without a type",
        text("config.json", "{}"),
        HERE,
        "--model_name_or_path {tmp}/model: cannot be loaded: Unrecognized model in {tmp}/model....",
    ),
    (
        "a model of images",
        other_kind(ViTConfig()),
        HERE,
        "--model_name_or_path {tmp}/model: a vit model is not a causal language model.",
    ),
    (
        "a model without its own head",
        other_kind(T5),
        HERE,
        "--model_name_or_path {tmp}/model: a t5 model is not a causal language model.",
    ),
    (
        "code of its own",
        configured("config.json", model_type="own", auto_map={"AutoConfig": "own.Own"}),
        HERE,
        "--model_name_or_path {tmp}/model: comes with Python code of its own, which is not run unasked. Look "
        "at it, then add --trust_remote_code.",
    ),
    (
        "weights in 4 bits, without the flag that trains over them; no data is read",
        configured("config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        HERE + " --dataset_name_or_path {tmp}/none.jsonl",
        "--model_name_or_path {tmp}/model: its weights are in 4 bits (bitsandbytes). Add --qlora, or give the "
        "unquantised model.",
    ),
    (
        "weights in 8 bits",
        configured("config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
        HERE + " --lora",
        "--model_name_or_path {tmp}/model: its weights are quantised already (bitsandbytes), in a way that is not "
        "trained on here. Give the unquantised model; --qlora turns that into 4 bits by itself.",
    ),
    (
        "weights in another method's 8 bits",
        configured("config.json", quantization_config={"quant_method": "fp8"}),
        HERE + " --qlora",
        "--model_name_or_path {tmp}/model: its weights are quantised already (fp8), in a way that is not trained on "
        "here. Give the unquantised model; --qlora turns that into 4 bits by itself.",
    ),
    (
        "pickled weights",
        pickled,
        HERE,
        "--model_name_or_path {tmp}/model: its weights are a pickle file (pytorch_model.bin), which could "
        "run code. Take them as safetensors or give --allow_pickle, which reads tensors alone.",
    ),
    (
        "no weights",
        without("model.safetensors"),
        HERE,
        "--model_name_or_path {tmp}/model: this folder holds no weights (*.safetensors); give a folder that has them.",
    ),
    (
        "no tokenizer",
        without(*TOKENIZER),
        HERE,
        "--model_name_or_path {tmp}/model: no tokenizer could be read from it. It needs tokenizer.json or "
        "tokenizer.model, and tokenizer_config.json.",
    ),
    (
        "a broken tokenizer",
        text("tokenizer.json", "{broken"),
        HERE,
        "--model_name_or_path {tmp}/model: no tokenizer could be read from it. It needs tokenizer.json or "
        "tokenizer.model, and tokenizer_config.json.",
    ),
    (
        "a tokenizer of nothing",
        text("tokenizer.json", "{}"),
        HERE,
        "--model_name_or_path {tmp}/model: no tokenizer could be read from it. It needs tokenizer.json or "
        "tokenizer.model, and tokenizer_config.json.",
    ),
    (
        "a tokenizer larger than the model",
        configured("config.json", vocab_size=100),
        HERE,
        "training row 1 holds a token that the model has no embedding for (16 rows do): the tokenizer has "
        "395 tokens, the model 100 embeddings. Take the tokenizer that belongs to the model, or a model "
        "whose embeddings were resized to it.",
    ),
    (
        "a tokenizer without special tokens",
        configured("tokenizer_config.json", eos_token=None, unk_token=None, bos_token=None, pad_token=None),
        HERE,
        "the tokenizer has no pad, unknown or end-of-sequence token within the model's vocabulary (395 "
        "tokens). Give it a pad token (pad_token in its tokenizer_config.json).",
    ),
    (
        "no end to add",
        configured("tokenizer_config.json", eos_token=None),
        HERE + " --add_eos_token",
        "--add_eos_token: this tokenizer has no end-of-sequence token. Leave the flag out.",
    ),
    (
        "a state-space model",
        other_kind(MAMBA),
        HERE + " --tokentune",
        "--tokentune cannot serve this model exactly: MambaForCausalLM has no layers that send their "
        "attention through transformers' attention interface",
    ),
    (
        "a state-space model, packed",
        other_kind(MAMBA),
        HERE + " --packing --lora --lora_target_modules in_proj",
        "--packing: MambaForCausalLM has no layers that send their attention through transformers' attention "
        "interface. Leave --packing out.",
    ),
    (
        "no such layers",
        None,
        "--lora --lora_target_modules gate_proj query_key_value",
        "--lora_target_modules: LlamaForCausalLM has no layer named query_key_value. Its linear layers: "
        "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj; all-linear stands for all "
        "of them but the output head.",
    ),
    ("no such kernels", None, "--attn_implementation magic", "--attn_implementation magic: ..."),
    (
        "kernels without masks",
        None,
        "--tokentune --attn_implementation flash_attention_2",
        "--attn_implementation flash_attention_2 with --tokentune: the positions of selected tokens have gaps, so that "
        "attention needs a mask, which only sdpa, eager and, on a GPU, flex_attention take. Use one of these, or leave "
        "it out.",
    ),
    (
        "kernels without masks, packed",
        None,
        "--packing --attn_implementation flash_attention_3",
        "--attn_implementation flash_attention_3 with --packing: the documents of a row are kept apart by a mask, "
        "which...",
    ),
    (
        "kernels of a GPU that the CPU has in part",
        None,
        "--attn_implementation flex_attention",
        "--attn_implementation flex_attention needs a GPU (it has no backward pass on the CPU): use sdpa",
    ),
    (
        "kernels of a GPU",
        None,
        "--use_liger_kernel",
        "--use_liger_kernel needs a GPU: its kernels are written in Triton, which compiles for nothing else",
    ),
    (
        "precision of a GPU",
        None,
        "--fp16",
        "--fp16 needs a GPU (its loss scaling does not run on the CPU): use --bf16, or neither",
    ),
    (
        "a history of a GPU",
        None,
        "--memory_snapshot {tmp}/history.pickle",
        "--memory_snapshot is a history of the GPU's allocator, and no GPU is there: leave it out "
        "(--report_memory works everywhere)",
    ),
]


@pytest.fixture
def places(tiny_llama_dir: Path, alpaca_file: Path, tmp_path: Path) -> dict[str, Path]:
    shutil.copytree(tiny_llama_dir, tmp_path / "model")
    return {"tmp": tmp_path, "model": tiny_llama_dir, "data": alpaca_file}


@pytest.mark.parametrize(("name", "change", "words", "sentence"), CASES, ids=[name for name, *_ in CASES])
def test_models(name: str, change: Callable, words: str, sentence: str, refused: Callable, places: dict) -> None:
    if "GPU" in sentence and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    if change is not None:
        change(places["tmp"] / "model")
    check_sentence(refused(*filled(words, **places).split(" ")), sentence, **places)


# ---- weights that turn out to be damaged when they are read ----------------------------------------------------------


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def weights(change: Callable[[dict], dict]) -> Callable[[Path], None]:
    return lambda folder: save_file(
        change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"}
    )


DAMAGED = [
    ("cut short", cut, "--model_name_or_path {tmp}/model: a weight file is damaged (..."),
    (
        "no safetensors",
        text("model.safetensors", "weights"),
        "--model_name_or_path {tmp}/model: a weight file is damaged (...",
    ),
    (
        "one missing",
        weights(lambda given: {k: v for k, v in given.items() if "layers.1.mlp.up" not in k}),
        "--model_name_or_path {tmp}/model: 1 weights that its config.json asks for are not in its files (the "
        "first: model.layers.1.mlp.up_proj.weight). It is incomplete, or not a checkpoint of a causal "
        "language model.",
    ),
    (
        "of another shape",
        weights(lambda given: given | {"lm_head.weight": torch.zeros(7, 32)}),
        "--model_name_or_path {tmp}/model: 1 weights do not have the shape that its config.json asks for "
        "(the first: lm_head.weight, (7, 32) instead of (395, 32)).",
    ),
]


@pytest.mark.parametrize(("name", "change", "sentence"), DAMAGED, ids=[name for name, *_ in DAMAGED])
def test_damaged_weights(
    name: str, change: Callable, sentence: str, places: dict, capsys: pytest.CaptureFixture
) -> None:
    change(places["tmp"] / "model")
    given = {"--model_name_or_path": places["tmp"] / "model", "--dataset_name_or_path": places["data"]}
    given |= {"--model_save_path": places["tmp"] / "models"}
    check_sentence(refusal(finetune.main, given, [], places["tmp"], capsys), sentence, **places)
