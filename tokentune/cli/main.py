"""The console command: `tokentune finetune --help`, or `python -m tokentune finetune --help`."""

import importlib
import sys
from collections.abc import Sequence
from difflib import get_close_matches

from tokentune.cli.command import run_command
from tokentune.cli.start import COMMANDS, start
from tokentune.errors import UserError
from tokentune.version import __version__


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command that the first word names, with the words after it. `argv`: None means the process's own."""
    run_command(lambda: call(sys.argv[1:] if argv is None else argv))


def call(words: Sequence[str]) -> None:
    """The same, with errors raised. Raises UserError: no such command, bad input, a package that is not installed."""
    name, rest = (words[0], words[1:]) if words else ("", [])
    if name in ("-h", "--help"):
        print(help_text())
    elif name == "--version":
        print(f"tokentune {__version__}")
    elif name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=1)
        what = f"there is no command {name!r}" if name else "a command is missing"
        raise UserError(f"{what}: " + (f"did you mean {near[0]}?" if near else f"give one of {', '.join(COMMANDS)}"))
    else:
        start(name, rest, f"tokentune {name}")
        importlib.import_module(f"tokentune.{name}").main(rest)


def help_text() -> str:
    """All commands, one line each."""
    lines = [f"  {name:<10}{command.description}" for name, command in COMMANDS.items()]
    return "\n".join(
        ["usage: tokentune COMMAND [flags]", "", *lines, "", "tokentune COMMAND --help lists the flags of a command."]
    )
