"""Heads of classifiers in merging: trained whole, adapted, or left as the base has them; and their configuration."""

import json
from pathlib import Path

import pytest
import torch
from adapters_on_disk import of_training, refused, train_by_hand
from classification_models import save_tiny_bert, save_tiny_vit
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from tokentune.merge import merge


def classifier_adapter(base: Path, folder: Path, auto_class, task: str | None, modules: list[str], labels: int = 3):
    """An adapter and head trained (by hand) as classify.py does; returns base + adapter."""
    torch.manual_seed(4)
    model = auto_class.from_pretrained(base, num_labels=labels, dtype=torch.float32, ignore_mismatched_sizes=True)
    settings = {"target_modules": "all-linear", "modules_to_save": modules, "task_type": task}
    model = get_peft_model(model, LoraConfig(r=2, **settings))
    train_by_hand(model)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize(
    ("task", "auto_class", "modules"),
    [
        ("SEQ_CLS", AutoModelForSequenceClassification, ["bert.pooler", "classifier"]),
        ("TOKEN_CLS", AutoModelForTokenClassification, ["classifier"]),
    ],
)
def test_classifiers_of_texts(tmp_path, task, auto_class, modules):
    base = save_tiny_bert(tmp_path / "base")
    together = classifier_adapter(base, tmp_path / "run", auto_class, task, modules)
    (tmp_path / "run" / "classification_summary.json").write_text(json.dumps({"classes": ["low", "middle", "high"]}))
    merge(str(base), str(tmp_path / "run"), str(tmp_path / "out"))
    merged = auto_class.from_pretrained(tmp_path / "out")
    ids = torch.arange(20).view(2, 10) + 5
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, together(ids).logits, rtol=0, atol=1e-5)
    assert merged.config.id2label == {0: "low", 1: "middle", 2: "high"}
    merge(str(base), str(tmp_path / "run"), str(tmp_path / "out"), qlora_base="dequantized")
    assert of_training(tmp_path / "out")["dequantized"] < 1e-5 < of_training(tmp_path / "out")["16bit"]
    assert AutoTokenizer.from_pretrained(tmp_path / "out").cls_token == "[CLS]"


def test_classifiers_of_images(tmp_path):
    base = save_tiny_vit(tmp_path / "base")
    together = classifier_adapter(base, tmp_path / "run", AutoModelForImageClassification, None, ["classifier"], 5)
    merge(str(base), str(tmp_path / "run"), str(tmp_path / "out"), dtype="bfloat16")
    merge(str(base), str(tmp_path / "run"), str(tmp_path / "out"))
    merged = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    size = merged.config.image_size
    pixels = torch.randn(2, merged.config.num_channels, size, size)
    with torch.no_grad():
        torch.testing.assert_close(merged(pixels).logits, together(pixels).logits, rtol=0, atol=1e-5)
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()


def test_classifiers_of_a_decoder_and_of_numbers(tiny_llama_dir, tmp_path):
    together = classifier_adapter(
        tiny_llama_dir, tmp_path / "run", AutoModelForSequenceClassification, "SEQ_CLS", ["score"], 1
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    tokenizer.pad_token = "<unk>"
    tokenizer.save_pretrained(tmp_path / "run")
    merge(str(tiny_llama_dir), str(tmp_path / "run"), str(tmp_path / "out"))
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    ids = torch.arange(20).view(1, 20) + 5
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, together(ids).logits, rtol=0, atol=1e-5)
    assert merged.config.problem_type == "regression"


def test_classifiers_that_are_refused(tiny_llama_dir, tmp_path):
    base = save_tiny_bert(tmp_path / "base")
    classifier_adapter(base, tmp_path / "run", AutoModelForTokenClassification, "TOKEN_CLS", ["classifier"])
    refused(tiny_llama_dir, tmp_path / "run", tmp_path / "out", "model_type bert.* has model_type llama", tmp_path)
    settings = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    (tmp_path / "run" / "adapter_config.json").write_text(json.dumps(settings | {"task_type": "QUESTION_ANS"}))
    refused(base, tmp_path / "run", tmp_path / "out", "adapter for the task QUESTION_ANS", tmp_path)
    (tmp_path / "run" / "adapter_config.json").write_text(json.dumps(settings))
    weights = load_file(tmp_path / "run" / "adapter_model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "classifier" not in name}
    save_file(kept, tmp_path / "run" / "adapter_model.safetensors")
    refused(base, tmp_path / "run", tmp_path / "out", "holds no head", tmp_path)


# Heads that the base holds


def save_multi_label_base(folder: Path) -> Path:
    """A tiny BERT that gives each text any of four names, with a head that was trained."""
    torch.manual_seed(5)
    save_tiny_bert(folder)
    names = dict(enumerate(["calm", "loud", "new", "old"]))
    model = AutoModelForSequenceClassification.from_pretrained(
        folder,
        id2label=names,
        label2id={name: n for n, name in names.items()},
        problem_type="multi_label_classification",
    )
    model.config.classifier_dropout = 0.25
    model.save_pretrained(folder)
    return folder


def adapt(base: Path, folder: Path, **settings):
    """An adapter trained (by hand) on a classifier as it is; returns base + adapter."""
    torch.manual_seed(4)
    model = AutoModelForSequenceClassification.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=2, **settings))
    train_by_hand(model)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["query"]},  # the head as it was
        {"target_modules": ["query", "classifier"]},  # LoRA on it
        {"target_modules": ["query"], "modules_to_save": ["classifier"], "task_type": "SEQ_CLS"},  # trained whole
        {"target_modules": ["query"], "modules_to_save": ["pooler"]},  # a part of it
    ],
)
def test_heads_of_the_base(tmp_path, settings):
    """The base's configuration (names, several labels at once, dropout) comes out as it was."""
    base = save_multi_label_base(tmp_path / "base")
    together = adapt(base, tmp_path / "run", **settings)
    merge(str(base), str(tmp_path / "run"), str(tmp_path / "out"))
    ids = torch.arange(20).view(2, 10) + 5
    with torch.no_grad():
        logits = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")(ids).logits
        torch.testing.assert_close(logits, together(ids).logits, rtol=0, atol=1e-5)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (base, tmp_path / "out"))
    assert after == before


def test_a_head_with_other_classes_than_the_bases(tmp_path):
    base = save_multi_label_base(tmp_path / "base")
    classifier_adapter(
        base, tmp_path / "run", AutoModelForSequenceClassification, "SEQ_CLS", ["bert.pooler", "classifier"], 3
    )
    merge(str(base), str(tmp_path / "run"), str(tmp_path / "out"))
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (base, tmp_path / "out"))
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert changed == {"id2label", "label2id"}
    assert len(after["id2label"]) == 3


@pytest.mark.parametrize("missing", ["pooler", "classifier"])
def test_a_part_of_the_head_that_nobody_holds(tmp_path, missing):
    """Random weights would take its place: no comparison with base + adapter would tell."""
    base = save_multi_label_base(tmp_path / "base")
    held = {"pooler": ["classifier"], "classifier": ["pooler"]}[missing]
    adapt(base, tmp_path / "run", target_modules=["query"], modules_to_save=held)
    weights = load_file(base / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if missing not in name}
    save_file(kept, base / "model.safetensors", metadata={"format": "pt"})
    words = f"2 of its weights are lost .*{missing}.*"
    refused(base, tmp_path / "run", tmp_path / "out", words, tmp_path)
