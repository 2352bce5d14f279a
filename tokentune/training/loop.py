"""The training loop: epochs, windows of micro-batches, updates; after each update its log line, validation, checkpoint.

It replaces the loop of transformers' Trainer, whose optimizers, schedulers, engines (DDP, FSDP, DeepSpeed), loss and
callbacks it calls. A resumed run has to end with the same bits, whether it was interrupted after a step, in a
validation or at an epoch's end. That depends on the order of the loop's lines, which the Trainer keeps in private
methods and changes from release to release.
"""

import contextlib
import logging
import math
import time
from pathlib import Path
from typing import NoReturn

import torch
from accelerate import skip_first_batches
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, ProcessorMixin, Trainer, TrainerState
from transformers.integrations.liger import apply_liger_kernel
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, align_special_tokens, speed_metrics

from tokentune.training.checkpoints.run_state import (
    load_best_weights,
    load_weights,
    loads_weights,
    read_run_state,
    restore_run,
)
from tokentune.training.checkpoints.saving import rotate
from tokentune.training.checkpoints.writing import write_checkpoint
from tokentune.training.distributed.interruptions import Interrupted, interruption, signal_name
from tokentune.training.nan_batch import sampler_of
from tokentune.training.optimizers import load_optimizer
from tokentune.training.trainer_arguments import Extent

logger = logging.getLogger(__name__)


class TrainingLoop:
    """One call of a `SelectiveTrainer`'s `train`.

    Attributes:
        loss_sum: of the micro-batches' losses since the last log entry.
        logged_step: the optimizer step of that entry.
        gradient_norm, learning_rate: of the last optimizer step; None before it.
        best_before: best metric and its step before the last validation.
        asked: the signal that asked the run to end; None: none did.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.loss_sum = torch.zeros((), device=trainer.args.device)
        self.logged_step = 0
        self.gradient_norm: Tensor | float | None = None
        self.learning_rate: float | None = None
        self.best_before: tuple[float | None, int | None] = (None, None)
        self.asked: int | None = None
        self._loss_total = 0.0  # of the entries logged by this process

    def run(self, checkpoint: Path | None) -> None:
        """Trains to the end, from a checkpoint or from the beginning.

        Raises:
            Interrupted: after a signal, with a checkpoint written.
        """
        trainer, settings = self.trainer, self.trainer.args
        model, loader = self._prepare(checkpoint)
        state, extent = trainer.state, self.extent
        first_step, started = state.global_step, time.time()
        self.logged_step = first_step
        model.zero_grad()
        self._tell("on_train_begin")
        at_end = state.global_step >= state.max_steps
        if checkpoint is not None:
            at_end = self._restore(checkpoint) or at_end
        elif settings.eval_on_start:
            self._evaluate()
        loss_before = self.loss_sum.item()
        if at_end:
            trainer.control.should_training_stop = trainer.control.should_log = True  # the last step, if it was not yet
            self._log_evaluate_save()
        epoch, steps_in_epoch = divmod(state.global_step, extent.steps_per_epoch)
        skipped = steps_in_epoch * settings.gradient_accumulation_steps
        while epoch < extent.epochs and not trainer.control.should_training_stop:
            self._epoch(model, loader, epoch, skipped, checkpoint)
            epoch, skipped, checkpoint = epoch + 1, 0, None
        self._finish(first_step, started, loss_before)

    def _prepare(self, checkpoint: Path | None) -> tuple[nn.Module, DataLoader]:
        """The model as the engine wraps it, with optimizer, scheduler and a checkpoint's states; the batches."""
        trainer, settings = self.trainer, self.trainer.args
        trainer.is_in_train = True
        if settings.use_liger_kernel:
            apply_liger_kernel(trainer.model, settings.liger_kernel_config)
        if isinstance(trainer.processing_class, PreTrainedTokenizerBase | ProcessorMixin):
            align_special_tokens(trainer.model, trainer.processing_class)
        trainer.accelerator.free_memory()
        if checkpoint is not None and loads_weights(trainer):
            load_weights(trainer.model, checkpoint)
        loader = trainer.get_train_dataloader()
        self.extent = Extent.of(trainer.train_dataset, settings)
        trainer.state = self._first_state(checkpoint)
        with load_optimizer(trainer, checkpoint):
            return trainer._prepare_for_training(
                self.extent.steps, loader, None if checkpoint is None else str(checkpoint)
            )

    def _first_state(self, checkpoint: Path | None) -> TrainerState:
        """The Trainer's record of a run, new or a checkpoint's; how often it logs follows the command line."""
        trainer = self.trainer
        state = TrainerState(train_batch_size=trainer.args.train_batch_size)
        if checkpoint is not None:
            state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
            trainer.last_checkpoint = checkpoint
            best = Path(trainer.args.output_dir) / f"checkpoint-{state.best_global_step}"
            if best.is_dir():  # where the run's folder is now
                state.best_model_checkpoint = str(best)
            elif state.best_model_checkpoint is not None and not Path(state.best_model_checkpoint).is_dir():
                logger.warning("%s, the best checkpoint so far, is gone: left out", state.best_model_checkpoint)
                state.best_model_checkpoint = None
        state.compute_steps(trainer.args, self.extent.steps)
        state.init_training_references(trainer, self.extent.steps, self.extent.epochs, None)
        return state

    def _restore(self, checkpoint: Path) -> bool:
        """Restores the figures of a resumed run, makes the validation it owes; returns whether it had ended."""
        saved = read_run_state(checkpoint)
        progress, last_step = saved["progress"], saved["progress"]["last_step"]
        self.loss_sum.fill_(progress["loss_sum"])
        self.logged_step = progress["last_logged"]
        self.gradient_norm, self.learning_rate = last_step["grad_norm"], last_step["learning_rate"]
        had_ended = restore_run(self.trainer, saved)
        if saved["evaluation_pending"]:
            # Random numbers are restored with the first batch; this validation may save a checkpoint before that.
            self.trainer._load_rng_state(str(checkpoint))
            self.trainer.control.should_evaluate = True
            self._log_evaluate_save()
        return had_ended or self.trainer.control.should_training_stop

    def _epoch(self, model: nn.Module, loader: DataLoader, epoch: int, skipped: int, checkpoint: Path | None) -> None:
        """One pass over the data, without its first `skipped` micro-batches where it continues from `checkpoint`."""
        trainer, settings = self.trainer, self.trainer.args
        trainer.train_dataset.set_epoch(epoch)  # before workers start: accelerate's loader only does it in one process
        self._tell("on_epoch_begin")
        sampler = sampler_of(loader)
        if skipped:
            loader = skip_first_batches(loader, skipped)
        elif checkpoint is not None:
            trainer._load_rng_state(str(checkpoint))
        for shuffled in (loader, sampler):  # accelerate does not reach a sampler behind one that skips batches
            if hasattr(shuffled, "set_epoch"):
                shuffled.set_epoch(epoch)
        batches, done, length = iter(loader), skipped, self.extent.batches_per_epoch
        while done < length and not trainer.control.should_training_stop:
            count = min(settings.gradient_accumulation_steps, length - done)
            window, items = trainer.get_batch_samples(batches, count, settings.device)
            if skipped and checkpoint is not None:  # skipped batches may have drawn random numbers
                trainer._load_rng_state(str(checkpoint))
                checkpoint = None
            if not window:
                break
            self._window(model, window, items)
            done += len(window)
            self._update(model, epoch + done / length)
        if not done:
            logger.warning("not one batch came of the training data: stopped at step %d", trainer.state.global_step)
            trainer.control.should_training_stop = True
        self._tell("on_epoch_end")
        self._log_evaluate_save()

    def _window(self, model: nn.Module, window: list[dict[str, Tensor]], items: Tensor | int | None) -> None:
        """Forward and backward passes of the micro-batches of one optimizer step."""
        trainer = self.trainer
        trainer.current_gradient_accumulation_steps = len(window)  # for a loss without `items`
        self._tell("on_step_begin")
        self._step_began = time.perf_counter()
        first = trainer.state.global_step * trainer.args.gradient_accumulation_steps
        for place, batch in enumerate(window):
            last = place == len(window) - 1
            trainer.accelerator.sync_gradients = last
            # FSDP's gradients would stay whole until they are synchronized; DeepSpeed accumulates by itself.
            split = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
            with contextlib.nullcontext() if last or split else trainer.accelerator.no_sync(model):
                loss = trainer.training_step(model, batch, items)
            self.loss_sum += loss
            trainer.bad_loss.note(loss, first + place)
            trainer.current_flos += float(trainer.floating_point_ops(batch))
            if not last:
                self._tell("on_substep_end")

    def _update(self, model: nn.Module, epochs: float) -> None:
        """The optimizer step, and what is due after it. `epochs`: trained on so far."""
        trainer, state, settings = self.trainer, self.trainer.state, self.trainer.args
        # Without clipping the norm is computed all the same, for the log.
        norm = trainer.accelerator.clip_grad_norm_(model.parameters(), settings.max_grad_norm or math.inf)
        self.gradient_norm, self.learning_rate = norm, float(trainer.optimizer.param_groups[0]["lr"])
        self._tell("on_pre_optimizer_step")
        trainer.optimizer.step()
        self._tell("on_optimizer_step")
        if not trainer.accelerator.optimizer_step_was_skipped:  # by float16's loss scaling
            trainer.lr_scheduler.step()
        model.zero_grad()
        state.global_step += 1
        state.epoch = epochs
        trainer.figures.step_seconds.append(time.perf_counter() - self._step_began)
        self._tell("on_step_end")
        self._decide()
        self._log_evaluate_save()

    def _decide(self) -> None:
        """What is due after this step besides what the Trainer's own callback has asked for."""
        trainer, settings = self.trainer, self.trainer.args
        control, step = trainer.control, trainer.state.global_step
        if trainer.diagnosis is not None and trainer.diagnosis.is_due(step):
            control.should_log = True
            trainer.figures.step_seconds[-1] -= trainer.diagnosis.seconds
            trainer.figures.evaluation_seconds += trainer.diagnosis.seconds
            trainer.diagnosis.seconds = 0.0
        if step >= trainer.state.max_steps:
            control.should_log = True
            control.should_evaluate = settings.eval_on_start or settings.eval_strategy == IntervalStrategy.STEPS
        # The last step gets no checkpoint beside the model itself.
        control.should_save = self._is_asked_to_end() or step % settings.save_steps == 0

    def _is_asked_to_end(self) -> bool:
        """Whether a signal came. Several processes agree on it, which waits for a GPU: there every 10 steps."""
        trainer, settings = self.trainer, self.trainer.args
        if settings.world_size == 1:
            self.asked = interruption()
        elif settings.device.type == "cpu" or trainer.state.global_step % 10 == 0:
            number = torch.tensor([interruption() or 0], device=settings.device)
            self.asked = int(trainer.accelerator.gather(number).max()) or None
        return self.asked is not None

    def _log_evaluate_save(self) -> None:
        trainer, state = self.trainer, self.trainer.state
        if trainer.control.should_log and state.global_step > self.logged_step:
            self._log()
        if trainer.control.should_evaluate:
            is_best = self._is_best(self._evaluate())
            if trainer.args.save_strategy == SaveStrategy.BEST:
                due = state.global_step % trainer.args.save_steps == 0 or self.asked is not None
                trainer.control.should_save = is_best or due
        if trainer.control.should_save:
            self._save(evaluation_pending=False)
            self._tell("on_save")
            if self.asked is not None:
                self._end_as_asked()

    def _log(self) -> None:
        trainer, step, last_step = self.trainer, self.trainer.state.global_step, self._last_step()
        loss = trainer.accelerator.gather(self.loss_sum).mean().item()
        self.loss_sum.zero_()
        logs = {"loss": loss / (step - self.logged_step)} | last_step
        if last_step["grad_norm"] is None:
            del logs["grad_norm"]
        self._loss_total += loss
        self.logged_step = step
        trainer.store_flos()
        trainer.log(logs)

    def _last_step(self) -> dict[str, float | None]:
        """Gradient norm and learning rate of the last step. Waits for the device."""
        norm = self.gradient_norm
        if self.trainer.optim_in_backward and self.trainer.figures.has_begun:  # its gradients are freed
            norm = self.trainer.optimizer.optimizer.gradient_norm()
        norm = norm.item() if isinstance(norm, Tensor) else norm
        return {"grad_norm": norm, "learning_rate": self.learning_rate}

    def _evaluate(self) -> dict[str, float]:
        try:
            if self.asked is not None:
                raise Interrupted(self.asked, f"interrupted by {signal_name(self.asked)}")
            return self.trainer.evaluate()
        except Interrupted as error:
            self.asked = error.signal_number
            if self.trainer.state.global_step > 0:
                self._save(evaluation_pending=True)
            self._end_as_asked()

    def _is_best(self, metrics: dict[str, float]) -> bool:
        """Whether this validation is the best so far, which the state then records."""
        state, settings = self.trainer.state, self.trainer.args
        self.best_before = state.best_metric, state.best_global_step
        if settings.metric_for_best_model is None:
            return False
        metric = metrics[f"eval_{settings.metric_for_best_model.removeprefix('eval_')}"]
        sign = 1 if settings.greater_is_better else -1
        is_best = sign * metric > (-math.inf if state.best_metric is None else sign * state.best_metric)
        if is_best:
            state.best_metric, state.best_global_step = metric, state.global_step
        return is_best

    def _save(self, *, evaluation_pending: bool) -> None:
        """Writes a checkpoint. `evaluation_pending`: the validation due at this step was interrupted."""
        state, losses = self.trainer.state, gather_object([self.loss_sum.item()])
        loss = sum(losses) / len(losses)
        progress = {"loss_sum": loss, "last_logged": self.logged_step, "last_step": self._last_step()}
        written = write_checkpoint(self.trainer, progress, evaluation_pending)
        if not written and state.best_global_step == state.global_step:  # the best of those that could be written
            state.best_metric, state.best_global_step = self.best_before

    def _finish(self, first_step: int, started: float, loss_before: float) -> None:
        """Closing figures, the best weights where they are asked for, and the end of the callbacks."""
        trainer, state, settings = self.trainer, self.trainer.state, self.trainer.args
        steps = state.global_step - first_step
        loss = (self._loss_total + self.loss_sum.item() - loss_before) / max(steps, 0.001)
        rows = steps * settings.train_batch_size * settings.gradient_accumulation_steps * settings.world_size
        if settings.max_steps <= 0:
            rows = len(trainer.train_dataset) * settings.num_train_epochs * steps / max(state.max_steps, 1)
        metrics = speed_metrics("train", started, num_samples=rows, num_steps=steps)
        trainer.store_flos()
        trainer.log(metrics | {"total_flos": state.total_flos, "train_loss": loss})
        best = state.best_model_checkpoint
        if settings.load_best_model_at_end and best is not None:
            load_best_weights(trainer)
        if settings.should_save and best is not None and settings.save_total_limit == 1:
            rotate(Path(settings.output_dir), 1, {Path(best)})
        self._tell("on_train_end")
        trainer.is_in_train = False

    def _end_as_asked(self) -> NoReturn:
        """Ends the run after a signal, with a sentence that says how to go on."""
        step, last = self.trainer.state.global_step, self.trainer.last_checkpoint
        if last is None:
            said = f"after step {step}, and no checkpoint is there"
        elif last.name == f"checkpoint-{step}":
            said = f"after step {step}, which is saved in {last}"
        else:
            said = f"after step {step}, which could not be saved; the last whole checkpoint is {last}"
        cure = "Go on with the same command and --resume_from_checkpoint."
        raise Interrupted(self.asked, f"interrupted by {signal_name(self.asked)} {said}.\n{cure}")

    def _tell(self, event: str) -> None:
        """Calls the callbacks' method of this name."""
        trainer = self.trainer
        trainer.control = getattr(trainer.callback_handler, event)(trainer.args, trainer.state, trainer.control)
