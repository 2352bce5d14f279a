"""What encoded rows hold, one number per row, in one pass over them with NumPy: a few seconds for 100,000 rows.

Legend: R rows, T tokens of a batch of rows laid end to end.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from tokentune.data.collators import CausalCollator
from tokentune.sampling.sampler import IGNORED_LABEL

BATCH = 2_000  # rows looked at together
LARGEST_SAMPLE = 2_048  # rows that `draws` draws for


@dataclass
class RowStatistics:
    """Of R encoded rows. Tokens, unless said."""

    lengths: np.ndarray  # (R,)
    supervised: np.ndarray  # (R,): with a label, but the first one's, which nothing predicts
    ends: np.ndarray  # (R,) supervised ones that end an answer: EOS, or the end of a turn
    turns: np.ndarray  # (R,) runs of supervised tokens: one for each answer
    ended_turns: np.ndarray  # (R,) of them with an end among their last two tokens
    last_ended: np.ndarray  # (R,) bool: the row's last turn is one of these
    outside: np.ndarray  # (R,) whose id the model has no embedding for
    doubled_bos: np.ndarray  # (R,) bool: begins with two BOS
    fingerprints: np.ndarray  # (R,) uint64: equal for equal token ids, and but for a chance of 2**-64 for no others

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
    found: dict[str, list[np.ndarray]] = {name: [] for name in RowStatistics.__dataclass_fields__}
    end_ids = np.array(sorted(end_token_ids(tokenizer)), dtype=np.int64)
    for ids, labels, lengths in _columns(rows):
        ends = np.cumsum(lengths)
        starts = ends - lengths
        not_first = np.ones(len(ids), dtype=bool)
        not_first[starts[lengths > 0]] = False
        supervised = (labels != IGNORED_LABEL) & not_first
        doubled = np.zeros(len(lengths), dtype=bool)
        if tokenizer.bos_token_id is not None:
            two = np.flatnonzero(lengths >= 2)
            doubled[two] = (ids[starts[two]] == tokenizer.bos_token_id) & (ids[starts[two]] == ids[starts[two] + 1])
        end_tokens = supervised & np.isin(labels, end_ids)
        turn_ends, ended = _turn_ends(supervised, end_tokens, starts[lengths > 0])
        last_ended = np.zeros(len(lengths), dtype=bool)
        places = np.flatnonzero(turn_ends)
        last_ended[np.searchsorted(ends, places, side="right")] = ended[places]  # of a row's several, the last counts
        counted = {
            "supervised": supervised,
            "ends": end_tokens,
            "turns": turn_ends,
            "ended_turns": ended,
            "outside": (ids < 0) | (ids >= vocab_size),
            "fingerprints": _mixed(ids, np.arange(len(ids)) - np.repeat(starts, lengths)),
        }
        batch = {name: _sums(values, starts, ends) for name, values in counted.items()}
        for name, values in (batch | {"lengths": lengths, "doubled_bos": doubled, "last_ended": last_ended}).items():
            found[name].append(values)
    kinds = {"doubled_bos": bool, "last_ended": bool, "fingerprints": np.uint64}
    return RowStatistics(
        **{name: np.concatenate([np.zeros(0, kinds.get(name, np.int64)), *parts]) for name, parts in found.items()}
    )


def _turn_ends(supervised: np.ndarray, end_tokens: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens (T,) are the last of a turn, and which of those turns end in an end token.

    An end token may have one token behind it: the line break that some templates' marks take in.
    """
    first = np.zeros(len(supervised), dtype=bool)
    first[starts] = True
    followed = np.append(supervised[1:] & ~first[1:], False)
    turn_ends = supervised & ~followed
    before = np.append(False, end_tokens[:-1]) & ~first & supervised
    return turn_ends, turn_ends & (end_tokens | before)


def _sums(values: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Of values (T,) the sums over each row, (R,); uint64 ones modulo 2**64."""
    values = values.astype(np.int64) if values.dtype == bool else values
    sums = np.concatenate([np.zeros(1, values.dtype), np.cumsum(values)])
    return sums[ends] - sums[starts]


def end_token_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """What may end an answer: EOS, and the special tokens that are neither BOS nor unknown (chat templates' marks)."""
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    special -= {tokenizer.bos_token_id, tokenizer.unk_token_id}
    return special | ({tokenizer.eos_token_id} - {None})


def draws(
    rows: Sequence[dict[str, Any]], prefix_length: int | float, strategy: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the selection makes of the rows, or of `LARGEST_SAMPLE` of them, evenly spaced.

    Args:
        rows: with their draw seeds.
        prefix_length, strategy: as of `CausalCollator`.

    Returns:
        Row numbers; of each row the selected tokens, and the supervised ones that a selected token predicts.
    """
    sample = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), LARGEST_SAMPLE)).astype(np.int64))
    collate = CausalCollator(0, prefix_length=prefix_length, strategy=strategy)
    selected, learnt = [], []
    for row in sample.tolist():
        batch = collate([rows[row]])
        selected.append(batch["selected_positions"].shape[1])
        learnt.append(batch["num_supervised"])
    return sample, np.array(selected), np.array(learnt)


def _columns(rows: Dataset | Sequence[dict[str, Any]]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Batches of rows: token ids (T,), labels (T,), and the rows' lengths (R,), all int64."""
    if isinstance(rows, Dataset):
        tables = rows.select_columns(["input_ids", "labels"]).with_format("arrow").iter(batch_size=BATCH)
        for table in tables:
            ids, labels = (table[name].combine_chunks() for name in ("input_ids", "labels"))
            yield _whole(ids.flatten()), _whole(labels.flatten()), _whole(ids.value_lengths())
        return
    for first in range(0, len(rows), BATCH):
        batch = [rows[row] for row in range(first, min(first + BATCH, len(rows)))]
        ids, labels = (np.array([t for row in batch for t in row[name]], np.int64) for name in ("input_ids", "labels"))
        yield ids, labels, np.array([len(row["input_ids"]) for row in batch], np.int64)


def _whole(array: Any) -> np.ndarray:
    return array.to_numpy(zero_copy_only=False).astype(np.int64)


def _mixed(ids: np.ndarray, places: np.ndarray) -> np.ndarray:
    """A random-looking number for each (token id, place in its row), uint64: SplitMix64's finalizer (Steele, 2014)."""
    with np.errstate(over="ignore"):
        mixed = ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + places.astype(np.uint64)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
        return mixed ^ (mixed >> np.uint64(31))
