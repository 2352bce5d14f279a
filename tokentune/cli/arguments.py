"""The words of a command that trains to its settings, checked against the machine and the launcher's engine."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from tokentune.cli.start import arguments_of, flags_given
from tokentune.settings.finetune import Arguments, FinetuneArguments
from tokentune.settings.glue import HUB_ID
from tokentune.training.checkpoints.run_folder import run_folder_name
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
    arguments = arguments_of(flags_given(argv, command), command)
    if arguments.model.offline:
        go_offline()
    return arguments


def answered(arguments: Arguments) -> bool:
    """Answers what needs no training code, `--print_run_folder` and `--preview`. Returns whether one was asked for."""
    if arguments.output.print_run_folder:
        print(run_folder_of(arguments))
    elif isinstance(arguments, FinetuneArguments) and arguments.run.preview is not None:
        from tokentune.cli.preview import preview  # the data's libraries take a second

        preview(arguments)
    else:
        return False
    return True


def run_folder_of(arguments: Arguments) -> Path:
    """`<model_save_path>/<model>-<data>[-<task>][-lora][-qlora][-tokentune-<selected>][-<labelled or supervised>]`."""
    selection, task = arguments.selection, getattr(arguments, "task", None)
    name = run_folder_name(
        arguments.model.model_name_or_path,
        arguments.data.dataset_name_or_path or HUB_ID,
        lora=arguments.adapters.lora,
        qlora=arguments.adapters.qlora,
        tokentune=selection.tokentune,
        prefix_length=selection.schedule or selection.selected,
        task=None if task is None else task.name,
    )
    if task is not None and selection.tokentune and selection.selection in ("labelled", "supervised"):
        name += f"-{selection.selection}"  # compared with a random draw of as many tokens, beside it
    return Path(arguments.output.model_save_path).expanduser() / name
