"""What a command says to its user: messages on the way, and errors that the user can cure, on which it ends.

Bad input is told in one to three lines (what is wrong, where, what to do) and exit code 2, without a traceback.
A traceback means a defect in TokenTune, so everything that is not a `UserError` is left to propagate.
"""

import logging
import os
import signal
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
        SystemExit: 2 after a `UserError` (its message on stderr), 130 after Ctrl-C and 143 after SIGTERM (128 + the
            signal's number, the shells' own convention). Every other exception propagates with its traceback.
    """
    try:
        main()
    except UserError as error:
        say_once(f"error: {error}")
        sys.exit(2)
    except KeyboardInterrupt as error:  # `interruptions.Interrupted` among it
        if os.environ.get("RANK", "0") == "0":  # a launcher interrupts all its processes
            print(str(error) or "interrupted", file=sys.stderr)
        sys.exit(128 + getattr(error, "signal_number", signal.SIGINT))


def say_once(message: str) -> None:
    """Prints what is wrong; of a launcher's processes, which mostly find the same, one does."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from tokentune.training.distributed.peers import leave_it_to_others  # too large an import for `--help`

        if leave_it_to_others():
            return
    print(message, file=sys.stderr)


def log_to_stderr() -> None:
    """Sends this project's messages to stderr: stdout is for the progress and --print_run_folder.

    Of a launcher's processes only the first one speaks, but for errors.
    """
    logger = logging.getLogger("tokentune")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    if os.environ.get("RANK", "0") != "0":
        from tokentune.training.distributed.peers import let_first_process_speak

        let_first_process_speak()
