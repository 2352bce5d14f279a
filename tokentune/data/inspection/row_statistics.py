"""What encoded rows hold, one number per row, in one pass over them with NumPy: a few seconds for 100,000 rows.

Legend: R rows, T tokens of a batch of rows, one row after another.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from tokentune.data.collators import CausalCollator
from tokentune.data.encoding import TOKENS
from tokentune.sampling.sampler import IGNORED_LABEL
from tokentune.sampling.schedule import Size

BATCH = 2_000  # rows looked at together
LARGEST_SAMPLE = 2_048  # rows that `draws` draws for
LONGEST_BLANK = 16  # supervised tokens, without end tokens, up to which a row is looked at for words


@dataclass
class RowStatistics:
    """Counts of R encoded rows, of tokens unless said otherwise."""

    lengths: np.ndarray  # (R,)
    supervised: np.ndarray  # (R,) that have a label; not the first one, which nothing predicts
    turns: np.ndarray  # (R,) runs of supervised tokens: one for each answer
    ended_turns: np.ndarray  # (R,) turns with an end among their last two tokens
    last_ended: np.ndarray  # (R,) bool: the row's last turn is one of these
    outside: np.ndarray  # (R,) whose id the model has no embedding for
    doubled_bos: np.ndarray  # (R,) bool: begins with two BOS
    # (R,) int64, equal for equal tokens, for others by a chance of 2**-64; of this process alone:
    fingerprints: np.ndarray  # of the ids
    answers: np.ndarray  # of the supervised tokens; 0: there are none
    wordless: np.ndarray  # of which end tokens are supervised, where beside them only white space is; 0: others are

    def __len__(self) -> int:
        return len(self.lengths)


def row_statistics(
    rows: Dataset | Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> RowStatistics:
    """Counts of every row.

    Args:
        rows: with "input_ids" and "labels".
        vocab_size: rows of the model's embedding.
    """
    ends = sorted(end_token_ids(tokenizer))
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    none = np.zeros(0, np.int64)

    known = len(tokenizer)

    @cache
    def is_blank(token: int) -> bool:
        return 0 <= token < known and not tokenizer.decode([token], clean_up_tokenization_spaces=False).strip()

    batches = [_counted(*batch, ends, bos, vocab_size, is_blank) for batch in ((none, none, none), *_columns(rows))]
    names = RowStatistics.__dataclass_fields__
    return RowStatistics(*(np.concatenate([getattr(batch, name) for batch in batches]) for name in names))


def _counted(
    ids: np.ndarray,
    labels: np.ndarray,
    lengths: np.ndarray,
    end_ids: list[int],
    bos_ids: list[int],
    vocab_size: int,
    is_blank: Callable[[int], bool],
) -> RowStatistics:
    """Of token ids (T,), labels (T,) and lengths (R,). No supervised token is a row's first one."""
    row = np.repeat(np.arange(len(lengths)), lengths)  # (T,): of each token

    def in_row(tokens: np.ndarray) -> np.ndarray:
        return np.bincount(row[tokens], minlength=len(lengths))

    first = np.diff(row, prepend=-1) != 0
    supervised = (labels != IGNORED_LABEL) & ~first
    ends = supervised & np.isin(labels, end_ids)
    turn_ends = supervised & ~np.append(supervised, False)[1:]
    # One token may follow an end token: the line break that some chat templates supervise with it.
    ended = turn_ends & (ends | np.append(False, ends)[:-1])
    last_ended = np.zeros(len(lengths), dtype=bool)
    last_ended[row[turn_ends]] = ended[turn_ends]  # of a row's several turns, the last is assigned last
    bos = np.isin(ids, bos_ids)
    second = np.append(False, first)[:-1] & ~first
    counts = in_row(supervised)
    others = supervised & ~ends
    looked_at = others & (in_row(others) <= LONGEST_BLANK)[row]
    blank = [token for token in np.unique(labels[looked_at]).tolist() if is_blank(token)]
    silent = (counts > 0) & (in_row(others & ~np.isin(labels, blank)) == 0)
    return RowStatistics(
        lengths=lengths,
        supervised=counts,
        turns=in_row(turn_ends),
        ended_turns=in_row(ended),
        last_ended=last_ended,
        outside=in_row((ids < 0) | (ids >= vocab_size)),
        doubled_bos=in_row(second & bos & np.append(False, bos)[:-1]) > 0,
        fingerprints=_hashes(ids, lengths),
        answers=np.where(counts > 0, _hashes(labels[supervised], counts), 0),
        wordless=np.where(silent, _hashes(labels[ends], in_row(ends), distinct=True), 0),
    )


def _hashes(tokens: np.ndarray, counts: np.ndarray, *, distinct: bool = False) -> np.ndarray:
    """Of each row's tokens, of which `counts` (R,) follow each other, or of the `distinct` ones among them; never 0."""
    rows = np.split(tokens, np.cumsum(counts)[:-1]) if len(counts) else []
    return np.array([hash((np.unique(row) if distinct else row).tobytes()) or 1 for row in rows], np.int64)


def end_token_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """What may end an answer: EOS, and the special tokens that are neither BOS nor unknown (chat templates' marks)."""
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return special - {tokenizer.bos_token_id, tokenizer.unk_token_id} | {tokenizer.eos_token_id} - {None}


def draws(
    rows: Sequence[dict[str, Any]], prefix_length: Size, strategy: str, *, independent: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the selection makes of the rows, or of `LARGEST_SAMPLE` of them, evenly spaced.

    Args:
        rows: with their draw seeds.
        prefix_length, strategy, independent: as of `CausalCollator`.

    Returns:
        Row numbers; of each row the selected tokens, and the supervised ones that a selected token predicts.
    """
    sample = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), LARGEST_SAMPLE)).astype(np.int64))
    collate = CausalCollator(0, prefix_length=prefix_length, strategy=strategy, independent=independent)
    counts = [[int(count) for count in collate.count(collate([rows[row]]))[1:]] for row in sample.tolist()]
    return sample, *np.array(counts).T


def _columns(rows: Dataset | Sequence[dict[str, Any]]) -> Iterator[list[np.ndarray]]:
    """Batches of rows: token ids (T,), labels (T,), and the rows' lengths (R,), all int64."""
    if not isinstance(rows, Dataset):
        rows = Dataset.from_dict({name: [row[name] for row in rows] for name in TOKENS}, features=TOKENS)
    for table in rows.select_columns([*TOKENS]).with_format("arrow").iter(batch_size=BATCH):
        ids, labels = (table[name].combine_chunks() for name in TOKENS)
        arrays = (ids.flatten(), labels.flatten(), ids.value_lengths())
        yield [array.to_numpy(zero_copy_only=False).astype(np.int64) for array in arrays]
