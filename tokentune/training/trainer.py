"""Training: the Hugging Face Trainer, set up and watched, and the saving of its result.

Legend: B sequences in a micro-batch, S tokens, K selected tokens. Memory in bytes unless a name says GiB.

What this module adds to the Trainer: the token counts and memory figures of every log line, one validation loss per
supervised token (not a mean of batch means), the bytes of the first step that autograd keeps for the backward pass,
and an end to a run whose loss is no number any more. The loss needs no change: the collator masks the labels of
unselected targets, so the Trainer's `num_items_in_batch` counts the selected supervised tokens of the whole
accumulation window, and every split of a global batch into micro-batches gives the same update.
"""

import logging
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from tokentune.core.compat.fsdp import is_split, own_class, own_part, runs_together, size_of, whole_tensor
from tokentune.core.compat.rotary_state import rotary_state_kept
from tokentune.core.patched import last_draw, set_prefix_length
from tokentune.core.saved_tensors.breakdown import KindOfModule
from tokentune.core.saved_tensors.saved_bytes import BYTES_IN_GIB, SavedForBackward
from tokentune.data.collators import CausalCollator, SeededRows
from tokentune.data.packing import PackedCollator, PackedRows
from tokentune.environment import memory_usage, reset_peak
from tokentune.errors import UserError
from tokentune.models.saved_types import hold_in, kept_in_float32
from tokentune.sampling.schedule import Schedule
from tokentune.settings.finetune import Arguments
from tokentune.training.callbacks import DrawsOfTheEpoch, EarlyStopping, LastStep, Progress, SaveEvery, StepTimes
from tokentune.training.checkpoints.run_state import Resumption
from tokentune.training.checkpoints.saving import StorageError, written_into
from tokentune.training.diagnosing import DiagnosedSteps, GradientDiagnosis
from tokentune.training.distributed.engines import as_often_as_others, even_sampler
from tokentune.training.distributed.interruptions import until_interrupted
from tokentune.training.evaluation import loss_per_token
from tokentune.training.nan_batch import FirstBadLoss, write_nan_batch
from tokentune.training.offline import offline
from tokentune.training.optimizers import in_backward
from tokentune.training.resumable_trainer import EndWhenAsked, ResumableTrainer
from tokentune.training.split_saving import save_split_model, set_fsdp_policy
from tokentune.training.trackers import keep_trackers_from_harm
from tokentune.training.trainer_arguments import update_count

logger = logging.getLogger(__name__)


# What a validation finds out, given the trainer and a loader of batches: "loss" and other figures by name.
Evaluation = Callable[["SelectiveTrainer", DataLoader], dict[str, float]]


class SelectiveTrainer(ResumableTrainer):
    """The resumable Trainer with counts, memory figures and a validation over all rows at once.

    Attributes:
        evaluations: (optimizer step, figures), in order; the figures are those of `Evaluation`.
        saved_for_backward_bytes: what autograd kept after the first micro-batch's forward pass; None before it.
        saved_for_backward_by: the same by kind of module (`core/saved_tensors/breakdown.py`).
        batch_shape: of that micro-batch, (sequences, tokens); None before it.
        step_seconds: of each optimizer step, without logging, evaluating and saving.
        evaluation_seconds: time spent in `evaluate`, and in comparing gradients, since the first step began.
        training_seconds: from the first step's beginning to the last log entry, those left out.
        schedule: how the selection's size changes over the run; None: it does not.
        looks: whether the model looks at all tokens before each step.
        model_draws: whether it then draws the selection itself, by what it saw, and not the collator.
        diagnosis: compares gradients every some steps (--diagnose_steps); None: not.
        tokens: trained on up to the last log entry, over all processes: `processed` (real ones), `selected`, and
            `selected_supervised` targets.
        use_cache: the model's own setting, which the Trainer switches off in its config; None where it has none.
    """

    def __init__(
        self,
        *args: Any,
        eval_collator: Callable[[list], dict[str, Tensor]],
        evaluation: Evaluation,
        **kwargs: Any,
    ) -> None:
        self.use_cache = getattr(kwargs["model"].config, "use_cache", None)
        super().__init__(*args, **kwargs)
        self.eval_collator, self.evaluation = eval_collator, evaluation
        self.optim_in_backward = False
        self.diagnosis: GradientDiagnosis | None = None
        self.schedule: Schedule | None = None
        self.looks = self.model_draws = False
        self.saved_for_backward_bytes: int | None = None
        self.saved_for_backward_by: dict[str, int] = {}
        self.batch_shape: tuple[int, int] | None = None
        self.step_seconds: list[float] = []
        self.evaluation_seconds = self.training_seconds = 0.0
        self.evaluations: list[tuple[int, dict[str, float]]] = []
        self._peak_bytes = self.peak_before = 0
        self._started: float | None = None
        self.seconds_before = 0.0
        self._place = (0, -1)  # optimizer step, micro-batch of it
        self.tokens = dict.fromkeys(("processed", "selected", "selected_supervised"), 0)
        # Both stay on the device and are read at log lines: reading them makes the host wait for the GPU.
        self._counts = torch.zeros(3, dtype=torch.int64, device=self.args.device)
        # Of the looks since the last log line: the summed loss over all supervised targets, and how many these were.
        self.loss_of_all = torch.zeros(2, device=self.args.device)
        self._bad_loss = FirstBadLoss(self.args.device)

    @property
    def validation_losses(self) -> list[tuple[int, float]]:
        """(optimizer step, validation loss), in order."""
        return [(step, figures["loss"]) for step, figures in self.evaluations]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's; with `optim_in_backward` one per parameter."""
        if self.optim_in_backward and self.optimizer is None:
            chosen = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer_cls_and_kwargs = in_backward(*chosen, self.model)
        return super().create_optimizer(model)

    def set_micro_batch(self, sequences: int, accumulation: int) -> None:
        """Splits each global batch into so many micro-batches of so many sequences. To be called before `train()`."""
        self.args.per_device_train_batch_size = self.args.per_device_eval_batch_size = sequences
        self.args.gradient_accumulation_steps = accumulation
        self._train_batch_size = self.args.train_batch_size  # of which the Trainer took a copy, and takes one likewise

    # -- several processes

    def create_accelerator_and_postprocess(self) -> None:
        """The Trainer's accelerator, with this project's precision where FSDP adds gradients up."""
        super().create_accelerator_and_postprocess()
        set_fsdp_policy(self.accelerator)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Any:
        return even_sampler(self) or super()._get_train_sampler(train_dataset)

    # -- one step

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Any:
        """Draws an optimizer step's micro-batches where their size depends on the step; then their labels are counted.

        Here and not in the collator: workers make batches ahead, before anyone knows in which step they will be.
        """
        if self.schedule is not None:
            size = self.schedule.at(self.state.global_step, self.state.max_steps)
            batch_samples[:] = [self.drawn(batch, size) for batch in batch_samples]
        return super()._get_num_items_in_batch(batch_samples, device)

    def drawn(self, batch: dict[str, Tensor], size: int | float) -> dict[str, Tensor]:
        """A batch of a schedule with its selection of this size; where the model draws, it is told."""
        if not self.model_draws:
            return self.data_collator.draw(batch, size)
        set_prefix_length(self.model, size)
        return batch

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
        """The Trainer's step (forward, backward), counted. Returns the micro-batch's share of the loss."""
        if self._started is None:
            self._started = time.perf_counter() - self.seconds_before
            self.reset_peaks()  # what loading the weights took is no part of training
            self._peak_bytes = self.peak_before
        if self.args.device.type == "cpu" or self.state.global_step % 10 == 0:
            self.check_finite()
        self._count(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.looks:
            self._count_look()
        if self.diagnosis is not None:
            self.diagnosis.note(self, inputs, partial(super().training_step, model))
        step, place = self._place
        self._place = (self.state.global_step, place + 1 if step == self.state.global_step else 0)
        self._bad_loss.note(loss, self._place[0] * self.args.gradient_accumulation_steps + self._place[1])
        return loss

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """The Trainer's loss. The first training step's also measures what autograd keeps; later ones run free."""
        if self.saved_for_backward_bytes is not None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        kinds = KindOfModule(self.model)
        self.batch_shape = tuple(next(iter(inputs.values())).shape[:2])
        with kinds, SavedForBackward(self.model, kinds.now) as saved:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.saved_for_backward_bytes, self.saved_for_backward_by = saved.bytes, saved.bytes_by
        return loss

    def _count(self, inputs: dict[str, Tensor]) -> None:
        counts = torch.stack(self.data_collator.count(inputs))
        if self.model_draws:
            counts[1:] = 0
        self._counts += counts.to(self._counts.device, non_blocking=True)

    def _count_look(self) -> None:
        drawn = last_draw(self.model)
        if self.model_draws:
            self._counts[1:] += torch.stack([drawn.selected, drawn.supervised]).to(self._counts.device)
        if drawn.loss is not None:
            self.loss_of_all += torch.stack([drawn.loss, drawn.targets]).to(self.loss_of_all)

    def check_finite(self) -> None:
        """Raises UserError when the loss of any step so far was no finite number; writes its batch down first."""
        number = self._bad_loss.number()
        if number is not None:
            path, step = write_nan_batch(self, number)
            batch = "" if path is None else f" The batch is in {path}."
            raise UserError(
                f"the training loss became nan or infinite at step {step}: stopped.{batch}\n"
                "Try a lower --learning_rate, a longer --warmup_steps, or --bf16 (float16 overflows above 65504)."
            )

    # -- figures

    def seconds(self) -> float:
        """Since the first step began, of all processes that this run was resumed in."""
        return self.seconds_before if self._started is None else time.perf_counter() - self._started

    def memory_figures(self) -> dict[str, int]:
        """Bytes of all devices that hold weights: now allocated, now reserved, and the peak of training so far."""
        devices = {parameter.device for parameter in self.model.parameters()}
        usages = [memory_usage(device) for device in devices]
        figures = {name: sum(usage[name] for usage in usages) for name in usages[0]}
        self._peak_bytes = max(self._peak_bytes, figures["peak_bytes"])
        return figures | {"peak_bytes": self._peak_bytes}

    def reset_peaks(self) -> None:
        """Starts the devices' peaks anew; the peak of training so far is kept."""
        for device in {parameter.device for parameter in self.model.parameters()}:
            reset_peak(device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds memory and speed to a training log line, for the bar, TensorBoard and the summary alike."""
        if "loss" in logs:
            self.check_finite()
            figures = self.memory_figures()
            if self.optim_in_backward and self._started is not None:  # the Trainer found no gradients
                logs["grad_norm"] = self.optimizer.optimizer.gradient_norm()
            logs |= {f"memory_{name.removesuffix('_bytes')}_gib": size / BYTES_IN_GIB for name, size in figures.items()}
            seconds = self.seconds() - self.evaluation_seconds
            counts = self.accelerator.reduce(self._counts, "sum").tolist()
            loss_of_all, number = self.accelerator.reduce(self.loss_of_all, "sum").tolist()
            if number:
                logs["loss_all_tokens"] = loss_of_all / number
            self.loss_of_all.zero_()
            new_tokens = counts[0] - self.tokens["processed"]
            if self.diagnosis is not None:
                logs |= self.diagnosis.latest
                self.diagnosis.latest = {}
            logs["tokens_per_second"] = new_tokens / (seconds - self.training_seconds)
            self.training_seconds, self.tokens = seconds, dict(zip(self.tokens, counts, strict=True))
        super().log(logs, start_time)

    def average_weights(self) -> None:
        """Puts the weights in place that the optimizer means to be used: schedule-free ones train others."""
        if callable(getattr(self.optimizer, "eval", None)):
            self.optimizer.eval()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The Trainer's save; a model whose loss was no number is not saved."""
        self.check_finite()
        with offline():
            super().save_model(output_dir, _internal_call)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        # What `save_strategy="best"` saves after an evaluation; --save_steps asks for more.
        best = super()._determine_best_metric(metrics, trial)
        return best or self.state.global_step % self.args.save_steps == 0 or self.asked is not None

    def _load_best_model(self) -> None:
        super()._load_best_model()
        metric, best = self.args.metric_for_best_model.removeprefix("eval_"), self.state.best_metric
        logger.info("the result is that of step %d: validation %s %.4f, the best", self.saved_step, metric, best)

    @property
    def saved_step(self) -> int:
        """After training: the optimizer step that the weights are from, the last one or the best one."""
        best = self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None
        return self.state.best_global_step if best else self.state.global_step

    # -- validation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The figures of `self.evaluation` over all rows, by the full forward pass without a selection.

        Raises:
            UserError: the loss is not finite.
        """
        started = time.perf_counter()
        self.memory_figures()  # takes note of training's peak, which evaluation's must not raise
        rows = eval_dataset if eval_dataset is not None else self.eval_dataset
        loader = self.accelerator.prepare(
            DataLoader(
                rows,
                batch_size=self.args.eval_batch_size,
                collate_fn=self.eval_collator,
                num_workers=self.args.dataloader_num_workers,
            )
        )
        # Among several processes no row is to count twice: one may then have a batch less, which `self.model`, the
        # model inside of DistributedDataParallel, does not mind.
        loader.batch_sampler.even_batches = False
        self.model.eval()
        self.average_weights()
        # A data loader takes a seed from the CPU's generator; forked, so that watching a run does not change it.
        with (
            torch.no_grad(),
            self.accelerator.autocast(),
            torch.random.fork_rng(devices=[]),
            rotary_state_kept(self.model),
        ):
            together = runs_together(self.model)
            batches = as_often_as_others(loader, rows, self.eval_collator) if together else loader
            figures = self.evaluation(self, until_interrupted(batches))
        if not math.isfinite(figures["loss"]):
            raise UserError(f"the validation loss is {figures['loss']} at step {self.state.global_step}: stopped.")
        self.evaluations.append((self.state.global_step, figures))
        self.reset_peaks()
        seconds = time.perf_counter() - started
        self.evaluation_seconds += seconds if self._started else 0.0
        metrics = {f"{metric_key_prefix}_{name}": figure for name, figure in figures.items()}
        metrics[f"{metric_key_prefix}_runtime"] = round(seconds, 3)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def build_trainer(
    model: nn.Module,
    settings: TrainingArguments,
    train_rows: SeededRows,
    eval_rows: Dataset | None,
    tokenizer: PreTrainedTokenizerBase,
    arguments: Arguments,
) -> SelectiveTrainer:
    """The trainer of a run, ready for `train()`. Creates the run's folder (the Trainer does).

    Args:
        model: with its adapters, and patched where `--tokentune` is given.
        train_rows, eval_rows: encoded rows (`input_ids`, `labels`); eval_rows None: no evaluation.
        tokenizer: has a pad token; saved beside the model.
    """
    trainer = SelectiveTrainer(
        model=model,
        args=settings,
        data_collator=training_collator(arguments, tokenizer, packed=isinstance(train_rows, PackedRows)),
        eval_collator=CausalCollator(pad_token_id=tokenizer.pad_token_id),
        evaluation=loss_per_token,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        callbacks=_callbacks(arguments),
    )
    if not trainer.model_accepts_loss_kwargs and settings.gradient_accumulation_steps > 1:
        logger.warning(
            "%s does not take num_items_in_batch: micro-batches weigh the same, however many targets they hold",
            type(model).__name__,
        )
    return watched(trainer, train_rows, arguments)


def training_collator(
    arguments: Arguments, tokenizer: PreTrainedTokenizerBase, *, packed: bool
) -> CausalCollator | PackedCollator:
    """What makes batches of training rows, with their selection where `--tokentune` is given. `packed`: their kind."""
    selection = arguments.selection
    collator = CausalCollator(
        pad_token_id=tokenizer.pad_token_id,
        prefix_length=selection.selected if selection.tokentune else None,
        strategy=selection.selection,
        keep_labels=selection.diagnose_steps is not None or selection.looks,
        draw_later=selection.scored or selection.schedule is not None,
    )
    return PackedCollator(collator) if packed else collator


def _callbacks(arguments: Arguments) -> list[TrainerCallback]:
    """Those of early stopping and of keeping the best weights."""
    patience = arguments.run.early_stopping_patience
    callbacks: list[TrainerCallback] = [SaveEvery()] if arguments.run.load_best_model_at_end else []
    return callbacks + ([EarlyStopping(patience)] if patience is not None else [])


def watched(trainer: SelectiveTrainer, train_rows: SeededRows, arguments: Arguments) -> SelectiveTrainer:
    """The trainer itself, with this project's callbacks for the Trainer's own."""
    settings = trainer.args
    trainer.optim_in_backward = arguments.optimization.optim_in_backward
    trainer.add_callback(DrawsOfTheEpoch(train_rows))
    trainer.add_callback(LastStep())
    trainer.add_callback(StepTimes(trainer.step_seconds))
    if arguments.selection.diagnose_steps is not None:
        trainer.diagnosis = GradientDiagnosis(arguments.selection.diagnose_steps)
        trainer.add_callback(DiagnosedSteps(trainer))
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(Progress(trainer.memory_figures, epochs=not isinstance(train_rows, IterableDataset)))
    trainer.flags = arguments.settings()
    trainer.schedule = arguments.selection.schedule if arguments.selection.tokentune else None
    trainer.looks = arguments.selection.looks
    trainer.model_draws = trainer.looks and arguments.selection.scored
    trainer.add_callback(Resumption(trainer))
    trainer.add_callback(EndWhenAsked(trainer))
    keep_trackers_from_harm(trainer)
    if arguments.output.logging_dir is not None:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback):  # it has no argument for this, only an environment variable
                callback.logging_dir = arguments.output.logging_dir
    rows = 0 if settings.max_steps > 0 else len(train_rows)  # a stream of rows has no length, and needs --max_steps
    steps = update_count(rows, settings)
    if settings.warmup_steps >= steps:
        logger.warning(
            "--warmup_steps %d: this run has %d optimizer steps, so the learning rate never reaches its peak",
            settings.warmup_steps,
            steps,
        )
    return trainer


def save_result(trainer: SelectiveTrainer, run_folder: Path, saved_dtype: torch.dtype) -> dict[str, Any]:
    """Saves the adapter, or the whole model in `saved_dtype`, and the tokenizer. To be called once, after training.

    Returns:
        `class`, `parameters`, `trainable_parameters` and `saved_dtype` (adapters stay in float32).

    Raises:
        UserError: every adapter is still what it was, so that nothing was learnt.
    """
    model = trainer.model
    trainer.average_weights()
    if isinstance(model, PreTrainedModel):
        parameters = list(model.parameters())
        trained, total = (sum(map(size_of, kind)) for kind in ([p for p in parameters if p.requires_grad], parameters))
        core, dtype = model, saved_dtype
        if not is_split(model):
            hold_in(model, saved_dtype)  # float32 masters are for training; the checkpoint keeps its type and size
    else:
        check_adapters_moved(model)
        trained, total = model.get_nb_trainable_parameters()
        core, dtype = model.get_base_model(), torch.float32
    if trainer.use_cache is not None:
        core.config.use_cache = trainer.use_cache  # off in training; saved off, it would slow every generation down
    try:
        with written_into(run_folder, writes=trainer.args.should_save) as folder:
            if is_split(model):
                trainer.check_finite()
                kept = kept_in_float32(model, dtype) if isinstance(model, PreTrainedModel) else ()
                save_split_model(trainer, folder, dtype, kept)
            else:
                trainer.save_model(str(folder))
    except StorageError as error:
        kept = trainer.last_checkpoint
        cure = f"Make room, and go on from {kept}: the same command with --resume_from_checkpoint."
        if kept is None:
            cure = "No checkpoint is there to go on from: make room, and start again, with --save_steps."
        raise UserError(f"the trained model could not be written to {run_folder}: {error}.\n{cure}") from error
    return {
        "class": own_class(core).__name__,
        "parameters": total,
        "trainable_parameters": trained,
        "saved_dtype": str(dtype).removeprefix("torch."),
    }


def check_adapters_moved(model: nn.Module) -> None:
    """Refuses adapters that training left at their start: one factor of each begins at zero (B; A for embeddings)."""
    zero_at_start = ("lora_B", "lora_embedding_A")
    factors = [p for name, p in model.named_parameters() if any(part in name for part in zero_at_start)]
    if not sum(whole_tensor(own_part(factor).detach().abs().sum()).item() for factor in factors) > 0:
        raise UserError(
            "nothing was learnt: every lora_B is still zero after training, and is not saved.\n"
            "A learning rate of 0 does this: a run of one step, with --warmup_steps above 0, has no other."
        )
