"""Every flag of `finetune.py`, grouped, with its check beside it; the groups that other commands share.

    python -u ./tokentune/finetune.py --help

Names, defaults and meanings are those of the released TokenTune scripts; what this project adds says so in its help.
Each group is a dataclass: its fields are its flags, and `__post_init__` refuses what cannot work, in a sentence that
names the flag. `parse_arguments` turns a command line into one `Arguments`, or into another command's: a dataclass
derived from it, whose groups are these ones or derived from them (`classification_arguments.py`).
"""

import difflib
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
from transformers import HfArgumentParser
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.training_args import OptimizerNames
from transformers.utils import is_liger_kernel_available

from tokentune.errors import UserError
from tokentune.selection import parse_prefix_length

logger = logging.getLogger(__name__)

# The schedules that need no options beyond warm-up and length; the others of transformers would fail after loading.
SCHEDULES = (
    *("cosine", "linear", "constant", "constant_with_warmup"),
    *("cosine_with_restarts", "polynomial", "inverse_sqrt"),
)
DEFAULT_TEMPLATE = str(Path(__file__).with_name("alpaca_template.json"))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _flag(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class ModelArguments:
    """Which model, and how its weights are held."""

    _argument_group_name = "model"
    model_name_or_path: str = field(metadata={"help": "hub id or local folder of a causal language model"})
    base_dtype: Literal["auto", "float32", "float16", "bfloat16"] = _flag(
        "auto",
        "how the base's weights are held. auto: with adapters the checkpoint's own type; without, float32 masters, "
        "because 16-bit weights round small updates away (the result is then saved in the checkpoint's own type)",
    )
    bf16: bool = _flag(False, "compute in bfloat16 (autocast)")
    fp16: bool = _flag(False, "compute in float16 (autocast, with loss scaling)")
    fp16_opt_level: str = _flag("O1", "obsolete (an option of NVIDIA Apex): accepted, does nothing")
    attn_implementation: str | None = _flag(
        None, "attention kernels: sdpa, eager (slow, for checking), flex_attention (on a GPU); default: the model's own"
    )
    use_liger_kernel: bool = _flag(
        False,
        "Liger's Triton kernels for norms, rotary embeddings and MLPs, on a GPU; with --tokentune the loss stays its "
        "own (--chunked_loss)",
    )
    model_parallel: bool = _flag(False, "spread the base over the visible GPUs, layer by layer")

    def __post_init__(self) -> None:
        _require(self.model_name_or_path != "", "--model_name_or_path is empty: give a hub id or a local folder")
        _require(not (self.bf16 and self.fp16), "--bf16 and --fp16 exclude each other: give one of them")
        cuda = torch.cuda.is_available()
        _require(
            not (self.fp16 and not torch.accelerator.is_available()),
            "--fp16 needs a GPU (its loss scaling does not run on the CPU): use --bf16, or neither",
        )
        _require(
            not (self.bf16 and cuda and not torch.cuda.is_bf16_supported(including_emulation=False)),
            "--bf16: this GPU cannot compute in bfloat16 (it takes Ampere or newer): use --fp16, or neither",
        )
        _require(
            not self.use_liger_kernel or cuda,
            "--use_liger_kernel needs a GPU: its kernels are written in Triton, which compiles for nothing else",
        )
        _require(
            not self.use_liger_kernel or is_liger_kernel_available(),
            "--use_liger_kernel: the package is not installed; `pip install liger-kernel`",
        )
        if self.fp16_opt_level != "O1":
            logger.warning("--fp16_opt_level %s does nothing: mixed precision is torch's autocast", self.fp16_opt_level)
        if self.model_parallel and torch.cuda.device_count() < 2:
            logger.warning(
                "--model_parallel changes nothing here: it takes two GPUs, %d visible", torch.cuda.device_count()
            )


@dataclass
class RowsArguments:
    """Which rows are learnt from and evaluated on, and how many tokens of them: every command's."""

    _argument_group_name = "data"
    dataset_name_or_path: str = field(
        metadata={"help": "hub id, or local .json, .jsonl, .csv or .parquet file or folder; columns: instruction, "
                          "input (may be absent), output"}
    )  # fmt: skip
    max_length: int = _flag(1024, "tokens per sequence; longer ones are cut at the end")
    num_workers: int = _flag(0, "data-loader worker processes")
    eval_dataset_name_or_path: str | None = _flag(
        None, "validation data, as the training data: its loss (all tokens, no selection) before and after training"
    )
    eval_steps: int | None = _flag(None, "also every so many optimizer steps")

    def __post_init__(self) -> None:
        _require(self.dataset_name_or_path != "", "--dataset_name_or_path is empty: give a hub id, a file or a folder")
        _require(self.max_length >= 2, f"--max_length {self.max_length}: a sequence needs at least two tokens")
        _require(self.num_workers >= 0, f"--num_workers {self.num_workers}: must be 0 or more")
        if self.eval_steps is not None:
            _require(self.eval_steps >= 1, f"--eval_steps {self.eval_steps}: must be 1 or more")


@dataclass
class DataArguments(RowsArguments):
    """Instruction data, and the prompt that it is put into."""

    prompt_template_name_or_path: str = _flag(
        DEFAULT_TEMPLATE, "JSON file with prompt_input, prompt_no_input and response_split"
    )
    add_eos_token: bool = _flag(False, "end every answer with the end-of-sequence token, and learn it")

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(
            self.eval_steps is None or self.eval_dataset_name_or_path is not None,
            "--eval_steps needs data to evaluate on: add --eval_dataset_name_or_path",
        )


@dataclass
class SelectionArguments:
    """TokenTune itself: gradients for a subset of the tokens."""

    _argument_group_name = "selective backpropagation"
    tokentune: bool = _flag(False, "backpropagate through selected tokens alone")
    prefix_length: str = _flag(
        "100",
        "selected tokens per sequence: a number (16), or, with a decimal point, a proportion of its tokens (0.3); "
        "without --tokentune it does nothing",
    )
    selection: Literal["random", "reference"] = _flag(
        "random", "how they are drawn: uniformly without replacement, or as the released code did (for comparison)"
    )
    skip_verification: bool = _flag(
        False, "do not compare a tiny copy of the model with the method's definition first: at your own risk"
    )

    def __post_init__(self) -> None:
        try:
            self.selected = parse_prefix_length(self.prefix_length)
        except ValueError as error:
            raise UserError(f"--prefix_length {self.prefix_length}: {error}") from None
        if not self.tokentune:
            _log_without_effect(self, ("prefix_length", "selection", "skip_verification"), "--tokentune")


@dataclass
class MemoryArguments:
    """What is kept for the backward pass, and where."""

    _argument_group_name = "memory"
    gradient_checkpointing: bool = _flag(
        False,
        "keep of each layer only what it takes to recompute it in the backward pass; with --tokentune the selected "
        "tokens alone are recomputed",
    )
    checkpoint_rest: Literal["auto", "keys_values", "hidden_states", "segments"] = _flag(
        "auto",
        "what --gradient_checkpointing keeps of the tokens that are not selected: each layer's keys and values, or its "
        "input, auto: the smaller of the two; segments keeps least and computes their forward pass twice",
    )
    offload_kv: bool = _flag(False, "keep that in the CPU's memory, copied beside the GPU's work")
    chunked_loss: Literal["auto", "on", "off"] = _flag(
        "auto",
        "take --tokentune's loss a chunk of rows at a time, so that the logits of a large vocabulary are never there "
        "as a whole; auto: where it costs no time (adapters) or with --gradient_checkpointing",
    )
    report_memory: bool = _flag(
        False, "after the run, say what its memory held and what would help most (also in memory_report.json)"
    )
    memory_snapshot: str | None = _flag(
        None, "write the GPU allocator's history to this file, for pytorch.org/memory_viz; needs a GPU"
    )

    def __post_init__(self) -> None:
        _require(
            self.memory_snapshot is None or torch.cuda.is_available(),
            "--memory_snapshot is a history of the GPU's allocator, and no GPU is there: leave it out "
            "(--report_memory works everywhere)",
        )
        if not self.gradient_checkpointing:
            _log_without_effect(self, ("checkpoint_rest", "offload_kv"), "--gradient_checkpointing")
        elif self.offload_kv and not torch.cuda.is_available():
            logger.warning("--offload_kv changes nothing here: without a GPU everything is in the CPU's memory")


@dataclass
class AdapterArguments:
    """LoRA and QLoRA."""

    _argument_group_name = "adapters"
    lora: bool = _flag(False, "train low-rank adapters, freeze the base")
    qlora: bool = _flag(False, "the same over a 4-bit base (NF4, double quantisation); implies --lora")
    lora_r: int = _flag(8, "rank")
    lora_alpha: int = _flag(16, "scale: the adapter's output is multiplied by alpha / rank")
    lora_dropout: float = _flag(0.05, "dropout in front of the adapters")
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["gate_proj", "down_proj", "up_proj"],
        metadata={"help": "names of the linear layers that get adapters, or all-linear"},
    )

    def __post_init__(self) -> None:
        self.lora = self.lora or self.qlora
        _require(self.lora_r >= 1, f"--lora_r {self.lora_r}: the rank must be 1 or more")
        _require(self.lora_alpha > 0, f"--lora_alpha {self.lora_alpha}: must be above 0, or the adapters do nothing")
        _require(0 <= self.lora_dropout < 1, f"--lora_dropout {self.lora_dropout}: must be at least 0 and below 1")
        if not self.lora:
            flags = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
            _log_without_effect(self, flags, "--lora or --qlora")


@dataclass
class OptimizationArguments:
    """How the weights move."""

    _argument_group_name = "optimization"
    global_batch_size: int = _flag(128, "sequences per optimizer step, over all devices")
    gradient_accumulation_steps: int = _flag(
        1, "micro-batches per optimizer step; a micro-batch holds global batch / accumulation / devices sequences"
    )
    num_epochs: int = _flag(1, "passes over the data")
    learning_rate: float = _flag(1.5e-4, "peak learning rate")
    weight_decay: float = _flag(0.01, "decoupled weight decay")
    warmup_steps: int = _flag(3000, "optimizer steps over which the learning rate rises from 0 to its peak")
    lr_scheduler_type: str = _flag("cosine", f"what it does afterwards: {', '.join(SCHEDULES)}")
    optim: str = _flag(
        "adamw_torch",
        "any optimizer of the Hugging Face Trainer; galore_* and apollo_* project the linear layers of all layers, "
        "*_layerwise implies --optim_in_backward",
    )
    optim_args: str | None = _flag(None, "its options, name=value,name=value, as in the Trainer: rank=64,scale=0.25")
    optim_in_backward: bool = _flag(
        False,
        "apply each gradient in the backward pass, as soon as it is complete, and free it: there is never more than "
        "one; takes --max_grad_norm 0 and no accumulation",
    )
    max_grad_norm: float = _flag(1.0, "gradients are scaled down to this common norm; 0: not")
    seed: int = _flag(42, "of the order of the data, the selection, dropout and the adapters' first values")

    def __post_init__(self) -> None:
        for name in ("global_batch_size", "gradient_accumulation_steps", "num_epochs"):
            _require(getattr(self, name) >= 1, f"--{name} {getattr(self, name)}: must be 1 or more")
        for name in ("learning_rate", "weight_decay", "warmup_steps", "max_grad_norm", "seed"):
            _require(0 <= getattr(self, name) < float("inf"), f"--{name} {getattr(self, name)}: must be 0 or more")
        _require(self.learning_rate > 0, "--learning_rate 0: nothing would be learnt")
        _require(
            self.lr_scheduler_type in SCHEDULES,
            f"--lr_scheduler_type {self.lr_scheduler_type}: choose from {', '.join(SCHEDULES)}",
        )
        optimizers = [name.value for name in OptimizerNames]
        _require(
            self.optim in optimizers,
            f"--optim {self.optim}: the Trainer has no such optimizer; it has {', '.join(optimizers)}",
        )
        self._check_in_backward()
        share = self.gradient_accumulation_steps * process_count()
        _require(
            self.global_batch_size % share == 0,
            f"--gradient_accumulation_steps {self.gradient_accumulation_steps} x {process_count()} process(es) does "
            f"not divide --global_batch_size {self.global_batch_size}: micro-batches must be of one size",
        )

    def _check_in_backward(self) -> None:
        """Each gradient is gone before the next one exists: nothing can look at several."""
        if self.optim.endswith("_layerwise"):
            flag, self.optim_in_backward = f"--optim {self.optim}", True
        elif "lomo" in self.optim:
            flag = f"--optim {self.optim}"
            _require(not self.optim_in_backward, f"{flag} works in the backward pass anyway: drop --optim_in_backward")
        elif self.optim_in_backward:
            flag = "--optim_in_backward"
        else:
            return
        _require(
            self.gradient_accumulation_steps == 1,
            f"{flag} applies each gradient at once and cannot add up --gradient_accumulation_steps "
            f"{self.gradient_accumulation_steps} micro-batches: take 1, with a smaller --global_batch_size",
        )
        _require(
            self.max_grad_norm == 0,
            f"{flag} cannot clip gradients by their common norm, which it never sees: add --max_grad_norm 0",
        )
        _require(process_count() == 1, f"{flag} cannot average gradients over processes: run one process")

    @property
    def micro_batch_size(self) -> int:
        """Sequences per forward pass and process."""
        return self.global_batch_size // self.gradient_accumulation_steps // process_count()


@dataclass
class OutputArguments:
    """What is written, where and how often."""

    _argument_group_name = "output"
    model_save_path: str = _flag("./models/", "where the run's folder is made; its name tells model, data and method")
    overwrite_output_dir: bool = _flag(False, "replace the run that the run's folder already holds")
    save_steps: int = _flag(50000, "optimizer steps between checkpoints")
    save_total_limit: int = _flag(10, "checkpoints to keep; older ones are deleted")
    logging_steps: int = _flag(1000, "optimizer steps between log lines; the first and the last step always get one")
    logging_dir: str | None = _flag(None, "folder for the TensorBoard files; default: runs/ in the run's folder")
    report_to: list[str] = field(
        default_factory=lambda: ["tensorboard"],
        metadata={"help": f"where the log goes: none, or any of {', '.join(INTEGRATION_TO_CALLBACK)}"},
    )
    print_run_folder: bool = _flag(False, "print the path of the run's folder, do nothing else")

    def __post_init__(self) -> None:
        _require(self.model_save_path != "", "--model_save_path is empty: give a folder")
        for name in ("save_steps", "save_total_limit", "logging_steps"):
            _require(getattr(self, name) >= 1, f"--{name} {getattr(self, name)}: must be 1 or more")
        if self.report_to == ["none"]:
            self.report_to = []
        available = get_available_reporting_integrations()
        for name in self.report_to:
            known = ", ".join(INTEGRATION_TO_CALLBACK)
            _require(name in INTEGRATION_TO_CALLBACK, f"--report_to {name}: choose none, or from {known}")
            _require(
                name in available,
                f"--report_to {name}: the package is not installed; `pip install {name}`, or --report_to none",
            )
        if self.logging_dir is not None and "tensorboard" not in self.report_to:
            logger.warning("--logging_dir has no effect without --report_to tensorboard")


@dataclass
class Arguments:
    """A whole command line of `finetune.py`."""

    prog: ClassVar[str] = "finetune.py"
    description: ClassVar[str] = "Fine-tune a causal language model."
    model: ModelArguments
    data: DataArguments
    selection: SelectionArguments
    memory: MemoryArguments
    adapters: AdapterArguments
    optimization: OptimizationArguments
    output: OutputArguments

    def __post_init__(self) -> None:
        _require(
            self.adapters.lora or not (self.model.fp16 and self.model.base_dtype == "float16"),
            "--fp16 with --base_dtype float16 cannot train all weights (loss scaling needs float32 ones): "
            "leave --base_dtype out, or add --lora",
        )
        _require(
            not (self.model.fp16 and self.optimization.optim_in_backward),
            "--optim_in_backward with --fp16: loss scaling looks at all gradients before one is applied; use --bf16",
        )
        _require(
            not (self.adapters.lora and self.optimization.optim.startswith(("galore", "apollo"))),
            f"--optim {self.optimization.optim} projects gradients of whole weight matrices to a low rank, which those "
            "of adapters have already: leave --lora and --qlora out, or take another --optim",
        )
        if not self.selection.tokentune:
            _log_without_effect(self.memory, ("checkpoint_rest", "offload_kv", "chunked_loss"), "--tokentune")

    def settings(self) -> dict[str, Any]:
        """Every flag's name and value, in one level."""
        return {name: value for group in asdict(self).values() for name, value in group.items()}


Command = TypeVar("Command", bound=Arguments)


def parse_arguments(argv: Sequence[str] | None = None, command: type[Command] = Arguments) -> Command:
    """Reads and checks a command line.

    Args:
        argv: the words after the command; None means the process's own.
        command: whose groups hold the flags.

    Raises:
        UserError: an unknown flag (with the nearest known one), a missing one, or a value that cannot work.
        SystemExit: 0, after `--help`.
    """
    groups = [group.type for group in fields(command)]
    parser = _Parser(groups, prog=command.prog, description=command.description, allow_abbrev=False)
    # No `.args` file is read: whatever is set stands on the command line.
    *parsed, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    for word in unknown:
        flag = word.split("=")[0]
        near = difflib.get_close_matches(flag, [f"--{f.name}" for group in groups for f in fields(group)], n=1)
        raise UserError(f"unknown argument {flag}" + (f": did you mean {near[0]}?" if near else " (--help lists all)"))
    return command(*parsed)


class _Parser(HfArgumentParser):
    def error(self, message: str) -> None:
        # argparse would print the usage of forty flags first and bury the sentence.
        raise UserError(f"{message} (--help lists all flags)")


def process_count() -> int:
    """Processes of a launcher such as torchrun; 1 in a plain run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _log_without_effect(group: Any, names: Sequence[str], needed: str) -> None:
    defaults = {f.name: f.default_factory() if callable(f.default_factory) else f.default for f in fields(group)}
    for name in names:
        if getattr(group, name) != defaults[name]:
            logger.warning("--%s has no effect without %s", name, needed)
