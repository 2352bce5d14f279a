"""Which files of a folder are the data set that is asked for: its splits and configurations, never joined by a guess.

They are known, in this order, by what `save_to_disk` wrote, by the `configs:` in a README.md (as in the hub's data
sets), and by names: `train.jsonl`, `data/train_sft-00000-of-00001.parquet`, `main/test.csv`.
"""

import json
import logging
import re
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from datasets.data_files import FILES_TO_IGNORE, resolve_pattern, sanitize_patterns
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCardData

from tokentune.data.formats.json_files import name_twice
from tokentune.data.formats.record_files import file_hash, kind_of_file, stem_of
from tokentune.data.formats.split_names import SHARD, SPLIT_WORDS, base_of, labelled
from tokentune.errors import UserError
from tokentune.sources import COMPRESSIONS, KINDS, first_line, listed

logger = logging.getLogger(__name__)

CHOICES = {role: f"--{which}dataset" for role, which in (("train", ""), ("validation", "eval_"), ("test", "test_"))}
# Parameters of a README's configuration that do not change which rows its files hold.
CARD_PARAMETERS = {"data_files", "data_dir", "default", "description", "version", "features"}
DOCUMENTS = re.compile(
    r"(readme|licen[cs]e|notice|citation|changelog)\b|.*\.(md|py|ya?ml|toml|cff|bib|png|jpe?g|svg|pdf)$"
)
COPY = re.compile(r" ?\(\d+\)$")  # "train (1).jsonl": what was downloaded again

# Name -> files, or the folder of a saved data set; those that a README names may be missing. None: without a name.
Splits = dict[str | None, list[Path]]
Catalogue = dict[str, Splits]  # configuration -> its splits; "": the folder itself


def find_files(
    folder: Path, flag: str, *, role: str, split: str | None = None, config: str | None = None
) -> list[Path]:
    """The files that are asked for, or the folder of a saved data set alone (`is_saved`). The log names files that are
    not read.

    They are sorted: rows, and so every seeded draw, have the same order on any file system.

    Args:
        flag: that named the folder.
        role: "train", "validation" or "test": which split is meant where `split` is None.
        split, config: asked for by name; None: there must be one that is meant.

    Raises:
        UserError: there is none, or more than one.
    """
    where = f"{flag} {folder}"
    catalogue, default = _catalogue(folder, where)
    splits = _chosen_config(catalogue, where, role, config or default, split or role)
    files = _chosen_split(splits, where, role, split)
    _check_there(files, folder, where)
    if any(is_saved(file) for file in files):
        if len(files) > 1:
            raise UserError(f"{where}: holds several saved data sets ({_paths(files, folder)}). Name one of them.")
        return files
    _check_kinds(files, folder, where)
    with suppress(OSError):  # told when the file is read
        _tell_doubles(files, folder, where)
    _tell_unread(folder, where, files, catalogue)
    return files


def tells_split(name_or_path: str, role: str) -> bool:
    """Whether a folder names this split. Of a file, and of a hub data set (loading it tells), False."""
    folder = Path(name_or_path).expanduser()
    if not folder.is_dir():
        return False
    if is_saved(folder) or _card_configs(folder, str(folder)):
        catalogue, _ = _catalogue(folder, str(folder))
    else:  # files of any kind: images too
        files = [path for path in folder.rglob("*") if path.is_file()]
        catalogue = labelled({path: (stem_of(path), path.relative_to(folder).parts[:-1]) for path in files})
    return any(base_of(name) == role for splits in catalogue.values() for name in splits if name is not None)


def subfolder_of_split(folder: Path, where: str, role: str, split: str | None) -> Path | None:
    """The subfolder that is asked for; None where none is asked for, and there are not several that `datasets` would
    join. Raises UserError: there is no such one, or several are meant."""
    named = {path.name: [path] for path in sorted(folder.iterdir()) if path.is_dir() and base_of(path.name)}
    if split is None and len([name for name in named if base_of(name) == role]) < 2:
        return None
    return _chosen_split(named or {None: [folder]}, where, role, split)[0]


def is_saved(folder: Path) -> bool:
    """Whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote the folder."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


# ---- what is there ---------------------------------------------------------------------------------------------------


def _catalogue(folder: Path, where: str) -> tuple[Catalogue, str | None]:
    """What the folder holds, and the name of its default configuration, if a README names one."""
    if is_saved(folder):
        return {"": _saved_splits(folder, where)}, None
    cards = _card_configs(folder, where)
    catalogue = {name: _card_splits(folder, name, card, where) for name, card in cards.items()}
    if not cards:
        catalogue = _told_by_names(folder)
    if not any(catalogue.values()):
        raise UserError(f"{where}: no {', '.join(KINDS)} file in this folder.")
    return catalogue, cards.get_default_config_name() if cards else None


def _saved_splits(folder: Path, where: str) -> Splits:
    if (folder / "state.json").is_file():
        return {None: [folder]}
    try:
        names = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        return {str(name): [folder / str(name)] for name in names}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where}: its dataset_dict.json names no splits: {first_line(error)}.") from error


def _card_configs(folder: Path, where: str) -> MetadataConfigs:
    """The `configs:` in the head of the folder's README.md; empty where there are none."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return MetadataConfigs()
    head = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    if head is None or not re.search(r"^configs\s*:", head[1], re.MULTILINE):  # what else it holds may be malformed
        return MetadataConfigs()
    try:
        listed_configs = yaml.safe_load(head[1])["configs"]
        if twice := name_twice(str(config["config_name"]) for config in listed_configs):
            raise UserError(f"{where}: the configs in its README.md cannot be told apart: {twice}.")
        configs = MetadataConfigs.from_dataset_card_data(DatasetCardData(configs=listed_configs))
        configs.get_default_config_name()
        return configs
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{where}: the configs in its README.md cannot be read: {first_line(error)}") from error


def _card_splits(folder: Path, name: str, card: dict[str, Any], where: str) -> Splits:
    if unread := [parameter for parameter in card if parameter not in CARD_PARAMETERS]:
        raise UserError(
            f"{where}: its README.md reads the configuration {name!r} with {listed(unread)}, which is not done here. "
            "Give the files themselves."
        )
    folder = folder / card.get("data_dir", ".")
    if "data_files" not in card:
        configs = _told_by_names(folder) if folder.is_dir() else {}
        if len(configs) > 1 or (configs and "" not in configs):
            raise UserError(
                f"{where}: its README.md reads the configuration {name!r} from {card.get('data_dir', 'this folder')}, "
                f"which holds folders of {listed(sorted(configs))}. Give one of them."
            )
        return configs.get("", {None: [folder / "*"]} if "data_dir" in card else {})
    try:
        named = sanitize_patterns(card["data_files"])
    except ValueError as error:
        raise UserError(f"{where}: the data_files in its README.md cannot be read: {first_line(error)}") from error
    splits: Splits = {}
    for split, patterns in named.items():
        found: dict[Path, None] = {}
        for pattern in patterns:
            if "://" in pattern:
                raise UserError(f"{where}: its README.md names a file elsewhere ({pattern:.80}). Download it first.")
            at = folder.absolute()
            try:
                matching = map(Path, resolve_pattern(pattern, str(at)))
            except FileNotFoundError:  # an incomplete copy: refused only if this split is chosen
                matching = [at / pattern]
            found |= {folder / path.relative_to(at) if path.is_relative_to(at) else path: None for path in matching}
        splits[split] = list(found)
    return splits


def _told_by_names(folder: Path) -> Catalogue:
    """Data files, and the folders of saved data sets, whose own files are left out."""
    saved = {path.parent for path in folder.rglob("state.json") if (path.parent / "dataset_info.json").is_file()}
    stems = {}
    for path in _visible(folder):
        if path in saved:
            stems[path] = path.name
        elif kind_of_file(path) and path.is_file() and path.name not in FILES_TO_IGNORE and not saved & {*path.parents}:
            stems[path] = stem_of(path)
    return labelled({path: (stem, path.relative_to(folder).parts[:-1]) for path, stem in stems.items()})


def _visible(folder: Path) -> list[Path]:
    """All that is below a folder, sorted, without what is hidden."""
    paths = sorted(folder.rglob("*"))
    return [path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def _check_there(files: list[Path], folder: Path, where: str) -> None:
    """Refuses a split of which the folder's own list names files that are missing, and warns of missing shards."""
    saved = (folder / "dataset_dict.json").is_file()
    missing = [file for file in files if not (is_saved(file) if saved else file.exists())]
    if missing:
        teller, what = ("dataset_dict.json", "a saved split") if saved else ("README.md", "data")
        raise UserError(
            f"{where}: its {teller} names {what} that is not there: {_paths(missing, folder)}. Copy or download it, or "
            f"correct {teller}."
        )
    numbered = [(file, match) for file in files if (match := SHARD.match(stem_of(file)))]
    shards = Counter((file.parent, kind_of_file(file), *match.groups()) for file, match in numbered)
    sets = Counter(shard[:3] for shard in shards)
    for (*of_set, name, total), count in shards.items():
        if sets[*of_set, name] > 1 or count > int(total):
            raise UserError(
                f"{where}: the files of {name!r} are numbered as those of several sets, which may hold the same rows "
                "twice. Name files, or remove those of one set."
            )
        if count < int(total):
            logger.warning("%s: only %d of the %d files of %r are there", where, count, int(total), name)


# ---- what is meant ---------------------------------------------------------------------------------------------------


def _chosen_config(catalogue: Catalogue, where: str, role: str, config: str | None, wanted: str) -> Splits:
    config_flag = f"{CHOICES[role]}_config"
    names = [name for name in catalogue if name]
    if config is not None:
        if config in catalogue:
            return catalogue[config]
        there = f"only {', '.join(sorted(names))}" if names else f"nor any other: leave {config_flag} out"
        raise UserError(f"{where}: no configuration {config!r}, {there}.")
    meant = {
        name: [file for split in _fitting(splits, wanted) for file in splits[split]]
        for name, splits in catalogue.items()
    }
    having = [name for name, files in meant.items() if _present(files)] or [name for name in meant if meant[name]]
    if len(having) == 1 or len(catalogue) == 1:
        return catalogue[having[0] if having else next(iter(catalogue))]
    if len(having) == 2 and "" in having and all(list(catalogue[name]) == [None] for name in having):
        # Files, and more of them in one subfolder, unless these are other states of the same.
        files = sorted(path for name in having for path in catalogue[name][None])
        if name_twice(stem_of(file) for file in files) is None:
            return {None: files}
    if not having:
        there = dict.fromkeys(split for splits in catalogue.values() for split in splits if split is not None)
        raise _no_split(where, role, wanted, [*there])
    named = ", ".join(sorted(name or "(the folder itself)" for name in having))
    raise UserError(
        f"{where}: holds several configurations: {named}. Choose one with {config_flag}, or name folders of them."
    )


def _fitting(splits: Splits, wanted: str) -> list[str | None]:
    """The splits that a name means: the one of that name, or all for the same purpose; None where none has a name."""
    if wanted in splits or list(splits) == [None]:
        return [wanted if wanted in splits else None]
    named = [name for name in splits if name is not None and wanted in SPLIT_WORDS and base_of(name) == wanted]
    return [name for name in named if _present(splits[name])] or named


def _present(files: Iterable[Path]) -> bool:
    return any(file.exists() for file in files)


def _chosen_split(splits: Splits, where: str, role: str, split: str | None) -> list[Path]:
    split_flag, wanted = f"{CHOICES[role]}_split", split or role
    if split is not None and list(splits) == [None]:
        raise UserError(f"{where}: tells no splits, so there is no {split!r}: leave {split_flag} out.")
    fitting, there = _fitting(splits, wanted), [name for name in splits if name is not None]
    if not fitting:
        raise _no_split(where, role, wanted, there)
    if len(fitting) > 1:
        raise UserError(
            f"{where}: holds several splits for {wanted}: {', '.join(sorted(fitting))}. Choose one with {split_flag}; "
            f"there are {', '.join(there)}."
        )
    return splits[fitting[0]]


def _no_split(where: str, role: str, wanted: str, there: list[str]) -> UserError:
    only = f"only {', '.join(there)}" if there else "nor any other"
    return UserError(f"{where}: no split {wanted!r}, {only}. Choose one with {CHOICES[role]}_split, or name a file.")


def _check_kinds(files: list[Path], folder: Path, where: str) -> None:
    """Refuses two kinds of file with one name, and copies beside their original, which may hold the same rows."""
    named: dict[Path, Path] = {}
    for file in files:
        stem = stem_of(file)
        shard = SHARD.match(stem)
        around = file.parent.parent if file.parent.name == "data" else file.parent
        other = named.setdefault(around / (shard[1] if shard else COPY.sub("", stem)), file)
        kinds_differ = other.name.removeprefix(stem_of(other)).lower() != file.name.removeprefix(stem).lower()
        if kinds_differ or bool(COPY.search(stem_of(other))) != bool(COPY.search(stem)):
            raise UserError(
                f"{where}: {_paths([other, file], folder)} have one name, and may hold the same rows twice. "
                "Name one of them."
            )


def _tell_doubles(files: list[Path], folder: Path, where: str) -> None:
    """Warns of files with the same content. Of files of different sizes nothing is read."""
    sizes = Counter(file.stat().st_size for file in files)
    first: dict[str, Path] = {}
    for file in (file for file in files if sizes[file.stat().st_size] > 1):
        if (other := first.setdefault(file_hash(file), file)) != file:
            both = _paths([other, file], folder)
            logger.warning("%s: %s have the same content, so that their rows come twice", where, both)


# ---- what is not read ------------------------------------------------------------------------------------------------


def _tell_unread(folder: Path, where: str, files: list[Path], catalogue: Catalogue) -> None:
    known = {path for splits in catalogue.values() for paths in splits.values() for path in paths}
    others = sorted(path for path in known - set(files) if path.exists())
    if others:
        logger.info("%s: not read, as they are of other splits or configurations: %s", where, _paths(others, folder))
    unknown = [
        path
        for path in _visible(folder)
        if path.is_file() and not known & {path, *path.parents}
        if path.name not in FILES_TO_IGNORE and not DOCUMENTS.match(path.name.lower())
    ]
    if unknown:
        read = f"{', '.join(KINDS)}, the first three also with {', '.join(COMPRESSIONS)}"
        logger.warning("%s: not read: %s (what is read: %s)", where, _paths(unknown, folder), read)


def _paths(paths: Iterable[Path], folder: Path) -> str:
    return listed([str(p.relative_to(folder) if p.is_relative_to(folder) else p) for p in paths], most=8)
