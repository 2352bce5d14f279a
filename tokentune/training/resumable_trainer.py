"""The Hugging Face Trainer, resumable to the last bit: whole checkpoints, nothing forgotten, an end when asked for one.

What is different from the Trainer's own resuming, and why:

- A checkpoint gets its name once it is whole (`training/checkpoints/saving.py`). One that cannot be written is
  reported, and training goes on: the next one may fit, and stopping would lose what was learnt since the last.
- Weights are read by the model's own class: the Trainer goes by the names in the file, where several families (ViT)
  have other ones than in memory, and leaves what it does not find as it was.
- The figures of the run go on (`training/checkpoints/run_state.py`), and so do callbacks with a state, such as the
  patience of early stopping. Nothing is evaluated twice, and a run that had come to its end takes no further step.
- SIGTERM and Ctrl-C end it after the step, or in the middle of a validation, which is made after resuming.
"""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from tokentune.training.checkpoints.run_state import RUN_STATE_NAME, run_state
from tokentune.training.checkpoints.saving import (
    StorageError,
    partial_folder,
    partial_path,
    publish,
    rotate,
    seal,
    storage_errors,
    write_whole,
)
from tokentune.training.distributed.interruptions import Interrupted, interruption, signal_name
from tokentune.training.nan_batch import sampler_of
from tokentune.training.optimizers import state_classes

logger = logging.getLogger(__name__)


class ResumableTrainer(Trainer):
    """See the module.

    Attributes:
        flags: {flag: value} of the run, kept in its checkpoints.
        data_digest: of the training rows, kept there too; None: not known.
        resumed_from: the checkpoint that this process went on from; None: it began the run.
        had_ended: that checkpoint was written when training had come to its end.
        evaluation_pending: the validation due at this step was interrupted.
        last_checkpoint: the newest that is whole; None: there is none yet.
        asked: the signal that asked the run to end; None: none did.
        last_step: "grad_norm" and "learning_rate" of the step that was made last.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.flags: dict[str, Any] = {}
        self.data_digest: str | None = None
        self.resumed_from: Path | None = None
        self.last_checkpoint: Path | None = None
        self.had_ended = self.evaluation_pending = False
        self.asked: int | None = None
        self.last_step: dict[str, Any] = {"grad_norm": None, "learning_rate": None}
        self._best_before: tuple[float | None, int | None] = (None, None)

    # -- writing

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """A checkpoint of this step, whole or not at all; a failure is reported and the last good one kept."""
        self.store_flos()
        checkpoint = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        best_before = self.state.best_model_checkpoint
        best = self.state.best_global_step
        if best and (best == self.state.global_step or checkpoint.with_name(f"checkpoint-{best}").exists()):
            self.state.best_model_checkpoint = str(checkpoint.with_name(f"checkpoint-{best}"))
        partial = partial_path(checkpoint)
        parts: list[Callable[[], Any]] = [
            self._first_process(lambda: partial_folder(checkpoint)),
            lambda: self.save_model(str(partial), _internal_call=True),
            lambda: None if self.args.save_only_model else self._save_states(str(partial)),
            lambda: self._save_run_state(partial),
            self._first_process(lambda: seal(partial)),
            self._first_process(lambda: publish(partial, checkpoint)),
        ]
        for part in parts:  # a process that fails does not leave the others waiting in the next part
            reason = next((said for said in gather_object([_attempt(part)]) if said is not None), None)
            if reason is not None:
                self._report_unsaved(checkpoint, reason, best_before)
                return
        self.last_checkpoint = checkpoint
        if self.args.should_save:
            best_path = self.state.best_model_checkpoint
            protected = {checkpoint} | ({Path(best_path)} if best_path else set())
            reason = _attempt(lambda: rotate(checkpoint.parent, self.args.save_total_limit, protected))
            if reason is not None:
                logger.warning("older checkpoints could not be deleted: %s", reason)

    def _first_process(self, work: Callable[[], Any]) -> Callable[[], Any]:
        return work if self.args.should_save else lambda: None

    def _save_states(self, folder: str) -> None:
        self._save_optimizer_and_scheduler(folder)
        self._save_scaler(folder)
        self._save_rng_state(folder)

    def _save_run_state(self, folder: Path) -> None:
        state = run_state(self)
        if not self.args.should_save:
            return
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                self.state.stateful_callbacks[type(callback).__name__] = callback.state()
        self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
        write_whole(folder / RUN_STATE_NAME, json.dumps(state, indent=1) + "\n")

    def _report_unsaved(self, checkpoint: Path, reason: str, best_before: str | None) -> None:
        if self.args.should_save:
            shutil.rmtree(partial_path(checkpoint), ignore_errors=True)
        kept = f"{self.last_checkpoint} is kept" if self.last_checkpoint is not None else "there is none before it"
        logger.error(
            "%s could not be written: %s. %s; training goes on, and tries again at the next one: make room.",
            *(checkpoint, reason, kept),
        )
        self.state.best_model_checkpoint = best_before
        if self.state.best_global_step == self.state.global_step:  # the best of those that could be kept
            self.state.best_metric, self.state.best_global_step = self._best_before

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        self._best_before = self.state.best_metric, self.state.best_global_step
        return super()._determine_best_metric(metrics, trial)

    # -- resuming

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._reads_whole_models():
            self._load_whole_model(resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self._reads_whole_models():
            self._load_whole_model(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def _reads_whole_models(self) -> bool:
        split = self.is_fsdp_enabled or self.is_deepspeed_enabled
        return isinstance(self.model, PreTrainedModel) and not split

    def _load_whole_model(self, folder: str) -> None:
        saved = type(self.model).from_pretrained(folder, local_files_only=True, use_safetensors=True)
        self.model.load_state_dict(saved.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # Torch reads tensors and plain numbers alone, and these classes, which hold nothing else.
        with torch.serialization.safe_globals(state_classes(self.args.optim.value)):
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return
        inner = self.optimizer.optimizer
        for optimizer in getattr(inner, "optimizers", {None: inner}).values():  # one, or one per parameter
            for parameter, state in optimizer.state.items():
                for kept in state.values():
                    if hasattr(kept, "ortho_matrix"):  # torch moves tensors that it finds, not those inside of others
                        kept.ortho_matrix = _moved(kept.ortho_matrix, parameter.device)

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        trained = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        self.resumed_from = None if resume_from_checkpoint is None else Path(resume_from_checkpoint)
        if self.resumed_from is not None:
            self.last_checkpoint = self.resumed_from
            self.state.compute_steps(self.args, max_steps)  # how often is logged and saved is this command's, not its
            best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
            if best.is_dir():  # where the run's folder is now
                self.state.best_model_checkpoint = str(best)
        return trained

    def _run_epoch(self, model: nn.Module, epoch: int, train_dataloader: Any, **kwargs: Any) -> None:
        if self.had_ended or self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = self.control.should_log = True  # the last step, if it was not yet
            norm, rate = self.last_step["grad_norm"], self.last_step["learning_rate"]
            self._maybe_log_save_evaluate(
                self._tr_loss, norm, model, None, epoch, None, kwargs["start_time"], learning_rate=rate
            )
            return
        sampler = sampler_of(train_dataloader)
        if hasattr(sampler, "set_epoch"):  # behind a sharding sampler that skips batches, accelerate does not reach it
            sampler.set_epoch(epoch)
        super()._run_epoch(model=model, epoch=epoch, train_dataloader=train_dataloader, **kwargs)

    def _maybe_log_save_evaluate(self, tr_loss: torch.Tensor, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        self.last_step = {"grad_norm": grad_norm, "learning_rate": kwargs.get("learning_rate")}
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    # -- ending when asked to

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        if skip_scheduler and self.resumed_from is not None:  # before the first step, which is long past
            return {}
        try:
            if self.asked is not None:
                raise Interrupted(self.asked, f"interrupted by {signal_name(self.asked)}")
            metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        except Interrupted as error:
            self.asked, self.evaluation_pending = error.signal_number, True
            if self.state.global_step > 0:
                self._save_checkpoint(self.model_wrapped, trial)
            self.end_as_asked()
        self.evaluation_pending = False
        return metrics

    def is_asked_to_end(self) -> bool:
        """Whether a signal came. Several processes agree on it: on a GPU, which would have to be waited for, seldom."""
        if self.args.world_size == 1:
            self.asked = interruption()
        elif self.args.device.type == "cpu" or self.state.global_step % 10 == 0:
            number = torch.tensor([interruption() or 0], device=self.args.device)
            self.asked = int(self.accelerator.gather(number).max()) or None
        return self.asked is not None

    def end_as_asked(self) -> NoReturn:
        """Ends the run after a signal, with a sentence that says how to go on."""
        step, name = self.state.global_step, signal_name(self.asked)
        saved = self.last_checkpoint is not None and self.last_checkpoint.name == f"checkpoint-{step}"
        if saved:
            said = f"after step {step}, which is saved in {self.last_checkpoint}"
        elif self.last_checkpoint is not None:
            said = f"after step {step}, which could not be saved; the last whole checkpoint is {self.last_checkpoint}"
        else:
            said = f"after step {step}, and no checkpoint is there"
        cure = "Go on with the same command and --resume_from_checkpoint."
        raise Interrupted(self.asked, f"interrupted by {name} {said}.\n{cure}")


class EndWhenAsked(TrainerCallback):
    """After a signal: a checkpoint at the end of the step, and the end of the run. To be added last."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = self.trainer.is_asked_to_end() or control.should_save

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.asked is not None:
            self.trainer.end_as_asked()


def _attempt(part: Callable[[], Any]) -> str | None:
    """What went wrong on the disk; None: nothing did."""
    try:
        with storage_errors():
            part()
    except StorageError as error:
        return str(error)
    return None


def _moved(value: Any, device: torch.device) -> Any:
    """A tensor, or several, on a device; None as it is."""
    if isinstance(value, list | tuple):
        return type(value)(_moved(item, device) for item in value)
    return value if value is None else value.to(device)
