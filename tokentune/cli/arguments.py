"""The words of a command that trains to its settings, checked against the machine and the launcher's engine."""

from collections.abc import Sequence
from typing import TypeVar

from tokentune.cli.start import arguments_of, flags_given
from tokentune.settings.finetune import Arguments, FinetuneArguments
from tokentune.training.diagnosing import check_diagnosing
from tokentune.training.distributed.engines import check_engine
from tokentune.training.offline import go_offline

Command = TypeVar("Command", bound=Arguments)


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
    return checked(arguments_of(flags_given(argv, command), command))


def checked(arguments: Command) -> Command:
    """The same, where the engine can serve them; with `--offline`, the process is cut off from the hub."""
    check_engine(arguments)
    check_diagnosing(arguments)
    if arguments.model.offline:
        go_offline()
    return arguments
