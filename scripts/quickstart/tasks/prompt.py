"""The prompt of a held-out question: word for word the one that fine-tuning used."""

import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[3]))  # for tokentune: lm-eval may be called from any folder

from tokentune.data.prompts import DEFAULT_TEMPLATE, PromptTemplate

TEMPLATE = PromptTemplate.load(DEFAULT_TEMPLATE)


def training_prompt(question: dict[str, Any]) -> str:
    return TEMPLATE.prompt(question["instruction"], question["input"])
