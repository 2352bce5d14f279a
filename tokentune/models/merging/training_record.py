"""What a run's folder tells of the training of the model or adapter in it: was the base in 4 bits, which classes."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from tokentune.training.checkpoints.run_folder import SCORES_NAME, SUMMARY_NAME

RUN_SETTINGS = "run.yaml"  # there from a run's beginning, where the summary comes at its end


@dataclass(frozen=True)
class TrainingRecord:
    """What is known of a training; None for what is not."""

    summary: dict[str, Any] | None  # training_summary.json
    qlora: bool | None  # whether the base was in 4 bits
    base_dtype: torch.dtype | None  # how what stayed unquantised was held
    classes: tuple[str, ...] | None  # the names of a classifier's outputs


def read_record(folder: Path) -> TrainingRecord:
    """The record of the run whose folder, checkpoint or seed this is. Never fails: a file that is no record is none."""
    summary = next(_found(folder, SUMMARY_NAME), None)
    settings = (summary or {}).get("settings") or next(_found(folder, RUN_SETTINGS), {})
    dtype = ((summary or {}).get("model") or {}).get("base_dtype")
    classes = next(_found(folder, SCORES_NAME), {}).get("classes")
    qlora = settings.get("qlora") if isinstance(settings, dict) else None
    return TrainingRecord(
        summary,
        qlora if isinstance(qlora, bool) else None,
        getattr(torch, dtype) if dtype in ("float32", "float16", "bfloat16") else None,
        tuple(map(str, classes)) if isinstance(classes, list) else None,
    )


def _found(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    """The file's content, in the folder itself or in those above it that the run made."""
    folder = folder.resolve()
    while True:
        try:
            text = (folder / name).read_text(encoding="utf-8")
            content = json.loads(text) if name.endswith(".json") else yaml.safe_load(text)
        except (OSError, ValueError, yaml.YAMLError):
            content = None
        if isinstance(content, dict):
            yield content
        if not folder.name.startswith(("checkpoint-", "seed-")):
            return
        folder = folder.parent
