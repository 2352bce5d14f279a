"""All data of a classification: read, checked, encoded; and what the model's configuration says of it.

load_processing -> load_data -> configured
"""

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Image as ImageFeature
from transformers import PreTrainedConfig

from tokentune.data.labelled.encoding import Encoded, RowReport, encode_texts, encode_words, true_labels
from tokentune.data.labelled.images import ImageRows, load_image_processor, open_image
from tokentune.data.labelled.labels import Labels, find_labels, find_token_labels
from tokentune.data.labelled.rows import Columns, Split, find_columns, read_split, require_columns, some_rows
from tokentune.data.prompts import ensure_pad_token
from tokentune.errors import UserError
from tokentune.models.pretrained import check_weights, load_tokenizer
from tokentune.sampling.sampler import IGNORED_LABEL
from tokentune.settings.classification import ClassificationArguments
from tokentune.sources import listed

logger = logging.getLogger(__name__)
_NEEDS_PREFIX_SPACE = ("roberta", "deberta", "gpt2", "bloom", "longformer", "modernbert")  # to be given single words


@dataclass
class ClassificationData:
    """The rows to learn from, to evaluate on and to predict, and their labels."""

    train: Encoded
    validation: Encoded
    test: Encoded | None
    labels: Labels
    inputs: Sequence[str]  # names of the columns that are classified by: of a pair two

    @property
    def splits(self) -> dict[str, Encoded | None]:
        """Those above, by name; None: no test data."""
        return {"train": self.train, "validation": self.validation, "test": self.test}


def load_processing(arguments: ClassificationArguments, config: PreTrainedConfig) -> Any:
    """The tokenizer, with a pad token, or the image processor. Raises UserError: none could be read, the weights are
    missing, or `--max_length` is more than the model takes."""
    model = arguments.model
    if not model.from_scratch:
        hint = "--from_scratch trains random ones"
        check_weights(model.model_name_or_path, hint=hint, allow_pickle=model.allow_pickle)
    trusted = {"trust_remote_code": model.trust_remote_code}
    if arguments.task.task_type == "image":
        return load_image_processor(model.model_name_or_path, config, from_scratch=model.from_scratch, **trusted)
    words = arguments.task.task_type == "token" and config.model_type in _NEEDS_PREFIX_SPACE
    options = {"add_prefix_space": True} if words else {}
    tokenizer = load_tokenizer(model.model_name_or_path, **trusted, **options)
    if arguments.task.task_type == "token" and not tokenizer.is_fast:
        raise UserError(
            f"--task_type token: the tokenizer of {model.model_name_or_path} ({type(tokenizer).__name__}) does not "
            "tell which word a token is of. Take a model that has a tokenizer.json."
        )
    tokenizer.padding_side = "right"
    text = config.get_text_config()
    ensure_pad_token(tokenizer, getattr(text, "vocab_size", None))  # a model of characters has no such number
    positions = getattr(text, "max_position_embeddings", None) or arguments.data.max_length
    most = min(positions, tokenizer.model_max_length)
    if arguments.data.max_length > most:
        raise UserError(
            f"--max_length {arguments.data.max_length}: {model.model_name_or_path} takes at most {most} tokens."
        )
    return tokenizer


def load_data(arguments: ClassificationArguments, config: PreTrainedConfig, processing: Any) -> ClassificationData:
    """Reads, checks and encodes all splits. Raises UserError: whatever is wrong with them, with the file, the row and
    the column."""
    train, validation, test = (read_split(arguments, split) for split in ("train", "validation", "test"))
    columns = find_columns(arguments, train)
    task_type = arguments.task.task_type
    if task_type == "token":
        labels = find_token_labels(train.rows, columns.label, train.where)
    else:
        labels = find_labels(train.rows, columns.label, train.where, task=arguments.task.glue)
    others = [name for name in train.rows.column_names if name not in (*columns.inputs, columns.label)]
    passed_over = f"; not read: {listed(others)}" if others else ""
    logger.info("%s from %s: %s%s", columns.label, " and ".join(columns.inputs), labels, passed_over)
    options = {"tokenizer": processing, "max_length": arguments.data.max_length}
    if task_type == "image":
        options = {"processing": processing, "channels": getattr(config, "num_channels", 3)}
    encode = {"text": encode_texts, "token": encode_words, "image": encode_image_rows}[task_type]

    def encoded(split: Split, *, to_predict: bool = False) -> Encoded:
        wanted = columns.inputs if to_predict else (*columns.inputs, columns.label)
        require_columns(split.rows, wanted, split.where, ", which the training data has")
        known = labels.of(split.rows.features.get(columns.label))
        rows = encode(split, columns, None if to_predict else known, **options)
        if to_predict:
            rows.truth = true_labels(split, columns, known, of_words=task_type == "token")
            rows.report.labels = len(rows.truth or ())
            if rows.truth and task_type == "token":
                lost = rows.report.cut_labels + rows.report.unwritten_labels
                rows.report.labels = sum(map(len, rows.truth)) - lost
        logger.info("%s: %s", split.where, rows.report)
        return rows

    learnt, evaluated = encoded(some_rows(train, arguments.data.max_train_rows)), encoded(validation)
    predicted = None if test is None else encoded(test, to_predict=True)
    if task_type != "image":  # rows of one length in a batch need less padding, and no score depends on the order
        evaluated.rows.sort(key=lambda row: len(row["input_ids"]))
    for split, rows in ((train, learnt), (validation, evaluated)):
        warn_of_one_label(rows, split.where)
    return ClassificationData(learnt, evaluated, predicted, labels, columns.inputs)


def warn_of_one_label(rows: Encoded, where: str) -> None:
    """Of rows that all have one label: those that --max_train_rows, --bad_rows or --max_length left, or a validation
    file that is sorted by its labels. (A training file of one label is refused.)"""
    if isinstance(rows.rows, ImageRows):
        found = np.unique(rows.rows.numbers)
    else:
        found = np.unique(np.concatenate([np.atleast_1d(row["labels"]) for row in rows.rows] or [np.zeros(0)]))
    if len(found[found != IGNORED_LABEL]) == 1 and rows.report.labels > 1:
        logger.warning("%s: all %d labels are the same: they tell nothing from another", where, rows.report.labels)


def encode_image_rows(
    split: Split, columns: Columns, labels: Labels | None, *, processing: Any, channels: int
) -> Encoded:
    """Images to rows of pixels and labels. `labels` None: rows to predict."""
    (column,) = columns.inputs
    if not isinstance(split.rows.features[column], ImageFeature):
        raise UserError(f"{split.where}: {column!r} holds no images but {split.rows.features[column]}.")
    split.rows = split.rows.cast_column(column, ImageFeature(decode=False))
    good, numbers = [], []
    for row, values in split.good_rows(columns.inputs if labels is None else (column, columns.label)):
        with split.bad.catch(where := split.place(row)):
            open_image(values[column], where)
            numbers += [] if labels is None else [labels.encode(values[columns.label], where)]
            good.append(row)
    split.bad.settle(split.where, len(split.rows))
    images = ImageRows(split.rows.select(good)[column], numbers or None, processing, channels, split.where)
    return Encoded(images, RowReport(rows=len(images), labels=len(numbers)))


def configured(config: PreTrainedConfig, labels: Labels, processing: Any) -> PreTrainedConfig:
    """A copy of the configuration with the head's classes and their names, or one number to predict."""
    config = copy.deepcopy(config)
    config.num_labels = labels.outputs
    if labels.is_regression:
        config.problem_type = "regression"
    else:
        config.id2label = dict(enumerate(labels.names))
        config.label2id = {name: number for number, name in config.id2label.items()}
        config.problem_type = "single_label_classification"
    pad = getattr(processing, "pad_token_id", None)
    if pad is not None and config.get_text_config().pad_token_id is None:
        config.get_text_config().pad_token_id = pad  # a decoder's head pools the last token before padding
    return config
