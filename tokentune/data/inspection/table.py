"""The preview's table: what training and validation data hold, counted."""

from typing import TYPE_CHECKING

import numpy as np
from rich.box import SIMPLE
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from tokentune.data.inspection.checks import Findings
from tokentune.data.inspection.row_statistics import RowStatistics
from tokentune.data.packing import fill_rate
from tokentune.settings.finetune import FinetuneArguments

if TYPE_CHECKING:
    from tokentune.data.encoding import EncodingReport
    from tokentune.data.instruction_data import InstructionData


def data_table(
    findings: Findings, data: "InstructionData", arguments: FinetuneArguments, tokenizer: PreTrainedTokenizerBase
) -> Table:
    """A column each for training and validation data. `findings`: of the data (`checks.look_at`)."""
    train = _counts(findings.train, data.train_report, tokenizer) | _selected_and_packed(findings, arguments)
    columns = {"training": train}
    if findings.validation is not None:
        columns["validation"] = _counts(findings.validation, data.validation_report, tokenizer)
    table = Table(box=SIMPLE, show_edge=False)
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    for name in train:
        table.add_row(name, *(column.get(name, "") for column in columns.values()))
    return table


def _counts(
    statistics: RowStatistics, report: "EncodingReport | None", tokenizer: PreTrainedTokenizerBase
) -> dict[str, str]:
    tokens, rows = int(statistics.lengths.sum()), len(statistics)
    longest, middle = statistics.lengths.max(initial=0), np.median(statistics.lengths) if rows else 0
    counts = {
        "rows": f"{rows:,}",
        "tokens": f"{tokens:,}",
        "tokens of a row: median, longest": f"{middle:,.0f}, {longest:,}",
        "supervised tokens": _share(int(statistics.supervised.sum()), tokens),
    }
    if report is not None:
        counts |= {
            "rows cut to --max_length": _share(report.cut_rows, rows),
            "... that lost an answer's end": _share(report.cut_ends, rows),
            "dropped: longer than --max_length": _share(report.dropped_long_rows, report.read_rows),
            "dropped: no answer token left": _share(report.dropped_rows, report.read_rows),
        }
    if tokenizer.bos_token_id is not None:
        counts[f"rows that begin with two {tokenizer.bos_token}"] = _share(int(statistics.doubled_bos.sum()), rows)
    counts["rows without an end token to learn"] = _share(int((statistics.ends == 0).sum()), rows)
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
            counts[name] = about + _share(round(count), int(lengths.sum()))
    if findings.bins is not None:
        fill = fill_rate(lengths, findings.bins, max_length)
        counts[f"packed rows of {max_length:,} tokens"] = f"{len(findings.bins):,} ({fill:.1%} full)"
    return counts


def _share(count: int, whole: int) -> str:
    return f"{count:,} ({count / whole:.1%})" if count and whole else f"{count:,}"
