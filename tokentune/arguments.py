"""The command line of `finetune.py`: every flag, in groups, each with its check beside it.

    python -u ./tokentune/finetune.py --help

Names, defaults and meanings are those of the released TokenTune scripts; what this project adds says so in its help.
Each group is a dataclass (`model_arguments.py`, `data_arguments.py`, `run_arguments.py`): its fields are its flags, and
`__post_init__` refuses what cannot work, in a sentence that names the flag. `parse_arguments` turns a command line into
one `Arguments`, or into another command's: a dataclass derived from it, whose groups are these ones or derived from
them (`classification_arguments.py`).
"""

import difflib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, TypeVar

from transformers import HfArgumentParser

from tokentune.data_arguments import DataArguments
from tokentune.errors import UserError
from tokentune.flags import log_without_effect, require
from tokentune.model_arguments import AdapterArguments, MemoryArguments, ModelArguments, SelectionArguments
from tokentune.run_arguments import OptimizationArguments, OutputArguments, RunArguments


@dataclass
class Arguments:
    """What the commands that train have in common."""

    prog: ClassVar[str]
    description: ClassVar[str]
    model: ModelArguments
    data: DataArguments
    selection: SelectionArguments
    memory: MemoryArguments
    adapters: AdapterArguments
    optimization: OptimizationArguments
    output: OutputArguments

    def __post_init__(self) -> None:
        require(
            self.adapters.lora or not (self.model.fp16 and self.model.base_dtype == "float16"),
            "--fp16 with --base_dtype float16 cannot train all weights (loss scaling needs float32 ones): "
            "leave --base_dtype out, or add --lora",
        )
        require(
            not (self.model.fp16 and self.optimization.optim_in_backward),
            "--optim_in_backward with --fp16: loss scaling looks at all gradients before one is applied; use --bf16",
        )
        require(
            not (self.adapters.lora and self.optimization.optim.startswith(("galore", "apollo"))),
            f"--optim {self.optimization.optim} projects gradients of whole weight matrices to a low rank, which those "
            "of adapters have already: leave --lora and --qlora out, or take another --optim",
        )
        if not self.selection.tokentune:
            log_without_effect(self.memory, ("checkpoint_rest", "offload_kv", "chunked_loss"), "--tokentune")

    def settings(self) -> dict[str, Any]:
        """Every flag's name and value, in one level."""
        return {name: value for group in asdict(self).values() for name, value in group.items()}


@dataclass
class FinetuneArguments(Arguments):
    """A whole command line of `finetune.py`."""

    prog: ClassVar[str] = "finetune.py"
    description: ClassVar[str] = "Fine-tune a causal language model."
    run: RunArguments

    def __post_init__(self) -> None:
        super().__post_init__()
        data, run = self.data, self.run
        validates = data.eval_dataset_name_or_path is not None or data.eval_fraction is not None
        for name in ("early_stopping_patience", "load_best_model_at_end"):
            require(
                not getattr(run, name) or (validates and data.eval_steps is not None),
                f"--{name} looks at the validation loss: add --eval_steps, and --eval_dataset_name_or_path or "
                "--eval_fraction",
            )
        require(
            not data.streaming or self.optimization.max_steps is not None,
            "--streaming cannot know how many rows there are: add --max_steps",
        )


Command = TypeVar("Command", bound=Arguments)


def parse_arguments(argv: Sequence[str] | None = None, command: type[Command] = FinetuneArguments) -> Command:
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
