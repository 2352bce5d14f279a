"""The Hugging Face Trainer's settings for a command line, and how long a run they make."""

import logging
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import has_length

from tokentune.errors import UserError
from tokentune.processes import FSDP, engine
from tokentune.settings.finetune import Arguments
from tokentune.settings.flags import AUTO
from tokentune.settings.low_rank import TARGET_MODULES, is_low_rank
from tokentune.training.optimizers import LAYERWISE, check_optimizer

logger = logging.getLogger(__name__)

MOST_WARMUP, MOST_BETWEEN_LINES, LEAST_LINES = 3000, 1000, 50  # of `auto`; the first two are the released defaults
# Not all of Liger's kernels: its fused loss replaces the model's forward and takes (B, S) rows and labels, where
# `core/loss.py` takes the loss of the selected rows in chunks. Norms, rotary embeddings and MLPs act on each token.
BESIDE_TOKENTUNE = {"fused_linear_cross_entropy": False, "cross_entropy": False}


def build_training_arguments(arguments: Arguments, run_folder: Path, **changes: Any) -> TrainingArguments:
    """The Trainer's settings for a command line. Writes nothing.

    Args:
        changes: settings of this command that differ.

    Raises:
        UserError: an optimizer whose package or options are missing, a precision that the device cannot do.
    """
    optimization, output, data = arguments.optimization, arguments.output, arguments.data
    run = getattr(arguments, "run", None)  # an estimate has none
    try:
        settings: Any = dict(
            output_dir=str(run_folder),
            per_device_train_batch_size=optimization.micro_batch_size,
            per_device_eval_batch_size=optimization.micro_batch_size,
            gradient_accumulation_steps=optimization.accumulation,
            num_train_epochs=optimization.num_epochs,
            max_steps=optimization.max_steps or -1,
            learning_rate=optimization.learning_rate,
            weight_decay=optimization.weight_decay,
            warmup_steps=0 if optimization.warmup_steps == AUTO else optimization.warmup_steps,
            lr_scheduler_type=optimization.lr_scheduler_type,
            use_liger_kernel=arguments.model.use_liger_kernel,
            liger_kernel_config=BESIDE_TOKENTUNE if arguments.selection.tokentune else None,
            optim=optimization.optim.removesuffix(LAYERWISE),
            optim_args=optimization.optim_args,
            optim_target_modules=TARGET_MODULES if is_low_rank(optimization.optim) else None,
            max_grad_norm=optimization.max_grad_norm,
            seed=optimization.seed,
            data_seed=optimization.seed,
            bf16=arguments.model.bf16,
            fp16=arguments.model.fp16,
            use_cpu=not torch.accelerator.is_available(),
            dataloader_num_workers=data.num_workers,
            dataloader_pin_memory=torch.accelerator.is_available(),
            remove_unused_columns=False,  # the collator reads `draw_seed`, which the model does not take
            eval_strategy="no" if data.eval_steps is None else "steps",
            eval_steps=data.eval_steps,
            eval_on_start=bool(data.eval_dataset_name_or_path or getattr(data, "eval_fraction", None)),
            train_sampling_strategy="group_by_length" if data.group_by_length else "random",
            prediction_loss_only=True,
            save_steps=output.save_steps,
            save_total_limit=output.save_total_limit,
            logging_steps=1 if output.logging_steps == AUTO else output.logging_steps,
            logging_first_step=True,
            # The filter reads every loss on the host, which makes it wait for the GPU, and hides the losses that
            # `SelectiveTrainer` stops at.
            logging_nan_inf_filter=False,
            report_to=output.report_to or "none",
            run_name=run_folder.name,  # what trackers call the run
            disable_tqdm=True,
            accelerator_config={
                # FSDP's gradients would otherwise stay whole on every device until the last micro-batch.
                "gradient_accumulation_kwargs": {"sync_each_batch": True} if engine() == FSDP else None,
                # Every process reads a stream and takes its share of each batch.
                "dispatch_batches": False if getattr(data, "streaming", False) else None,
            },
        )
        best = getattr(run, "load_best_model_at_end", False)
        if best or getattr(run, "early_stopping_patience", None):
            settings |= {"metric_for_best_model": "loss", "greater_is_better": False}
            if best:
                settings |= {"load_best_model_at_end": True, "save_strategy": "best"}
        settings = TrainingArguments(**(settings | changes))
    except (ValueError, ImportError) as error:  # what is left after the flags' own checks: precision and devices
        raise UserError(f"this machine cannot train with these flags: {error}") from error
    check_optimizer(settings)
    # A plain run that sees several GPUs would be wrapped in nn.DataParallel, whose replicas call the original's layers.
    settings._n_gpu = min(settings.n_gpu, 1)
    return settings


def settle_by_length(settings: TrainingArguments, arguments: Arguments, steps: int) -> None:
    """Sets what `--warmup_steps auto` and `--logging_steps auto` come to in a run of so many optimizer steps."""
    found = []
    if arguments.optimization.warmup_steps == AUTO:
        # Rounded down: the first step of a warm-up has a learning rate of 0, which a run of few steps cannot spare.
        settings.warmup_steps = min(MOST_WARMUP, steps * 3 // 100)
        found.append(f"--warmup_steps {settings.warmup_steps}")
    if arguments.output.logging_steps == AUTO:
        settings.logging_steps = max(1, min(MOST_BETWEEN_LINES, steps // LEAST_LINES))
        found.append(f"--logging_steps {settings.logging_steps}")
    if found:
        logger.info("auto: %s (optimizer steps: %d)", " ".join(found), steps)


@dataclass
class Extent:
    """How long a run is: passes over the data and optimizer steps; in each pass optimizer steps and micro-batches."""

    epochs: int
    steps: int
    steps_per_epoch: int
    batches_per_epoch: int  # of one process

    @classmethod
    def of(cls, rows: Any, settings: TrainingArguments) -> "Extent":
        """`rows`: of training; a stream of them has no length, and needs a `max_steps`."""
        accumulation, steps = settings.gradient_accumulation_steps, settings.max_steps
        if not has_length(rows):
            return cls(sys.maxsize, steps, steps, steps * accumulation)
        batches = math.ceil(len(rows) / (settings.per_device_train_batch_size * settings.world_size))
        per_epoch = math.ceil(batches / accumulation)
        epochs = int(settings.num_train_epochs) if steps <= 0 else math.ceil(steps / per_epoch)
        return cls(epochs, steps if steps > 0 else epochs * per_epoch, per_epoch, batches)
