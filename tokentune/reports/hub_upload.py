"""`--push_to_hub`: uploads a finished folder to the Hugging Face hub, after everything is saved.

Only the files of the result are uploaded, those of the list `BELONGS`. Everything else in the folder stays:
checkpoints, batches and predictions with texts of the data, pickles, the user's own files. In settings and summaries
each local path is cut to its last component.
"""

import json
import re
import shlex
import tempfile
from pathlib import Path
from typing import Any

import yaml
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

from tokentune.errors import UserError
from tokentune.file_names import BASE_FINGERPRINT_NAME, CARD_NAME, CURVES_NAME, RUN_CONFIG_NAME, SUMMARY_NAME
from tokentune.reports.model_card import model_name, shown
from tokentune.sources import error_chain, first_line

PUSH_FLAG = "--push_to_hub"
# Files in the folder itself, of its subfolders the chat templates alone. A model's own Python code belongs to it.
BELONGS = (
    *(CARD_NAME, RUN_CONFIG_NAME, SUMMARY_NAME, CURVES_NAME, "merge_summary.json"),
    *("config.json", "generation_config.json", "model.safetensors", "model-*-of-*.safetensors"),
    *("model.safetensors.index.json", "adapter_config.json", "adapter_model.safetensors"),
    BASE_FINGERPRINT_NAME,
    *("configuration_*.py", "modeling_*.py", "tokenization_*.py", "processing_*.py", "image_processing_*.py"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("vocab.txt", "merges.txt", "*.model", "*.tiktoken", "chat_template.*", "additional_chat_templates/*.jinja"),
    *("preprocessor_config.json", "processor_config.json"),
)
NAMING_PATHS = (RUN_CONFIG_NAME, SUMMARY_NAME, "merge_summary.json", "adapter_config.json")
_LONGEST_NAME = 96  # the hub's


def repository_name(repository: str, folder: Path) -> str:
    """`repository`; if that is empty, the folder's name in the characters that the hub allows."""
    if repository:
        return repository
    name = re.sub(r"([.-])[.-]+", r"\1", re.sub(r"[^A-Za-z0-9._-]", "-", model_name(folder))).strip("-.")
    return name[:_LONGEST_NAME].strip("-.")


def check_push(repository: str | None, folder: Path) -> None:
    """Refuses an upload that cannot succeed, before anything is computed. `repository` None: no upload is asked for.

    Raises:
        UserError: the hub does not allow the name, there is no token, or the hub may not be used (offline).
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
    """Uploads the result in a finished folder.

    Args:
        repository: `owner/name`, `name`, or "" for the folder's name. An existing repository keeps its visibility.
        public: whether a new repository is public; otherwise it is private.

    Returns:
        The repository's address.

    Raises:
        UserError: the upload failed. The message says where everything is saved, and how to upload it later.
    """
    name = repository_name(repository, folder)
    try:
        api = HfApi()
        created = api.create_repo(name, private=not public, exist_ok=True)
        with tempfile.TemporaryDirectory() as staged:
            _stage(folder, Path(staged))
            api.upload_folder(repo_id=created.repo_id, folder_path=staged, commit_message="TokenTune")
    except Exception as error:  # any failure: the user must read that nothing is lost
        later = [path for path in files_to_upload(folder) if path.name not in NAMING_PATHS[:-1]]
        included = " ".join(f"--include {shlex.quote(path.relative_to(folder).as_posix())}" for path in later)
        command = f"hf upload {name} {shlex.quote(str(folder))} . {'' if public else '--private '}{included}"
        raise UserError(
            f"{PUSH_FLAG} {name}: {_reason(error)}\nEverything is saved in {folder}. To upload it later, but for the "
            f"settings and summaries, which name local paths:\n  {command}"
        ) from error
    return str(created)


def files_to_upload(folder: Path) -> list[Path]:
    """The files of the result in a folder, by their names."""
    return sorted({path for pattern in BELONGS for path in folder.glob(pattern) if path.is_file()})


def _stage(folder: Path, staged: Path) -> None:
    """Fills a folder with what is uploaded: links to files, and copies without local paths of those that name some."""
    for path in files_to_upload(folder):
        target = staged / path.relative_to(folder)
        target.parent.mkdir(exist_ok=True)
        if path.name not in NAMING_PATHS:
            target.symlink_to(path.resolve())
        elif path.suffix == ".yaml":
            settings = without_paths(yaml.safe_load(path.read_text(encoding="utf-8")))
            text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
            target.write_text(f"# Settings of the run. Of local paths, the last component.\n{text}", encoding="utf-8")
        else:
            content = without_paths(json.loads(path.read_text(encoding="utf-8")))
            target.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def without_paths(value: Any) -> Any:
    """Settings in which each local path is its last component."""
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    return shown(value) if isinstance(value, str) else value


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
