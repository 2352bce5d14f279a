"""Errors that a user can cure, and how a command ends on them.

Bad input is told in one to three lines (what is wrong, where, what to do) and exit code 2, without a traceback.
A traceback means a defect in TokenTune, so everything that is not a `UserError` is left to propagate.
"""

import sys
from collections.abc import Callable


class UserError(Exception):
    """What is wrong, where (file, row, flag) and what to do: a message of one to three lines."""


class UnsupportedModelError(ValueError):
    """A model that the selective layers cannot serve exactly. The message says which part of it, and why."""


def run_command(main: Callable[[], None]) -> None:
    """Runs a command's `main` and turns the errors that a user can cure into an exit code.

    Args:
        main: the command; takes nothing, returns nothing.

    Raises:
        SystemExit: 2 after a `UserError` (its message on stderr), 130 after Ctrl-C (128 + SIGINT, the shells' own
            convention). Every other exception propagates with its traceback.
    """
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
