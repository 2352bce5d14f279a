"""A trainer of a tiny model on rows of token ids; `make_trainer` in conftest.py gives it to a test."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from tokentune.cli.arguments import parse_arguments
from tokentune.data.collators import SeededRows
from tokentune.data.prompts import ensure_pad_token
from tokentune.models.builder import base_dtype, prepare_model
from tokentune.models.pretrained import load_config, load_tokenizer
from tokentune.settings.finetune import Arguments
from tokentune.training.build import build_trainer
from tokentune.training.trainer import SelectiveTrainer
from tokentune.training.trainer_arguments import build_training_arguments

ROWS = 19  # no multiple of any batch: the last accumulation window is partial, in rows and in micro-batches


def make_rows(count: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Rows of 6 to 24 tokens; the first half of each is prompt, so rows differ much in supervised tokens."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        length = 6 + index * 7 % 19
        ids = torch.randint(3, 90, (length,), generator=generator).tolist()
        prompt = 1 + index * 5 % (length - 2)
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def arguments_for(model_dir: Path, folder: Path, words: str) -> Arguments:
    required = ["--model_name_or_path", str(model_dir), "--dataset_name_or_path", "rows.jsonl"]
    fixed = ["--model_save_path", str(folder), "--report_to", "none", "--warmup_steps", "0", "--logging_steps", "1"]
    return parse_arguments([*required, *fixed, *words.split()])


def trained_parameters(trainer: SelectiveTrainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def trainer_maker(model_dir: Path, folder: Path) -> Callable[..., SelectiveTrainer]:
    """A function that builds a trainer on a model from flags, as the command does."""

    def make(
        words: str, *, rows: int = ROWS, eval_rows: list | None = None, dtype: torch.dtype | None = None
    ) -> SelectiveTrainer:
        words += " --eval_dataset_name_or_path rows.jsonl" if eval_rows is not None else ""
        arguments = arguments_for(model_dir, folder, words)
        settings = build_training_arguments(arguments, folder / "run")
        tokenizer = load_tokenizer(str(model_dir))
        config = load_config(str(model_dir))
        ensure_pad_token(tokenizer, config.vocab_size)
        torch.manual_seed(0)
        model = prepare_model(arguments, base_dtype(arguments, config))
        if dtype is not None:
            model = model.to(dtype)
        seeded = SeededRows(make_rows(rows), arguments.optimization.seed)
        return build_trainer(model, settings, seeded, eval_rows, tokenizer, arguments)

    return make
