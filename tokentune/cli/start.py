"""The commands by name, and what is answered before anything heavy is imported."""

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from tokentune.cli.arguments import arguments_of, flags_given, parse_arguments, parser_of
from tokentune.cli.command import log_to_stderr, run_command
from tokentune.errors import UserError
from tokentune.settings.chat import ChatArguments
from tokentune.settings.classification import ClassificationArguments
from tokentune.settings.diagnose import DiagnoseArguments
from tokentune.settings.estimate import EstimateArguments
from tokentune.settings.finetune import FinetuneArguments
from tokentune.settings.merge import MergeArguments

COMMANDS: dict[str, Any] = {
    "finetune": FinetuneArguments,
    "classify": ClassificationArguments,
    "merge": MergeArguments,
    "chat": ChatArguments,
    "estimate": EstimateArguments,
    "diagnose": DiagnoseArguments,
}
PACKAGES = (  # without which no command starts
    *("torch", "transformers", "numpy", "accelerate", "datasets", "huggingface_hub", "jinja2", "peft", "psutil"),
    *("pyarrow", "safetensors", "tqdm", "yaml"),
)
PACKAGES_OF = {  # some are imported at a run's end
    "finetune": ("rich", "matplotlib"),
    "classify": ("rich", "matplotlib", "PIL", "sklearn", "scipy", "seqeval"),
    "estimate": ("rich", "bitsandbytes"),
    "diagnose": ("rich", "matplotlib"),
}


def start(name: str, words: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Does what takes no training code, whose imports take seconds: `--help`, refusals of flags, `--preview` and so on.

    Args:
        name: the command, one of `COMMANDS`.
        words: those after it; None means the process's own.
        prog: how the command was called, for its usage.

    Raises:
        SystemExit: 0 after what was answered, 2 after flags that are refused, or without the packages.
    """
    set_up_packages(name)
    run_command(lambda: _answer(name, sys.argv[1:] if words is None else words, prog))


def set_up_packages(name: str) -> None:
    """What other packages read when they are imported: what they say, and how much they keep.

    Silenced are words on their own internals, which a user can do nothing about, and bars in files.
    """
    # Per shape of a 16-bit matrix product on a CPU, oneDNN and PyTorch around it keep up to 0.6 MiB: with 1,024 each,
    # the default, memory rose by 2.8 MiB a step; with 256 it stayed after 50 steps, which took no longer.
    for cache in ("ONEDNN_PRIMITIVE_CACHE", "LRU_CACHE"):
        os.environ.setdefault(f"{cache}_CAPACITY", "256")
    for module in ("bitsandbytes.backends.cpu.ops", "transformers.trainer_utils"):  # kernels; a pad token that we set
        logging.getLogger(module).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    warnings.filterwarnings("ignore", message="This DataLoader will create .* worker processes")  # more than cores
    if name in ("chat", "estimate", "diagnose"):
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        for library in ("HF_HUB", "HF_DATASETS"):  # transformers follows the hub's
            os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")


def _answer(name: str, words: Sequence[str], prog: str | None) -> None:
    """Refuses, UserError, mistaken flags, and a Python that lacks what the commands import; SystemExit: answered."""
    command = COMMANDS[name]
    parser_of(command, prog).read(words)
    needed = (*PACKAGES, *PACKAGES_OF.get(name, ()))
    if missing := [package for package in needed if find_spec(package) is None]:
        raise UserError(
            f"{sys.executable} lacks {', '.join(missing)}. Activate the environment that has the requirements, or "
            "install them, in the project's folder: pip install '.[train]'"
        )
    given = flags_given(words, command, prog)
    if name in ("finetune", "classify") and given.keys() & {"preview", "print_run_folder"}:
        from tokentune.cli.answers import answered  # packages that may have been missing

        log_to_stderr()
        if answered(parse_arguments(words, command)):
            sys.exit(0)
    logging.getLogger("tokentune").setLevel(logging.ERROR)  # the command itself says what has no effect
    arguments_of(given, command)
