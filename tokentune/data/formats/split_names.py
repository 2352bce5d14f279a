"""Splits, configurations and shards by the names of files and folders."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

SPLIT_WORDS = {
    "train": ("train", "training", "trainset"),
    "validation": ("validation", "valid", "val", "dev", "eval", "evaluation", "devset", "valset"),
    "test": ("test", "testing", "testset", "holdout", "heldout"),
}
SHARD = re.compile(r"(.+?)-\d{5}-of-(\d{5})")  # as `datasets` names the files of one split
NUMBERS = re.compile(r"(?:(?<![a-z])(?:part|shard|chunk|file|of)(?![a-z])|[-_. ()\d])+$", re.IGNORECASE)
VERSION = re.compile(r"(?<![a-z])v(er(sion)?)?[-_.]?\d[\d._-]*$", re.IGNORECASE)


def labelled(paths: Mapping[Any, tuple[str, Sequence[str]]]) -> dict[str, dict[str | None, list]]:
    """Configuration -> split -> files, by each file's stem and the folders around it."""
    # Where the name of one shard is a split's, all are: "unsupervised-00000-of-00001" too.
    sharded = any((match := SHARD.match(stem)) and base_of(match[1]) for stem, _ in paths.values())
    catalogue: dict[str, dict[str | None, list]] = {}
    for path, (stem, folders) in paths.items():
        shard = SHARD.match(stem)
        split, around = (shard[1] if shard and sharded else _split_told(stem)), list(folders)
        for part in [] if split is not None else reversed(folders):
            if (split := _split_told(part)) is not None:
                around.remove(part)
                break
        around = [part for part in around if part.lower() != "data" and _unnumbered(part)]
        catalogue.setdefault("/".join(around), {}).setdefault(split, []).append(path)
    return catalogue


def _split_told(text: str) -> str | None:
    """The split in a file's or folder's name: from its word to the end, without numbers ("train_sft", "train")."""
    for match in reversed(list(re.finditer("[a-z]+", text.lower()))):
        if any(match[0] in words for words in SPLIT_WORDS.values()):
            return _unnumbered(text[match.start() :])
    return None


def _unnumbered(text: str) -> str:
    """A name without what counts files: "train" of "train_part-01", all of "train_v2"."""
    match = NUMBERS.search(text)
    if match is None or not any(c.isdigit() for c in match[0]) or VERSION.search(text):
        return text
    return text[: match.start()]


def base_of(name: str) -> str | None:
    """What a split is for by its name: "train", "validation" or "test"; None: none of these."""
    words = re.findall("[a-z]+", name.lower())
    return next((base for word in reversed(words) for base, known in SPLIT_WORDS.items() if word in known), None)
