"""Working without the network: `--offline`, and saving a run.

The Hugging Face libraries read HF_HUB_OFFLINE when they are imported, before the command line is read. Their own
variables are therefore set here too; the environment's are for worker processes and for what is imported later.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants as hub_constants

# Trackers that keep their records for a later upload, or would send telemetry. Variables that are set already stay.
OFFLINE_TRACKERS = {
    **{"WANDB_MODE": "offline", "COMET_MODE": "offline", "SWANLAB_MODE": "offline"},
    **{"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "1"},
}


def go_offline() -> None:
    """From here on no model, tokenizer or data set is requested from the hub; its cache is still used."""
    for name, value in OFFLINE_TRACKERS.items():
        os.environ.setdefault(name, value)
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    for module in (hub_constants, sys.modules.get("datasets.config")):
        if module is not None:
            module.HF_HUB_OFFLINE = True


@contextmanager
def offline() -> Iterator[None]:
    """Within it huggingface_hub and peft do not ask the hub.

    Saving an adapter asks for the base's configuration, to find out whether the vocabulary grew. A hub that cannot be
    reached would then cost minutes of waiting, or the run.
    """
    variable, constant = os.environ.get("HF_HUB_OFFLINE"), hub_constants.HF_HUB_OFFLINE
    os.environ["HF_HUB_OFFLINE"], hub_constants.HF_HUB_OFFLINE = "1", True
    try:
        yield
    finally:
        del os.environ["HF_HUB_OFFLINE"]
        hub_constants.HF_HUB_OFFLINE = constant
        if variable is not None:
            os.environ["HF_HUB_OFFLINE"] = variable
