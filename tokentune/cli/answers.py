"""What is answered without training code: `--print_run_folder` and `--preview`."""

from pathlib import Path

from tokentune.settings.classification import ClassificationArguments
from tokentune.settings.finetune import Arguments
from tokentune.settings.glue import HUB_ID
from tokentune.training.checkpoints.run_folder import run_folder_name


def answered(arguments: Arguments) -> bool:
    """Prints what was asked for. Returns whether it was: training is then not wanted."""
    if arguments.output.print_run_folder:
        print(run_folder_of(arguments))
    elif arguments.run.preview is not None:
        if isinstance(arguments, ClassificationArguments):  # each with libraries of its own, which take seconds
            from tokentune.cli.labelled import preview
        else:
            from tokentune.cli.preview import preview
        preview(arguments)
    else:
        return False
    return True


def run_folder_of(arguments: Arguments) -> Path:
    """`--run_name` in `--model_save_path`; by default it is called
    `<model>-<data>[-<task>][-lora][-qlora][-tokentune-<selected>][-<labelled or supervised>]`.
    """
    selection, task = arguments.selection, getattr(arguments, "task", None)
    name = run_folder_name(
        arguments.model.model_name_or_path,
        arguments.data.dataset_name_or_path or HUB_ID,
        arguments.adapters,
        selection,
        None if task is None else task.name,
    )
    if task is not None and selection.tokentune and selection.selection in ("labelled", "supervised"):
        name += f"-{selection.selection}"  # compared with a random draw of as many tokens, beside it
    return Path(arguments.output.model_save_path).expanduser() / (arguments.output.run_name or name)
