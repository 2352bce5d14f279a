"""Rows to batches: padding by length, the selection's draw, and the labels that it leaves.

The draw happens here, before the Trainer counts labels, so that its `num_items_in_batch` is the number of selected
supervised tokens of the whole optimizer step, for any gradient accumulation and in the last, partial window too.

Legend: B sequences, S tokens of the padded batch, K selected positions per sequence.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokentune.drawing import pooled_tokens
from tokentune.selection import IGNORED_LABEL, draw_scores, mask_unselected_labels, select_positions, target_mask
from tokentune.verification import Pooling


class SeededRows(torch.utils.data.Dataset):
    """An encoded data set whose items carry a seed for their selection beside their columns: "draw_seed".

    The seed depends on (seed, epoch, row) alone: a row draws anew in each epoch, and the same whatever the number of
    workers, the batch it comes in and the order of the rows.
    """

    def __init__(self, rows: Sequence[dict[str, Any]], seed: int) -> None:
        """
        Args:
            rows: indexed by row number (a `datasets.Dataset`, or a list of items).
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

    def __getitem__(self, row: int | None) -> dict[str, Any]:
        """One row; None asks for one without targets, to fill the last batch up (`distributed.EvenSampler`)."""
        if row is None:
            return {"input_ids": self.rows[0]["input_ids"][:1], "labels": [IGNORED_LABEL], "draw_seed": 0}
        item = self.rows[row]
        mixed = np.random.SeedSequence((self.seed, int(self._epoch), row)).generate_state(1, np.uint64)[0]
        draw_seed = int(mixed >> np.uint64(1))  # 63 bits: fits int64
        return {**item, "draw_seed": draw_seed}


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
            and the labels of targets outside the selection are -100. "num_supervised", an int, counts the others, which
            a GPU would have to be waited for.

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

    @staticmethod
    def count(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Of a batch that this collator made: real tokens, selected ones, and supervised targets of the selection."""
        mask, positions = batch["attention_mask"], batch.get("selected_positions")  # (B, S), (B, K)
        selected = mask if positions is None else mask.gather(1, positions)
        supervised = batch["labels"][:, 1:] != IGNORED_LABEL  # targets that were not selected are -100 by now
        return mask.sum(), selected.sum(), supervised.sum()

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
        supervised = int((labels[:, 1:] != IGNORED_LABEL).sum())
        return batch | {"labels": labels, "selected_positions": positions, "num_supervised": supervised}


@dataclass
class ClassificationCollator:
    """Rows to a batch for an encoder with a classification head; draws the selection when asked to.

    Args:
        pad: makes the batch, with "labels" (B,), or (B, S) of tokens: one of transformers' collators,
            or `stack_images`.
        draw: None draws nothing (evaluation).
        tokens_per_image: S of a batch without "input_ids".
    """

    pad: Callable[[list[dict[str, Any]]], dict[str, Tensor]]
    draw: "EncoderDraw | None" = None
    tokens_per_image: int = 1

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """The padded batch; when drawing also "selected_positions" (B, K), and the labels of these tokens alone."""
        batch = dict(self.pad([{k: v for k, v in example.items() if k != "draw_seed"} for example in examples]))
        if self.draw is None:
            return batch
        mask = self._mask(batch)
        return batch | self.draw(mask, batch["labels"], [example["draw_seed"] for example in examples])

    def count(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Of a batch that this collator made: real tokens, selected ones, and labels that are learnt from."""
        mask, positions = self._mask(batch), batch.get("selected_positions")
        selected = mask if positions is None else mask.gather(1, positions)
        labels = batch["labels"]
        learnt = labels != IGNORED_LABEL if labels.ndim == 2 else torch.ones_like(labels, dtype=torch.bool)
        return mask.sum(), selected.sum(), learnt.sum()

    def _mask(self, batch: dict[str, Tensor]) -> Tensor:
        if "attention_mask" in batch:
            return batch["attention_mask"]
        labels = batch["labels"]
        return torch.ones(labels.shape[0], self.tokens_per_image, dtype=torch.int64, device=labels.device)


@dataclass
class EncoderDraw:
    """How the tokens of an encoder's batch are drawn.

    Args:
        prefix_length, strategy: as in `CausalCollator`.
        pooling: which token the head for whole sequences pools: selected always.
        first_always: select the first token whatever is pooled (an image's class token).
        in_place: the model returns all S rows, not K: labels of tokens are masked instead of gathered.
        outside: the class of words outside of entities, which "labelled" selects after those inside.
    """

    prefix_length: int | float
    strategy: str = "random"
    pooling: Pooling | None = None
    first_always: bool = False
    in_place: bool = False
    outside: int | None = None

    def __call__(self, mask: Tensor, labels: Tensor, seeds: Sequence[int]) -> dict[str, Tensor]:
        """mask (B, S), labels (B,), or (B, S) of tokens -> "selected_positions" (B, K) and "labels" to go with them."""
        targets = preferred = None
        if labels.ndim == 2:
            targets = target_mask(labels, causal=False)
            preferred = targets if self.outside is None else targets & (labels != self.outside)
        always = pooled_tokens(Pooling.FIRST if self.first_always else self.pooling, mask)
        positions = select_positions(
            mask,
            self.prefix_length,
            targets=targets,
            always=always,
            preferred=preferred,
            strategy=self.strategy,
            scores=draw_scores(seeds, mask.shape[1]),
        )
        if labels.ndim == 2:
            masked = self.in_place
            labels = mask_unselected_labels(labels, positions, causal=False) if masked else labels.gather(1, positions)
        return {"selected_positions": positions, "labels": labels}


def stack_images(examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Images of one size as a batch: "pixel_values" (B, channels, height, width) and "labels" (B,)."""
    pixels = torch.stack([torch.as_tensor(example["pixel_values"]) for example in examples])
    return {"pixel_values": pixels, "labels": torch.tensor([example["labels"] for example in examples])}
