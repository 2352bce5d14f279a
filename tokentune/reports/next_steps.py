"""What to type after a run: the last lines of its log."""

import json
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from tokentune.settings.classification import ClassificationArguments
from tokentune.settings.finetune import Arguments

logger = logging.getLogger(__name__)

PACKAGE = Path(__file__).resolve().parents[1]


def say_next_steps(arguments: Arguments, folder: Path, *, inputs: Sequence[str] = ()) -> None:
    """Logs the commands that use a finished run's result.

    Args:
        folder: of the run, or of one of its seeds.
        inputs: what a classifier takes, one text or image or a pair of texts.
    """
    task = arguments.task.task_type if isinstance(arguments, ClassificationArguments) else None
    if arguments.adapters.lora and arguments.adapters.invocation is None:
        logger.info("to merge it into its base: %s", merge_command(arguments, folder))
    if task is None:
        logger.info("to talk to it: %s", command("chat", folder))
    elif not arguments.adapters.lora:
        logger.info("to use it: %s", prediction(task, folder, pairs=len(inputs) == 2))


def merge_command(arguments: Arguments, folder: Path) -> str:
    """The whole command line."""
    model = arguments.model
    paths = {"base_model_name_or_path": model.model_name_or_path, "peft_model_path": folder}
    words = [str(word) for name, path in paths.items() for word in (f"--{name}", path)]
    words += [f"--{name}" for name in ("trust_remote_code", "allow_pickle") if getattr(model, name)]
    return command("merge", *words, "--output_dir", folder / "merged")


def prediction(task: str, folder: Path, *, pairs: bool) -> str:
    """A command that classifies an example. `task`: "text", "token" or "image"."""
    example: str | dict[str, str] = "picture.jpg" if task == "image" else "A text."
    example = {"text": example, "text_pair": "Another text."} if pairs else example
    name, path, given = map(json.dumps, (f"{task}-classification", str(folder), example))
    return "python -c " + shlex.quote(f"from transformers import pipeline; print(pipeline({name}, {path})({given}))")


def command(name: str, *words: object) -> str:
    """One of this project's commands, called as the one that runs now: as a file of the package, or as `tokentune`."""
    program = Path(sys.argv[0])
    own = program.resolve().parent == PACKAGE
    called = ["python", str(program.with_name(f"{name}.py"))] if own else ["tokentune", name]
    return shlex.join([*called, *map(str, words)])
