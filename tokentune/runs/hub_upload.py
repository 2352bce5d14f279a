"""`--push_to_hub`: a finished folder uploaded to the Hugging Face hub, after everything is saved."""

import re
import shlex
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of the client that the hub's package uses
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from tokentune.data.sources import error_chain, first_line
from tokentune.errors import UserError

PUSH_FLAG = "--push_to_hub"
# What a folder holds for going on with a run, not for using its result; and pickles, which nobody should have to trust.
NOT_UPLOADED = ("checkpoint-*", "runs/*", "merged/*", "training_args.bin", "*.pt", "*.pth", "*.lock", "*.tmp", ".*")
_LONGEST_NAME = 96  # the hub's


def repository_name(repository: str, folder: Path) -> str:
    """`repository`, or where that is empty one of the folder's name (of the token's owner), spelt as the hub allows."""
    if repository:
        return repository
    folder = folder.resolve()
    name = f"{folder.parent.name}-merged" if folder.name == "merged" else folder.name
    name = re.sub(r"([.-])[.-]+", r"\1", re.sub(r"[^A-Za-z0-9._-]", "-", name)).strip("-.")
    return name[:_LONGEST_NAME].strip("-.")


def check_push(repository: str | None, folder: Path) -> None:
    """Refuses, before anything is computed, an upload that cannot succeed. None: none is asked for.

    Raises:
        UserError: no name that the hub allows, no token, or the hub may not be reached.
    """
    if repository is None:
        return
    name = repository_name(repository, folder)
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"{PUSH_FLAG} {name}: no name of a repository (owner/name): {first_line(error)}") from error
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{PUSH_FLAG} {name}: HF_HUB_OFFLINE=1 forbids it. Unset that, or leave the flag out.")
    if get_token() is None:
        raise UserError(f"{PUSH_FLAG} {name}: no token: set HF_TOKEN to one with write access, or run: hf auth login")


def push_folder(folder: Path, repository: str, *, public: bool) -> str:
    """Uploads a finished folder; checkpoints, logs and pickled files are left out.

    Args:
        repository: `owner/name`, `name`, or "" for the folder's. One that exists keeps its visibility.
        public: whether a new one is; else it is private.

    Returns:
        The repository's address.

    Raises:
        UserError: it could not be uploaded; with where everything is safe, and the command that uploads it later.
    """
    name = repository_name(repository, folder)
    try:
        api = HfApi()
        created = api.create_repo(name, private=not public, exist_ok=True)
        api.upload_folder(
            repo_id=created.repo_id,
            folder_path=str(folder),
            ignore_patterns=list(NOT_UPLOADED),
            commit_message="TokenTune",
        )
    except Exception as error:  # whatever it is: nothing is lost, and that is what is to be said
        excluded = " ".join(f"--exclude {shlex.quote(pattern)}" for pattern in NOT_UPLOADED)
        later = f"hf upload {name} {shlex.quote(str(folder))} . {'' if public else '--private '}{excluded}"
        raise UserError(
            f"{PUSH_FLAG} {name}: {_reason(error)}\nEverything is saved in {folder}. To upload it later:\n  {later}"
        ) from error
    return str(created)


def _reason(error: Exception) -> str:
    chain = list(error_chain(error))
    if any(isinstance(e, LocalTokenNotFoundError) for e in chain):
        return "not uploaded: no token. Set HF_TOKEN to one with write access, or run: hf auth login"
    if any(isinstance(e, OfflineModeIsEnabled) for e in chain):
        return "not uploaded: HF_HUB_OFFLINE=1 forbids it"
    status = next((e.response.status_code for e in chain if isinstance(e, HfHubHTTPError)), None)
    if status in (401, 403) or any(isinstance(e, RepositoryNotFoundError | GatedRepoError) for e in chain):
        return f"not uploaded: this token has no right to write there ({first_line(error)})"
    if status is None and any(isinstance(e, ConnectionError | TimeoutError | HTTPError) for e in chain):
        return "not uploaded: huggingface.co cannot be reached"
    return f"not uploaded: {first_line(error)}"
