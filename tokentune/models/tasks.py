"""The kinds of model that are trained: which auto class loads one, and which weights make up a new head."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
)

if TYPE_CHECKING:  # importing it takes the modelling code's seconds
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Head:
    """The last part of a model, which its task decides."""

    description: str  # what a model without it is not: "a causal language model"
    auto_class: Any
    models: Mapping[type[PreTrainedConfig], Any]
    adapter_task: str | None  # peft's word for it, saved with an adapter; None where peft has none
    is_new: bool  # trained from random weights: a pretrained checkpoint need not hold them


CAUSAL_LM = Head("a causal language model", AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING, "CAUSAL_LM", False)
TEXT = Head(
    "a model with a pooled token and a head that classifies texts by it",
    AutoModelForSequenceClassification,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "SEQ_CLS",
    True,
)
TOKEN = Head(
    "a model with a head that classifies tokens",
    AutoModelForTokenClassification,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    "TOKEN_CLS",
    True,
)
IMAGE = Head(
    "a model with a head that classifies images",
    AutoModelForImageClassification,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    None,
    True,
)

HEADS = {"text": TEXT, "token": TOKEN, "image": IMAGE}  # by what gets a label


def head_weights(model: "PreTrainedModel", weights: list[str]) -> list[str]:
    """Those of `weights` that belong to the head: the pooler, and all that is outside of the base model."""
    base = f"{model.base_model_prefix}."
    return [name for name in weights if not name.startswith(base) or "pooler" in name.split(".")]


def head_modules(model: "PreTrainedModel") -> list[str]:
    """Paths of the modules that make up the head, none inside another: `classifier`, `bert.pooler`."""
    paths = set()
    for name in head_weights(model, [name for name, _ in model.named_parameters()]):
        parts = name.split(".")
        outer = 1 if not name.startswith(f"{model.base_model_prefix}.") else parts.index("pooler") + 1
        paths.add(".".join(parts[:outer]))
    return sorted(paths)
