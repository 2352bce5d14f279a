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

from tokentune.core.profile import Pooling, pooled_tokens
from tokentune.sampling.resolver import find_strategy
from tokentune.sampling.sampler import (
    IGNORED_LABEL,
    counts_of_rows,
    draw_scores,
    mask_unselected_labels,
    select_positions,
    select_tokens,
    target_mask,
)

ALL_LABELS = "all_labels"  # a batch's labels before any was masked: for scoring passes and `training/diagnosing.py`


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
            return self._without_targets()
        item = self.rows[row]
        mixed = np.random.SeedSequence((self.seed, int(self._epoch), row)).generate_state(1, np.uint64)[0]
        draw_seed = int(mixed >> np.uint64(1))  # 63 bits: fits int64
        return {**item, "draw_seed": draw_seed}

    def _without_targets(self) -> dict[str, Any]:
        first = self.rows[0]
        if set(first) <= {"input_ids", "labels"}:  # of a causal model: one token is enough
            return {"input_ids": first["input_ids"][:1], "labels": [IGNORED_LABEL], "draw_seed": 0}
        labels = np.full_like(first["labels"], IGNORED_LABEL).tolist()  # a class, or one for each token
        return {**first, "labels": labels, "draw_seed": 0}


@dataclass
class CausalCollator:
    """Pads rows on the right into a batch for a causal language model, and draws the selection when asked to.

    Args:
        pad_token_id: fills "input_ids"; may equal any other token, for padding is told by length alone.
        prefix_length: an int is a count of tokens, a float a proportion; None draws nothing (evaluation).
        strategy: a name that `strategies.find_strategy` knows.
        pad_to_multiple_of: S is rounded up to a multiple of it (8 suits tensor cores).
        keep_labels: where labels are masked, keep all of them beside them, as "all_labels".
        draw_later: leave the draw to whom the batch goes, the model (which scores tokens first) or `draw`.

    Raises:
        ValueError: no such strategy, or one that needs scores, which no collator has.
    """

    pad_token_id: int
    prefix_length: int | float | None = None
    strategy: str = "random"
    pad_to_multiple_of: int | None = None
    keep_labels: bool = False
    draw_later: bool = False

    def __post_init__(self) -> None:
        if find_strategy(self.strategy).needs and self.prefix_length is not None and not self.draw_later:
            raise ValueError(f"strategy {self.strategy!r} needs scores, which a model has: draw_later=True")

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """
        Args:
            examples: B items with "input_ids" and "labels" of equal length, and "draw_seed" when selecting.

        Returns:
            "input_ids", "attention_mask" and "labels" (B, S) int64; when selecting also what `draw` adds, or, to draw
            later, "selection_draws" (B, S) float32, the uniform numbers to do it with.

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
        if self.prefix_length is None:
            return batch
        if not all("draw_seed" in example for example in examples):
            raise ValueError(
                "a selection needs each example's draw_seed: wrap the data set in SeededRows, and keep the Trainer "
                "from removing the column (remove_unused_columns=False)"
            )
        uniform = draw_scores([example["draw_seed"] for example in examples], longest)
        if self.draw_later:
            return batch | {"selection_draws": uniform.float()}
        return self.draw(batch | {"selection_draws": uniform}, self.prefix_length)

    def draw(self, batch: dict[str, Tensor], prefix_length: int | float) -> dict[str, Tensor]:
        """A padded batch with its "selection_draws" turned into a selection of this size.

        Returns:
            The batch with "selected_positions" (B, K) instead, and labels that are -100 at targets outside of the
            selection. Where the strategy knows its probabilities, labels stay, all of them being stood for by the
            selected ones' "selection_weights" (B, K). On the CPU also "num_supervised", an int: the targets that were
            selected, for which a GPU would have to be waited for.
        """
        uniform = batch["selection_draws"]
        targets = target_mask(batch["labels"], causal=True)
        positions, weights = select_tokens(
            batch["attention_mask"],
            prefix_length,
            targets=targets,
            strategy=self.strategy,
            scores=uniform,
            input_ids=batch["input_ids"],
            labels=batch["labels"],
        )
        drawn = {name: value for name, value in batch.items() if name != "selection_draws"}
        if weights is None:
            drawn["labels"] = mask_unselected_labels(batch["labels"], positions, causal=True)
            if self.keep_labels:
                drawn[ALL_LABELS] = batch["labels"]
        else:
            drawn["selection_weights"] = weights
        drawn["selected_positions"] = positions
        if positions.device.type == "cpu":
            drawn["num_supervised"] = int(targets.gather(1, positions).sum())
        return drawn

    def count(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Of a batch that this collator made: real tokens, selected ones, and supervised targets of the selection.

        Where the model will draw, so many as it will draw, and all supervised targets.
        """
        mask, positions = batch["attention_mask"], batch.get("selected_positions")  # (B, S), (B, K)
        supervised = target_mask(batch["labels"], causal=True)
        if positions is not None:
            return mask.sum(), mask.gather(1, positions).sum(), supervised.gather(1, positions).sum()
        selected = mask.sum()
        if "selection_draws" in batch:
            selected = counts_of_rows(self.prefix_length, mask.sum(-1), self.strategy).sum()
        return mask.sum(), selected, supervised.sum()


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
        seeds = [example["draw_seed"] for example in examples]
        return batch | self.draw(mask, batch["labels"], seeds, batch.get("input_ids"))

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
        pad_token_id: by which that head knows padding.
        first_always: select the first token whatever is pooled (an image's class token).
        in_place: the model returns all S rows, not K: labels of tokens are masked instead of gathered.
        outside: the class of words outside of entities, which "supervised" selects after those inside.
    """

    prefix_length: int | float
    strategy: str = "random"
    pooling: Pooling | None = None
    pad_token_id: int | None = None
    first_always: bool = False
    in_place: bool = False
    outside: int | None = None

    def __call__(
        self, mask: Tensor, labels: Tensor, seeds: Sequence[int], input_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        """mask (B, S), labels (B,), or (B, S) of tokens -> "selected_positions" (B, K) and "labels" to go with them.

        Weights of a strategy that knows its probabilities have no place in an encoder's loss, and are left out.
        """
        targets = preferred = None
        if labels.ndim == 2:
            targets = target_mask(labels, causal=False)
            preferred = targets if self.outside is None else targets & (labels != self.outside)
        pooling = Pooling.FIRST if self.first_always else self.pooling
        always = pooled_tokens(pooling, mask, input_ids, self.pad_token_id)
        positions = select_positions(
            mask,
            self.prefix_length,
            targets=targets,
            always=always,
            preferred=preferred,
            strategy=self.strategy,
            scores=draw_scores(seeds, mask.shape[1]),
            input_ids=input_ids,
            labels=labels,
        )
        if labels.ndim == 2:
            masked = self.in_place
            labels = mask_unselected_labels(labels, positions, causal=False) if masked else labels.gather(1, positions)
        return {"selected_positions": positions, "labels": labels}


def stack_images(examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Images of one size as a batch: "pixel_values" (B, channels, height, width) and "labels" (B,)."""
    pixels = torch.stack([torch.as_tensor(example["pixel_values"]) for example in examples])
    return {"pixel_values": pixels, "labels": torch.tensor([example["labels"] for example in examples])}
