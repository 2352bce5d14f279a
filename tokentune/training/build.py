"""The trainer of `finetune.py`, and its collator."""

import logging

from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, TrainingArguments

from tokentune.data.collators import CausalCollator, SeededRows
from tokentune.data.packing import PackedCollator, PackedRows
from tokentune.settings.finetune import Arguments
from tokentune.settings.model import SelectionArguments
from tokentune.training.callbacks import EarlyStopping
from tokentune.training.evaluation import loss_per_token
from tokentune.training.trainer import SelectiveTrainer

logger = logging.getLogger(__name__)


def build_trainer(
    model: nn.Module,
    settings: TrainingArguments,
    train_rows: SeededRows,
    eval_rows: Dataset | None,
    tokenizer: PreTrainedTokenizerBase,
    arguments: Arguments,
) -> SelectiveTrainer:
    """The trainer of a run, ready for `train()`; arguments as of `SelectiveTrainer`."""
    patience = arguments.run.early_stopping_patience
    trainer = SelectiveTrainer(
        model,
        settings,
        train_rows,
        eval_rows,
        tokenizer,
        arguments,
        collator=training_collator(arguments.selection, tokenizer, packed=isinstance(train_rows, PackedRows)),
        eval_collator=CausalCollator(pad_token_id=tokenizer.pad_token_id),
        evaluation=loss_per_token,
        callbacks=[] if patience is None else [EarlyStopping(patience)],
    )
    if not trainer.model_accepts_loss_kwargs and settings.gradient_accumulation_steps > 1:
        logger.warning(
            "%s does not take num_items_in_batch: micro-batches weigh the same, however many targets they hold",
            type(model).__name__,
        )
    return trainer


def training_collator(
    selection: SelectionArguments, tokenizer: PreTrainedTokenizerBase, *, packed: bool
) -> CausalCollator | PackedCollator:
    """Makes batches of training rows, with their selection where `--tokentune` is given. `packed`: rows are packed."""
    collator = CausalCollator(
        pad_token_id=tokenizer.pad_token_id,
        prefix_length=selection.selected if selection.tokentune else None,
        strategy=selection.selection,
        keep_labels=selection.diagnose_steps is not None or selection.scoring_pass,
        draw_later=selection.scored or selection.schedule is not None,
        independent=selection.gradient_correction > 0,
    )
    return PackedCollator(collator) if packed else collator
