"""Names on the command line: local paths and hub ids, and messages about those that cannot be loaded."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from huggingface_hub import constants as hub_constants
from huggingface_hub.errors import GatedRepoError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError

from tokentune.errors import UserError

KINDS = (".json", ".jsonl", ".csv", ".parquet")
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}  # of all but Parquet, which compresses by itself
DATA_SUFFIXES = (*KINDS, *(kind + suffix for kind in KINDS[:-1] for suffix in COMPRESSIONS))


def is_local_path(name: str) -> bool:
    """Whether a model's or data set's name means a path: it exists, or cannot be a hub id."""
    spelt_like_path = name.startswith(("/", "./", "../", "~")) or name in (".", "..") or name.count("/") > 1
    return spelt_like_path or name.endswith(("/", *DATA_SUFFIXES)) or "\\" in name or os.path.exists(name)


def check_model_folder(name: str, flag: str) -> None:
    """Refuses a local model folder that is missing or holds no full model; a hub id passes. Raises UserError: no such
    folder, not a folder, an adapter's folder, or no `config.json` in it."""
    if not is_local_path(name):
        return
    folder = Path(name)
    # transformers would read the base from an adapter's folder and load both, as if the adapter were a full model.
    if not folder.exists():
        reason = "no such folder. Give a model's folder, or a hub id such as owner/name."
    elif not folder.is_dir():
        reason = "is a file; give the folder that holds the model."
    elif (folder / "adapter_config.json").is_file():
        reason = "holds an adapter, not a full model. Give its base, or merge it first (tokentune/merge.py)."
    elif not (folder / "config.json").is_file():
        reason = "no config.json in this folder, so it holds no model. Check the path."
    else:
        return
    raise UserError(f"{flag} {name}: {reason}")


def error_chain(error: BaseException) -> Iterator[BaseException]:
    """The error and its causes: transformers wraps the hub's errors in an OSError."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def first_line(error: BaseException) -> str:
    """An error's message cut to one readable line (transformers lists hundreds of class names in some)."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= 300 else lines[0][:300] + " ..."


def listed(names: Iterable[str], most: int = 20) -> str:
    """Names for a message, in quotes: the first of them, and of a long one the beginning."""
    names = list(names)
    shown = [repr(name if len(name) <= 60 else name[:60] + "...") for name in names[:most]]
    return ", ".join(shown) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def hub_error(name: str, error: BaseException, flag: str) -> UserError:
    """The message for a model or data set of the hub that could not be loaded: it says what to do.

    Args:
        name: the hub id, as the user gave it.
        error: what was raised; its causes are considered too.
        flag: the command line's flag that `name` came from.
    """
    chain = list(error_chain(error))
    texts = " ".join(map(str, chain)).lower()

    def has(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in chain)

    if has(GatedRepoError) or "gated repo" in texts or "gated dataset" in texts:
        reason = (
            "this repository is gated. Accept its terms on its huggingface.co page, then set HF_TOKEN to a token "
            "of that account (or run: hf auth login), or give a local folder."
        )
    elif has(HFValidationError):
        reason = "neither a local folder nor spelt like a hub id (owner/name)."
    elif has(RepositoryNotFoundError):
        reason = (
            "no local folder of this name, and no such public repository on the hub. Check the spelling; "
            "for a private repository set HF_TOKEN."
        )
    elif has(ConnectionError, TimeoutError, LocalEntryNotFoundError):
        why = "huggingface.co cannot be reached. Check the network, or give a local folder."
        if hub_constants.HF_HUB_OFFLINE:
            why = "--offline or HF_HUB_OFFLINE=1 forbids to download it. Give a local folder, or go online once."
        reason = f"no local folder of this name, not in the hub's cache, and {why}"
    else:
        reason = f"cannot be loaded: {first_line(error)}"
    return UserError(f"{flag} {name}: {reason}")


def loading_error(name: str, error: BaseException, flag: str) -> UserError:
    """`hub_error` for hub ids; for a local folder, what is wrong with its files."""
    if "trust_remote_code" in str(error):
        reason = (
            "comes with Python code of its own, which is not run unasked. Look at it, then add --trust_remote_code."
        )
    elif not os.path.isdir(name):
        return hub_error(name, error, flag)
    elif isinstance(error, SafetensorError):
        reason = f"a weight file is damaged ({first_line(error)}). Copy or download it again."
    else:
        reason = f"cannot be loaded: {first_line(error)}"
    return UserError(f"{flag} {name}: {reason}")
