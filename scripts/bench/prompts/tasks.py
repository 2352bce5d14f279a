"""The tasks of `prompt_heavy.py`: rows whose prompts are longer than their answers, and how a model learns them.

Rows are {"prompt", "completion"}. `lookup` is made here; the others are made of the files of the data folder.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

Row = dict[str, str]
Rows = dict[str, list[Row]]  # by "train" and "validation"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
OPINIONS = ("bad", "good")
SPLITS = ("train", "validation")


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def tool_calls(data: Path) -> Rows:
    """The signatures of some tools and a request -> the call."""
    return {split: records(data / f"tool_calls.{split}.jsonl") for split in SPLITS}


def names(data: Path) -> Rows:
    """A message -> the names in it, written out (WNUT-17)."""
    return {split: [named(row) for row in records(data / f"wnut17.{split}.jsonl")] for split in SPLITS}


def named(record: dict) -> Row:
    found: list[list[str]] = []
    for word, tag in zip(record["tokens"], record["ner_tags"], strict=True):
        if tag.startswith("B-"):
            found.append([word])
        elif tag.startswith("I-") and found:
            found[-1].append(word)
    answer = "; ".join(" ".join(words) for words in found) or "none"
    return {"prompt": f"Text: {' '.join(record['tokens'])}\nNames:", "completion": f" {answer}"}


def opinions(data: Path, shots: int = 4) -> Rows:
    """Sentences with their opinion, and a sentence -> its opinion (SST-2). The examples are training rows."""
    known = records(data / "glue" / "sst2.train.jsonl")
    made = {}
    for split in SPLITS:
        chance = random.Random(split)
        made[split] = []
        for record in records(data / "glue" / f"sst2.{split}.jsonl"):
            shown = [opinion(other) for other in chance.sample(known, shots)]
            own = opinion(record)
            before = "".join(f"{row['prompt']}{row['completion']}\n\n" for row in shown)
            made[split].append(own | {"prompt": before + own["prompt"]})
    return made


def opinion(record: dict) -> Row:
    return {"prompt": f"Review: {record['sentence']}\nOpinion:", "completion": f" {OPINIONS[record['label']]}"}


def lookup(data: Path, *, hops: int, chains: int = 5, rows: int = 6000) -> Rows:
    """Chains of keys, their links in any order, and a first key -> what stands `hops` links further.

    Only a row's own prompt tells the answer. With more than one link, keys and values of the prompt that are trained to
    help (each link carrying on what the link before it says) are of use: what is lost without gradients through the
    prompt shows here.
    """
    made: Rows = {}
    for split, number in zip(SPLITS, (rows, max(rows // 10, 1)), strict=True):
        chance = random.Random(f"{split} {hops}")
        made[split] = [chain_row(chance, hops, chains) for _ in range(number)]
    return made


def chain_row(chance: random.Random, hops: int, chains: int) -> Row:
    letters = chance.sample(LETTERS, chains * (hops + 1))
    found = [letters[at : at + hops + 1] for at in range(0, len(letters), hops + 1)]
    links = [f"{one} > {other}" for chain in found for one, other in pairwise(chain)]
    chance.shuffle(links)
    asked = found[0]
    return {"prompt": f"{', '.join(links)}. From {asked[0]}, {hops} further:", "completion": f" {asked[-1]}"}


@dataclass(frozen=True)
class Task:
    """What is learnt, by which model, and how long.

    Attributes:
        make: the rows, of a data folder.
        model: the flag that names the model's folder.
        trained: "lora" (rank 16, all linear layers) or "full".
        batch: rows of an optimizer step.
        max_length: tokens; longer rows are left out.
        rates: peak learning rates that each arm tries, ascending.
        most_rates: as many at most, with those that it tries beyond a best one that is the highest or the lowest.
        lengths: optimizer steps of full training, ascending; selective arms take twice as many.
        evaluated: rows, of validation data, of training data held out, of other data.
    """

    make: Callable[[Path], Rows]
    model: str
    trained: str
    batch: int
    max_length: int
    rates: tuple[float, ...]
    lengths: tuple[int, ...]
    evaluated: dict[str, int]
    most_rates: int = 7

    def small(self) -> "Task":
        """To try the script out."""
        few = {name: 4 for name in self.evaluated}
        return replace(self, batch=4, rates=self.rates[:2], most_rates=2, lengths=(1, 2), evaluated=few)


SHAPES = {
    "model": {
        "batch": 8,
        "max_length": 256,
        "lengths": (6, 12, 24, 48),
        "evaluated": {"validation": 64, "held_out": 32, "other": 16},
    },
    "tiny": {
        "batch": 16,
        "max_length": 384,
        "lengths": (20, 40, 80, 160),
        "evaluated": {"validation": 256, "held_out": 128, "other": 32},
    },
}
RATES = {
    ("model", "lora"): (5e-4, 1e-3, 2e-3),
    ("model", "full"): (5e-5, 1e-4, 2e-4),
    ("tiny", "lora"): (1e-3, 2e-3, 4e-3),
    ("tiny", "full"): (2e-4, 4e-4, 8e-4),
}
MADE = {
    "tools": tool_calls,
    "names": names,
    "opinions": opinions,
    "lookup-1": partial(lookup, hops=1),
    "lookup-2": partial(lookup, hops=2),
}


def task(make: Callable[[Path], Rows], model: str, trained: str) -> Task:
    return Task(make, model, trained, rates=RATES[model, trained], **SHAPES[model])


TASKS = {
    **{f"{name}-{trained}": task(MADE[name], "model", trained) for name in MADE for trained in ("lora", "full")},
    **{f"tiny-{name}-{trained}": task(MADE[name], "tiny", trained) for name in MADE for trained in ("lora", "full")},
}
