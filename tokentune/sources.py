"""Names on the command line: whether one means a local path or a hub id, and what to say when it leads nowhere."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from huggingface_hub import constants as hub_constants
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError

from tokentune.errors import UserError

KINDS = (".json", ".jsonl", ".csv", ".parquet")
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}  # of the texts among them; Parquet compresses by itself
DATA_SUFFIXES = (*KINDS, *(kind + suffix for kind in KINDS[:-1] for suffix in COMPRESSIONS))


def is_local_path(name: str) -> bool:
    """Whether a model's or data set's name means a path: it exists, or no hub id is spelt like that."""
    spelt_like_path = name.startswith(("/", "./", "../", "~")) or name in (".", "..") or name.count("/") > 1
    return spelt_like_path or name.endswith(("/", *DATA_SUFFIXES)) or "\\" in name or os.path.exists(name)


def check_model_folder(name: str, flag: str) -> None:
    """Refuses a local model folder that is missing or holds no full model; a hub id passes.

    Raises:
        UserError: no such folder, not a folder, an adapter's folder, or no `config.json` in it.
    """
    if not is_local_path(name):
        return
    folder = Path(name)
    if not folder.exists():
        raise UserError(f"{flag} {name}: no such folder. Give a model's folder, or a hub id such as owner/name.")
    if not folder.is_dir():
        raise UserError(f"{flag} {name}: is a file; give the folder that holds the model.")
    # transformers would follow the adapter's record to a base and load both, as if the adapter were a full model.
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{flag} {name}: holds an adapter, not a full model. Give its base, or merge it first (tokentune/merge.py)."
        )
    if not (folder / "config.json").is_file():
        raise UserError(f"{flag} {name}: no config.json in this folder, so it holds no model. Check the path.")


def error_chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what led to it: transformers wraps the hub's errors into an OSError."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def first_line(error: BaseException) -> str:
    """An error's message cut to one readable line (transformers lists hundreds of class names in some)."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= 300 else lines[0][:300] + " ..."


def listed(names: Iterable[str], most: int = 20) -> str:
    """Names for a message, in quotes; of many, or long ones, the beginning."""
    names = list(names)
    shown = [repr(name if len(name) <= 60 else name[:60] + "...") for name in names[:most]]
    return ", ".join(shown) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def hub_error(name: str, error: BaseException, flag: str) -> UserError:
    """Turns a failure to get a model or data set from the hub into a sentence that names the cure.

    Args:
        name: the hub id, as the user gave it.
        error: what was raised; the errors that it wraps are looked at too.
        flag: the command line's flag that `name` came from.
    """
    chain = list(error_chain(error))
    texts = [str(e).lower() for e in chain]
    unreachable = any(isinstance(e, (ConnectionError, TimeoutError, LocalEntryNotFoundError)) for e in chain)
    if any(isinstance(e, GatedRepoError) for e in chain) or any(
        "gated repo" in t or "gated dataset" in t for t in texts
    ):
        reason = (
            "this repository is gated. Accept its terms on its huggingface.co page, then set HF_TOKEN to a token "
            "of that account (or run: hf auth login), or give a local folder."
        )
    elif any(isinstance(e, HFValidationError) for e in chain):
        reason = "neither a local folder nor spelt like a hub id (owner/name)."
    elif any(isinstance(e, RepositoryNotFoundError) for e in chain):
        reason = (
            "no local folder of this name, and no such public repository on the hub. Check the spelling; "
            "for a private repository set HF_TOKEN."
        )
    elif unreachable and hub_constants.HF_HUB_OFFLINE:
        reason = (
            "no local folder of this name, not in the hub's cache, and --offline or HF_HUB_OFFLINE=1 forbids to "
            "download it. Give a local folder, or go online once."
        )
    elif unreachable:
        reason = (
            "no local folder of this name, not in the hub's cache, and huggingface.co cannot be reached. "
            "Check the network, or give a local folder."
        )
    else:
        reason = f"cannot be loaded: {first_line(error)}"
    return UserError(f"{flag} {name}: {reason}")


def loading_error(name: str, error: BaseException, flag: str) -> UserError:
    """`hub_error` for hub ids; for a local folder, what is the matter with its files."""
    if "trust_remote_code" in str(error):
        return UserError(
            f"{flag} {name}: comes with Python code of its own, which is not run unasked. Look at it, then add "
            "--trust_remote_code."
        )
    if not os.path.isdir(name):
        return hub_error(name, error, flag)
    if isinstance(error, SafetensorError):
        return UserError(f"{flag} {name}: a weight file is damaged ({first_line(error)}). Copy or download it again.")
    return UserError(f"{flag} {name}: cannot be loaded: {first_line(error)}")
