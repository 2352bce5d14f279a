"""`--preview`: some examples with their tokens marked by role, and what the data holds, before anything is trained.

    python -u ./tokentune/finetune.py ... --preview 3

On a terminal roles are colours; elsewhere, and with NO_COLOR set, marks in a line below the text. The selection shown
is that of the first epoch.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from rich.box import SIMPLE
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.theme import Theme
from transformers import PreTrainedTokenizerBase

from tokentune.data.collators import CausalCollator, selected_in
from tokentune.data.encoding import EncodingReport
from tokentune.data.inspection.checks import Findings, look_at
from tokentune.data.inspection.row_statistics import RowStatistics
from tokentune.data.inspection.token_text import spelled, visible
from tokentune.data.instruction_data import InstructionData
from tokentune.data.packing import fill_rate
from tokentune.errors import UserError
from tokentune.sampling.sampler import IGNORED_LABEL
from tokentune.settings.finetune import FinetuneArguments

PROMPT_TOKENS, ANSWER_TOKENS = 160, 300  # shown of a prompt or answer of more than half as many again
DOCUMENTS = 4  # shown of one packed row
WIDTH = 110  # columns where there is no terminal
THEME = Theme(
    {
        "prompt": "grey62",
        "supervised": "green3",
        "learnt": "bold grey3 on green3",
        "selected": "bold underline",
        "special": "bold italic",
        "left_out": "italic yellow",
    }
)
MARKS = {"loss": {"supervised": "-", "learnt": "="}, "selected": {"selected": "^"}}
GUTTER = "{:>8} │ "


@dataclass
class Document:
    """One row of the data as training sees it: its T tokens, and the roles of each, (T,) bool."""

    row: int  # from 0
    ids: list[int]
    supervised: np.ndarray  # has a label
    learnt: np.ndarray  # its loss counts: supervised, and the token before it is selected, if any selection is made
    selected: np.ndarray  # keeps gradients; none without --tokentune

    def __str__(self) -> str:
        text = f"row {self.row + 1:,}: {len(self.ids):,} tokens, {self.supervised.sum():,} supervised"
        if self.selected.any():
            text += f", {self.selected.sum():,} selected, {self.learnt.sum():,} selected and supervised"
        return text


def show_preview(
    data: InstructionData,
    tokenizer: PreTrainedTokenizerBase,
    arguments: FinetuneArguments,
    vocab_size: int,
    console: Console | None = None,
) -> None:
    """Prints `arguments.run.preview` examples, a table of counts, and what the checks warn of.

    Args:
        data, vocab_size: as in `checks.check_data`.
        console: None: stdout.

    Raises:
        UserError: after the output, where training would be refused.
    """
    console = console or stdout_console()
    findings = look_at(data, tokenizer, arguments, vocab_size)
    with console.use_theme(THEME):
        selection = arguments.selection
        print_legend(console, LEGEND, tokentune=selection.tokentune and not selection.scored)
        if selection.tokentune and selection.scored:
            console.print(f"Which of them are selected, the model's scores decide (--selection {selection.selection}).")
        for title, documents, room in _examples(findings, arguments):
            print_title(console, title)
            for document in documents:
                if arguments.data.packing:
                    console.print(Text(f"— {document}", style="bold"))
                text = marked(document, tokenizer)
                if len(document.ids) == arguments.data.max_length:
                    text.append(" [--max_length]", "left_out")
                print_text(console, text)
            if room:
                print_text(console, Text(f"[room for {room:,} tokens more]", "left_out"))
        console.print()
        console.print(_data_table(findings, data, arguments, tokenizer))
        console.print()
        if findings.gain is not None and findings.gain not in findings.warnings:
            console.print(Text(findings.gain))
        for warning in findings.warnings:
            console.print(Text(f"warning: {warning}", style="yellow"))
    if findings.refusals:
        raise UserError(findings.refusals[0])


def stdout_console() -> Console:
    """Where a preview is printed: stdout, `WIDTH` columns wide where it is no terminal."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # the texts may hold characters outside of the terminal's encoding
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDTH)


def _in_colour(console: Console) -> bool:
    return console.color_system is not None and not console.no_color


LEGEND = {  # style -> name, meaning without --tokentune, meaning with it
    "prompt": ("prompt", "read, carries no loss", "read, carries no loss"),
    "supervised": (
        "supervised",
        "an answer's token: carries loss",
        "an answer's token; no loss in this draw, as the token before it is not selected",
    ),
    "learnt": ("selected and supervised", None, "its loss counts, as the token before it is selected"),
    "selected": ("selected", None, "keeps gradients, whatever else it is"),
    "special": ("<special>", *["a token of its own; ⏎ is a line break, ⇥ a tab"] * 2),
}


def print_legend(console: Console, legend: dict[str, tuple[str, str | None, str]], *, tokentune: bool) -> None:
    """Prints what each style or mark means. `legend`: as `LEGEND`."""
    marks = MARKS["loss"] | MARKS["selected"]
    table = Table.grid(padding=(0, 2))
    for style, (name, *meanings) in legend.items():
        if (meaning := meanings[tokentune]) is not None:
            mark = [] if _in_colour(console) else [marks.get(style, "")]
            table.add_row(*mark, Text.assemble((name, style)), meaning)
    console.print(table)


def print_title(console: Console, title: str) -> None:
    """Prints a line above an example."""
    console.print()
    console.rule(Text(title, style="bold"), align="left", style="grey62")


def examples_of(number: int, asked: int) -> Iterator[tuple[str, int]]:
    """Of at most `asked` rows spread over `number`: how their title begins, and which they are."""
    count = min(asked, number)
    for example in range(count):
        yield f"example {example + 1} of {count}, ", (2 * example + 1) * number // (2 * count)


def _examples(findings: Findings, arguments: FinetuneArguments) -> Iterator[tuple[str, list[Document], int]]:
    """Rows spread over the data, or packed rows: title, documents, tokens that they leave room for."""
    rows, bins = findings.rows, findings.bins
    number = len(rows if bins is None else bins)
    for title, row in examples_of(number, arguments.run.preview):
        if bins is None:
            document = _document(rows, row, arguments)
            yield f"{title}{document}", [document], 0
            continue
        tokens, hidden = int(findings.train.lengths[bins[row]].sum()), len(bins[row]) - DOCUMENTS
        title += f"packed row {row + 1:,} of {number:,}: {tokens:,} tokens"
        title += f" (the last {hidden} of its {len(bins[row])} documents are not shown)" if hidden > 0 else ""
        shown = [_document(rows, document, arguments) for document in bins[row][:DOCUMENTS]]
        yield title, shown, arguments.data.max_length - tokens


def _document(rows: Sequence[dict[str, Any]], row: int, arguments: FinetuneArguments) -> Document:
    item, selection = rows[row], arguments.selection
    supervised = np.array(item["labels"]) != IGNORED_LABEL
    supervised[:1] = False  # nothing predicts the first token
    selected, learnt = np.zeros_like(supervised), supervised
    if selection.tokentune and not selection.scored:
        options = {"strategy": selection.selection, "independent": selection.gradient_correction > 0}
        batch = CausalCollator(0, selection.selected, **options)([item])
        selected[batch["selected_positions"][selected_in(batch["attention_mask"], batch).bool()]] = True
        learnt = supervised & np.roll(selected, 1)
    return Document(row, list(item["input_ids"]), supervised, learnt, selected)


def marked(document: Document, tokenizer: PreTrainedTokenizerBase, unsupervised: str = "prompt") -> Text:
    """The text of a document, its roles as styles of `THEME`. The middle of long prompts and answers is left out.

    `unsupervised`: what tokens without a label are part of.
    """
    special = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    pieces, first = [], 0  # of each piece: text, tokens, roles
    for text, count in spelled(document.ids, tokenizer):
        tokens = slice(first, first + count)
        roles = {name for name in ("supervised", "learnt", "selected") if getattr(document, name)[tokens].any()}
        roles |= {"special"} if document.ids[first] in special else set()
        pieces.append((visible(text) or "∅", count, roles))
        first += count
    whole = Text()
    # Runs of pieces that are all supervised, or none of them: answers and prompts.
    for supervised, run in groupby(pieces, key=lambda piece: "supervised" in piece[2]):
        limit, kind = (ANSWER_TOKENS, "answer") if supervised else (PROMPT_TOKENS, unsupervised)
        for text, _, roles in _shortened(list(run), limit, kind):
            start = len(whole)
            whole.append(text)
            loss = "learnt" if "learnt" in roles and document.selected.any() else "supervised"
            styles = [name for name in ("special", "selected", "left_out") if name in roles]
            for style in [loss if supervised else "prompt", *styles] if "left_out" not in roles else styles:
                whole.stylize(style, start)
    return whole


def _shortened(run: list[tuple], limit: int, kind: str) -> list[tuple[str, int, set[str]]]:
    """The beginning and the end of a run of more than `limit` tokens, with a note between."""
    if len(run) <= limit or sum(count for _, count, _ in run) <= 1.5 * limit:
        return run
    half = limit // 2
    left_out = sum(count for _, count, _ in run[half:-half])
    return [*run[:half], (f" [… {left_out:,} tokens of the {kind} left out …] ", 0, {"left_out"}), *run[-half:]]


def print_text(console: Console, text: Text) -> None:
    """Prints marked text: its roles as colours, or as marks in a line below."""
    if _in_colour(console):
        console.print(text, overflow="fold")
        return
    for line in text.wrap(console, console.width - len(GUTTER.format("")), overflow="fold"):
        console.print(Text(GUTTER.format("") + line.plain), soft_wrap=True)
        for name, marks in MARKS.items():
            if below := mark_line(line, marks):
                console.print(Text(GUTTER.format(name) + below), soft_wrap=True)


def mark_line(line: Text, marks: dict[str, str]) -> str:
    """The line of marks below a line of text: the mark of each character's style, as wide as the character."""
    below = [" "] * len(line.plain)
    for span in line.spans:
        if span.style in marks:
            below[span.start : span.end] = [marks[span.style]] * (span.end - span.start)
    return "".join(mark * cell_len(character) for mark, character in zip(below, line.plain, strict=True)).rstrip()


# ---- the table of counts ---------------------------------------------------------------------------------------------


def _data_table(
    findings: Findings, data: InstructionData, arguments: FinetuneArguments, tokenizer: PreTrainedTokenizerBase
) -> Table:
    """A column each for training and validation data."""
    train = _counts(findings.train, data.train_report, tokenizer) | _selected_and_packed(findings, arguments)
    name = "training" if data.table is not None else f"training: the first {len(findings.train):,} rows of the stream"
    columns = {name: train}
    if findings.validation is not None:
        columns["validation"] = _counts(findings.validation, data.validation_report, tokenizer)
    return counts_table(columns)


def counts_table(columns: dict[str, dict[str, str]]) -> Table:
    """A table of these columns, whose rows are those of the first."""
    table = Table(box=SIMPLE, show_edge=False)
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    for name in next(iter(columns.values())):
        table.add_row(name, *(column.get(name, "") for column in columns.values()))
    return table


def _counts(
    statistics: RowStatistics, report: EncodingReport | None, tokenizer: PreTrainedTokenizerBase
) -> dict[str, str]:
    tokens, rows = int(statistics.lengths.sum()), len(statistics)
    longest, middle = statistics.lengths.max(initial=0), np.median(statistics.lengths) if rows else 0
    counts = {
        "rows": f"{rows:,}",
        "tokens": f"{tokens:,}",
        "tokens of a row: median, longest": f"{middle:,.0f}, {longest:,}",
        "supervised tokens": share(int(statistics.supervised.sum()), tokens),
    }
    if report is not None:
        counts |= {
            "rows cut to --max_length": share(report.cut_rows, rows),
            "... that lost an answer's end": share(report.cut_ends, rows),
            "dropped: longer than --max_length": share(report.dropped_long_rows, report.records),
            "dropped: no answer token left": share(report.dropped_rows, report.records),
        }
    if tokenizer.bos_token_id is not None:
        counts[f"rows that begin with two {tokenizer.bos_token}"] = share(int(statistics.doubled_bos.sum()), rows)
    counts["rows whose last answer has no end token"] = share(int((~statistics.last_ended).sum()), rows)
    return counts


def _selected_and_packed(findings: Findings, arguments: FinetuneArguments) -> dict[str, str]:
    """The first epoch's selection, estimated where only some of the rows were drawn for; and the packed rows."""
    counts, lengths, max_length = {}, findings.train.lengths, arguments.data.max_length
    if findings.drawn is not None:
        sample, selected, learnt = findings.drawn
        supervised = findings.train.supervised
        about = "" if len(sample) == len(lengths) else "≈ "
        of_selected = selected.sum() * lengths.sum() / max(lengths[sample].sum(), 1)
        of_learnt = learnt.sum() * supervised.sum() / max(supervised[sample].sum(), 1)
        named = f"selected tokens (--prefix_length {arguments.selection.prefix_length})"
        for name, count in ((named, of_selected), ("selected and supervised tokens", of_learnt)):
            counts[name] = about + share(round(count), int(lengths.sum()))
    if findings.bins is not None:
        fill = fill_rate(lengths, findings.bins, max_length)
        counts[f"packed rows of {max_length:,} tokens"] = f"{len(findings.bins):,} ({fill:.1%} full)"
    return counts


def share(count: int, whole: int) -> str:
    """A count, and in brackets its part of the whole."""
    return f"{count:,} ({count / whole:.1%})" if count and whole else f"{count:,}"
