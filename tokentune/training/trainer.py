"""The trainer of a run: transformers' Trainer with its own loop (`training/loop.py`), which resumes bit for bit.

It adds token counts and memory to every log line, a validation loss per supervised token (not a mean of batch means),
the bytes that autograd saves for the backward pass in the first step, and it stops at a loss that is not finite. The
training loss needs no change: the collator masks the labels of unselected targets, so that `num_items_in_batch` counts
the selected supervised tokens of the whole accumulation window, and every split of a global batch into micro-batches
gives the same update.
"""

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import seed_worker

from tokentune.core.compat.fsdp import runs_together
from tokentune.core.compat.rotary_state import rotary_state_kept
from tokentune.core.patched import last_draw, set_prefix_length
from tokentune.core.saved_tensors.breakdown import KindOfModule
from tokentune.core.saved_tensors.saved_bytes import SavedForBackward
from tokentune.data.collators import ClassificationCollator
from tokentune.data.step_work import units_of_rows
from tokentune.errors import UserError
from tokentune.models.fingerprint import fingerprint_of_checkpoint
from tokentune.phases import phase
from tokentune.sampling.schedule import Size
from tokentune.settings.finetune import Arguments
from tokentune.settings.flags import AUTO
from tokentune.training.callbacks import Progress, without_bars
from tokentune.training.checkpoints.run_folder import no_empty_folders
from tokentune.training.diagnosing import GradientDiagnosis
from tokentune.training.distributed.engines import as_often_as_others, even_sampler
from tokentune.training.distributed.interruptions import until_interrupted
from tokentune.training.figures import RunFigures
from tokentune.training.grouping import GroupedSampler
from tokentune.training.loop import TrainingLoop
from tokentune.training.nan_batch import FirstBadLoss, write_nan_batch
from tokentune.training.offline import offline
from tokentune.training.optimizers import in_backward
from tokentune.training.trackers import prepare_trackers
from tokentune.training.trainer_arguments import Extent, settle_by_length

logger = logging.getLogger(__name__)

# A validation: "loss" and other figures by name, given the trainer and a loader of batches.
Evaluation = Callable[["SelectiveTrainer", Iterable[dict[str, Tensor]]], dict[str, float]]


class SelectiveTrainer(Trainer):
    """See the module.

    Attributes:
        figures: what the run counts and times.
        schedule: how the selection's size changes over the run; None: it does not.
        scoring_pass: whether the model makes a scoring pass over all tokens before each step.
        model_draws: whether the model then draws the selection, by those scores, and not the collator.
        diagnosis: compares gradients every some steps (--diagnose_steps); None: never.
        optim_in_backward: whether each weight is updated within the backward pass.
        flags: {flag: value} of the run, kept in its checkpoints.
        use_cache: of the model's config, where the Trainer switches it off; None: the config has none.
        base_fingerprint: of the weight files that adapters are trained on; None: not known, or no adapters.
        data_digest: of the training rows, kept in checkpoints; None: not known.
        units: what each row costs (R, 2), which --group_by_length groups by; None: rows come in random order.
        last_checkpoint: the newest one; None: there is none yet.
        progress: what the user sees of the steps.
        bad_loss: the first micro-batch whose loss was not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: TrainingArguments,
        train_rows: Any,
        eval_rows: Any,
        processing: Any,
        arguments: Arguments,
        *,
        collator: Callable[[list], dict[str, Tensor]],
        eval_collator: Callable[[list], dict[str, Tensor]],
        evaluation: Evaluation,
        loss: Callable[..., Tensor] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        """
        Args:
            model: with its adapters, and patched where tokens are selected.
            train_rows, eval_rows: of training (with `set_epoch`), and of validation or None.
            processing: tokenizer or image processor, saved beside the model.
            collator: makes batches of training rows and counts their tokens (`count`).
            loss: of (outputs, labels, num_items_in_batch); None: the model's own.
        """
        self.use_cache = getattr(model.config, "use_cache", None)
        # The Trainer makes its folder at once; here `train` does, as a run may still be refused, or be a dry one.
        with no_empty_folders(Path(settings.output_dir)) if settings.should_save else nullcontext():
            super().__init__(
                model=model,
                args=settings,
                data_collator=collator,
                train_dataset=train_rows,
                eval_dataset=eval_rows,
                processing_class=processing,
                compute_loss_func=loss,
                callbacks=list(callbacks),
            )
        self.eval_collator, self.evaluation = eval_collator, evaluation
        selection = arguments.selection
        self.schedule = selection.schedule if selection.tokentune else None
        self.scoring_pass, self.model_draws = selection.scoring_pass, selection.scoring_pass and selection.scored
        self.diagnosis = GradientDiagnosis(selection.diagnose_steps) if selection.diagnose_steps is not None else None
        self.optim_in_backward = arguments.optimization.optim_in_backward
        self.flags = arguments.settings()
        base, self.base_fingerprint = arguments.model, None
        if arguments.adapters.lora and not getattr(base, "from_scratch", False) and settings.should_save:
            self.base_fingerprint = fingerprint_of_checkpoint(
                base.model_name_or_path, allow_pickle=base.allow_pickle, local_files_only=True
            )
        self.data_digest: str | None = None
        self.units: np.ndarray | None = None
        if settings.train_sampling_strategy == "group_by_length":
            self.units = units_of_rows(train_rows, selection, lora=arguments.adapters.lora, causal=self.causal)
        self.last_checkpoint: Path | None = None
        self.figures = RunFigures(model, settings.device)
        self.bad_loss = FirstBadLoss(settings.device)
        self.remove_callback(PrinterCallback)
        self.progress = Progress(self.figures.memory, epochs=not isinstance(train_rows, IterableDataset))
        self.add_callback(self.progress)
        prepare_trackers(self.callback_handler.callbacks, arguments.output.logging_dir)
        steps = Extent.of(train_rows, settings).steps
        settle_by_length(settings, arguments, steps)
        if settings.warmup_steps >= steps:
            logger.warning(
                "--warmup_steps %d: this run has %d optimizer steps, so the learning rate never reaches its peak",
                *(settings.warmup_steps, steps),
            )

    def train(self, resume_from_checkpoint: str | Path | None = None) -> None:
        """Trains to the end, from a checkpoint or from the beginning.

        Raises:
            UserError: a loss that is no number.
            Interrupted: after a signal, with a checkpoint written.
        """
        if self.args.should_save:
            Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
        with closing(self.progress), without_bars():
            TrainingLoop(self).run(None if resume_from_checkpoint is None else Path(resume_from_checkpoint))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer; with `optim_in_backward` one per parameter."""
        if self.optim_in_backward and self.optimizer is None:
            chosen = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer_cls_and_kwargs = in_backward(*chosen, self.model)
        return super().create_optimizer(model)

    @property
    def auto_values(self) -> dict[str, int]:
        """What the flags that were given as `auto` came to; a setting of the Trainer has its flag's name."""
        names = ("gradient_accumulation_steps", "warmup_steps", "logging_steps")
        return {name: getattr(self.args, name) for name in names if self.flags[name] == AUTO}

    def set_micro_batch(self, sequences: int, accumulation: int) -> None:
        """Splits each global batch into so many micro-batches of so many sequences. To be called before `train()`."""
        self.args.per_device_train_batch_size = self.args.per_device_eval_batch_size = sequences
        self.args.gradient_accumulation_steps = accumulation

    def create_accelerator_and_postprocess(self) -> None:
        """The Trainer's accelerator; FSDP computes in its 16 bits, and keeps weights and sums of gradients in float32.

        accelerate's own policy would sum gradients, and round the loss, in 16 bits.
        """
        super().create_accelerator_and_postprocess()
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None:
            dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
            reduce_dtype = None if dtype is None else torch.float32
            plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduce_dtype)
            # A checkpointed layer returns its hidden states through an identity, a view. Nothing writes into them.
            warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(\w+\) returned a view tensor")

    def get_train_dataloader(self) -> DataLoader:
        """Batches of the training rows, each process's share of them, in an order of the seed."""
        rows, settings = self.train_dataset, self.args
        options: dict[str, Any] = {"pin_memory": settings.dataloader_pin_memory}
        if not isinstance(rows, IterableDataset):
            seeds = {"num_workers": settings.dataloader_num_workers, "rank": settings.process_index}
            options |= {"sampler": self._sampler(), "worker_init_fn": partial(seed_worker, **seeds)}
        return self._loader(rows, settings.train_batch_size, self.data_collator, **options)

    def _sampler(self) -> Sampler:
        settings, order = self.args, None
        if self.units is not None:
            together = settings.train_batch_size * settings.gradient_accumulation_steps * settings.world_size
            order = GroupedSampler(self.units, settings.data_seed, together)
        return even_sampler(self, order) or order or RandomSampler(self.train_dataset)

    def _loader(self, rows: Any, batch_size: int, collate: Callable, **options: Any) -> DataLoader:
        options |= {"batch_size": batch_size, "num_workers": self.args.dataloader_num_workers}
        return self.accelerator.prepare(DataLoader(rows, collate_fn=collate, **options))

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor | int | None]:
        """An optimizer step's micro-batches, and the number of their targets; a schedule's selection is drawn here.

        Not in the collator: workers make batches ahead, before their step is known.
        """
        if self.schedule is not None:
            size = self.schedule.at(self.state.global_step, self.state.max_steps)
            epoch_iterator = map(partial(self.drawn, size=size), epoch_iterator)
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def drawn(self, batch: dict[str, Tensor], size: Size) -> dict[str, Tensor]:
        """A schedule's batch with a selection of this size; where the model draws, it gets the size."""
        if not self.model_draws:
            return self.data_collator.draw(batch, size)
        set_prefix_length(self.model, size)
        return batch

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
        """The Trainer's step (forward, backward), counted. Returns the micro-batch's share of the loss."""
        if not self.figures.has_begun:
            self.figures.begin()
        if self.args.device.type == "cpu" or self.state.global_step % 10 == 0:
            self.check_finite()
        processed, *selected = self.data_collator.count(inputs)
        self.figures.count(processed, *([] if self.model_draws else selected))
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.scoring_pass:
            self.figures.count_draw(last_draw(self.model), selected=self.model_draws)
        if self.diagnosis is not None:
            self.diagnosis.note(self, inputs, partial(super().training_step, model))
        return loss

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """The Trainer's loss. The first training step also measures what autograd saves."""
        if self.figures.saved_for_backward_bytes is not None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        kinds = KindOfModule(self.model)
        self.figures.batch_shape = tuple(next(iter(inputs.values())).shape[:2])
        with kinds, SavedForBackward(self.model, kinds.now) as saved:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.figures.saved_for_backward_bytes, self.figures.saved_for_backward_by = saved.bytes, saved.bytes_by
        return loss

    def check_finite(self) -> None:
        """Raises UserError where the loss of any step so far was not finite, with its batch written to a file."""
        number = self.bad_loss.number()
        if number is not None:
            path, step = write_nan_batch(self, number)
            batch = "" if path is None else f" The batch is in {path}."
            raise UserError(
                f"the training loss became nan or infinite at step {step}: stopped.{batch}\n"
                "Try a lower --learning_rate, a longer --warmup_steps, or --bf16 (float16 overflows above 65504)."
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds memory and speed to a training log line, for the progress bar, trackers and the summary."""
        if "loss" in logs:
            self.check_finite()
            logs |= self.figures.log_entry()
            if self.diagnosis is not None:
                logs |= self.diagnosis.latest
                self.diagnosis.latest = {}
        super().log(logs, start_time)

    def average_weights(self) -> None:
        """Switches a schedule-free optimizer to its averaged weights, which are to be used; it trains others."""
        if callable(getattr(self.optimizer, "eval", None)):
            self.optimizer.eval()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The Trainer's save, without the pickle of its settings; a model whose loss was not finite is not saved."""
        self.check_finite()
        with offline():
            super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            (Path(output_dir or self.args.output_dir) / TRAINING_ARGS_NAME).unlink(missing_ok=True)

    @property
    def causal(self) -> bool:
        """Whether the model predicts the next token, and not a class or a number."""
        return not isinstance(self.data_collator, ClassificationCollator)

    @property
    def saved_step(self) -> int:
        """After training: the optimizer step that the weights are from, the last one or the best one."""
        best = self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None
        return self.state.best_global_step if best else self.state.global_step

    @phase("evaluate")
    def evaluate(self) -> dict[str, float]:
        """The figures of `self.evaluation` over all rows, by the full forward pass without a selection.

        Raises:
            UserError: the loss is not finite.
        """
        started = time.perf_counter()
        self.figures.memory()  # notes training's peak, which evaluation must not raise
        loader = self._loader(self.eval_dataset, self.args.eval_batch_size, self.eval_collator)
        # No row may count twice. A process may then have one batch less, which `self.model`, the model inside
        # DistributedDataParallel, allows.
        loader.batch_sampler.even_batches = False
        self.model.eval()
        self.average_weights()
        # A data loader draws a seed from the CPU's generator: forked, so that validation does not change training.
        with (
            torch.no_grad(),
            self.accelerator.autocast(),
            torch.random.fork_rng(devices=[]),
            rotary_state_kept(self.model),
        ):
            batches: Iterable = loader
            if runs_together(self.model):
                batches = as_often_as_others(loader, self.eval_dataset, self.eval_collator)
            figures = self.evaluation(self, until_interrupted(batches))
        if not math.isfinite(figures["loss"]):
            raise UserError(f"the validation loss is {figures['loss']} at step {self.state.global_step}: stopped.")
        self.figures.evaluations.append((self.state.global_step, figures))
        self.figures.reset_peaks()
        seconds = time.perf_counter() - started
        self.figures.evaluation_seconds += seconds if self.figures.has_begun else 0.0
        metrics = {f"eval_{name}": figure for name, figure in figures.items()} | {"eval_runtime": round(seconds, 3)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
