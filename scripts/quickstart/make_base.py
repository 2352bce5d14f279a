"""Makes the quick start's base model: a SentencePiece tokenizer and a small Llama, both from generated text alone.

    python scripts/quickstart/make_base.py --output_dir quickstart/base

One to two minutes on two CPU cores. The model learns plain notes (`skills.py`) by predicting the next token, and
nothing else: no question, no instruction, no prompt template is in its text.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
import torch
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

sys.path.append(str(Path(__file__).resolve().parents[2]))  # for tokentune; skills.py lies beside this file

from skills import SKILLS, World, make_world, random_note

from tokentune.data.prompts import DEFAULT_TEMPLATE, PromptTemplate

VOCABULARY = 1200
ROW_TOKENS, ROWS = 96, 32  # of a pre-training batch
STEPS = 800
NOTES_PER_DOCUMENT = 6


def tokenizer_lines(world: World, seed: int) -> Iterator[str]:
    """What the tokenizer learns from: notes, prompt template and questions, so that each of their words is one token.

    Pieces must not join a word and the mark after it: `12?` and `12` would be two unrelated tokens. So a line ends at
    each mark. (The tokenizer sees questions; the model does not.)
    """
    rng = random.Random(f"tokenizer {seed}")
    template = PromptTemplate.load(DEFAULT_TEMPLATE)
    texts = [random_note(rng, world) for _ in range(12000)]
    texts += [
        template.prompt(q.instruction, q.input)
        for q in (skill.question(rng, world, None) for skill in SKILLS.values() for _ in range(200))
    ]
    for text in texts:
        yield from (line for line in re.split(r"([^\w ]+)", text) if line.strip())


def train_tokenizer(world: World, seed: int, folder: Path) -> PreTrainedTokenizerBase:
    """A Llama tokenizer (BPE with byte fallback). Without SentencePiece's space in front of the text, a word has one
    token at the start of a line, where answers begin, and one within it."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=tokenizer_lines(world, seed),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        add_dummy_prefix=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": False,
        "legacy": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 256,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return AutoTokenizer.from_pretrained(folder)


def pretraining_rows(world: World, seed: int, tokenizer: PreTrainedTokenizerBase, rows: int) -> torch.Tensor:
    """(rows, ROW_TOKENS) token ids: documents of some notes each, one after the other, cut into rows."""
    rng = random.Random(f"pretraining {seed}")
    tokens: list[int] = []
    while len(tokens) < rows * ROW_TOKENS:
        documents = ["\n".join(random_note(rng, world) for _ in range(NOTES_PER_DOCUMENT)) for _ in range(1000)]
        for document in tokenizer(documents).input_ids:
            tokens += [*document, tokenizer.eos_token_id]
    return torch.tensor(tokens[: rows * ROW_TOKENS]).view(rows, ROW_TOKENS)


def new_model(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """0.9 million parameters. Their spread, 0.06, is about 1 / sqrt(hidden size): Llama's 0.02 learns late here."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=336,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            initializer_range=0.06,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.unk_token_id,
        )
    )


def rate_factor(step: int, steps: int) -> float:
    """Of the learning rate: 30 steps up, level, and down to 0.02 over the last 60 %."""
    return min(1, (step + 1) / 30, 0.02 + (1 - step / steps) / 0.6)


def pretrain(model: LlamaForCausalLM, rows: torch.Tensor) -> float:
    """Trains in place on (N, ROW_TOKENS) ids, each row once; returns the mean loss of the last 50 steps, in nats.

    Muon on the matrices needs about half of AdamW's steps here.
    """
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=7e-3, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=5e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    batches = rows.split(ROWS)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, len(batches)))
        for optimizer in optimizers
    ]
    losses = []
    progress = tqdm(batches, desc="pre-training", unit="step", mininterval=2)
    for batch in progress:
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{losses[-1]:.2f}", refresh=False)
    return sum(losses[-50:]) / len(losses[-50:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()

    world = make_world(arguments.seed)
    tokenizer = train_tokenizer(world, arguments.seed, arguments.output_dir)
    rows = pretraining_rows(world, arguments.seed, tokenizer, arguments.steps * ROWS)
    torch.manual_seed(arguments.seed)
    model = new_model(tokenizer)
    print(
        f"{len(tokenizer):,} token vocabulary, {model.num_parameters():,} parameters, {rows.numel():,} tokens of text",
        flush=True,
    )
    loss = pretrain(model, rows)
    model.save_pretrained(arguments.output_dir)
    print(f"base model in {arguments.output_dir}, last loss {loss:.3f} nats per token")


if __name__ == "__main__":
    main()
