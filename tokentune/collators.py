"""Rows to batches: padding by length, the selection's draw, and the labels that it leaves.

The draw happens here, before the Trainer counts labels, so that its `num_items_in_batch` is the number of selected
supervised tokens of the whole optimizer step, for any gradient accumulation and in the last, partial window too.

Legend: B sequences, S tokens of the padded batch, K selected positions per sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokentune.selection import IGNORED_LABEL, draw_scores, mask_unselected_labels, select_positions, target_mask


class SeededRows(torch.utils.data.Dataset):
    """An encoded data set whose items carry a seed for their selection: "input_ids", "labels" and "draw_seed".

    The seed depends on (seed, epoch, row) alone: a row draws anew in each epoch, and the same whatever the number of
    workers, the batch it comes in and the order of the rows.
    """

    def __init__(self, rows: Sequence[dict[str, Any]], seed: int) -> None:
        """
        Args:
            rows: indexed by row number; items with "input_ids" and "labels" (a `datasets.Dataset`, or a list).
            seed: not negative.
        """
        self.rows = rows
        self.seed = seed
        # Shared memory: workers that outlive an epoch (persistent_workers) hold a copy of this object, and would
        # otherwise repeat the first epoch's draws for ever.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Call before the epoch's first batch is asked for: workers fetch ahead."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        item = self.rows[row]
        mixed = np.random.SeedSequence((self.seed, int(self._epoch), row)).generate_state(1, np.uint64)[0]
        draw_seed = int(mixed >> np.uint64(1))  # 63 bits: fits int64
        return {"input_ids": item["input_ids"], "labels": item["labels"], "draw_seed": draw_seed}


@dataclass
class CausalCollator:
    """Pads rows on the right into a batch for a causal language model, and draws the selection when asked to.

    Args:
        pad_token_id: fills "input_ids"; may equal any other token, for padding is told by length alone.
        prefix_length: an int is a count of tokens, a float a proportion; None draws nothing (evaluation).
        strategy: one of `tokentune.selection.STRATEGIES`.
        pad_to_multiple_of: S is rounded up to a multiple of it (8 suits tensor cores).
    """

    pad_token_id: int
    prefix_length: int | float | None = None
    strategy: str = "random"
    pad_to_multiple_of: int | None = None

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """
        Args:
            examples: B items with "input_ids" and "labels" of equal length, and "draw_seed" when selecting.

        Returns:
            "input_ids", "attention_mask" and "labels" (B, S) int64; when selecting also "selected_positions" (B, K),
            and the labels of targets outside the selection are -100.

        Raises:
            ValueError: `prefix_length` is set and an example has no "draw_seed".
        """
        lengths = [len(example["input_ids"]) for example in examples]
        multiple = self.pad_to_multiple_of or 1
        longest = -(-max(lengths) // multiple) * multiple

        input_ids = torch.full((len(examples), longest), self.pad_token_id, dtype=torch.int64)
        labels = torch.full_like(input_ids, IGNORED_LABEL)
        attention_mask = torch.zeros_like(input_ids)
        for row, (example, length) in enumerate(zip(examples, lengths, strict=True)):
            input_ids[row, :length] = torch.as_tensor(example["input_ids"])
            labels[row, :length] = torch.as_tensor(example["labels"])
            attention_mask[row, :length] = 1
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        return batch if self.prefix_length is None else self._select(batch, examples)

    def _select(self, batch: dict[str, Tensor], examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Adds the positions to a padded batch and removes the labels that no selected position predicts."""
        if not all("draw_seed" in example for example in examples):
            raise ValueError(
                "a selection needs each example's draw_seed: wrap the data set in SeededRows, and keep the Trainer "
                "from removing the column (remove_unused_columns=False)"
            )
        positions = select_positions(
            batch["attention_mask"],
            self.prefix_length,
            targets=target_mask(batch["labels"], causal=True),
            strategy=self.strategy,
            scores=draw_scores([example["draw_seed"] for example in examples], batch["labels"].shape[1]),
        )
        labels = mask_unselected_labels(batch["labels"], positions, causal=True)
        return batch | {"labels": labels, "selected_positions": positions}
