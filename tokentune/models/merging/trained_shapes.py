"""The base's output head and embeddings are given the shapes that they had in training, read from the adapter's files.

A classifier's head is mostly trained whole and saved with the adapter; the base's configuration does not know of it. If
the base is a classifier already, its head may be unchanged or have an adapter. Embeddings may be resized and untied.

Legend: V rows of the base's embedding (its vocabulary, padding rows included), D hidden size, r rank.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from tokentune.errors import UserError
from tokentune.models.merging.trained_adapter import ADAPTER_FLAG, BASE_FLAG, Adapter
from tokentune.models.tasks import CAUSAL_LM, HEADS, TEXT, TOKEN, Head
from tokentune.settings.flags import require

if TYPE_CHECKING:
    import peft

_BY_TASK = {head.adapter_task: head for head in (CAUSAL_LM, TEXT, TOKEN)}
_MARKED_OUTPUTS = 7919  # an unlikely size of anything else in a model
_PREFIX = "base_model.model."  # of every name in an adapter's file
# How peft calls a whole embedding in it: as it is, or below one of its wrappers.
_WHOLE = (
    *("weight", "base_layer.weight", "original_module.weight", "modules_to_save.weight"),
    "token_adapter.base_layer.weight",
)


# --- output head ------------------------------------------------------------------------------------------------------


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
    trained = (adapter.config.auto_mapping or {}).get("base_model_class") or ""  # BertForTokenClassification, say
    ends = {head.auto_class.__name__.removeprefix("AutoModel"): head for head in HEADS.values()}
    return next((head for end, head in ends.items() if trained.endswith(end)), CAUSAL_LM)


def with_outputs(config: PreTrainedConfig, adapter: Adapter, head: Head) -> PreTrainedConfig:
    """A copy of the base's configuration with as many outputs as the head in the adapter's file has.

    If the file holds no head, the base's own is used and the configuration does not change.
    """
    config = copy.deepcopy(config)
    count = _output_count(config, adapter, head) if head.is_new else None
    if count is None:
        return config
    changed = count != config.num_labels
    if changed:
        config.num_labels = count  # names of other classes go with it
    if adapter.classes is not None and len(adapter.classes) == count:
        config.id2label = dict(enumerate(adapter.classes))
        config.label2id = {name: number for number, name in config.id2label.items()}
        config.problem_type = "single_label_classification"
    elif count == 1 and (changed or config.problem_type is None):
        config.problem_type = "regression"
    elif changed and config.problem_type == "regression":
        config.problem_type = None  # of the base's one number
    return config


def _output_count(config: PreTrainedConfig, adapter: Adapter, head: Head) -> int | None:
    """The number of outputs of the head in the adapter's file; None: it holds no whole head."""
    marked = copy.deepcopy(config)
    marked.num_labels = _MARKED_OUTPUTS
    with torch.device("meta"):
        skeleton = head.auto_class.from_config(marked)
    whole = tuple(f".{name}" for name, p in skeleton.named_parameters() if p.shape[:1] == (_MARKED_OUTPUTS,))
    return next((shape[0] for name, shape in adapter.shapes.items() if name.endswith(whole)), None)


def check_head(random: Sequence[str], adapter: Adapter, base: str) -> None:
    """Refuses a head that neither the base nor the adapter's file holds completely.

    Args:
        random: weights of the head that the base lacks, or has for other outputs.
    """
    lost = [name for name in random if f"{_PREFIX}{name}" not in adapter.shapes]
    if lost:
        raise UserError(
            f"{ADAPTER_FLAG} {adapter.folder}: holds no head, or not all of it, and {BASE_FLAG} {base} lacks the rest: "
            f"{len(lost)} of its weights are lost (the first: {lost[0]}).\nTrain with modules_to_save, as "
            "tokentune/classify.py does, or give the classifier that the adapter was trained on."
        )


# --- embeddings -------------------------------------------------------------------------------------------------------


def needed_rows(adapter: Adapter, base: PreTrainedModel) -> int:
    """The rows V that the embedding had in training, by what the adapter's file holds of it.

    Raises:
        UserError: the number differs from the base's, and the new rows are not in the file: they are lost.
    """
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    own = embedding.weight.shape[0]
    names = {module: name for name, module in base.named_modules()}
    rows, held = _rows_in_file(adapter.shapes, names[embedding])
    # a model without weights shares none, so the configuration is asked
    tied = head is not None and base.config.get_text_config().tie_word_embeddings
    if head is not None:
        head_rows, head_held = _rows_in_file(adapter.shapes, names[head])
        rows, held = rows | head_rows, (held or head_held) if tied else (held and head_held)
    trained = _trained_tokens(adapter.config)
    if not rows and max(trained, default=0) >= own:
        rows = {max(trained) + 1}
    if not rows or rows == {own}:
        return own
    where = f"{ADAPTER_FLAG} {adapter.folder}: was trained on embeddings of {' and '.join(map(str, sorted(rows)))} rows"
    require(len(rows) == 1, f"{where}, where the base has {own}: it belongs to no one vocabulary, or is damaged.")
    (wanted,) = rows
    require(
        held or (wanted >= own and set(range(own, wanted)) <= trained and tied),
        f"{where}, but {BASE_FLAG} has {own}, and the adapter's file does not hold all of them.\n"
        "Give the resized base that it was trained on.",
    )
    return wanted


def _rows_in_file(shapes: Mapping[str, tuple[int, ...]], module: str) -> tuple[set[int], bool]:
    """The numbers of rows V that the file's weights for an embedding or head have, and whether it holds all rows."""
    parts = {name.removeprefix(f"{_PREFIX}{module}."): shape for name, shape in shapes.items()}
    whole = {shape[0] for part, shape in parts.items() if part in _WHOLE}  # (V, D)
    adapted = {parts[part][axis] for part, axis in (("lora_embedding_A", 1), ("lora_B.weight", 0)) if part in parts}
    return whole | adapted, bool(whole)  # of the adapters: (r, V), (V, r)


def _trained_tokens(config: "peft.LoraConfig") -> set[int]:
    """The tokens of `trainable_token_indices`, whose rows are in the file."""
    chosen = getattr(config, "trainable_token_indices", None) or []
    lists = chosen.values() if isinstance(chosen, Mapping) else [chosen]
    return {token for tokens in lists for token in tokens}


def untie_adapted_embeddings(model: "peft.PeftModel") -> None:
    """Unties output head and input embedding if either has an adapter: folding into shared weights would change both.

    (Modules trained whole have no base layer: peft replaces the shared weights by their own copy.)
    """
    base = model.get_base_model()
    pair = [base.get_input_embeddings(), base.get_output_embeddings()]
    layers = [module.get_base_layer() if hasattr(module, "get_base_layer") else module for module in pair]
    embedding, head = layers
    if layers != pair and head is not None and head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the output head shares the input embedding's weights."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def settle_tying(merged: PreTrainedModel) -> None:
    """Ties head and embedding of a folded model, which were tied in the base, if they are still equal.

    The configuration is set accordingly.
    """
    embedding, head = merged.get_input_embeddings(), merged.get_output_embeddings()
    same = head.weight.shape == embedding.weight.shape and bool((head.weight == embedding.weight).all())
    if same:
        head.weight = embedding.weight
    merged.config.tie_word_embeddings = merged.config.get_text_config().tie_word_embeddings = same
