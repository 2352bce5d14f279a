"""The batch of an estimated step: how many tokens its rows select, and its tensors."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from tokentune.core.layers import inner_model
from tokentune.errors import UserError
from tokentune.sampling.independent import count_at_quantile
from tokentune.sampling.sampler import answers_count, selected_count
from tokentune.sampling.schedule import Answers
from tokentune.settings.finetune import Arguments
from tokentune.settings.model import SelectionArguments


def batch_without_data(
    model: nn.Module, arguments: Arguments, shape: tuple[int, int], device: str, answer_share: float | None
) -> dict[str, Any]:
    """A batch without padding. On the CPU its values are real, because code for the CPU reads them."""
    core, selection = inner_model(model), arguments.selection
    corrects = selection.tokentune and selection.gradient_correction > 0
    rows, length = shape
    text = core.config.get_text_config()
    with unset_fake_temporarily() if device == "cpu" else nullcontext():
        ids = torch.ones(rows, length, dtype=torch.int64, device=device)
        batch: dict[str, Any] = {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}
        if core.main_input_name == "pixel_values":
            raise UserError("steps on images cannot be run without data")
        if core.can_generate():
            batch["num_items_in_batch"] = rows * (length - 1)
        else:
            whole = core.loss_type == "ForSequenceClassification"  # one label for all tokens
            batch["labels"] = ids[:, 0].clone() if whole else batch["labels"].zero_()
        if getattr(text, "type_vocab_size", 0):
            batch["token_type_ids"] = torch.zeros_like(ids)
        if selection.scoring_pass and selection.scored:  # the model draws, after a scoring pass
            batch["selection_draws"] = torch.linspace(0, 0.99, length, device=device).expand(rows, -1).clone()
        elif selection.tokentune:
            count = count_of_row(selection, length, answer_share)
            positions = torch.arange(count, device=device) * length // count
            if arguments.adapters.invocation is not None:  # adapters act on the selected tokens, the last ones
                positions = torch.arange(length - count, length, device=device)
                batch["alora_offsets"] = [count] * rows
            batch["selected_positions"] = positions.expand(rows, -1).clone()
            if corrects:
                known = torch.full((rows, count), count / length, device=device)
                batch |= {"selection_probabilities": known, "selection_weights": 1 / known}
        # Where all tokens are selected, the layers run as in ordinary training, unless the gradient is corrected.
        selects_all = not corrects and batch.get("selected_positions", ids[:, :0]).shape[1] == length
        ordinary = not selection.tokentune or selects_all
        if ordinary and device != "cpu" and not getattr(text, "sliding_window", None):
            # transformers drops a mask without padding; it cannot read that from a mask without data.
            del batch["attention_mask"]
    return batch


def count_of_row(selection: SelectionArguments, length: int, answer_share: float | None) -> int:
    """Selected tokens of a row of `length` tokens; a quantile with the correction. `answer_share`: of its targets."""
    size, corrects = selection.selected, selection.gradient_correction > 0  # then the number is random
    if not isinstance(size, Answers):
        return (count_at_quantile if corrects else selected_count)(size, length)
    targets = round(answer_share * length)
    if corrects and targets < length:
        return targets + count_at_quantile(size.share, length - targets)
    return answers_count(size, targets, length)


def unknown_answers(arguments: Arguments) -> UserError:
    return UserError(
        f"--prefix_length {arguments.selection.prefix_length}: how many tokens a step selects depends on the rows' "
        "answers. Add --answer_share 0.05 (their share of a row's tokens), or --dataset_name_or_path to count them"
    )
