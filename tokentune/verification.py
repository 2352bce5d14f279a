"""Trust nothing: a model is compared with the definition of the method before it is patched.

A tiny random copy of the model (its class and head, its options, every kind of layer it has, at least three layers)
runs twice on a padded batch: once patched, once as the definition says (Simoulin et al., EMNLP 2024, section 3):

    run the unmodified model; replace each row of a layer's input outside of the selection by a constant, and
    likewise each query, key and value inside attention; take the loss over the selected rows.

Outputs and all parameter gradients have to agree, and the definition's outputs with the untouched model's.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tokentune.attention import UnsupportedModelError, eager_function
from tokentune.selection import mask_unselected_labels
from tokentune.structure import attention_modules, transformer_layers

# Sizes that differ from one another and from every size of the tiny model, so that no dimension passes for another.
BATCH, LENGTH, PADDING = 3, 19, 4
# Relative. Even a float64 copy casts to float32 in its norms, rotary angles and loss. Eager attention goes through a
# float32 softmax, which turns float64's smallest number into -inf and rows that see nothing into NaN: float32 then.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
_DEFINITION = "tokentune_definition"


def verify_model(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError, with the size and place of the mismatch, unless a tiny copy of `model` agrees."""
    devices = [] if not torch.cuda.is_available() else list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        try:
            tiny = tiny_copy(model)
            batches = [(side, *_random_batch(tiny, side)) for side in ("right", "left")]
            outputs = [_run(tiny, batch, None)[0] for _, batch, _ in batches]
        except UnsupportedModelError:
            raise
        except Exception as error:  # whatever a family's own code raises on sizes it was not written for
            raise UnsupportedModelError(
                f"no small copy of {type(model).__name__} could be run to verify it: {type(error).__name__}: {error}"
            ) from error
        for (side, batch, positions), untouched in zip(batches, outputs, strict=True):
            _compare(tiny, batch, positions, untouched, f"{type(model).__name__} ({side} padding)")


def tiny_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same class, head and options with random weights, about a million of them."""
    config = tiny_config(model.config)
    config._experts_implementation = "eager"  # the fused ones know no float64, and experts act on each token alone
    own = _implementation(model)
    dtype = torch.float32 if own == "eager" else torch.float64
    tiny = type(model)._from_config(config, attn_implementation=own, dtype=dtype)
    with torch.no_grad():
        for parameter in tiny.parameters():
            noise = torch.randn_like(parameter)
            # Weights large enough for every path to matter, vectors (norms, biases) near what they were.
            parameter.copy_(noise * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else parameter + 0.1 * noise)
    return tiny.train()


def _implementation(model: PreTrainedModel) -> str:
    return "eager" if model.config._attn_implementation == "eager" else "sdpa"


def tiny_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy with few layers, heads, experts and words; everything that changes the computation stays.

    The head size is kept (rotary tables depend on it), as is whether heads are grouped; dropout is turned off.
    """
    config = copy.deepcopy(config)
    text = config.get_text_config()
    depth = text.num_hidden_layers
    kept = _layers_to_keep(text)
    for name, value in vars(text).items():
        if isinstance(value, list | tuple) and len(value) == depth:
            setattr(text, name, type(value)(value[:kept]))
        elif isinstance(value, int | float) and ("dropout" in name or "drop_path" in name or name.endswith("pdrop")):
            setattr(text, name, 0.0)
    text.num_hidden_layers = kept
    heads, groups = text.num_attention_heads, getattr(text, "num_key_value_heads", None)
    head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
    text.num_attention_heads = 4
    if groups is not None:
        text.num_key_value_heads = 4 if groups == heads else 1 if groups == 1 else 2
    text.hidden_size = 4 * head_size
    sizes = {"intermediate_size": 48, "moe_intermediate_size": 24, "ffn_dim": 48, "n_inner": 48, "vocab_size": 97}
    sizes |= {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
    for name, size in sizes.items():
        if isinstance(getattr(text, name, None), int):
            setattr(text, name, min(size, getattr(text, name)))
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(text, name, None if getattr(text, name, None) is None else 0)
    if isinstance(getattr(text, "sliding_window", None), int):
        text.sliding_window = min(text.sliding_window, 5)
    return config


def _layers_to_keep(text: PreTrainedConfig) -> int:
    kinds = getattr(text, "layer_types", None) or []
    needed = next((n for n in range(1, len(kinds) + 1) if set(kinds[:n]) == set(kinds)), 0)
    return min(text.num_hidden_layers, max(3, needed))


def _random_batch(tiny: PreTrainedModel, side: str) -> tuple[dict[str, Tensor], Tensor]:
    """A padded batch with labels for the model's head, and a selection (B, K) that holds position 0 for encoders."""
    ids = torch.randint(1, tiny.config.get_text_config().vocab_size, (BATCH, LENGTH))
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    start = 0 if side == "left" else LENGTH - PADDING
    mask[1, start : start + PADDING] = 0
    scores = torch.rand(BATCH, LENGTH).masked_fill(mask == 0, 2.0)
    if not tiny.can_generate():
        scores[:, 0] = -1.0
    positions = scores.argsort(1)[:, :7].sort(1).values
    batch = {"input_ids": ids, "attention_mask": mask}
    labels = _labels(tiny, mask)
    return (batch if labels is None else batch | {"labels": labels}), positions


def _labels(tiny: PreTrainedModel, mask: Tensor) -> Tensor | None:
    """Random labels of the kind that the head takes; None for a model without a head."""
    if tiny.base_model is tiny:
        return None
    loss_type = "ForCausalLM" if tiny.can_generate() else tiny.loss_type
    if loss_type in ("ForCausalLM", "ForMaskedLM", "ForTokenClassification"):
        per_class = loss_type == "ForTokenClassification"
        classes = tiny.config.num_labels if per_class else tiny.config.get_text_config().vocab_size
        return torch.randint(0, classes, mask.shape).masked_fill(mask == 0, -100)
    if loss_type in ("ForSequenceClassification", "ForImageClassification"):
        return torch.randint(0, tiny.config.num_labels, mask.shape[:1])
    raise UnsupportedModelError(f"the head of {type(tiny).__name__} is not served")


def _compare(tiny: PreTrainedModel, batch: dict[str, Tensor], positions: Tensor, untouched: Tensor, kind: str) -> None:
    from tokentune.patching import apply_tokentune, remove_tokentune  # here, because patching verifies in its turn

    with definition_of_the_method(tiny, positions):
        defined, defined_gradients = _run(tiny, _selected_labels(tiny, batch, positions), positions)
    real = batch["attention_mask"].bool()
    if untouched.shape[:2] != real.shape:  # one row per sequence: a classification head
        real = slice(None)
    _agree(defined[real], untouched[real], f"{kind}: outputs of the attention interface's own function")
    apply_tokentune(tiny, verify=False)
    try:
        selected, gradients = _run(tiny, batch | {"selected_positions": positions}, None)
    except (RuntimeError, TypeError, AttributeError, IndexError) as error:
        raise UnsupportedModelError(f"{kind} fails on groups of tokens: {type(error).__name__}: {error}") from error
    finally:
        remove_tokentune(tiny)
    expected = defined if isinstance(real, slice) else defined[torch.arange(BATCH)[:, None], positions]
    _agree(selected, expected, f"{kind}: outputs")
    for name, gradient in gradients.items():
        _agree(gradient, defined_gradients[name], f"{kind}: gradient of {name}")


def _selected_labels(tiny: PreTrainedModel, batch: dict[str, Tensor], positions: Tensor) -> dict[str, Tensor]:
    labels = batch.get("labels")
    if labels is None or labels.ndim == 1:
        return batch
    return batch | {"labels": mask_unselected_labels(labels, positions, causal=tiny.can_generate())}


def _run(tiny: PreTrainedModel, batch: dict[str, Tensor], positions: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and parameter gradients of one training step; without a head the loss is a random projection.

    `positions` are the rows that carry such a loss; None: all that come back.
    """
    tiny.zero_grad(set_to_none=True)
    result = tiny(**batch)
    output = result.logits if "labels" in batch else result.last_hidden_state
    loss = result.loss if "labels" in batch else None
    if loss is None:
        rows = output if positions is None else output[torch.arange(BATCH)[:, None], positions]
        loss = (rows * torch.linspace(-1, 1, rows[0, 0].numel(), dtype=rows.dtype)).sum()
    loss.backward()
    return output.detach(), {n: p.grad for n, p in tiny.named_parameters() if p.grad is not None}


@contextmanager
def definition_of_the_method(model: PreTrainedModel, positions: Tensor) -> Iterator[None]:
    """Within it, the unmodified model computes what the method is defined to compute for `positions` (B, K)."""

    own = _implementation(model)

    def hold(tensor: Tensor, dim: int) -> Tensor:
        keep = torch.zeros(tensor.shape[0], tensor.shape[dim], dtype=torch.bool).scatter_(1, positions, True)
        keep = keep.view(tensor.shape[0], *(-1 if d == dim else 1 for d in range(1, tensor.ndim)))
        return torch.where(keep, tensor, tensor.detach())

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        function = eager_function(module) if own == "eager" else ALL_ATTENTION_FUNCTIONS[own]
        return function(module, hold(query, 2), hold(key, 2), hold(value, 2), *args, **kwargs)

    def hold_input(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple:
        if args:
            return (hold(args[0], 1), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": hold(kwargs["hidden_states"], 1)}

    AttentionInterface.register(_DEFINITION, attention)
    AttentionMaskInterface.register(_DEFINITION, ALL_MASK_ATTENTION_FUNCTIONS[own])
    configs = [model.config, *(module.config for module in attention_modules(model))]
    handles = [
        layer.register_forward_pre_hook(hold_input, with_kwargs=True, prepend=True)
        for layer in transformer_layers(model)
    ]
    try:
        for config in configs:
            config._attn_implementation_internal = _DEFINITION
        yield
    finally:
        for config in configs:
            config._attn_implementation_internal = own
        for handle in handles:
            handle.remove()


def _agree(found: Tensor, expected: Tensor, what: str) -> None:
    error = (found - expected).abs().max() / expected.abs().max().clamp(min=1e-9)
    if not error <= TOLERANCE[found.dtype]:  # also where it is NaN
        raise UnsupportedModelError(f"{what} differ from the definition of the method by {error:.1e} (relative)")
