"""What every command does with its messages and errors."""

import logging
import os
import signal
import sys
from collections.abc import Callable

from tokentune.errors import UserError
from tokentune.processes import process_count


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
        if process_count() == 1:
            print(f"error: {error}", file=sys.stderr)
        else:
            from tokentune.training.distributed.peers import say_once  # imports torch: seconds, for a misspelt flag

            say_once(f"error: {error}")
        sys.exit(2)
    except KeyboardInterrupt as error:  # `interruptions.Interrupted` among it
        if os.environ.get("RANK", "0") == "0":  # a launcher interrupts all its processes
            print(str(error) or "interrupted", file=sys.stderr)
        sys.exit(128 + getattr(error, "signal_number", signal.SIGINT))


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
