"""Flags: how the weights move, and what is written where and how often."""

import logging
import re
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

from tokentune.processes import process_count
from tokentune.settings import machine
from tokentune.settings.flags import AUTO, Group, flag, log_without_effect, require

logger = logging.getLogger(__name__)

# The schedules that need no options beyond warm-up and length; the others of transformers would fail after loading.
SCHEDULES = (
    *("cosine", "linear", "constant", "constant_with_warmup"),
    *("cosine_with_restarts", "polynomial", "inverse_sqrt"),
)


@dataclass
class OptimizationArguments(Group):
    """How the weights move."""

    _argument_group_name = "optimization"
    global_batch_size: int = flag(128, "sequences per optimizer step, over all devices", least=1)
    gradient_accumulation_steps: int | Literal["auto"] = flag(
        AUTO,
        "micro-batches per optimizer step; a micro-batch holds global batch / accumulation / devices sequences; auto: "
        "the largest that fits into memory",
        least=1,
        metavar="N",
    )
    num_epochs: int = flag(1, "passes over the data", least=1)
    max_steps: int | None = flag(None, "end after so many optimizer steps, whatever --num_epochs says", least=1)
    learning_rate: float = flag(1.5e-4, "peak learning rate", least=0)
    weight_decay: float = flag(0.01, "decoupled weight decay", least=0)
    warmup_steps: float | Literal["auto"] = flag(
        AUTO,
        "optimizer steps over which the learning rate rises from 0 to its peak; below 1, a share of all steps; auto: "
        "0.03 of them, at most 3000 steps",
        least=0,
        metavar="N",
    )
    lr_scheduler_type: str = flag("cosine", f"what it does afterwards: {', '.join(SCHEDULES)}")
    optim: str = flag(
        "adamw_torch",
        "any optimizer of the Hugging Face Trainer; galore_* and apollo_* project the linear layers of all layers, "
        "*_layerwise implies --optim_in_backward",
    )
    optim_args: str | None = flag(
        None, "its options, name=value,name=value, as in the Trainer: rank=64,scale=0.25", metavar="NAME=VALUE,..."
    )
    optim_in_backward: bool = flag(
        False,
        "apply each gradient in the backward pass, as soon as it is complete, and free it: there is never more than "
        "one; takes --max_grad_norm 0 and no accumulation",
    )
    max_grad_norm: float = flag(1.0, "gradients are scaled down to this common norm; 0: not", least=0)
    seed: int = flag(42, "of the order of the data, the selection, dropout and the adapters' first values", least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.learning_rate > 0, "--learning_rate 0: nothing would be learnt")
        steps = self.warmup_steps
        require(
            steps == AUTO or steps < 1 or steps == int(steps),
            f"--warmup_steps {steps}: give a number of steps, a share of all steps below 1, or auto",
        )
        require(
            self.lr_scheduler_type in SCHEDULES,
            f"--lr_scheduler_type {self.lr_scheduler_type}: choose from {', '.join(SCHEDULES)}",
        )
        if self.optim != "adamw_torch":
            names = machine.optimizer_names()
            require(
                self.optim in names,
                f"--optim {self.optim}: the Trainer has no such optimizer; it has {', '.join(names)}",
            )
        self._check_in_backward()
        share = self.accumulation * process_count()
        require(
            self.global_batch_size % share == 0,
            f"--gradient_accumulation_steps {self.accumulation} x {process_count()} process(es) does "
            f"not divide --global_batch_size {self.global_batch_size}: micro-batches must be of one size",
        )

    def _check_in_backward(self) -> None:
        """Each gradient is gone before the next one exists: nothing can look at several."""
        if self.optim.endswith("_layerwise"):
            flag, self.optim_in_backward = f"--optim {self.optim}", True
        elif "lomo" in self.optim:
            flag = f"--optim {self.optim}"
            require(not self.optim_in_backward, f"{flag} works in the backward pass anyway: drop --optim_in_backward")
        elif self.optim_in_backward:
            flag = "--optim_in_backward"
        else:
            return
        require(
            self.accumulation == 1,
            f"{flag} applies each gradient at once and cannot add up --gradient_accumulation_steps "
            f"{self.gradient_accumulation_steps} micro-batches: take 1, with a smaller --global_batch_size",
        )
        require(
            self.max_grad_norm == 0,
            f"{flag} cannot clip gradients by their common norm, which it never sees: add --max_grad_norm 0",
        )
        require(process_count() == 1, f"{flag} cannot average gradients over processes: run one process")

    @property
    def accumulation(self) -> int:
        """Micro-batches per optimizer step; 1 while `auto` has not been found."""
        return 1 if self.gradient_accumulation_steps == AUTO else self.gradient_accumulation_steps

    @property
    def micro_batch_size(self) -> int:
        """Sequences per forward pass and process; all of a step while `auto` has not been found."""
        return self.global_batch_size // self.accumulation // process_count()


@dataclass
class OutputArguments(Group):
    """What is written, where and how often."""

    _argument_group_name = "output"
    model_save_path: str = flag(
        "./models/", "where the run's folder is made; its name tells model, data and method", filled="a folder"
    )
    run_name: str | None = flag(None, "that folder's name, instead of the one that is made of model, data and method")
    overwrite_output_dir: bool = flag(False, "replace the run that the run's folder already holds")
    save_steps: int = flag(50000, "optimizer steps between checkpoints", least=1)
    save_total_limit: int = flag(10, "checkpoints to keep; older ones are deleted", least=1)
    logging_steps: int | Literal["auto"] = flag(
        AUTO,
        "optimizer steps between log lines; the first and the last step always get one; auto: 1000, or fewer, so that "
        "a run has at least 50 lines",
        least=1,
        metavar="N",
    )
    logging_dir: str | None = flag(None, "folder for the TensorBoard files; default: runs/ in the run's folder")
    report_to: list[str] = flag(
        ["tensorboard"], "where the log goes: none, or any trackers that the Trainer knows (tensorboard, wandb, ...)"
    )
    print_run_folder: bool = flag(False, "print the path of the run's folder, do nothing else")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.run_name is None or re.fullmatch(r"[A-Za-z0-9]([\w.+=-]{0,98}[\w+=-])?", self.run_name, re.ASCII),
            f"--run_name {self.run_name!r}: not a folder's name on every system: give at most 100 letters (a to z), "
            "digits and . _ + = -, a letter or digit first and no dot last; --model_save_path says where it is made",
        )
        if self.report_to == ["none"]:
            self.report_to = []
        require("none" not in self.report_to, f"--report_to {' '.join(self.report_to)}: none, or the others")
        for name in self.report_to:
            if name == "tensorboard" and find_spec(name):  # without the import of the Trainer, which takes seconds
                continue
            known = machine.tracker_names()
            require(name in known, f"--report_to {name}: choose none, or from {', '.join(known)}")
            require(
                name in machine.installed_trackers(),
                f"--report_to {name}: the package is not installed; `pip install {name}`, or --report_to none",
            )
        if self.logging_dir is not None and "tensorboard" not in self.report_to:
            logger.warning("--logging_dir has no effect without --report_to tensorboard")


@dataclass
class WatchedRunArguments(Group):
    """How a run begins, is watched and ends."""

    _argument_group_name = "run"
    preview: int | None = flag(
        None,
        "print so many examples (5 where no number is given) with their tokens coloured by role, and "
        "what the data holds, and stop",
        nargs="?",
        const=5,
        least=1,
    )
    dry_run: bool = flag(False, "do everything but the training steps: read, check, build, and say what would be done")
    early_stopping_patience: int | None = flag(
        None, "stop after so many evaluations in a row without a lower validation loss", least=1
    )
    push_to_hub: str | None = flag(
        None,
        "afterwards, upload the run's folder without its checkpoints to the hub, into a private "
        "repository: owner/name, or by itself the folder's name",
        nargs="?",
        const="",
    )
    hub_public: bool = flag(False, "... into a public one, where it is new")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.push_to_hub is None:
            log_without_effect(self, ("hub_public",), "--push_to_hub")


@dataclass
class RunArguments(WatchedRunArguments):
    """How a run begins, is watched and ends."""

    resume_from_checkpoint: str | None = flag(
        None,
        "go on where a checkpoint was written: its folder, or last (also where nothing is given) for "
        "the newest good one of the run's folder, from the beginning where there is none yet",
        nargs="?",
        const="last",
    )
    load_best_model_at_end: bool = flag(
        False, "save the weights with the lowest validation loss, not the last ones; every evaluation may save"
    )
    auto_micro_batch: bool = flag(
        False, "find the largest micro-batch that fits, by trying; the global batch, and so the result, stays"
    )
    skip_memory_probe: bool = flag(False, "do not try the longest batch before training")


# How a run was started, not what it does: whoever reruns it says anew whether to replace, go on, look, or upload.
STARTING = (
    *("overwrite_output_dir", "resume_from_checkpoint", "preview", "dry_run", "print_run_folder"),
    *("push_to_hub", "hub_public"),
)
