"""The commands by name, the flags that their words give, and what is answered before anything heavy is imported."""

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields
from importlib.util import find_spec
from typing import Any, TypeVar

from tokentune.cli.command import log_to_stderr, run_command
from tokentune.cli.parser import Parser
from tokentune.errors import UserError
from tokentune.settings.classification import ClassificationArguments
from tokentune.settings.diagnose import DiagnoseArguments
from tokentune.settings.estimate import EstimateArguments
from tokentune.settings.finetune import FinetuneArguments
from tokentune.settings.flags import require
from tokentune.settings.merge import MergeArguments

COMMANDS: dict[str, Any] = {
    "finetune": FinetuneArguments,
    "classify": ClassificationArguments,
    "merge": MergeArguments,
    "estimate": EstimateArguments,
    "diagnose": DiagnoseArguments,
}
PACKAGES = (  # without which no command starts
    *("torch", "transformers", "numpy", "accelerate", "datasets", "huggingface_hub", "jinja2", "peft", "psutil"),
    *("pyarrow", "safetensors", "tqdm", "yaml"),
)
Command = TypeVar("Command")


def start(name: str, words: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Does what takes no training code, whose imports take seconds: `--help`, refusals of flags, `--preview` and so on.

    Args:
        name: the command, one of `COMMANDS`.
        words: those after it; None means the process's own.
        prog: how the command was called, for its usage.

    Raises:
        SystemExit: 0 after what was answered, 2 after flags that are refused, or without the packages.
    """
    # Other packages' words on their own internals, which a user can do nothing about.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    warnings.filterwarnings("ignore", message="This DataLoader will create .* worker processes")  # more than cores
    if name in ("estimate", "diagnose"):
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    run_command(lambda: _answer(name, sys.argv[1:] if words is None else words, prog))


def _answer(name: str, words: Sequence[str], prog: str | None) -> None:
    """Refuses, UserError, mistaken flags, and a Python that lacks what the commands import; SystemExit: answered."""
    command = COMMANDS[name]
    parser_of(command, prog).read(words)
    if missing := [package for package in PACKAGES if find_spec(package) is None]:
        raise UserError(
            f"{sys.executable} lacks {', '.join(missing)}. Activate the environment that has the requirements, or "
            "install them, in the project's folder: pip install '.[train]'"
        )
    given = flags_given(words, command, prog)
    if name in ("finetune", "classify") and given.keys() & {"preview", "print_run_folder"}:
        from tokentune.cli.arguments import answered, parse_arguments  # packages that may have been missing

        log_to_stderr()
        if answered(parse_arguments(words, command)):
            sys.exit(0)
    logging.getLogger("tokentune").setLevel(logging.ERROR)  # the command itself says what has no effect
    arguments_of(given, command)


def parser_of(command: type, prog: str | None = None) -> Parser:
    """The parser of a command's flags."""
    groups = [group.type for group in fields(command)]
    shown = getattr(command, "shown", None)
    hidden = [group._argument_group_name for group in groups if shown and group._argument_group_name != shown]
    epilog = getattr(command, "epilog", None)
    return Parser(groups, hidden=hidden, prog=prog or command.prog, description=command.description, epilog=epilog)


def flags_given(words: Sequence[str] | None, command: type, prog: str | None = None) -> dict[str, Any]:
    """The flags that the words, and the file of `--config` among them, give to a command; no defaults.

    Raises:
        UserError: flags or a file that cannot be read, or without a flag that is required.
    """
    words = sys.argv[1:] if words is None else words
    parser = parser_of(command, prog)
    given = parser.read(words)
    files = given.pop("config", [])
    require(len(files) <= 1, f"--config is given {len(files)} times: put the flags into one file")
    if files:
        from tokentune.cli.config_file import read_config  # PyYAML, which `_check` may find to be missing

        given = read_config(files[0], parser) | given
    parser.check_needed(given)
    return given


def arguments_of(given: dict[str, Any], command: type[Command]) -> Command:
    """A command's groups of settings, each checked: what is given, and defaults. Raises UserError."""
    groups = {}
    for group in fields(command):
        flags = [flag.name for flag in fields(group.type) if flag.init]
        groups[group.name] = group.type(**{name: given[name] for name in flags if name in given})
    return command(**groups)
