"""What a model that an adapter belongs to ends in, and how many outputs that has: by the adapter's files.

A classifier's head is mostly trained whole and stands in the adapter's file; its base's configuration then knows
nothing of it. Where the base is a classifier already, its head may have been left as it is, or got an adapter.
"""

import copy
from collections.abc import Sequence

import torch
from transformers import PreTrainedConfig

from tokentune.errors import UserError
from tokentune.models.merging.trained_adapter import ADAPTER_FLAG, BASE_FLAG, Adapter
from tokentune.models.tasks import CAUSAL_LM, IMAGE, TEXT, TOKEN, Head

_BY_TASK = {head.adapter_task: head for head in (CAUSAL_LM, TEXT, TOKEN)}
_BY_CLASS = {
    "ForSequenceClassification": TEXT,
    "ForTokenClassification": TOKEN,
    "ForImageClassification": IMAGE,
}
_MARKED_OUTPUTS = 7919  # an unlikely size of anything else in a model


def head_of(adapter: Adapter) -> Head:
    """The kind of model that the adapter was trained on: its record of a task, or of the model's class.

    Raises:
        UserError: one that is not trained here (sequence to sequence, question answering, ...).
    """
    task = adapter.config.task_type
    if task is not None:
        if task not in _BY_TASK:
            raise UserError(
                f"{ADAPTER_FLAG} {adapter.folder}: an adapter for the task {task}; merged are those of "
                f"{', '.join(map(str, _BY_TASK))} and of image classification."
            )
        return _BY_TASK[task]
    trained_class = (adapter.config.auto_mapping or {}).get("base_model_class") or ""
    return next((head for end, head in _BY_CLASS.items() if trained_class.endswith(end)), CAUSAL_LM)


def with_outputs(config: PreTrainedConfig, adapter: Adapter, head: Head) -> PreTrainedConfig:
    """A copy of the base's configuration with the outputs of the head that the adapter's file holds.

    Where it holds none the base's own is meant, and the configuration stays what it is.
    """
    config = copy.deepcopy(config)
    count = _output_count(config, adapter, head) if head.is_new else None
    if count is None:
        return config
    changed = count != config.num_labels
    if changed:
        config.num_labels = count  # names of other classes go with it
    if adapter.record.classes is not None and len(adapter.record.classes) == count:
        config.id2label = dict(enumerate(adapter.record.classes))
        config.label2id = {name: number for number, name in config.id2label.items()}
        config.problem_type = "single_label_classification"
    elif count == 1 and (changed or config.problem_type is None):
        config.problem_type = "regression"
    elif changed and config.problem_type == "regression":
        config.problem_type = None  # of the base's one number
    return config


def _output_count(config: PreTrainedConfig, adapter: Adapter, head: Head) -> int | None:
    """The outputs of the head in the adapter's file; None: it holds no whole head."""
    marked = copy.deepcopy(config)
    marked.num_labels = _MARKED_OUTPUTS
    with torch.device("meta"):
        skeleton = head.auto_class.from_config(marked)
    ends = [name for name, p in skeleton.named_parameters() if p.shape[:1] == (_MARKED_OUTPUTS,)]
    whole = tuple(f".{end}" for end in ends)
    return next((shape[0] for name, shape in adapter.shapes.items() if name.endswith(whole)), None)


def check_head(random: Sequence[str], adapter: Adapter, base: str) -> None:
    """Refuses a head of which neither the base nor the adapter's file holds all.

    Args:
        random: weights of the head that the base lacks, or has for other outputs.
    """
    lost = [name for name in random if f"base_model.model.{name}" not in adapter.shapes]
    if lost:
        raise UserError(
            f"{ADAPTER_FLAG} {adapter.folder}: holds no head, or not all of it, and {BASE_FLAG} {base} lacks the rest: "
            f"{len(lost)} of its weights are lost (the first: {lost[0]}).\nTrain with modules_to_save, as "
            "tokentune/classify.py does, or give the classifier that the adapter was trained on."
        )
