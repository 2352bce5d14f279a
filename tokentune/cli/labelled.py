"""What `classify.py` reads before any weight, and its `--preview`, which shows it."""

import logging
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedConfig

from tokentune.core.patched import profile_of
from tokentune.core.profile import Pooling, pad_token
from tokentune.data.inspection.labelled_preview import show_labelled_preview
from tokentune.data.labelled.splits import ClassificationData, configured, load_data, load_processing
from tokentune.errors import UserError
from tokentune.models.builder import check_structure
from tokentune.models.pretrained import check_quantization, load_config
from tokentune.models.tasks import HEADS
from tokentune.settings.classification import ClassificationArguments
from tokentune.training.classification import training_collator

logger = logging.getLogger(__name__)


class LabelledInputs(NamedTuple):
    """Of a classification's training, besides weights."""

    config: PreTrainedConfig  # with the head's classes
    processing: Any  # the tokenizer, or the image processor
    data: ClassificationData
    skeleton: nn.Module  # the model on the meta device, patched where tokens are selected


def read_labelled(arguments: ClassificationArguments) -> LabelledInputs:
    """Reads config, tokenizer or image processor, and data; tries the model's structure. Raises UserError: one cannot
    be read, there are no weights, or the structure cannot be served."""
    name, trusted = arguments.model.model_name_or_path, arguments.model.trust_remote_code
    head = HEADS[arguments.task.task_type]
    config = load_config(name, head=head, trust_remote_code=trusted)
    check_quantization(config, name, qlora=arguments.adapters.qlora)
    processing = load_processing(arguments, config)
    data = load_data(arguments, config, processing)
    config = configured(config, data.labels, processing)
    skeleton = check_structure(arguments, config, head)
    if arguments.selection.tokentune:
        say_pooling(skeleton, name, arguments.task.task_type, processing)
    return LabelledInputs(config, processing, data, skeleton)


def say_pooling(skeleton: nn.Module, name: str, task_type: str, processing: Any) -> None:
    """Says what the head for whole sequences looks at in training. Evaluation is the ordinary forward pass."""
    pooling = profile_of(skeleton).pooling
    if task_type == "token":
        logger.info("every selected word is classified; evaluation classifies all words")
    elif pooling is None:
        raise UserError(
            f"--model_name_or_path {name}: its head pools no token that could be "
            "selected. Take another model, or leave --tokentune out."
        )
    elif pooling is Pooling.ALL:
        logger.info(
            "the head pools all tokens: in training too it gets the whole sequence, the tokens that are not selected "
            "as constants; evaluation is the ordinary forward pass"
        )
    else:
        theirs, own = getattr(processing, "pad_token_id", None), pad_token(skeleton)
        if pooling is Pooling.LAST_NON_PAD and theirs != own:
            raise UserError(
                f"--model_name_or_path {name}: its head looks for the last token that is "
                f"not number {own} (pad_token_id in config.json), and its tokenizer pads with number {theirs}: "
                "the head would pool padding. Give both the same number."
            )
        logger.info("the head pools the %s token, which is always selected", pooling.value)


def preview(arguments: ClassificationArguments) -> None:
    """Prints what `--preview` asks for. Raises UserError as `read_labelled`."""
    inputs = read_labelled(arguments)
    rows = inputs.data.train.rows
    collator = training_collator(inputs.skeleton, rows, inputs.processing, arguments, inputs.data.labels)
    show_labelled_preview(inputs.data, inputs.processing, arguments, collator)
