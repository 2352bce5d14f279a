"""The words of a command to its settings. Imports nothing heavy, for a quick `--help`."""

import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from functools import cache
from typing import Any, TypeVar

from tokentune.cli.parser import Parser
from tokentune.settings.finetune import Arguments, FinetuneArguments
from tokentune.settings.flags import require

Command = TypeVar("Command", bound=Arguments)
Settings = TypeVar("Settings")


def parse_arguments(argv: Sequence[str] | None = None, command: type[Command] = FinetuneArguments) -> Command:
    """Reads and checks a command line; with `--offline`, cuts the process off from the hub.

    Args:
        argv: the words after the command; None means the process's own.
        command: whose groups hold the flags.

    Raises:
        UserError: an unknown flag (with what to give instead), a missing one, a value that cannot work, a `--config`
            file that cannot be read.
        SystemExit: 0, after `--help` and `--version`.
    """
    arguments = arguments_of(flags_given(argv, command), command)
    if arguments.model.offline:
        from tokentune.training.offline import go_offline  # the hub's client, which may be missing at the start

        go_offline()
    return arguments


def parser_of(command: type, prog: str | None = None) -> Parser:
    """The parser of a command's flags."""
    groups = [group.type for group in fields(command)]
    common, epilog = getattr(command, "common", "").split(), getattr(command, "epilog", None)
    options = {"common": common, "epilog": epilog, "words": getattr(command, "words", ())}
    return Parser(groups, prog=prog or command.prog, description=command.description, **options)


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
        from tokentune.cli.config_file import read_config  # PyYAML, which may be missing at the start

        given = read_config(files[0], parser) | given
    parser.check_needed(given)
    if parser.notes:
        _say_once("; ".join(parser.notes))
    return given


@cache
def _say_once(note: str) -> None:
    """On stderr: a command reads its words several times, and a launcher starts several processes."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {note}", file=sys.stderr)


def arguments_of(given: dict[str, Any], command: type[Settings]) -> Settings:
    """A command's groups of settings, each checked: what is given, and defaults. Raises UserError."""
    groups = {}
    for group in fields(command):
        flags = [flag.name for flag in fields(group.type) if flag.init]
        groups[group.name] = group.type(**{name: given[name] for name in flags if name in given})
    return command(**groups)
