"""A tiny model of a family against the definition of the method, and the bytes that it saves.

The definition here shares nothing with `tokentune`: constants are put in place by hooks on the layers that the table
names, and by a stand-in for transformers' attention functions inside the model's own file. Everything is float64: where
a model's code casts to float32, the cast is turned into one to float64.

    B sequences, S tokens, K selected, D hidden size
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from families import IMAGE_TOKEN, SIZES, VISION, Family
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tokentune import UnsupportedModelError, apply_tokentune
from tokentune.core.checkpointing import CHECKPOINT_REST
from tokentune.core.saved_tensors.saved_bytes import SavedForBackward

BATCH, LENGTH, SELECTED = 3, 15, 5
TOLERANCE = 1e-11  # relative to the largest entry


class Float64(TorchFunctionMode):
    """Turns casts to float32 inside the models' own code into casts to float64, so that no error hides in rounding."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.float:
            return args[0].double()
        swap = lambda value: torch.float64 if value is torch.float32 else value  # noqa: E731
        kwargs = {key: swap(value) for key, value in (kwargs or {}).items()}
        return func(*(swap(value) for value in args), **kwargs)


def build(family: Family, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The tiny model with random weights, in training mode."""
    torch.manual_seed(0)
    cls = getattr(transformers, family.model)
    known = cls.config_class()
    sizes = VISION if cls.main_input_name == "pixel_values" and not cls.can_generate() else SIZES
    sizes = {key: value for key, value in sizes.items() if hasattr(known, key)} | without_dropout(known)
    config = cls.config_class(**{**sizes, **family.sizes})
    config._experts_implementation = "eager"
    model = cls._from_config(config, attn_implementation=family.attention, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()


def without_dropout(config: transformers.PreTrainedConfig) -> dict[str, float]:
    return {
        key: 0.0
        for key, value in vars(config).items()
        if ("drop" in key or "jitter" in key) and isinstance(value, float) and value > 0
    }


def batch_for(model: nn.Module, side: str, batch: int = BATCH, length: int = LENGTH, padded: bool = True) -> dict:
    """Inputs and the labels of the model's head. Rows 1 and 2 are padded on `side`."""
    dtype = next(model.parameters()).dtype
    config = model.config
    if model.main_input_name == "pixel_values" and not model.can_generate():
        inputs = {"pixel_values": torch.randn(batch, config.num_channels, *[config.image_size] * 2, dtype=dtype)}
        kind = type(model).__name__
        return inputs | ({"labels": torch.arange(batch) % config.num_labels} if "Classification" in kind else {})
    mask = torch.ones(batch, length, dtype=torch.long)
    for row, padding in enumerate((0, 3, 5)[:batch]):
        if padding and padded:
            mask[row, slice(length - padding, None) if side == "right" else slice(0, padding)] = 0
    ids = torch.randint(3, 90, mask.shape).masked_fill(mask == 0, 0)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if hasattr(config, "vision_config"):
        inputs |= image_inputs(model, ids, dtype)
    kind = type(model).__name__
    if "SequenceClassification" in kind:
        return inputs | {"labels": torch.arange(batch) % config.num_labels}
    if model.can_generate() or "MaskedLM" in kind:
        return inputs | {"labels": ids.masked_fill(mask == 0, -100)}
    if "QuestionAnswering" in kind:
        return inputs | {
            "start_positions": torch.tensor([1, 8, 7])[:batch],
            "end_positions": torch.tensor([4, 9, 8])[:batch],
        }
    if "TokenClassification" in kind:
        return inputs | {"labels": (ids % config.num_labels).masked_fill(mask == 0, -100)}
    return inputs


def image_inputs(model: nn.Module, ids: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Four image tokens at positions 5 to 8 of every row, real tokens everywhere, and their images."""
    ids[:, 5:9] = IMAGE_TOKEN
    vision = model.config.vision_config
    if hasattr(vision, "spatial_merge_size"):  # Qwen-VL: patches of all images in one list
        grid = torch.tensor([[1, 4, 4]] * len(ids))
        pixels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        types = (ids == IMAGE_TOKEN).long()
        found = {"pixel_values": torch.randn(16 * len(ids), pixels, dtype=dtype), "image_grid_thw": grid}
        return found | {"mm_token_type_ids": types}
    found = {"pixel_values": torch.randn(len(ids), 3, *[vision.image_size] * 2, dtype=dtype)}
    return found | ({"token_type_ids": (ids == IMAGE_TOKEN).long()} if "Gemma3" in type(model).__name__ else {})


def selection(inputs: dict, length: int, count: int = SELECTED) -> Tensor:
    """(B, K): random real tokens, the first and the last real one among them (heads pool one or the other)."""
    mask = inputs.get("attention_mask")
    batch = len(next(iter(inputs.values()))) if mask is None else len(mask)
    mask = torch.ones(batch, length, dtype=torch.long) if mask is None else mask
    scores = torch.rand(mask.shape).masked_fill(mask == 0, -1.0)
    scores[:, 0] = 2.0
    scores[torch.arange(batch), length - 1 - mask.flip(1).argmax(1)] = 3.0
    return scores.topk(count, dim=1).indices.sort(dim=1).values


@contextmanager
def constants_outside(model: nn.Module, family: Family, positions: Tensor) -> Iterator[None]:
    """Within it, the unmodified model back-propagates through the selected rows alone.

    Constants outside of the selection are: the input of every layer, what leaves the last one (a head may look at all
    rows), and the queries, keys and values that the layers' modelling file hands to an attention function.
    """
    inside: list[bool] = []  # not empty while one of the layers runs: a vision tower's attention is left alone

    def hold(tensor: Tensor, dim: int) -> Tensor:
        chosen = torch.zeros(tensor.shape[0], tensor.shape[dim], dtype=torch.bool)
        for row, places in enumerate(positions.tolist()):
            chosen[row, places] = True
        chosen = chosen.view(len(tensor), *(-1 if d == dim else 1 for d in range(1, tensor.ndim)))
        return torch.where(chosen, tensor, tensor.detach())

    def enter(layer: nn.Module, args: tuple, kwargs: dict) -> tuple:
        inside.append(True)
        if args:
            return (hold(args[0], 1), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": hold(kwargs["hidden_states"], 1)}

    def leave(layer: nn.Module, args: tuple, output: Any) -> Any:
        inside.pop()
        return (hold(output[0], 1), *output[1:]) if isinstance(output, tuple) else hold(output, 1)

    layers = next(m for n, m in model.named_modules() if f".{n}".endswith(f".{family.layers}"))
    files = {sys.modules[type(child).__module__] for child in layers.modules()}
    originals = {f: f.ALL_ATTENTION_FUNCTIONS for f in files if hasattr(f, "ALL_ATTENTION_FUNCTIONS")}
    handles = [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in layers]
    handles += [layer.register_forward_hook(leave) for layer in layers]
    try:
        for file, original in originals.items():
            file.ALL_ATTENTION_FUNCTIONS = _Holding(original, lambda t: hold(t, 2) if inside else t)
        yield
    finally:
        for file, original in originals.items():
            file.ALL_ATTENTION_FUNCTIONS = original
        for handle in handles:
            handle.remove()


class _Holding:
    """Stands in a modelling file for transformers' attention functions; holds queries, keys and values."""

    def __init__(self, original: Any, hold: Callable[[Tensor], Tensor]):
        self.original, self.hold = original, hold

    def get_interface(self, name: str, default: Callable) -> Callable:
        function = self.original.get_interface(name, default)

        def attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
            return function(module, self.hold(q), self.hold(k), self.hold(v), *args, **kwargs)

        return attention


def defined_step(model: nn.Module, family: Family, inputs: dict, positions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output (all rows) and gradients of one step as the method is defined."""
    inputs = dict(inputs)
    labels = inputs.get("labels")
    if labels is not None and labels.ndim == 2:
        ahead = int(model.can_generate())  # a causal model predicts the next token at a selected position
        kept = torch.zeros_like(labels, dtype=torch.bool)
        for row, places in enumerate(positions.tolist()):
            kept[row, [place + ahead for place in places if place + ahead < labels.shape[1]]] = True
        inputs["labels"] = labels.masked_fill(~kept, -100)
    with Float64(), constants_outside(model, family, positions):
        return step(model, inputs, positions)


def step(model: nn.Module, inputs: dict, positions: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients of all parameters; a model without a head gets a fixed projection of the selected rows."""
    model.zero_grad(set_to_none=True)
    result = model(**inputs)
    if "start_positions" in inputs:
        output = torch.stack((result.start_logits, result.end_logits), dim=-1)
    else:
        output = result.logits if "labels" in inputs else result.last_hidden_state
    loss = getattr(result, "loss", None)
    if loss is None:
        rows = output if output.shape[1] == positions.shape[1] else take(output, positions)
        loss = (rows * torch.linspace(-1, 1, rows[0].numel(), dtype=rows.dtype).view(rows.shape[1:])).sum()
    loss.backward()
    return output.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def take(rows: Tensor, positions: Tensor) -> Tensor:
    return rows[torch.arange(len(rows))[:, None], positions]


def difference(model: nn.Module, family: Family, side: str) -> float:
    """Largest relative difference of outputs and gradients between the patched model and the definition."""
    inputs = batch_for(model, side)
    length = layer_input(model, family, inputs).shape[1]
    positions = selection(inputs, length)
    expected, expected_gradients = defined_step(model, family, inputs, positions)
    with Float64():
        found, gradients = step(model, inputs | {"selected_positions": positions}, positions)
    if expected.ndim == 3:  # what stands at padding is nobody's concern
        real = inputs.get("attention_mask", torch.ones(expected.shape[:2])).bool()
        chosen = take(real, positions)
        pairs = (
            (found, take(expected, positions))
            if found.shape[1] == SELECTED
            else (take(found, positions), take(expected, positions))
        )
        found, expected = (rows[chosen] for rows in pairs)
    if expected_gradients.keys() != gradients.keys():
        return float("inf")
    scale = max(gradient.abs().max() for gradient in expected_gradients.values())
    errors = [(found - expected).abs().max() / expected.abs().max()]
    for name, gradient in expected_gradients.items():
        # Key biases cancel in the softmax: their gradient is rounding noise around zero, measured against the others.
        errors.append((gradients[name] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-3 * scale))
    return float(torch.stack(errors).max())


def layer_input(model: nn.Module, family: Family, inputs: dict) -> Tensor:
    """What the first layer is given (B, S, D): images become tokens on the way."""
    layers = next(m for n, m in model.named_modules() if f".{n}".endswith(f".{family.layers}"))
    seen = []
    handle = layers[0].register_forward_pre_hook(
        lambda layer, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return seen[0]


def bytes_ratio(family: Family, proportion: float = 0.3) -> float:
    """Bytes saved for backward at `proportion`, relative to plain training: 2 x 64 tokens (or image patches)."""
    model = build(family, torch.float32)
    inputs = batch_for(model, "right", batch=2, length=64, padded=False)
    length = layer_input(model, family, inputs).shape[1]
    positions = selection(inputs, length, round(proportion * length))
    with SavedForBackward(model) as plain:
        model(**inputs)
    apply_tokentune(model)
    with SavedForBackward(model) as selective:
        model(**inputs, selected_positions=positions)
    return selective.bytes / plain.bytes


def checkpointed(family: Family) -> tuple[bool, float]:
    """With selective checkpointing: whether every way of it gives the gradients of a step without it, to the last bit;
    and bytes saved for backward, relative to plain training, as in `bytes_ratio`.
    """
    model = build(family, torch.float32)
    inputs = batch_for(model, "right", batch=2, length=64, padded=False)
    length = layer_input(model, family, inputs).shape[1]
    positions = selection(inputs, length, round(0.3 * length))
    with SavedForBackward(model) as plain:
        model(**inputs)
    same = True
    apply_tokentune(model)
    _, expected = step(model, inputs | {"selected_positions": positions}, positions)
    model.activation_checkpointing_enable()
    for rest in reversed(CHECKPOINT_REST):
        # The logits as a whole: the sum over chunks of them rounds otherwise.
        apply_tokentune(model, checkpoint_rest=rest, chunked_loss=False)
        _, found = step(model, inputs | {"selected_positions": positions}, positions)
        same &= found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    apply_tokentune(model)
    with SavedForBackward(model) as saved:
        model(**inputs, selected_positions=positions)
    return same, saved.bytes / plain.bytes


def measure(family: Family) -> dict[str, Any]:
    """The family's row of the table."""
    row = {"family": family.name, "class": family.model, "attention": family.attention, "drawn": family.drawn}
    model = build(family)
    start = time.perf_counter()
    try:
        apply_tokentune(model)
    except UnsupportedModelError as error:
        return row | {"refused": str(error)}
    row["verification_seconds"] = round(time.perf_counter() - start, 2)
    row["profile"] = {"rows": model._tokentune.profile.rows.value}
    row["difference"] = max(difference(model, family, side) for side in ("left", "right"))
    row["bytes_ratio"] = bytes_ratio(family)
    if model.supports_gradient_checkpointing:
        row["checkpointing_is_exact"], row["checkpointed_bytes_ratio"] = checkpointed(family)
    return row
