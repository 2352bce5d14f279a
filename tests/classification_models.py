"""Tiny encoders, and labelled texts, words and images that they can learn in seconds."""

import json
import random
from pathlib import Path

import numpy as np
import torch
from conftest import tiny_bert_config
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertForMaskedLM,
    BertModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

COLD, WARM = ["ice", "snow", "frost", "winter"], ["sun", "fire", "summer", "heat"]
NAMES, SURNAMES = ["anna", "boris", "clara"], ["smith", "jones"]
PLACES, PARTS = ["oslo", "paris", "quito"], ["north", "west"]
FILLERS = ["the", "a", "was", "very", "there", "again", "and", "we", "saw", "it"]
PIECES = ["##s", "##ing", "##ed", "##er"]
SHORT = "--global_batch_size 8 --learning_rate 5e-3 --max_length 32 --report_to none --logging_steps 1"


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """BERT's kind: [CLS] and [SEP], word pieces; unknown words are cut into letters."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + list("0123456789.,")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    known = [
        *special,
        *COLD,
        *WARM,
        *NAMES,
        *SURNAMES,
        *PLACES,
        *PARTS,
        *FILLERS,
        *PIECES,
        *letters,
        *(f"##{c}" for c in letters),
    ]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(known))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **names, mask_token="[MASK]", model_max_length=64, model_input_names=inputs
    )


def save_tiny_bert(folder: Path, *, pooler: bool = True) -> Path:
    """Random weights of a BERT without a classification head, as a pretrained checkpoint has them."""
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = tiny_bert_config(vocab_size=len(tokenizer), initializer_range=0.15)  # what adapters can build on
    (BertModel if pooler else BertForMaskedLM)(config).save_pretrained(folder)
    return folder


def tiny_vit_config(**changes: object) -> ViTConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return ViTConfig(**{**sizes, **dropout, "image_size": 8, "patch_size": 2, "num_channels": 1, **changes})


def save_tiny_vit(folder: Path) -> Path:
    """Random weights of a ViT for grey images of 8 x 8 pixels (16 patches), with its image processor."""
    torch.manual_seed(0)
    ViTForImageClassification(tiny_vit_config(num_labels=10)).save_pretrained(folder)
    size = {"height": 8, "width": 8}
    ViTImageProcessor(size=size, image_mean=[0.5], image_std=[0.5]).save_pretrained(folder)
    return folder


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_texts(path: Path, count: int, *, seed: int) -> Path:
    """Sentences of 4 to 12 words, one or two of which tell the class."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        label = "warm" if number % 2 else "cold"
        words = draw.choices(FILLERS, k=draw.randint(3, 10)) + draw.choices(WARM if number % 2 else COLD, k=2)
        draw.shuffle(words)
        rows.append({"text": " ".join(words), "label": label})
    return write_lines(path, rows)


def write_words(path: Path, count: int, *, seed: int) -> Path:
    """Lists of words with the entities of persons and places; some words are several pieces long."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        words = [(word + draw.choice(["", "", "s"]), "O") for word in draw.choices(FILLERS, k=draw.randint(4, 9))]
        for kind, firsts, seconds in (("person", NAMES, SURNAMES), ("place", PLACES, PARTS)):
            at = draw.choice([n for n in range(len(words) + 1) if n == len(words) or not words[n][1].startswith("I-")])
            words[at:at] = [(draw.choice(firsts), f"B-{kind}"), (draw.choice(seconds), f"I-{kind}")]
        rows.append({"tokens": [word for word, _ in words], "ner_tags": [tag for _, tag in words]})
    return write_lines(path, rows)


def write_images(folder: Path, count: int, *, seed: int) -> Path:
    """Grey images of a bright row or a bright column, in a subfolder per class."""
    draw = np.random.default_rng(seed)
    for number in range(count):
        pixels = draw.integers(0, 60, (8, 8), dtype=np.uint8)
        at = draw.integers(0, 8)
        kind = "row" if number % 2 else "column"
        pixels[(at, slice(None)) if number % 2 else (slice(None), at)] = 255
        (folder / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels, "L").save(folder / kind / f"{number:03}.png")
    return folder
