"""Doing without the network: `--offline`, and the saving of a run.

The Hugging Face libraries read HF_HUB_OFFLINE when they are imported, which is before a command line is: their own
variables are set here beside the environment's, which is for worker processes and for what is imported later.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub import constants as hub_constants

# Trackers that keep their records for a later upload, or else would send some of their own. What is set already stays.
OFFLINE_TRACKERS = {
    **{"WANDB_MODE": "offline", "COMET_MODE": "offline", "SWANLAB_MODE": "offline"},
    **{"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "1"},
}


def go_offline() -> None:
    """From here on no model, tokenizer or data set is asked for on the hub; what is in its cache is still found."""
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    for name, value in OFFLINE_TRACKERS.items():
        os.environ.setdefault(name, value)
    for settings, name in _switches():
        setattr(settings, name, True)


@contextmanager
def offline() -> Iterator[None]:
    """The same for a while.

    Saving an adapter asks the hub for the base's configuration, to find out whether the vocabulary grew. A hub that
    cannot be reached would then cost minutes of waiting, or the run.
    """
    variables = {name: os.environ.get(name) for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")}
    switches = [(settings, name, getattr(settings, name)) for settings, name in _switches()]
    os.environ.update(dict.fromkeys(variables, "1"))
    for settings, name, _ in switches:
        setattr(settings, name, True)
    try:
        yield
    finally:
        for settings, name, value in switches:
            setattr(settings, name, value)
        for name, value in variables.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _switches() -> list[tuple[Any, str]]:
    """(module, variable) of what is imported already."""
    datasets = sys.modules.get("datasets.config")
    return [(hub_constants, "HF_HUB_OFFLINE")] + ([(datasets, "HF_HUB_OFFLINE")] if datasets is not None else [])
