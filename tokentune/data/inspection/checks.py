"""What the data would make of a run: refused where it would be wasted, warned of where it may be.

Every one of these ends, in common tools, in a run that says "success": no token to learn, a selection that misses all
that there are, ids without an embedding, two BOS, an end token that is never learnt, rows cut or dropped, fewer rows
than one batch, validation rows that were trained on.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from tokentune.data.collators import SeededRows
from tokentune.data.encoding import EncodingReport
from tokentune.data.inspection.row_statistics import RowStatistics, draws, row_statistics
from tokentune.data.packing import bins_of, fill_rate
from tokentune.errors import UserError
from tokentune.settings.finetune import FinetuneArguments

if TYPE_CHECKING:
    from tokentune.data.instruction_data import InstructionData

logger = logging.getLogger(__name__)

STREAMED = 1_000  # rows that are looked at of a data set that is read while training
MANY = 0.5  # a share of the rows that is most of them
DOUBLED = 0.01  # a share with two BOS beyond which it is no single text's doing


@dataclass
class Findings:
    """What was found out about the data, for the checks and the preview.

    Attributes:
        train, validation: statistics of the rows; of streamed training data, of its first `STREAMED` ones.
        rows: the training rows, or those first ones, with their draw seeds.
        drawn: `row_statistics.draws` of them; None without --tokentune, and where the model draws.
        bins: with --packing, the packed rows.
        refusals, warnings: sentences, the most important first.
    """

    rows: Sequence[dict[str, Any]]
    train: RowStatistics
    validation: RowStatistics | None
    drawn: tuple[np.ndarray, np.ndarray, np.ndarray] | None
    bins: list[list[int]] | None
    refusals: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def check_data(
    data: "InstructionData", tokenizer: PreTrainedTokenizerBase, arguments: FinetuneArguments, vocab_size: int
) -> Findings:
    """Looks at all rows, warns in the log, and refuses what would waste the run.

    Args:
        data: encoded training and validation rows, and the reports of their encoding.
        vocab_size: rows of the model's embedding.

    Raises:
        UserError: the first of the refusals.
    """
    findings = look_at(data, tokenizer, arguments, vocab_size)
    for warning in findings.warnings:
        logger.warning("%s", warning)
    if findings.refusals:
        raise UserError(findings.refusals[0])
    return findings


def look_at(
    data: "InstructionData", tokenizer: PreTrainedTokenizerBase, arguments: FinetuneArguments, vocab_size: int
) -> Findings:
    """`check_data` that neither warns nor raises."""
    streamed = not isinstance(data.train, Dataset | list)
    encoded = list(islice(iter(data.train), STREAMED)) if streamed else data.train
    rows = encoded if streamed else SeededRows(encoded, arguments.optimization.seed)
    train = row_statistics(encoded, tokenizer, vocab_size)
    validation = None if data.validation is None else row_statistics(data.validation, tokenizer, vocab_size)
    selection, max_length = arguments.selection, arguments.data.max_length
    drawn = bins = None
    if selection.tokentune and not selection.scored and len(train):  # then the model draws
        drawn = draws(rows, selection.selected, selection.selection)
    if arguments.data.packing and train.lengths.max(initial=0) <= max_length:
        bins = bins_of(train.lengths, max_length)
    findings = Findings(rows, train, validation, drawn, bins)
    for name, statistics in (("training", train), ("validation", validation)):
        if statistics is not None:
            findings.refusals += _unusable(statistics, name, tokenizer, vocab_size)
            findings.warnings += _doubtful(statistics, name, tokenizer, arguments)
    if drawn is not None and train.supervised.any():
        _judge_draws(findings, arguments)
    for name, report in (("training", data.train_report), ("validation", data.validation_report)):
        findings.warnings += [] if report is None else _lost(report, name, arguments)
    if validation is not None:
        findings.warnings += _shared(train, validation)
    if not streamed:
        findings.warnings += _short(findings, arguments)
    return findings


def _unusable(
    statistics: RowStatistics, name: str, tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> Iterator[str]:
    """What no run can learn from, or compute with."""
    if not statistics.supervised.any():
        yield (
            f"the {name} data has {len(statistics):,} rows and no supervised token: there is nothing to learn. "
            "--preview shows which tokens carry loss."
        )
    outside = np.flatnonzero(statistics.outside)
    if len(outside):
        yield (
            f"{name} row {outside[0] + 1:,} holds a token that the model has no embedding for ({len(outside):,} rows "
            f"do): the tokenizer has {len(tokenizer):,} tokens, the model {vocab_size:,} embeddings. Take the "
            "tokenizer that belongs to the model, or a model whose embeddings were resized to it."
        )
    doubled = np.flatnonzero(statistics.doubled_bos)
    if len(doubled) > DOUBLED * len(statistics):
        yield _doubled_bos(doubled, statistics, name, tokenizer)


def _doubtful(
    statistics: RowStatistics, name: str, tokenizer: PreTrainedTokenizerBase, arguments: FinetuneArguments
) -> Iterator[str]:
    """What can be trained on and may not be meant."""
    learnt = statistics.supervised > 0
    if not learnt.any():
        return
    idle = len(statistics) - int(learnt.sum())
    if idle > MANY * len(statistics):
        yield f"{idle:,} of {len(statistics):,} {name} rows have no supervised token: they cost time and teach nothing"
    doubled = np.flatnonzero(statistics.doubled_bos)
    if 0 < len(doubled) <= DOUBLED * len(statistics):
        yield _doubled_bos(doubled, statistics, name, tokenizer)
    if name != "training":
        return
    yield from _endless(statistics, learnt, tokenizer, arguments)


def _endless(
    statistics: RowStatistics, learnt: np.ndarray, tokenizer: PreTrainedTokenizerBase, arguments: FinetuneArguments
) -> Iterator[str]:
    """Answers that do not end: each row's last ones, and those before, which a last one's end must not hide."""
    whole = learnt & (
        statistics.lengths < arguments.data.max_length
    )  # a row that was cut does not end where its text does
    eos = tokenizer.eos_token
    what = (
        f"without a supervised end token{'' if eos is None else f' ({eos})'}: the model does not learn to stop there;"
    )
    last, last_endless = int(whole.sum()), int((whole & ~statistics.last_ended).sum())
    if last_endless > MANY * last:
        cure = "add --add_eos_token" if eos is not None else "give the tokenizer an end-of-sequence token"
        if arguments.data.add_eos_token:
            cure = "the chat template has to end an answer with one"
        yield f"{last_endless:,} of the {last:,} training rows that were not cut end {what} {cure}"
    before = int((statistics.turns - 1)[learnt].sum())
    endless = before - int((statistics.ended_turns - statistics.last_ended)[learnt].sum())
    if endless > MANY * before:
        yield (
            f"{endless:,} of the {before:,} answers of training rows that other messages follow end {what} the "
            "chat template has to end each answer with one (--chat_template)"
        )


def _doubled_bos(doubled: np.ndarray, statistics: RowStatistics, name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    return (
        f"{len(doubled):,} of {len(statistics):,} {name} rows begin with two {tokenizer.bos_token} (the first: row "
        f"{doubled[0] + 1:,}): the texts or the template spell one out, and another is added. Take it out."
    )


def _judge_draws(findings: Findings, arguments: FinetuneArguments) -> None:
    """Whether the selection leaves rows something to learn."""
    sample, _, learnt = findings.drawn
    supervised = findings.train.supervised[sample] > 0
    missed = int((supervised & (learnt == 0)).sum())
    if not missed:
        return
    length, strategy = arguments.selection.prefix_length, arguments.selection.selection
    what = (
        f"--prefix_length {length}: the selection misses every supervised token in {missed:,} of "
        f"{int(supervised.sum()):,} rows, which then teach nothing: raise it"
        f"{', or take --selection random, which keeps at least one' if strategy != 'random' else ''}"
    )
    (findings.refusals if missed > MANY * supervised.sum() else findings.warnings).append(what)


def _lost(report: EncodingReport, name: str, arguments: FinetuneArguments) -> Iterator[str]:
    """Rows that lost their end, or are not there at all."""
    length = arguments.data.max_length
    if report.cut_ends > MANY * report.rows:
        yield (
            f"{report.cut_ends:,} of {report.rows:,} {name} rows are longer than --max_length {length} and lose the "
            "end of an answer, the end token with it: raise it, or leave such rows out with --long_rows drop"
        )
    if report.dropped_rows > MANY * report.read_rows:
        yield (
            f"{report.dropped_rows:,} of {report.read_rows:,} {name} records are left out, because their answer is "
            f"empty or lies beyond --max_length {length}"
        )
    if report.dropped_long_rows > MANY * report.read_rows:
        yield (
            f"{report.dropped_long_rows:,} of {report.read_rows:,} {name} records are left out, because they are "
            f"longer than --max_length {length} (--long_rows drop)"
        )


def _shared(train: RowStatistics, validation: RowStatistics) -> Iterator[str]:
    shared = int(np.isin(validation.fingerprints, train.fingerprints).sum())
    if shared:
        yield (
            f"{shared:,} of {len(validation):,} validation rows are in the training data too: their loss tells what "
            "was memorised, not what was learnt"
        )


def _short(findings: Findings, arguments: FinetuneArguments) -> Iterator[str]:
    """Runs of few steps, and packing that does not pay."""
    optimization, selection = arguments.optimization, arguments.selection
    sequences = len(findings.train) if findings.bins is None else len(findings.bins)
    batch = optimization.global_batch_size
    if 0 < sequences < batch:
        steps = optimization.max_steps or optimization.num_epochs
        yield (
            f"{sequences:,} {'packed ' if findings.bins is not None else ''}rows are fewer than --global_batch_size "
            f"{batch}: each optimizer step takes all of them, and the run has {steps:,} step{'s' * (steps != 1)}"
        )
    if findings.bins is None:
        return
    fill = fill_rate(findings.train.lengths, findings.bins, arguments.data.max_length)
    if len(findings.bins) == len(findings.train):
        yield f"--packing: no two rows fit into --max_length {arguments.data.max_length} together ({fill:.0%} full)"
    if selection.tokentune and isinstance(selection.selected, int) and optimization.micro_batch_size > 1:
        yield (
            f"--packing with --prefix_length {selection.prefix_length} selects up to so many tokens of each document: "
            "rows of a batch are padded until all have as many; a proportion such as 0.3 needs hardly any padding"
        )
