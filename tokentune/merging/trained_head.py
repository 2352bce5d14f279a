"""What a model that an adapter belongs to ends in, and how many outputs that has: by the adapter's files.

A classifier's head is trained whole and stands in the adapter's file; its base's configuration knows nothing of it.
"""

import copy

import torch
from transformers import PreTrainedConfig

from tokentune.errors import UserError
from tokentune.heads import CAUSAL_LM, IMAGE, TEXT, TOKEN, Head
from tokentune.merging.trained_adapter import ADAPTER_FLAG, Adapter

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

    Raises:
        UserError: the file holds no such head.
    """
    if not head.is_new:
        return config
    count = _output_count(config, adapter, head)
    config = copy.deepcopy(config)
    config.num_labels = count
    if adapter.record.classes is not None and len(adapter.record.classes) == count:
        config.id2label = dict(enumerate(adapter.record.classes))
        config.label2id = {name: number for number, name in config.id2label.items()}
    config.problem_type = "single_label_classification" if count > 1 else "regression"
    return config


def _output_count(config: PreTrainedConfig, adapter: Adapter, head: Head) -> int:
    marked = copy.deepcopy(config)
    marked.num_labels = _MARKED_OUTPUTS
    with torch.device("meta"):
        skeleton = head.auto_class.from_config(marked)
    ends = [name for name, p in skeleton.named_parameters() if p.shape[:1] == (_MARKED_OUTPUTS,)]
    for name, shape in adapter.shapes.items():
        if any(name.endswith(f".{end}") for end in ends):
            return shape[0]
    raise UserError(
        f"{ADAPTER_FLAG} {adapter.folder}: holds no head ({' or '.join(ends)}): its weights are lost. Train with "
        "modules_to_save, as tokentune/classify.py does."
    )
