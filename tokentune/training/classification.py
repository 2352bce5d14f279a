"""Training of an encoder's head: the loss of a whole accumulation window, the validation scores, the predictions.

Legend: B rows in a micro-batch, S tokens, K selected tokens, C classes.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import Dataset
from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding, TrainingArguments

from tokentune.core.layers import inner_model, transformer_layers
from tokentune.core.patched import profile_of
from tokentune.core.profile import Rows, pad_token
from tokentune.data.collators import ClassificationCollator, EncoderDraw, SeededRows, stack_images
from tokentune.data.labelled.labels import Labels
from tokentune.errors import UnsupportedModelError
from tokentune.sampling.sampler import IGNORED_LABEL
from tokentune.settings.classification import ClassificationArguments
from tokentune.training.callbacks import EarlyStopping
from tokentune.training.scores import LOWER_IS_BETTER, scorer
from tokentune.training.trainer import Evaluation, SelectiveTrainer
from tokentune.training.trainer_arguments import build_training_arguments


def classification_settings(arguments: ClassificationArguments, run_folder: Path, metric: str) -> TrainingArguments:
    """The Trainer's settings for one seed: validated after each epoch or every --eval_steps; the best is kept."""
    every = arguments.data.eval_steps
    return build_training_arguments(
        arguments,
        run_folder,
        eval_strategy="epoch" if every is None else "steps",
        eval_on_start=False,
        save_strategy="best",
        save_only_model=True,
        load_best_model_at_end=True,
        metric_for_best_model=metric,
        greater_is_better=metric not in LOWER_IS_BETTER,
    )


def window_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """The head's loss, summed over the labels and divided by their number in the whole accumulation window.

    Not the model's own: several encoders' heads (BERT's) average each micro-batch and ignore the number of items, where
    the Trainer expects a sum.

    Args:
        outputs: with `logits` (B, C), (B, K, C) or (B, S, C).
        labels: class numbers (B,), (B, K) or (B, S), -100 where there is none; or numbers to predict (B,), floats.
        num_items_in_batch: of labels in the window; None: in this batch.
    """
    logits = outputs.logits.float()
    if labels.is_floating_point():
        total, count = mse_loss(logits.squeeze(-1), labels.float(), reduction="sum"), labels.numel()
    else:
        flat = labels.flatten()
        total = cross_entropy(logits.flatten(0, -2), flat, ignore_index=IGNORED_LABEL, reduction="sum")
        count = (flat != IGNORED_LABEL).sum().clamp(min=1)
    return total / (count if num_items_in_batch is None else num_items_in_batch)


# ---- validation and predictions --------------------------------------------------------------------------------------


def scores_of(task_type: str, labels: Labels) -> Evaluation:
    """The trainer's `Evaluation`: loss per label, and the task's scores, over all rows."""
    score = scorer(task_type, labels)

    def evaluation(trainer: SelectiveTrainer, loader: Iterable[dict[str, Tensor]]) -> dict[str, float]:
        rows: list[tuple] = []  # few bytes each, where logits would be many
        for batch in loader:
            true = batch.pop("labels")
            rows += _predicted(trainer.model(**batch).logits.float(), true)
        predicted, true, losses, counts = zip(*gather_object(rows), strict=True)
        return {"loss": sum(losses) / sum(counts)} | score(predicted, true, labels)

    return evaluation


def _predicted(logits: Tensor, true: Tensor) -> Iterable[tuple]:
    """Per row: what is predicted and true (a number, a class, or classes of words), the summed loss, labels."""
    if true.ndim == 2:
        known, predicted = true != IGNORED_LABEL, logits.argmax(-1)
        losses = cross_entropy(logits.transpose(1, 2), true, ignore_index=IGNORED_LABEL, reduction="none").sum(1)
        words = [[row[at].tolist() for row, at in zip(rows, known, strict=True)] for rows in (predicted, true)]
        return zip(*words, losses.tolist(), known.sum(1).tolist(), strict=True)
    if true.is_floating_point():
        predicted = logits.squeeze(-1)
        losses = mse_loss(predicted, true, reduction="none")
    else:
        predicted, losses = logits.argmax(-1), cross_entropy(logits, true, reduction="none")
    return zip(predicted.tolist(), true.tolist(), losses.tolist(), [1] * len(true), strict=True)


@torch.no_grad()
def predict(trainer: SelectiveTrainer, rows: Sequence[dict[str, Any]], labels: Labels) -> Iterator[dict[str, Any]]:
    """For each row "prediction": a class's name with its "probability", a number, or a name for each word.

    Every process predicts all rows; a word beyond --max_length has no prediction (None).
    """
    trainer.model.eval()
    size = trainer.args.eval_batch_size
    for start in range(0, len(rows), size):
        part = [dict(rows[row]) for row in range(start, min(start + size, len(rows)))]
        words = [item.pop("word_positions", None) for item in part]
        batch = {name: value.to(trainer.args.device) for name, value in trainer.eval_collator(part).items()}
        batch.pop("labels", None)
        with trainer.accelerator.autocast():
            logits = trainer.model(**batch).logits.float()
        for number, (scores, positions) in enumerate(zip(logits.cpu(), words, strict=True), start=start + 1):
            yield {"row": number} | _prediction(scores, positions, labels)


def _prediction(logits: Tensor, positions: list[int | None] | None, labels: Labels) -> dict[str, Any]:
    if labels.is_regression:
        return {"prediction": logits.item()}
    if positions is not None:
        best = logits.argmax(-1).tolist()
        return {"prediction": [None if p is None else labels.names[best[p]] for p in positions]}
    probabilities = logits.softmax(-1)
    best = int(probabilities.argmax())
    return {"prediction": labels.names[best], "probability": round(float(probabilities[best]), 6)}


# ---- the trainer -----------------------------------------------------------------------------------------------------


def build_classification_trainer(
    model: nn.Module,
    settings: TrainingArguments,
    train_rows: SeededRows,
    eval_rows: Sequence[dict[str, Any]] | Dataset,
    processing: Any,
    arguments: ClassificationArguments,
    labels: Labels,
) -> SelectiveTrainer:
    """The trainer of one seed, ready for `train()`; arguments as of `SelectiveTrainer`, and what the labels mean."""
    collator = training_collator(model, train_rows.rows, processing, arguments, labels)
    patience = arguments.run.early_stopping_patience
    return SelectiveTrainer(
        model,
        settings,
        train_rows,
        eval_rows,
        processing,
        arguments,
        collator=collator,
        eval_collator=replace(collator, draw=None),
        evaluation=scores_of(arguments.task.task_type, labels),
        loss=window_loss,
        callbacks=[] if patience is None else [EarlyStopping(patience)],
    )


def training_collator(
    model: nn.Module,
    rows: Sequence[dict[str, Any]] | Dataset,
    processing: Any,
    arguments: ClassificationArguments,
    labels: Labels,
) -> ClassificationCollator:
    """Makes batches of training rows, with their selection where `--tokentune` is given; the model may be on meta."""
    task_type, selection = arguments.task.task_type, arguments.selection
    if task_type == "image":
        pad, tokens = stack_images, tokens_per_image(model, rows[0]["pixel_values"])
    else:
        kind = DataCollatorForTokenClassification if task_type == "token" else DataCollatorWithPadding
        pad, tokens = kind(processing), 1
    if not selection.tokentune:
        return ClassificationCollator(pad, None, tokens)
    profile = profile_of(model)
    draw = EncoderDraw(
        prefix_length=selection.selected,
        strategy=selection.selection,
        pooling=profile.pooling,
        pad_token_id=pad_token(inner_model(model)),
        first_always=task_type == "image",
        in_place=profile.rows is Rows.ALL,
        outside=labels.outside,
    )
    return ClassificationCollator(pad, draw, tokens)


@torch.no_grad()
def tokens_per_image(model: nn.Module, pixels: Tensor | np.ndarray) -> int:
    """Tokens that the first layer gets for an image (channels, height, width): patches, class token, registers.

    1, the image itself, for a model without transformer layers (trained without a selection).
    """
    inner = inner_model(model)
    try:
        first = transformer_layers(inner).layers[0]
    except UnsupportedModelError:
        return 1
    lengths = []
    handle = first.register_forward_pre_hook(
        lambda layer, args, kwargs: lengths.append((args[0] if args else kwargs["hidden_states"]).shape[1]),
        with_kwargs=True,
    )
    was_training, weight = model.training, next(inner.parameters())
    model.eval()(pixel_values=torch.as_tensor(pixels)[None].to(weight.device, weight.dtype))
    model.train(was_training)
    handle.remove()
    return lengths[0]
