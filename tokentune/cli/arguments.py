"""A command line to groups of settings: argparse with a help to be read, and a settings file."""

import argparse
import difflib
import re
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from tokentune.cli.config_file import read_config
from tokentune.errors import UserError
from tokentune.settings.finetune import Arguments, FinetuneArguments
from tokentune.settings.flags import check_characters, require
from tokentune.training.diagnosing import check_diagnosing
from tokentune.training.distributed.engines import check_engine
from tokentune.training.offline import go_offline
from tokentune.version import __version__

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
    check_engine(arguments)
    check_diagnosing(arguments)
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
