"""Every flag of `estimate.py`: those of `finetune.py`, of which only the model is needed, and what is asked."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from tokentune.settings.data import DataArguments
from tokentune.settings.finetune import FinetuneArguments
from tokentune.settings.flags import REQUIRED, Group, flag, require
from tokentune.settings.model import RUN_WITHOUT_DATA, ModelArguments
from tokentune.settings.presets import PRESETS
from tokentune.settings.run import OutputArguments


@dataclass
class EstimatedModelArguments(ModelArguments):
    """Which model, and how its weights would be held."""

    model_name_or_path: str = flag(
        REQUIRED, f"a preset ({', '.join(PRESETS)}), a hub id, a folder or a config.json", filled="a preset or a hub id"
    )

    def __post_init__(self) -> None:
        require(
            self.attn_implementation in (None, *RUN_WITHOUT_DATA),
            f"--attn_implementation {self.attn_implementation}: its kernels run on real tensors alone, and an estimate "
            "has none: leave it out, or take sdpa or eager",
        )
        fp16, self.fp16 = self.fp16, False  # which needs no GPU to be estimated
        super().__post_init__()
        self.fp16 = fp16
        require(not (self.bf16 and fp16), "--bf16 and --fp16 exclude each other: give one of them")


@dataclass
class EstimatedDataArguments(DataArguments):
    """Rows are read for `--prefix_length answers` alone, whose cost depends on them."""

    dataset_name_or_path: list[str] = flag(
        [], "for --prefix_length answers: rows whose longest and whose longest answer are counted; else not read"
    )


@dataclass
class UnusedOutputArguments(OutputArguments):
    """Nothing is written."""

    def __post_init__(self) -> None:
        self.report_to = []
        super().__post_init__()


@dataclass
class EstimationArguments(Group):
    """What is asked; all flags of finetune.py can be given besides."""

    _argument_group_name = "estimate"
    find: Literal["proportion", "batch", "length"] | None = flag(None, "the largest that fits --memory")
    memory: float | None = flag(None, "of the card, as it is sold (24: 24 x 10^9 bytes)", metavar="GB")
    answer_share: float | None = flag(
        None,
        "for --prefix_length answers without data: the answers' share of a row's tokens, such as 0.05; with --lora_on "
        "answers their generation prompts count too",
    )
    only: bool = flag(False, "only the mode that the flags choose, no table of all")
    num_processes: int = flag(1, "GPUs that share the training", least=1)
    sharding: Literal["ddp", "zero2", "fsdp"] | None = flag(
        None,
        "what is split between them: ddp nothing, zero2 optimizer and gradients, fsdp the weights as well (ddp)",
    )
    device: Literal["cuda", "cpu"] = flag("cuda", "where it would train")
    json: str | None = flag(None, "write the numbers there, in bytes", metavar="FILE")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.find is None or self.memory is not None,
            f"--find {self.find} needs the size of the card: add --memory 24 (GB)",
        )
        require(self.memory is None or self.memory > 0, f"--memory {self.memory or 0:g}: must be above 0 (GB)")
        require(self.memory is None or self.find is not None, "--memory goes with --find proportion, batch or length")
        share = self.answer_share
        require(share is None or 0 < share <= 1, f"--answer_share {share}: must be above 0 and at most 1")
        several = self.num_processes > 1
        require(
            several or not self.sharding, f"--sharding {self.sharding} is about several GPUs: add --num_processes 8"
        )
        self.sharding = (self.sharding or "ddp") if several else None
        there = self.json is None or Path(self.json).resolve().parent.is_dir()
        require(there, f"--json {self.json}: there is no such folder")


@dataclass
class EstimateArguments(FinetuneArguments):
    """A whole command line of `estimate.py`."""

    prog: ClassVar[str] = "estimate.py"
    description: ClassVar[str] = "Estimate what a fine-tuning run needs in memory."
    common: ClassVar[str] = (
        "model_name_or_path bf16 max_length tokentune prefix_length gradient_checkpointing chunked_loss lora qlora "
        "optim global_batch_size gradient_accumulation_steps estimate"
    )
    model: EstimatedModelArguments
    data: EstimatedDataArguments
    output: UnusedOutputArguments
    estimation: EstimationArguments
