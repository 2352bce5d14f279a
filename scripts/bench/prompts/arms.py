"""What is compared in `prompt_heavy.py`: each arm as flags of finetune.py, and what all of them have in common."""

from dataclasses import dataclass, field
from pathlib import Path

from prompts.tasks import Task

COMMON = {
    "long_rows": "drop",
    "add_eos_token": "",
    "data_cache": "none",
    "bf16": "",
    "weight_decay": "0.01",
    "max_grad_norm": "1.0",
    "report_to": "none",
}
TRAINED = {
    "full": {},
    "lora": {"lora": "", "lora_target_modules": "all-linear", "lora_r": "16", "lora_alpha": "16", "lora_dropout": "0"},
}
CHUNKED = {"chunked_loss": "on"}
FULL, MICRO_BATCH = "full", "full-micro-batch"


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        flags: of finetune.py.
        same_as: the arm whose gradients these are, up to rounding: its losses are taken over, and checked by one run.
        longer: how many times full training's steps its runs have.
    """

    flags: dict[str, str] = field(default_factory=dict)
    same_as: str | None = None
    longer: int = 1

    def lengths(self, task: Task) -> tuple[int, ...]:
        """Optimizer steps of its runs, ascending."""
        return tuple(steps * self.longer for steps in task.lengths)


def selective(size: str, **flags: str) -> Arm:
    return Arm({"tokentune": "", "prefix_length": size} | flags, longer=2)


ARMS = {
    FULL: Arm(),
    "full-chunked": Arm(CHUNKED, FULL),
    "full-checkpointing": Arm({"gradient_checkpointing": ""} | CHUNKED, FULL),
    MICRO_BATCH: Arm(CHUNKED, FULL),
    "answers": selective("answers"),
    "answers-checkpointing": Arm(
        {"tokentune": "", "prefix_length": "answers", "gradient_checkpointing": ""}, "answers", longer=2
    ),
    "answers+0.1": selective("answers+0.1"),
    "answers+0.3": selective("answers+0.3"),
    "answers+0.1-corrected": selective("answers+0.1", gradient_correction="1"),
    "answers+0.3-corrected": selective("answers+0.3", gradient_correction="1"),
    "random-0.3": selective("0.3", selection="random"),
}
ANSWERS = "answers"  # whose bytes MICRO_BATCH may keep


def words(task: Task, arm: Arm, model: Path, data: Path, *, seed: int = 0, micro_batch: int | None = None) -> list[str]:
    """What stands behind `finetune.py`, but for the learning rate and the number of steps."""
    flags = COMMON | TRAINED[task.trained] | arm.flags
    flags |= {"model_name_or_path": str(model), "dataset_name_or_path": str(data), "seed": str(seed)}
    flags |= {"max_length": str(task.max_length), "global_batch_size": str(task.batch)}
    if micro_batch is not None:
        flags["gradient_accumulation_steps"] = str(task.batch // micro_batch)
    return [word for flag, value in flags.items() for word in (f"--{flag}", value) if word]
