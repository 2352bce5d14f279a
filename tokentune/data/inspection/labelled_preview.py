"""`--preview` of a classification: some rows with their labels and the selection, and what the data holds.

    python ./tokentune/classify.py ... --preview 3

Colours and marks are those of `preview.py`. The selection shown is that of the first epoch.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.text import Text

from tokentune.data.collators import ClassificationCollator, SeededRows, selected_in
from tokentune.data.inspection.label_counts import label_counts
from tokentune.data.inspection.preview import (
    LEGEND,
    THEME,
    Document,
    counts_table,
    examples_of,
    marked,
    print_legend,
    print_text,
    print_title,
    share,
    stdout_console,
)
from tokentune.data.inspection.token_text import visible
from tokentune.data.labelled.encoding import Encoded
from tokentune.data.labelled.labels import Labels
from tokentune.data.labelled.splits import ClassificationData
from tokentune.data.row_sizes import lengths_of
from tokentune.data.step_work import selected_in_rows
from tokentune.sampling.sampler import IGNORED_LABEL
from tokentune.settings.classification import ClassificationArguments

WORDS = 40  # labels shown of one row
OF_TOKENS = {
    "selected": ("selected", None, "keeps gradients"),
    "special": LEGEND["special"],
}
LEGENDS = {
    "text": {"prompt": ("text", "gets gradients", "read, keeps no gradients"), **OF_TOKENS},
    "token": {
        "prompt": ("text", "has no label", "has no label"),
        "supervised": (
            "labelled",
            "the first token of a word: carries the loss of its label",
            "the first token of a word; no loss in this draw, as it is not selected",
        ),
        "learnt": ("selected and labelled", None, "its loss counts"),
        **OF_TOKENS,
    },
}


def show_labelled_preview(
    data: ClassificationData,
    processing: Any,
    arguments: ClassificationArguments,
    collator: ClassificationCollator,
    console: Console | None = None,
) -> None:
    """Prints `arguments.run.preview` examples, and a table of counts.

    Args:
        processing: the tokenizer, or the image processor.
        collator: of the training.
        console: None: stdout.
    """
    console = console or stdout_console()
    task_type, rows = arguments.task.task_type, SeededRows(data.train.rows, arguments.seeds[0])
    with console.use_theme(THEME):
        if task_type in LEGENDS:
            print_legend(console, LEGENDS[task_type], tokentune=collator.draw is not None)
        for title, row in examples_of(len(rows), arguments.run.preview):
            item = rows[row]
            selected = selected_tokens(item, collator)
            if task_type == "image":
                path, label = data.train.rows.images[row].get("path"), data.labels.told(item["labels"])
                _print_image(console, f"{title}row {row + 1:,}", collator, selected, label, path)
            else:
                _print_tokens(console, title, _document(row, item, selected), item["labels"], processing, data.labels)
        console.print()
        console.print(counts_table(_counts(data, arguments, collator)))


def selected_tokens(item: dict[str, Any], collator: ClassificationCollator) -> list[int]:
    """The positions that the collator selects of a row; none where it draws no selection."""
    batch = collator([item])
    if "selected_positions" not in batch:
        return []
    tokens = len(item["input_ids"]) if "input_ids" in item else collator.tokens_per_image
    real = selected_in(torch.ones(1, tokens, dtype=torch.int64), batch).bool()
    return sorted(batch["selected_positions"][real].tolist())


def _print_tokens(
    console: Console, title: str, document: Document, labels: Any, tokenizer: Any, classes: Labels
) -> None:
    of_words = isinstance(labels, list)
    counts = {
        "tokens": len(document.ids),
        "labelled": document.supervised.sum(),
        "selected": document.selected.sum(),
        "selected and labelled": document.learnt.sum() if document.selected.any() else 0,
    }
    told = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)
    label = "" if of_words else f"; {classes.told(labels)}"
    print_title(console, f"{title}row {document.row + 1:,}: {told}{label}")
    print_text(console, marked(document, tokenizer, "text"))
    if of_words:
        console.print(Text(", ".join(_words(document, labels, tokenizer, classes))))


def _print_image(
    console: Console, title: str, collator: ClassificationCollator, selected: list[int], label: str, path: str | None
) -> None:
    selects = collator.draw is not None
    chosen = f", {len(selected)} selected" if selects else ""
    print_title(console, f"{title}: {collator.tokens_per_image:,} tokens{chosen}; {label}")
    lines = [path or "an image within the data", *([f"selected: {', '.join(map(str, selected))}"] if selects else [])]
    console.print(Text("\n".join(lines)))


def _document(row: int, item: dict[str, Any], positions: list[int]) -> Document:
    labels = item["labels"] if isinstance(item["labels"], list) else [IGNORED_LABEL] * len(item["input_ids"])
    supervised, selected = np.array(labels) != IGNORED_LABEL, np.zeros(len(labels), dtype=bool)
    selected[positions] = True
    return Document(row, list(item["input_ids"]), supervised, supervised & selected, selected)


def _words(document: Document, numbers: list[int], tokenizer: Any, labels: Labels) -> Iterator[str]:
    """The labelled words of a row, but for those outside of entities, which are counted."""
    starts = np.flatnonzero(document.supervised).tolist()
    shown = [start for start in starts if numbers[start] != labels.outside]
    stops = dict(zip(starts, [*starts[1:], len(document.ids)], strict=True))
    for start in shown[:WORDS]:
        word = tokenizer.decode(document.ids[start : stops[start]], skip_special_tokens=True)
        yield f"{visible(word.strip())} {labels.names[numbers[start]]}"
    if len(shown) > WORDS:
        yield f"{len(shown) - WORDS:,} words more"
    if outside := len(starts) - len(shown):
        yield f"{outside:,} words {labels.names[labels.outside]}"


def _counts(
    data: ClassificationData, arguments: ClassificationArguments, collator: ClassificationCollator
) -> dict[str, dict[str, str]]:
    """Of each split: rows, tokens, labels; of the training data the first epoch's selection."""
    splits = {name: split for name, split in data.splits.items() if split is not None}
    of_labels = label_counts(splits, data.labels)
    counts = {name: _of_split(split) | of_labels.get(name, {}) for name, split in splits.items()}
    if collator.draw is not None:
        rows, size = data.train.rows, f"selected tokens (--prefix_length {arguments.selection.prefix_length})"
        images = arguments.task.task_type == "image"
        lengths = np.full(len(rows), collator.tokens_per_image) if images else lengths_of(rows)
        chosen = selected_in_rows(rows, lengths, arguments.selection, causal=False)
        counts["train"][size] = share(int(chosen.sum()), int(lengths.sum()))
    return counts


def _of_split(split: Encoded) -> dict[str, str]:
    report = split.report
    counts = {"rows": f"{report.rows:,}"}
    if report.tokens:
        lengths = lengths_of(split.rows)
        counts |= {
            "tokens": f"{report.tokens:,}",
            "tokens of a row: median, longest": f"{np.median(lengths):,.0f}, {lengths.max():,}",
            "rows cut to --max_length": share(report.cut_rows, report.rows),
        }
    return counts | {"labels": f"{report.labels:,}"}
