"""The command line of `finetune.py`: every flag, in groups, each with its check beside it.

    python -u ./tokentune/finetune.py --help

Names, defaults and meanings are those of the released TokenTune scripts; what this project adds says so in its help.
Each group is a dataclass (`settings/model.py`, `settings/data.py`, `settings/run.py`): its fields are its flags, and
`__post_init__` refuses what cannot work, in a sentence that names the flag. `parse_arguments` turns a command line into
one `Arguments`, or into another command's: a dataclass derived from it, whose groups are these ones or derived from
them (`settings/classification.py`). `--config` reads flags from a file first (`cli/config_file.py`).
"""

import argparse
import difflib
import re
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from tokentune import __version__
from tokentune.cli.config_file import read_config
from tokentune.errors import UserError
from tokentune.settings.data import DataArguments
from tokentune.settings.flags import check_characters, log_without_effect, require
from tokentune.settings.model import AdapterArguments, MemoryArguments, ModelArguments, SelectionArguments
from tokentune.settings.run import OptimizationArguments, OutputArguments, RunArguments
from tokentune.training.diagnosing import check_diagnosing
from tokentune.training.distributed.engines import check_engine
from tokentune.training.offline import go_offline


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
        check_engine(self)
        check_diagnosing(self)
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
            not run.auto_micro_batch or self.optimization.gradient_accumulation_steps == 1,
            "--auto_micro_batch finds the accumulation itself: leave --gradient_accumulation_steps out",
        )
        require(
            not (run.auto_micro_batch and self.optimization.optim_in_backward),
            "--auto_micro_batch has nothing to find beside --optim_in_backward, whose micro-batch is the global batch: "
            "leave it out, and choose --global_batch_size",
        )
        require(
            not (run.auto_micro_batch and data.streaming),
            "--auto_micro_batch cannot change the batches of --streaming, which are made as they are read: give "
            "--gradient_accumulation_steps",
        )
        self._check_packing()
        require(
            not data.streaming or self.optimization.max_steps is not None,
            "--streaming cannot know how many rows there are: add --max_steps",
        )

    def _check_packing(self) -> None:
        """A packed row draws for each of its documents, which only the one who packs them can tell apart."""
        selection = self.selection
        if not (self.data.packing and selection.tokentune):
            return
        require(
            not selection.scored,
            f"--packing with --selection {selection.selection}: the model draws then, for whole rows, and would leave "
            "some of the documents in a row without a selected token; leave --packing out, or take a --selection "
            "without scores",
        )
        require(
            selection.schedule is None,
            f"--packing with --prefix_length {selection.prefix_length}: packed rows are drawn for before their "
            "optimizer step is known; give one size, or leave --packing out",
        )
        require(
            selection.gradient_correction == 0,
            "--packing with --gradient_correction: tokens attend within their document, each of which has its own "
            "share of selected tokens, and the correction knows that of whole rows alone; leave one of them out",
        )


Command = TypeVar("Command", bound=Arguments)
UNBROKEN = "\0"  # a space in the help where no line may end
WORDING = {  # argparse's, and ours
    r"(--\w+)/--[\w-]+": r"\1",
    "^argument ": "",
    "expected (one|at least one) argument": "needs a value",
    "invalid int value: (.*)": r"\1 is not a whole number",
    "invalid float value: (.*)": r"\1 is not a number",
    "Truthy value expected: got (.*) but expected one of.*": r"'\1' is not true or false",
    r"invalid choice: ('.*') \(choose from (.*)\)": r"\1 is none of \2",
}


def parse_arguments(argv: Sequence[str] | None = None, command: type[Command] = FinetuneArguments) -> Command:
    """Reads and checks a command line; with `--offline`, cuts the process off from the hub.

    Args:
        argv: the words after the command; None means the process's own.
        command: whose groups hold the flags.

    Raises:
        UserError: an unknown flag (with the nearest known one), a missing one, a value that cannot work, a `--config`
            file that cannot be read.
        SystemExit: 0, after `--help` and `--version`.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    for word in words:
        check_characters(word, "the command line")
    groups = [group.type for group in fields(command)]
    parser = _Parser(groups, prog=command.prog, description=command.description)
    parser.check_names(words)
    parser.take_settings(settings_in_file(words, command))
    # No `.args` file is read: whatever is set stands on the command line or in the file that it names.
    *parsed, _, unknown = parser.parse_args_into_dataclasses(
        words, return_remaining_strings=True, look_for_args_file=False
    )
    for word in unknown:
        hint = f": did you mean --config {word}?" if word.endswith((".yaml", ".yml")) else " (--help lists all)"
        raise UserError(f"unexpected argument {word!r}, which belongs to no flag{hint}")
    arguments = command(*parsed)
    if arguments.model.offline:
        go_offline()
    return arguments


def settings_in_file(words: Sequence[str], command: type[Arguments] = FinetuneArguments) -> dict[str, Any]:
    """What the file of `--config` says, by the flags' names; nothing without such a file. Raises UserError."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = _refuse
    parser.add_argument("--config", action="append", default=[])
    files = parser.parse_known_args(words)[0].config
    require(len(files) <= 1, f"--config is given {len(files)} times: put the flags into one file")
    return read_config(files[0], [group.type for group in fields(command)]) if files else {}


class _Parser(HfArgumentParser):
    """argparse for groups of flags, with a help to be read: one name for each flag, and defaults that say something."""

    def __init__(self, groups: Sequence[type], **settings: Any) -> None:
        super().__init__(groups, allow_abbrev=False, formatter_class=_HelpFormatter, **settings)
        self.add_argument("--version", action="version", version=f"tokentune {__version__}", help="print the version")
        self.add_argument(
            "--config",
            metavar="FILE",
            help="YAML file of flags and their values (learning_rate: 4e-4), such as the run.yaml in a run's folder; "
            "flags given beside it override it (--bf16 false); paths in it are relative to the current folder",
        )
        descriptions = {group._argument_group_name: group.__doc__ for group in groups}
        for section in self._action_groups:
            section.description = descriptions.get(section.title)
        for action in self._actions:
            action.metavar = action.metavar or _metavar(action)
        needed = "".join(f" {action.option_strings[0]} {action.metavar}" for action in self._actions if action.required)
        self.usage = f"{self.prog}{needed} [flags]"

    def check_names(self, words: Sequence[str]) -> None:
        """Refuses a flag that there is not, before anything else: misspelt, a needed one would just be missing."""
        names = [name for action in self._actions for name in action.option_strings]
        for name in (word.split("=")[0] for word in words):
            if name.startswith("--") and name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f": did you mean {near[0]}?" if near else " (--help lists all)"
                raise UserError(f"unknown argument {name}{hint}")

    def take_settings(self, settings: dict[str, Any]) -> None:
        """Values that hold where the command line gives none."""
        self.set_defaults(**settings)
        for action in self._actions:
            action.required = action.required and action.dest not in settings

    def error(self, message: str) -> None:
        # argparse would print the usage of forty flags first and bury the sentence.
        _refuse(message)


def _refuse(message: str) -> None:
    for pattern, words in WORDING.items():
        message = re.sub(pattern, words, message)
    raise UserError(f"{message} (--help lists all flags)")


def _metavar(action: argparse.Action) -> str | None:
    """What stands for a flag's value in the help; None: its choices, or nothing."""
    if action.choices is not None or action.nargs == 0:
        return None
    if action.type in (int, float):
        return {int: "N", float: "NUMBER"}[action.type]
    is_path = re.search("save_path|template|cache|snapshot|checkpoint|dir$", action.dest)
    return "PATH" if is_path and action.choices is None else "NAME"


class _HelpFormatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=8)  # texts below their flags, all of the line's width

    def _format_action_invocation(self, action: argparse.Action) -> str:
        # Dashes within a name work too, and -h; said with every flag, they would double the text.
        flag = next(name for name in action.option_strings if name.startswith("--"))
        if action.nargs == 0 or action.type is string_to_bool:
            return flag
        return f"{flag} {self._format_args(action, action.dest.upper())}"

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        if action.nargs == "+":
            return f"{action.metavar} ..."
        return super()._format_args(action, default_metavar)

    def _get_help_string(self, action: argparse.Action) -> str:
        default = action.default
        if action.required:
            return f"{action.help} (required)"
        if default is None or default is False or default in ([], argparse.SUPPRESS):
            return action.help
        shown = " ".join(map(str, default)) if isinstance(default, list) else str(default)
        shown = Path(shown).name if shown.startswith("/") else shown  # a file of this project
        return f"{action.help} (default:{UNBROKEN}{shown})"

    def _split_lines(self, text: str, width: int) -> Iterable[str]:
        # Not in the middle of a word with a hyphen: a flag or a name that is broken there cannot be copied.
        lines = textwrap.wrap(" ".join(text.split(" ")), width, break_on_hyphens=False, break_long_words=False)
        return [line.replace(UNBROKEN, " ") for line in lines]
