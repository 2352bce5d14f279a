"""Data that would waste a run is refused; data that may waste it is warned of.

In common tools each of these ends in a run that says "success": no token to learn, empty answers, answers that are all
the same, a selection that misses all supervised tokens, ids without an embedding, two BOS, an end token that is never
learnt, rows cut or dropped, fewer rows than one batch, validation rows that are trained on.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from tokentune.data.collators import SeededRows
from tokentune.data.encoding import EncodingReport
from tokentune.data.inspection.row_statistics import RowStatistics, draws, row_statistics
from tokentune.data.inspection.selection_gain import Shares, Step, gain_of
from tokentune.data.instruction_data import InstructionData
from tokentune.data.packing import bins_of, fill_rate
from tokentune.data.step_work import selected_of
from tokentune.errors import UserError
from tokentune.settings.finetune import FinetuneArguments

logger = logging.getLogger(__name__)

STREAMED = 1_000  # rows of streamed data that are checked
MANY = 0.5  # share of rows above which most are meant
EMPTY = 0.1  # share of rows with an empty answer above which these are no exceptions
DOUBLED = 0.01  # share of rows with two BOS above which the template, not a single text, must be the cause


@dataclass
class Findings:
    """What was found out about the data, for the checks and the preview."""

    rows: Sequence[dict[str, Any]]  # for training, with their draw seeds; of streamed data the first `STREAMED`
    train: RowStatistics  # of these rows
    validation: RowStatistics | None
    drawn: tuple[np.ndarray, np.ndarray, np.ndarray] | None  # `draws` of the rows; None where nothing is drawn here
    bins: list[list[int]] | None  # with --packing, the packed rows
    refusals: list[str] = field(default_factory=list)  # sentences, the most important first
    warnings: list[str] = field(default_factory=list)
    gain: str | None = None  # what the selection holds and costs (`selection_gain`); it may be one of the warnings


def check_data(
    data: InstructionData, tokenizer: PreTrainedTokenizerBase, arguments: FinetuneArguments, vocab_size: int
) -> Findings:
    """Checks all rows, warns in the log, and refuses what would waste the run.

    Args:
        vocab_size: rows of the model's embedding.

    Raises:
        UserError: the first of the refusals.
    """
    findings = look_at(data, tokenizer, arguments, vocab_size)
    for warning in findings.warnings:
        logger.warning("%s", warning)
    if findings.gain is not None and findings.gain not in findings.warnings:
        logger.info("%s", findings.gain)
    if findings.refusals:
        raise UserError(findings.refusals[0])
    return findings


def look_at(
    data: InstructionData, tokenizer: PreTrainedTokenizerBase, arguments: FinetuneArguments, vocab_size: int
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
        corrects = selection.gradient_correction > 0
        drawn = draws(rows, selection.selected, selection.selection, independent=corrects)
    if arguments.data.packing and train.lengths.max(initial=0) <= max_length:
        bins = bins_of(train.lengths, max_length)
    findings = Findings(rows, train, validation, drawn, bins)
    for name, statistics in (("training", train), ("validation", validation)):
        if statistics is not None:
            _judge_rows(findings, statistics, name, tokenizer, arguments, vocab_size)
    if drawn is not None and train.supervised.any() and selection.gradient_correction == 0:
        _judge_draws(findings, arguments)
    for name, report in (("training", data.train_report), ("validation", data.validation_report)):
        findings.warnings += [] if report is None else _lost(report, name, max_length)
    shared = 0 if validation is None else int(np.isin(validation.fingerprints, train.fingerprints).sum())
    if shared:
        findings.warnings.append(
            f"{shared:,} of {len(validation):,} validation rows are in the training data too: their loss tells what "
            "was memorised, not what was learnt"
        )
    _note_gain(findings, arguments, f" (counted in the first {len(train):,} rows)" if streamed else "")
    if not streamed:
        findings.warnings += _short(findings, arguments)
        return findings
    seen = f" (looked at: the first {len(train):,} rows of the stream)"
    for sentences in (findings.refusals, findings.warnings):
        sentences[:] = [sentence + seen for sentence in sentences]
    return findings


def _note_gain(findings: Findings, arguments: FinetuneArguments, where: str) -> None:
    """What the selection costs and holds; nothing where the model's scores decide, whose pass has a cost of its own."""
    selection, train = arguments.selection, findings.train
    tokens, targets = int(train.lengths.sum()), int(train.supervised.sum())
    if not targets or (selection.tokentune and findings.drawn is None):
        return
    learnt = 1.0
    if findings.drawn is not None:
        sample, _, found = findings.drawn
        learnt = found.sum() / max(train.supervised[sample].sum(), 1)
    selected = selected_of(train.lengths, train.supervised, selection).sum()
    step = Step(arguments.adapters.lora, arguments.memory.gradient_checkpointing, selection.scoring_pass)
    asked = selection.prefix_length if selection.tokentune else None
    found = gain_of(Shares(targets / tokens, selected / tokens, learnt), step, asked)
    if found is not None:
        findings.gain, warns = found[0] + where, found[1]
        findings.warnings += [findings.gain] if warns else []


def _judge_rows(
    findings: Findings,
    statistics: RowStatistics,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    arguments: FinetuneArguments,
    vocab_size: int,
) -> None:
    """What no run can learn from or compute with, and what can be trained on but may not be meant."""
    count, learnt = len(statistics), statistics.supervised > 0
    if not learnt.any():
        findings.refusals.append(
            f"the {name} data has {count:,} rows and no supervised token: there is nothing to learn. --preview shows "
            "which tokens carry loss."
        )
    if len(outside := np.flatnonzero(statistics.outside)):
        findings.refusals.append(
            f"{name} row {outside[0] + 1:,} holds a token that the model has no embedding for ({len(outside):,} rows "
            f"do): the tokenizer has {len(tokenizer):,} tokens, the model {vocab_size:,} embeddings. Take the "
            "tokenizer that belongs to the model, or a model whose embeddings were resized to it."
        )
    idle = count - int(learnt.sum())
    if learnt.any() and idle > MANY * count:
        findings.warnings.append(
            f"{idle:,} of {count:,} {name} rows have no supervised token: they cost time and teach nothing"
        )
    doubled = np.flatnonzero(statistics.doubled_bos)
    if len(doubled) > DOUBLED * count or (len(doubled) and learnt.any()):
        (findings.refusals if len(doubled) > DOUBLED * count else findings.warnings).append(
            f"{len(doubled):,} of {count:,} {name} rows begin with two {tokenizer.bos_token} (the first: row "
            f"{doubled[0] + 1:,}): the texts or the template spell one out, and another is added. Take it out."
        )
    if learnt.any() and name == "training":
        findings.warnings += _endless(statistics, learnt, tokenizer, arguments)
    _judge_answers(findings, statistics, name)


def _judge_answers(findings: Findings, statistics: RowStatistics, name: str) -> None:
    """Answers of which nothing is learnt but their end, and answers that do not depend on the question.

    Special tokens may be answers too, but then not the same ones in all rows.
    """
    answers = statistics.answers[statistics.answers != 0]
    wordless = statistics.wordless[statistics.wordless != 0]
    empty, learnt = int(np.unique(wordless, return_counts=True)[1].max(initial=0)), len(answers)
    if 0 < empty == learnt:
        findings.refusals.append(
            f"every answer of the {learnt:,} {name} rows is empty or blank: there is nothing to learn but to end. "
            "Look at the column that answers are read from; --preview shows which tokens carry loss."
        )
    elif empty > EMPTY * learnt and empty > MANY * len(wordless):
        findings.warnings.append(
            f"{empty:,} of {learnt:,} {name} rows have an empty or blank answer: they teach to end at once"
        )
    if name == "training" and learnt > max(empty, 1) and (answers == answers[0]).all():
        findings.warnings.append(
            f"all {learnt:,} training rows have the same answer: the model learns to give it, whatever it is asked"
        )


def _endless(
    statistics: RowStatistics, learnt: np.ndarray, tokenizer: PreTrainedTokenizerBase, arguments: FinetuneArguments
) -> Iterator[str]:
    """Answers that do not end. The last answer of each row is counted apart from the others: often it alone has an end
    token."""
    whole = learnt & (statistics.lengths < arguments.data.max_length)  # a row that was cut may have lost its end
    eos = tokenizer.eos_token
    named = "" if eos is None else f" ({eos})"
    what = f"without a supervised end token{named}: the model does not learn to stop there;"
    last, last_endless = int(whole.sum()), int((whole & ~statistics.last_ended).sum())
    if last_endless > MANY * last:
        cure = "add --add_eos_token" if eos is not None else "give the tokenizer an end-of-sequence token"
        if arguments.data.add_eos_token:
            cure = "the chat template has to end an answer with one"
        yield f"{last_endless:,} of the {last:,} training rows shorter than --max_length end {what} {cure}"
    before = int((statistics.turns - 1)[learnt].sum())
    endless = before - int((statistics.ended_turns - statistics.last_ended)[learnt].sum())
    if endless > MANY * before:
        yield (
            f"{endless:,} of the {before:,} answers of training rows that other messages follow end {what} the "
            "chat template has to end each answer with one (--chat_template)"
        )


def _judge_draws(findings: Findings, arguments: FinetuneArguments) -> None:
    """Whether the selection leaves rows something to learn."""
    sample, _, learnt = findings.drawn
    supervised = findings.train.supervised[sample] > 0
    count, missed = int(supervised.sum()), int((supervised & (learnt == 0)).sum())
    if not missed:
        return
    is_random = arguments.selection.selection == "random"
    other = "" if is_random else ", or take --selection random, which keeps at least one"
    (findings.refusals if missed > MANY * count else findings.warnings).append(
        f"--prefix_length {arguments.selection.prefix_length}: the selection misses every supervised token in "
        f"{missed:,} of {count:,} rows, which then teach nothing: raise it{other}"
    )


def _lost(report: EncodingReport, name: str, length: int) -> Iterator[str]:
    """Rows that lost their end, or are left out."""
    if report.cut_ends > MANY * report.rows:
        yield (
            f"{report.cut_ends:,} of {report.rows:,} {name} rows are longer than --max_length {length} and lose the "
            "end of an answer, the end token with it: raise it, or leave such rows out with --long_rows drop"
        )
    for count, why in (
        (report.dropped_rows, f"their answer is empty or context only, or lies beyond --max_length {length}"),
        (report.dropped_long_rows, f"they are longer than --max_length {length} (--long_rows drop)"),
    ):
        if count > MANY * report.records:
            yield f"{count:,} of {report.records:,} {name} records are left out, because {why}"


def _short(findings: Findings, arguments: FinetuneArguments) -> Iterator[str]:
    """Runs of few steps, and packing that saves nothing."""
    optimization, selection = arguments.optimization, arguments.selection
    sequences, what = len(findings.train), ""
    if findings.bins is not None:
        sequences, what = len(findings.bins), "packed "
    if 0 < sequences < optimization.global_batch_size:
        steps = optimization.max_steps or optimization.num_epochs
        yield (
            f"{sequences:,} {what}rows are fewer than --global_batch_size {optimization.global_batch_size}: each "
            f"optimizer step takes all of them, and the run has {steps:,} step{'s' * (steps != 1)}"
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
