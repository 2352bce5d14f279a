"""The embeddings of a model that an adapter is folded into: resized as the run did it, tied or untied.

Legend: V rows of the base's embedding (its vocabulary, padding rows included), D hidden size, r rank.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tokentune.errors import UserError
from tokentune.models.merging.trained_adapter import ADAPTER_FLAG, BASE_FLAG, Adapter

if TYPE_CHECKING:
    import peft

_PREFIX = "base_model.model."  # of every name in an adapter's file
# How peft calls a whole embedding in it: as it is, or below one of its wrappers.
_WHOLE = (
    *("weight", "base_layer.weight", "original_module.weight", "modules_to_save.weight"),
    "token_adapter.base_layer.weight",
)


def needed_rows(adapter: Adapter, base: PreTrainedModel) -> int:
    """The rows V that the embedding had in training, by what the adapter's file holds of it.

    Raises:
        UserError: not the base's own number, while the file lacks the rows that the base has not: what they were is
            lost. With both numbers.
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
    if len(rows) > 1:
        raise UserError(f"{where}, where the base has {own}: it belongs to no one vocabulary, or is damaged.")
    (wanted,) = rows
    if not held and (wanted < own or not set(range(own, wanted)) <= trained or not tied):
        raise UserError(
            f"{where}, but {BASE_FLAG} has {own}, and the adapter's file does not hold all of them.\n"
            "Give the resized base that it was trained on."
        )
    return wanted


def _rows_in_file(shapes: Mapping[str, tuple[int, ...]], module: str) -> tuple[set[int], bool]:
    """The numbers of rows V that the file's weights for an embedding or head have, and whether it holds all rows."""
    rows, held = set(), False
    for name, shape in shapes.items():
        part = name.removeprefix(_PREFIX).removeprefix(f"{module}.")
        if name != f"{_PREFIX}{module}.{part}":
            continue
        if part in _WHOLE:
            rows, held = rows | {shape[0]}, True  # (V, D)
        elif part == "lora_embedding_A":
            rows = rows | {shape[1]}  # (r, V)
        elif part == "lora_B.weight":
            rows = rows | {shape[0]}  # (V, r)
    return rows, held


def _trained_tokens(config: "peft.LoraConfig") -> set[int]:
    """The tokens whose rows alone were trained, and are in the file."""
    chosen = getattr(config, "trainable_token_indices", None) or []
    lists = chosen.values() if isinstance(chosen, Mapping) else [chosen]
    return {token for tokens in lists for token in tokens}


def resize(base: PreTrainedModel, rows: int) -> None:
    """Gives embedding and head so many rows. New ones are arbitrary: the adapter's file has their values."""
    if rows != base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(rows, mean_resizing=False)


def highest_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The highest id that it gives a token."""
    return max(tokenizer.get_vocab().values())


def check_tokenizer(
    adapters: PreTrainedTokenizerBase, base: PreTrainedTokenizerBase | None, rows: int, where: str
) -> None:
    """Refuses a tokenizer that gives ids without a row, unless the base's own does so too.

    Args:
        adapters: the tokenizer that the merged model gets.
        base: the base's; None where it is the same one.
        rows: of the merged model's embedding.
        where: how the message begins.
    """
    highest = highest_token(adapters)
    if highest < rows or base is None or highest_token(base) >= highest:
        return
    raise UserError(
        f"{where}: its tokenizer has {highest + 1} tokens, but {BASE_FLAG} has embeddings for {rows}, and the "
        "adapter's file holds none for the others.\nGive the resized base that it was trained on."
    )


def untie_adapted_embeddings(model: "peft.PeftModel") -> None:
    """Gives the output head its own weights where it shares the input embedding's and an adapter sits on either.

    Folding into the shared weights would change both, while the adapter changes one only. (Modules trained whole have
    no base layer: peft puts their own copy in place of the shared weights.)
    """
    base = model.get_base_model()
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if head is None or not (hasattr(embedding, "get_base_layer") or hasattr(head, "get_base_layer")):
        return
    embedding, head = (m.get_base_layer() if hasattr(m, "get_base_layer") else m for m in (embedding, head))
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the output head shares the input embedding's weights."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def settle_tying(merged: PreTrainedModel, *, was_tied: bool) -> None:
    """Ties head and embedding of a folded model that are still equal, and says in its configuration what they are.

    Args:
        was_tied: whether the base's are.
    """
    embedding, head = merged.get_input_embeddings(), merged.get_output_embeddings()
    if head is None or not was_tied:
        return
    same = head.weight.shape == embedding.weight.shape and bool((head.weight == embedding.weight).all())
    if same:
        head.weight = embedding.weight
        return
    merged.config.tie_word_embeddings = merged.config.get_text_config().tie_word_embeddings = False
