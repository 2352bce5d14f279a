"""The data of a run: from the command line's names to rows of token ids and labels.

Main path: `load_instruction_data` opens each data set (`data/formats/records.py`), recognises its format
(`data/formats/data_formats.py`), encodes its rows (`record_encoding.py`), keeps the tokens for the next run
(`token_cache.py`), and joins training and validation rows. With `--streaming` the rows are encoded while training
(`streaming_rows.py`).
"""

import copy
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from datasets import Dataset, concatenate_datasets
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from tokentune.data.answers_apart import AnswersApart
from tokentune.data.chat.template_files import (
    AS_IT_IS,
    SYSTEM_IN_USER,
    beside_own,
    load_chat_template,
    prompt_as_chat_template,
)
from tokentune.data.encoding import (
    END_LOST,
    TOKENS,
    EncodingReport,
    LengthLimit,
    Notes,
    TableOfRows,
    TokenRow,
    count_supervised,
)
from tokentune.data.formats.bad_rows import BadRows
from tokentune.data.formats.data_formats import FORMATS, Answer, recognised
from tokentune.data.formats.record_files import chunks
from tokentune.data.formats.records import DROPPED_SOURCES, RecordSource, open_source
from tokentune.data.prompts import PromptTemplate
from tokentune.data.record_encoding import CHUNK, RecordEncoder, killed_workers_told, ordered_map, worker_count
from tokentune.data.streaming_rows import StreamedRows, StreamedSource
from tokentune.data.token_cache import Entry, cache_folder, cache_key, cached
from tokentune.errors import UserError
from tokentune.processes import process_count
from tokentune.settings.data import DataArguments
from tokentune.settings.finetune import FinetuneArguments
from tokentune.settings.flags import require

logger = logging.getLogger(__name__)

TRAIN_FLAG, VALIDATION_FLAG = "--dataset_name_or_path", "--eval_dataset_name_or_path"


@dataclass(frozen=True)
class SourceReport:
    """One data set of the command line."""

    flag: str
    name: str
    data_format: str
    rows: int | None  # that can be learnt from, or evaluated on; None: streamed, and not counted
    used: int | None  # of them in an epoch: more than there are where a weight repeats them
    left_out: int  # of `records.DROPPED_SOURCES`
    bad: int = 0  # that --bad_rows skip leaves out


@dataclass
class InstructionData:
    """Rows to learn from and to evaluate on: "input_ids", and "labels" of the same length (-100: no loss)."""

    train: Dataset | StreamedRows
    validation: Dataset | None
    train_report: EncodingReport | None  # of an epoch's rows; None: streamed
    validation_report: EncodingReport | None
    sources: list[SourceReport] = field(default_factory=list)
    chat_template: str | dict[str, str] | None = None  # writes the prompt that was trained with; saved with the model
    invocation: tuple[int, ...] | None = None  # in front of each answer, with `--lora_on answers`

    @property
    def table(self) -> Dataset | None:
        """The training rows; None: streamed."""
        return self.train if isinstance(self.train, Dataset) else None


def load_instruction_data(
    arguments: FinetuneArguments, tokenizer: PreTrainedTokenizerBase, template: PromptTemplate
) -> InstructionData:
    """Reads, encodes and splits the data; shows progress on a terminal.

    Args:
        tokenizer: with the chat template of conversations, where `--chat_template` names no other.
        template: around instructions.

    Raises:
        UserError: data that cannot be found, read, recognised or learnt from; a conversation without a chat template.
    """
    data, own = arguments.data, tokenizer.chat_template
    tokenizer = copy.deepcopy(tokenizer)  # a stream reads with it when the caller's has the template that is saved
    if data.chat_template is not None:
        tokenizer.chat_template = load_chat_template(data.chat_template, tokenizer)
    apart = arguments.adapters.invocation is not None
    loader = _Loader(data, tokenizer, template, keep=not arguments.run.dry_run, answers_apart=apart)
    held = None  # opened first: what cannot be found is told before anything is tokenized
    if data.eval_dataset_name_or_path is not None:
        asked = {"split": data.eval_dataset_split, "config": data.eval_dataset_config}
        held = open_source(data.eval_dataset_name_or_path, flag=VALIDATION_FLAG, role="validation", **asked)
    names = data.dataset_name_or_path
    if data.streaming:
        train_report, sources = None, []
        opened = [loader.open_stream(number) for number in range(len(names))]
        block = arguments.optimization.micro_batch_size * process_count()
        train = StreamedRows(opened, data, arguments.optimization.seed, block)
    else:
        opened = [open_source(name, flag=TRAIN_FLAG, **data.chosen(number)) for number, name in enumerate(names)]
        parts = [loader.load(source, data.eval_fraction) for source in opened]
        train, train_report, sources = _mixed(parts, data, arguments.optimization.seed)
        train = train.select_columns([*TOKENS])
    validation = validation_report = None
    if held is not None:
        part = loader.load(held, None)
        validation, validation_report = part.tables["train"].select_columns([*TOKENS]), part.reports["train"]
        validation_report.check(data.max_length)
        sources.append(part.summary)
    elif data.eval_fraction is not None:
        validation = concatenate_datasets([part.tables["validation"] for part in parts]).select_columns([*TOKENS])
        validation_report = _sum(parts, "validation")
        logger.info("--eval_fraction %s: %s", data.eval_fraction, validation_report)
    if data.chat_template is not None and not loader.conversations:
        logger.warning("--chat_template has no effect: the data holds no conversation. It is saved all the same")
    chat_template = beside_own(loader.chat_template(), own)
    reports = train_report, validation_report
    return InstructionData(train, validation, *reports, sources, chat_template, loader.invocation)


class _Part(NamedTuple):
    """One encoded data set. Its sides: "train", and "validation" where a part of it is held out."""

    tables: dict[str, Dataset]
    reports: dict[str, EncodingReport]
    summary: SourceReport


@dataclass
class _Loader:
    """Opens and encodes the data sets of one command line.

    `keep`: tokens may be written into the cache. `answers_apart`: each answer is a row (`data/answers_apart.py`).
    """

    data: DataArguments
    tokenizer: PreTrainedTokenizerBase
    template: PromptTemplate
    keep: bool
    answers_apart: bool = False
    conversations: bool = False  # whether one was found
    invocation: tuple[int, ...] | None = None  # with `answers_apart`, in front of each answer
    formats: set[str] = field(default_factory=set)

    def chat_template(self) -> str | dict[str, str] | None:
        """What writes the prompt that is trained with; for texts without prompts the tokenizer's own."""
        if self.conversations and self.data.system_in_user:
            return SYSTEM_IN_USER + self.tokenizer.get_chat_template()
        if self.conversations or self.data.chat_template is not None or self.formats <= {"text"}:
            return self.tokenizer.chat_template
        return prompt_as_chat_template(self.template if "alpaca" in self.formats else AS_IT_IS, self.tokenizer)

    def load(self, source: RecordSource, fraction: float | None) -> _Part:
        """A data set, encoded: all of it as "train", or with a fraction of it apart as "validation"."""
        folder = cache_folder(self.data.data_cache)
        depends_on = source, self.data, self.tokenizer, self.template, fraction
        key = "" if folder is None else cache_key(*depends_on, answers_apart=self.answers_apart)
        entry = cached(folder, key, lambda target: self._encode(source, fraction, target), source.where, keep=self.keep)
        facts, rows = entry.facts, len(entry.tables["train"])
        reports = {side: EncodingReport(**counts) for side, counts in facts["reports"].items()}
        if left_out := facts["left_out"]:
            logger.warning("%s: %d rows left out, data_source %s", source.name, left_out, " or ".join(DROPPED_SOURCES))
        self.conversations |= facts["conversations"]
        self.formats.add(facts["format"])
        Notes(facts["notes"]).log(logger)
        BadRows(self.data.bad_rows, **facts["bad"]).settle(source.where, facts["read"])
        if self.answers_apart:
            self._invoke_by(tuple(facts["invocation"]), source.where)
        read = f"{facts['read']:,} rows{source.read_from} read"
        told = f"{reports['train']}{facts['passed_over']}"
        logger.info("%s: %s; %s, %s", source.where, read, facts["format"], told)
        lost = left_out, facts["bad"]["count"]
        return _Part(entry.tables, reports, SourceReport(source.flag, source.name, facts["format"], rows, rows, *lost))

    def _invoke_by(self, invocation: tuple[int, ...], where: str) -> None:
        require(
            self.invocation in (None, invocation),
            f"{where}: its answers begin behind other tokens than those of other data sets (--lora_on answers). Bring "
            "them into one format, or take --lora_on all.",
        )
        self.invocation = invocation

    def open_stream(self, number: int) -> StreamedSource:
        """The data set of this number, to be read while training."""
        name, chosen = self.data.dataset_name_or_path[number], self.data.chosen(number)
        source = open_source(name, flag=TRAIN_FLAG, streaming=True, **chosen)
        kind = recognised(source, self.data.data_format, whole=False)
        self.formats.add(kind)
        encoder = RecordEncoder(self.tokenizer, FORMATS[kind], self.template, self.data)
        if (unread := encoder.data_format.unread(source.columns()[0])) is not None:
            logger.warning("%s: %s", source.where, unread)
        rows = source.rows(encoder.data_format.columns)
        where, first = next((where, row) for where, row in rows if not isinstance(row, UserError))
        with suppress(*([UserError] if self.data.bad_rows == "skip" else [])):
            self.conversations |= not isinstance(encoder.data_format.read(first, where, self.template), Answer)
        passed_over = encoder.data_format.passed_over(dict.fromkeys([*source.columns()[0], *first]))
        logger.info("%s: %s%s, read while training%s", source.where, kind, source.read_from, passed_over)
        return StreamedSource(source, encoder)

    def _encode(self, source: RecordSource, fraction: float | None, target: Path | None) -> Entry:
        kind = recognised(source, self.data.data_format, whole=True)
        encode = RecordEncoder(self.tokenizer, FORMATS[kind], self.template, self.data, fraction)
        sides = ("train",) if fraction is None else ("train", "validation")
        limits = {side: LengthLimit(self.data.max_length, self.data.long_rows) for side in sides}
        tables = {side: TableOfRows(None if target is None else target / f"{side}.arrow") for side in sides}
        read, left_out, conversations, bad, notes = 0, 0, False, BadRows(self.data.bad_rows), Notes()
        columns = dict.fromkeys(source.columns()[0])
        if (unread := encode.data_format.unread(columns)) is not None:
            notes.add(logging.WARNING, unread, source.where)
        apart = None
        records = chunks(source.rows(encode.data_format.columns), CHUNK)
        with killed_workers_told(), tqdm(desc="Tokenizing", unit=" rows", disable=None) as bar:
            if not bar.disable:
                bar.reset(source.count())
            for chunk in ordered_map(encode, records, worker_count(self.data.tokenize_workers)):
                good = [row for _, _, row in chunk.rows if isinstance(row, TokenRow)]
                if self.answers_apart and apart is None and good:
                    invocation = encode.invocation(good[0], conversations=chunk.conversations)
                    apart = AnswersApart(invocation, self.tokenizer)
                for where, side, row in chunk.rows:
                    with bad.catch(where):
                        if isinstance(row, UserError):
                            raise row
                        for part in [row] if apart is None else apart(row, where):
                            if (cut := limits[side](part)) is not None:
                                tables[side].add(cut)
                bar.update(len(chunk.rows) + chunk.left_out)
                read, left_out = read + len(chunk.rows) + chunk.left_out, left_out + chunk.left_out
                conversations |= chunk.conversations
                columns |= dict.fromkeys(sorted(chunk.columns))
                notes.update(chunk.notes)
        bad.refuse(source.where, read)
        if not any(limit.report.records for limit in limits.values()):
            raise UserError(f"{source.where}: holds no rows to train on.")
        facts = {
            "format": kind,
            "read": read,
            "left_out": left_out,
            "conversations": conversations,
            "passed_over": encode.data_format.passed_over(columns),
            "reports": {side: vars(limit.report) for side, limit in limits.items()},
            "bad": {"count": bad.count, "first": bad.first},
            "notes": notes.found,
            "invocation": None if apart is None else apart.invocation,
        }
        return Entry({side: table.finish() for side, table in tables.items()}, facts)


def _mixed(parts: list[_Part], data: DataArguments, seed: int) -> tuple[Dataset, EncodingReport, list[SourceReport]]:
    """The training rows of an epoch."""
    report = _sum(parts, "train")
    sizes = counts = [part.summary.rows for part in parts]
    if data.eval_fraction is None:
        report.check(data.max_length)
    else:
        held = _sum(parts, "validation")
        (report + held).check(data.max_length)
        for count, side, cure in ((report.rows, "training", "lower"), (held.rows, "validation", "raise")):
            if count == 0:
                raise UserError(
                    f"--eval_fraction {data.eval_fraction} of {report.rows + held.rows} rows leaves none for {side}: "
                    f"{cure} it, or name data with {VALIDATION_FLAG}."
                )
    rows = concatenate_datasets([part.tables["train"] for part in parts])
    if data.dataset_weights:
        for name, size, weight in zip(data.dataset_name_or_path, sizes, data.dataset_weights, strict=True):
            if weight > 0 and size == 0:
                raise UserError(f"{TRAIN_FLAG} {name}: --dataset_weights {weight}, but no row is left to learn from.")
        counts = mixture_counts(sizes, data.dataset_weights)
        rows = rows.select(mixture_rows(sizes, counts, seed))
        report = replace(
            _sum([part for part, count in zip(parts, counts, strict=True) if count], "train"),
            rows=len(rows),
            tokens=sum(map(len, rows["input_ids"])),
            supervised_tokens=sum(map(count_supervised, rows["labels"])),
            cut_rows=sum(map(bool, rows["cut"])),
            cut_ends=[*rows["cut"]].count(END_LOST),
        )
    summaries = [replace(part.summary, used=count) for part, count in zip(parts, counts, strict=True)]
    if len(parts) > 1:
        for summary in summaries:
            logger.info("%s: %s rows in an epoch, of %s", summary.name, f"{summary.used:,}", f"{summary.rows:,}")
    return rows, report, summaries


def _sum(parts: list[_Part], side: str) -> EncodingReport:
    return sum((part.reports[side] for part in parts), EncodingReport())


def mixture_counts(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Rows of each data set in an epoch, in proportion to the weights.

    No row is left out: the data set that is largest for its weight gives every row once, and the rows of the others are
    repeated as their share demands. A data set of weight 0 gives none.

    Args:
        sizes: rows of the data sets; 0 only where the weight is 0.
        weights: not negative, not all zero.
    """
    epoch = max(size / weight for size, weight in zip(sizes, weights, strict=True) if weight > 0)
    return [round(epoch * weight) for weight in weights]


def mixture_rows(sizes: Sequence[int], counts: Sequence[int], seed: int) -> np.ndarray:
    """Indices into the concatenated data sets, one data set after another, of each so many.

    Of one data set no row occurs more than once more often than another; the seed draws which do.
    """
    chosen, offset = [], 0
    for number, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        times, more = divmod(count, max(size, 1))  # an empty one has the weight 0
        drawn = np.random.default_rng((seed, number)).permutation(size)[:more]
        chosen.append(offset + np.concatenate([np.tile(np.arange(size), times), np.sort(drawn)]))
        offset += size
    return np.concatenate(chosen)
