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
from torch.nn.utils.rnn import pad_sequence

from tokentune.core.profile import Pooling, pooled_tokens
from tokentune.sampling.resolver import find_strategy
from tokentune.sampling.sampler import (
    IGNORED_LABEL,
    counts_of_rows,
    draw_scores,
    mask_unselected_labels,
    select_tokens,
    target_mask,
)
from tokentune.sampling.schedule import Size

ALL_LABELS = "all_labels"  # a batch's labels before any was masked: for scoring passes and `training/diagnosing.py`


def draw_seed(*numbers: int) -> int:
    """A seed that is drawn from these numbers, none of them negative: 63 bits, so that it fits int64."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


class SeededRows(torch.utils.data.Dataset):
    """An encoded data set whose items have a seed for their selection beside their columns: "draw_seed".

    The seed depends on (seed, epoch, row) alone: a row's selection is drawn anew in each epoch, and does not depend on
    the number of workers, the batch, or the order of the rows.

    Args:
        rows: indexed by row number (a `datasets.Dataset`, or a list of items).
        seed: not negative.
    """

    def __init__(self, rows: Sequence[dict[str, Any]], seed: int) -> None:
        self.rows, self.seed = rows, seed
        # Shared memory: workers that outlive an epoch (persistent_workers) hold a copy of this object, and would
        # otherwise repeat the first epoch's draws.
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
        return {**self.rows[row], "draw_seed": draw_seed(self.seed, int(self._epoch), row)}

    def _without_targets(self) -> dict[str, Any]:
        first = self.rows[0]
        if set(first) <= {"input_ids", "labels"}:  # for a causal model: one token is enough
            return {"input_ids": first["input_ids"][:1], "labels": [IGNORED_LABEL], "draw_seed": 0}
        labels = np.full_like(first["labels"], IGNORED_LABEL).tolist()  # a class, or one for each token
        return {**first, "labels": labels, "draw_seed": 0}


@dataclass
class CausalCollator:
    """Pads rows on the right into a batch for a causal language model, and draws the selection when asked to.

    Args:
        pad_token_id: fills "input_ids"; may be any token's id, as padding is known by length alone.
        prefix_length: an int is a count of tokens, a float a proportion, `Answers` all targets and a share of the
            others; None draws nothing (evaluation).
        strategy: a name that `strategies.find_strategy` knows.
        pad_to_multiple_of: S is rounded up to a multiple of it (8 suits tensor cores).
        keep_labels: where labels are masked, also return them unmasked, as "all_labels".
        draw_later: leave the draw to the model (which scores tokens first), or to a later call of `draw`.
        independent: draw each token on its own, as the gradient's correction needs (`sampling/independent.py`).

    Raises:
        ValueError: no such strategy, or one that needs scores, which no collator has.
    """

    pad_token_id: int
    prefix_length: Size | None = None
    strategy: str = "random"
    pad_to_multiple_of: int | None = None
    keep_labels: bool = False
    draw_later: bool = False
    independent: bool = False

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
        lengths = torch.tensor([len(example["input_ids"]) for example in examples])
        longest = round_up(int(lengths.max()), self.pad_to_multiple_of)
        input_ids, labels = (
            pad_rows([torch.as_tensor(example[name], dtype=torch.int64) for example in examples], fill, longest)
            for name, fill in (("input_ids", self.pad_token_id), ("labels", IGNORED_LABEL))
        )
        attention_mask = (torch.arange(longest) < lengths[:, None]).long()
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

    def draw(self, batch: dict[str, Tensor], prefix_length: Size) -> dict[str, Tensor]:
        """A padded batch with its "selection_draws" turned into a selection of this size.

        Returns:
            The batch with "selected_positions" (B, K) instead, and labels that are -100 at targets outside of the
            selection; also "selection_fillers" (B, K) where real tokens fill a row up. Where the strategy knows its
            probabilities, labels stay, and "selection_weights" (B, K) weight the selected ones to stand for all. With
            `independent` also "selection_probabilities" (B, K). On the CPU also "num_supervised", an int: the selected
            targets (on a GPU, reading it would stop the host until the GPU is done).
        """
        targets = target_mask(batch["labels"], causal=True)
        positions, weights, fillers, probabilities = select_tokens(
            batch["attention_mask"],
            prefix_length,
            targets=targets,
            strategy=self.strategy,
            scores=batch["selection_draws"],
            input_ids=batch["input_ids"],
            labels=batch["labels"],
            independent=self.independent,
        )
        drawn = {name: value for name, value in batch.items() if name != "selection_draws"}
        if weights is None:
            drawn["labels"] = mask_unselected_labels(batch["labels"], positions, causal=True)
            if self.keep_labels:
                drawn[ALL_LABELS] = batch["labels"]
        else:
            drawn["selection_weights"] = weights.float()  # MPS, to which the batch may go, has no float64
        drawn["selected_positions"] = positions
        if fillers is not None:
            drawn["selection_fillers"] = fillers
        if probabilities is not None:
            drawn["selection_probabilities"] = probabilities.float()
        if positions.device.type == "cpu":
            drawn["num_supervised"] = int(selected_in(targets, drawn).sum())
        return drawn

    def count(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """`token_counts`; where the model draws, the tokens that it will select, and all supervised targets."""
        counts = token_counts(batch["attention_mask"], batch)
        if "selection_draws" not in batch:
            return counts
        rows = batch["attention_mask"].sum(-1)
        return counts[0], counts_of_rows(self.prefix_length, rows, self.strategy).sum(), counts[2]


def token_counts(mask: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Of a causal model's batch: real tokens (B, S), selected ones, and supervised targets of the selection."""
    targets, positions = target_mask(batch["labels"], causal=True), batch.get("selected_positions")
    if positions is None:
        return mask.sum(), mask.sum(), targets.sum()
    return mask.sum(), selected_in(mask, batch).sum(), selected_in(targets, batch).sum()


def selected_in(mask: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """(B, K): the mask (B, S), of real tokens or of targets, at the selected positions of a batch; 0 at fillers."""
    selected, fillers = mask.gather(1, batch["selected_positions"]), batch.get("selection_fillers")
    return selected if fillers is None else selected.masked_fill(fillers, 0)


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
        """The padded batch; when drawing also what `EncoderDraw` returns, with the labels of the selection alone."""
        batch = dict(self.pad([{k: v for k, v in example.items() if k != "draw_seed"} for example in examples]))
        if self.draw is None:
            return batch
        seeds = [example["draw_seed"] for example in examples]
        return batch | self.draw(self._mask(batch), batch["labels"], seeds, batch.get("input_ids"))

    def count(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Of a batch that this collator made: real tokens, selected ones, and labels that are learnt from."""
        mask, labels = self._mask(batch), batch["labels"]
        selected = selected_in(mask, batch) if "selected_positions" in batch else mask
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
        pooling: which token a head for whole sequences pools: always selected.
        pad_token_id: by which that head recognises padding.
        first_always: always select the first token (an image's class token).
        in_place: the model returns all S rows, not K: token labels are masked instead of gathered.
        outside: the class of words outside of entities, which "supervised" selects after those inside.
    """

    prefix_length: Size
    strategy: str = "random"
    pooling: Pooling | None = None
    pad_token_id: int | None = None
    first_always: bool = False
    in_place: bool = False
    outside: int | None = None

    def __call__(
        self, mask: Tensor, labels: Tensor, seeds: Sequence[int], input_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        """mask (B, S), labels (B,), or (B, S) of tokens -> "selected_positions" (B, K) and their "labels".

        Also "selection_fillers" (B, K), as of `CausalCollator.draw`.

        An encoder's loss has no weights: those of a strategy that knows its probabilities are left out.
        """
        targets = preferred = None
        if labels.ndim == 2:
            targets = target_mask(labels, causal=False)
            preferred = targets if self.outside is None else targets & (labels != self.outside)
        pooling = Pooling.FIRST if self.first_always else self.pooling
        always = pooled_tokens(pooling, mask, input_ids, self.pad_token_id)
        drawn = select_tokens(
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
        if labels.ndim == 2 and self.in_place:
            labels = mask_unselected_labels(labels, drawn.positions, causal=False)
        elif labels.ndim == 2:
            labels = labels.gather(1, drawn.positions)
        fillers = {} if drawn.fillers is None else {"selection_fillers": drawn.fillers}
        return {"selected_positions": drawn.positions, "labels": labels} | fillers


def round_up(number: int, multiple: int | None) -> int:
    """The smallest multiple that is not below the number; without a multiple, the number itself."""
    return -(-number // (multiple or 1)) * (multiple or 1)


def pad_rows(rows: Sequence[Tensor], fill: float, width: int) -> Tensor:
    """Rows of any lengths as one batch, (B, width), filled up on the right."""
    padded = pad_sequence(rows, batch_first=True, padding_value=fill)
    return torch.nn.functional.pad(padded, (0, width - padded.shape[1]), value=fill)


def stack_images(examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Images of one size as a batch: "pixel_values" (B, channels, height, width) and "labels" (B,)."""
    pixels = torch.stack([torch.as_tensor(example["pixel_values"]) for example in examples])
    return {"pixel_values": pixels, "labels": torch.tensor([example["labels"] for example in examples])}
