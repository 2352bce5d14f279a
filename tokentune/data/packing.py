"""Packing: several documents in one row, none of which attends to another.

    python -u ./tokentune/finetune.py ... --packing

A document is a row of the data. Its selection is drawn, and its labels are masked, as in a row of its own; then
documents are joined. Their position ids restart, and in a batch without an attention mask transformers builds masks
from that which keep them apart (`masking_utils.find_packed_sequence_indices`). `data/packing_check.py` tests whether a
model does keep them apart.

Legend: B rows of a batch, S tokens of the padded batch, K selected positions per row, N documents of the batch.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokentune.data.collators import (
    ALL_LABELS,
    CausalCollator,
    SeededRows,
    pad_rows,
    round_up,
    selected_in,
    token_counts,
)
from tokentune.data.row_sizes import lengths_of
from tokentune.sampling.sampler import IGNORED_LABEL, fill_up
from tokentune.sampling.schedule import Answers

logger = logging.getLogger(__name__)


def bins_of(lengths: Sequence[int] | np.ndarray, max_length: int) -> list[list[int]]:
    """Which documents share a row: best-fit decreasing, the longest first, each into the fullest row that has room.

    It needs at most about 11/9 of the fewest rows possible (Johnson et al., "Worst-case performance bounds for simple
    one-dimensional packing algorithms", 1974).

    Args:
        lengths: tokens of each document.
        max_length: tokens of a row.

    Returns:
        For each row the numbers of its documents, ascending.

    Raises:
        ValueError: a document is empty or longer than a row.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= max_length:
        raise ValueError(f"documents of {lengths.min()} to {lengths.max()} tokens do not fit rows of {max_length}")
    bins: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(max_length + 1)]  # bins by the tokens that they have room for
    rooms = 0  # bit r: some bin has room for exactly r tokens
    for document in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[document])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1  # the lowest bit: the least room that suffices
            number = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, number = max_length, len(bins)
            bins.append([])
        bins[number].append(document)
        if room > length:
            with_room[room - length].append(number)
            rooms |= 1 << (room - length)
    return [sorted(documents) for documents in bins]


@dataclass(eq=False)
class PackedRows(torch.utils.data.Dataset):
    """Rows of several documents each: {"documents": [...]}, each document with the draw seed that it has alone.

    Args:
        rows: the documents.
        bins: for each packed row the numbers of its documents (`bins_of`).
    """

    rows: SeededRows
    bins: Sequence[Sequence[int]]

    def set_epoch(self, epoch: int) -> None:
        """As of `SeededRows`."""
        self.rows.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, row: int | None) -> dict[str, list[dict[str, Any]]]:
        """One packed row; None as of `SeededRows`."""
        documents = [None] if row is None else self.bins[row]
        return {"documents": [self.rows[document] for document in documents]}


def pack(rows: SeededRows, max_length: int) -> PackedRows:
    """Documents into rows of at most `max_length` tokens; says in the log how full they are."""
    lengths = lengths_of(rows.rows)
    bins = bins_of(lengths, max_length)
    logger.info(
        "--packing: %s documents in %s rows of at most %s tokens, %.1f%% full",
        *(f"{number:,}" for number in (len(lengths), len(bins), max_length)),
        100 * fill_rate(lengths, bins, max_length),
    )
    return PackedRows(rows, bins)


def fill_rate(lengths: np.ndarray, bins: Sequence[Sequence[int]], max_length: int) -> float:
    """The share of the packed rows' places that hold a token."""
    return float(lengths.sum() / (len(bins) * max_length)) if bins else 0.0


@dataclass
class PackedCollator:
    """Packed rows to a batch for a causal language model; draws the selection of each document when asked to.

    Args:
        documents: pads and draws for the documents, as if each were a row.
    """

    documents: CausalCollator

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """
        Args:
            examples: B items of `PackedRows`.

        Returns:
            "input_ids", "labels" and "position_ids" (B, S) int64, and "use_cache": with a cache there is no packing.
            When selecting also "selected_positions" (B, K), "num_supervised" and, where there are any,
            "selection_weights", "selection_fillers" and "selection_probabilities" (B, K), as of `CausalCollator.draw`.

            Rows that select fewer than K positions select padding too, and S is as large as that takes, or, where
            counts do not follow from lengths, fillers where the padding ends. Each padding token has position 0, and so
            is a document of its own.
        """
        drawn = self.documents([document for example in examples for document in example["documents"]])
        counts = [len(example["documents"]) for example in examples]
        real = drawn["attention_mask"].bool()  # (N, tokens of the longest document)
        lengths = real.sum(1)  # (N,)
        tokens = torch.stack([own.sum() for own in lengths.split(counts)])  # (B,)
        selection, width = {}, int(tokens.max())
        if self.documents.prefix_length is not None:
            positions = drawn["selected_positions"]
            chosen = selected_in(drawn["attention_mask"], drawn).bool()  # what the document has in its own row
            starts = torch.cat([own.cumsum(0) - own for own in lengths.split(counts)])  # (N,)
            selected = _joined(positions + starts[:, None], chosen, counts, fill=-1)  # (B, K)
            selection = {"num_supervised": drawn["num_supervised"]}
            if isinstance(self.documents.prefix_length, Answers) or self.documents.independent:
                inside = torch.arange(round_up(width, self.documents.pad_to_multiple_of))
                of_row = torch.stack([torch.isin(inside, own) for own in selected])
                filled, _, fillers, _ = fill_up(of_row, inside < tokens[:, None])
                selection |= {} if fillers is None else {"selection_fillers": fillers}
            else:
                padding = (selected < 0).cumsum(1) - 1 + tokens[:, None]
                filled = torch.where(selected < 0, padding, selected)
            selection["selected_positions"] = filled
            width = max(width, int(filled.max()) + 1)
            for name, elsewhere in (("selection_weights", 0.0), ("selection_probabilities", 1.0)):
                if name in drawn:
                    own = _joined(drawn[name], chosen, counts)
                    of_row = own.new_full((len(own), width + 1), elsewhere)  # the last place is for what is no position
                    of_row = of_row.scatter(1, selected.where(selected >= 0, width), own)
                    selection[name] = of_row.gather(1, filled)
        width = round_up(width, self.documents.pad_to_multiple_of)
        places = torch.arange(real.shape[1]).expand_as(real)
        batch = {
            "input_ids": _joined(drawn["input_ids"], real, counts, self.documents.pad_token_id, width),
            "position_ids": _joined(places, real, counts, width=width),
            "use_cache": False,
        }
        for name in ("labels", ALL_LABELS):
            if name in drawn:
                drawn[name][:, 0] = IGNORED_LABEL  # nothing predicts a document's first token
                batch[name] = _joined(drawn[name], real, counts, IGNORED_LABEL, width)
        return batch | selection

    @staticmethod
    def count(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """`token_counts` of a batch that this collator made."""
        tokens, places = real_tokens(batch["position_ids"]), torch.arange(batch["labels"].shape[1])
        return token_counts(places.to(tokens.device) < tokens[:, None], batch)


def _joined(values: Tensor, kept: Tensor, counts: Sequence[int], fill: float = 0, width: int | None = None) -> Tensor:
    """Of the documents (N, any) the kept values, those of so many documents in each row: (B, width).

    Args:
        counts: documents of each row.
        width: of the rows; None: that of the longest.
    """
    sizes = [int(own.sum()) for own in kept.split(counts)]
    return pad_rows(values[kept].split(sizes), fill, max(sizes) if width is None else width)


def real_tokens(position_ids: Tensor) -> Tensor:
    """Tokens in front of the padding, (B, S) -> (B,): up to the last one that is not the first of a document.

    A document of one token at a row's end counts as padding; nothing can be learnt from it.
    """
    places = torch.arange(1, position_ids.shape[1] + 1, device=position_ids.device)
    return (places * (position_ids > 0)).amax(1)
