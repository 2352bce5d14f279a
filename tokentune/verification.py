"""Trust nothing: a model is compared with the definition of the method before it is patched.

A tiny random copy of the model (its class and head, its options, every kind of layer it has, at least three layers)
runs twice on a padded batch: once patched, once as the definition says (Simoulin et al., EMNLP 2024, section 3):

    run the unmodified model; replace each row of a layer's input outside of the selection by a constant, and
    likewise each query, key and value inside attention; take the loss over the selected rows.

Outputs and all parameter gradients have to agree, and the definition's outputs with the untouched model's. On the way
it is found out which rows the head needs (`selective.Rows`) and which token it pools.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tokentune.attention import UnsupportedModelError, eager_function
from tokentune.selection import mask_unselected_labels
from tokentune.selective import Rows, TokenGroups
from tokentune.structure import transformer_layers

# Sizes that differ from one another and from every size of the tiny model, so that no dimension passes for another.
BATCH, LENGTH, PADDING, SELECTED = 3, 19, 4, 7
# Relative. Even a float64 copy casts to float32 in its norms, rotary angles and loss. Eager attention goes through a
# float32 softmax, which turns float64's smallest number into -inf and rows that see nothing into NaN: float32 then.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
_DEFINITION = "tokentune_definition"


class Pooling(Enum):
    """Which token's last hidden state a head for whole sequences looks at."""

    FIRST = "first"
    LAST = "last"
    ALL = "all"


@dataclass(frozen=True)
class Profile:
    """What the verification finds out about a model."""

    rows: Rows
    pooling: Pooling | None  # None: the head looks at every token for itself, or there is none


@dataclass
class _Trial:
    """A tiny model with a batch to try it on, and what the untouched model makes of that."""

    tiny: PreTrainedModel
    batch: dict[str, Tensor]
    side: str
    positions: Tensor  # (B, K)
    untouched: Tensor
    pooling: Pooling | None


def verified_profile(model: PreTrainedModel) -> Profile:
    """Compare a tiny copy of `model` with the definition of the method, on both sides of padding.

    Raises:
        UnsupportedModelError: with the place and the size of the first mismatch.
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices), torch.enable_grad():
        torch.manual_seed(0)
        try:
            tiny = tiny_copy(model)
            trials = [_trial(tiny, side) for side in ("right", "left")]
        except UnsupportedModelError:
            raise
        except Exception as error:  # whatever a family's own code raises on sizes it was not written for
            raise UnsupportedModelError(
                f"no small copy of {type(model).__name__} could be run to verify it: {type(error).__name__}: {error}"
            ) from error
        pooling = next((trial.pooling for trial in trials if trial.pooling is not None), None)
        first_error = None
        for rows in (Rows.SELECTED, Rows.GATHERED, Rows.ALL):
            try:
                for trial in trials:
                    _compare(trial, Profile(rows, pooling))
                return Profile(rows, pooling)
            except UnsupportedModelError as error:
                first_error = first_error or error
        raise first_error


# --- the tiny copy ----------------------------------------------------------------------------------------------------


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
    return "eager" if transformer_layers(model).backbone.config._attn_implementation == "eager" else "sdpa"


def tiny_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy with few layers, heads, experts and words; everything that changes the computation stays.

    The head size is kept (rotary tables depend on it), as is whether heads are grouped; dropout is turned off.
    """
    config = copy.deepcopy(config)
    subconfigs = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    for part in [config, *(part for part in subconfigs if isinstance(part, PreTrainedConfig))]:
        if hasattr(part, "num_hidden_layers") and hasattr(part, "num_attention_heads"):
            _shrink(part)
    return config


def _shrink(config: PreTrainedConfig) -> None:
    depth, kept = config.num_hidden_layers, _layers_to_keep(config)
    for name, value in vars(config).items():
        if isinstance(value, list | tuple) and len(value) == depth:
            setattr(config, name, type(value)(value[:kept]))
        elif isinstance(value, int | float) and ("drop" in name or name.endswith("pdrop")):
            setattr(config, name, type(value)(0))
    config.num_hidden_layers = kept
    heads, groups = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    config.num_attention_heads = 4
    if groups is not None:
        config.num_key_value_heads = 4 if groups == heads else 1 if groups == 1 else 2
    config.hidden_size = 4 * head_size
    most = {"intermediate_size": 48, "moe_intermediate_size": 24, "ffn_dim": 48, "n_inner": 48, "vocab_size": 97}
    most |= {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
    most |= {
        "sliding_window": 5,
        "local_attention": 6,
        "attention_chunk_size": 6,
        "hidden_dim": 48,
        "shared_expert_intermediate_size": 24,
    }
    for name, size in most.items():
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, min(size, getattr(config, name)))
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"):
        if getattr(config, name, None) is not None:
            setattr(config, name, 0)
    if isinstance(getattr(config, "image_size", None), int) and isinstance(getattr(config, "patch_size", None), int):
        config.image_size = 4 * config.patch_size


def _layers_to_keep(config: PreTrainedConfig) -> int:
    kinds = getattr(config, "layer_types", None) or []
    needed = next((n for n in range(1, len(kinds) + 1) if set(kinds[:n]) == set(kinds)), 0)
    return min(config.num_hidden_layers, max(3, needed))


# --- what it is tried on ----------------------------------------------------------------------------------------------


def _trial(tiny: PreTrainedModel, side: str) -> _Trial:
    """A padded batch with labels for the model's head, and a selection that holds what the head pools."""
    dtype = next(tiny.parameters()).dtype
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    if tiny.main_input_name == "pixel_values":
        vision = tiny.config
        batch = {"pixel_values": torch.randn(BATCH, vision.num_channels, *[vision.image_size] * 2, dtype=dtype)}
    else:
        start = 0 if side == "left" else LENGTH - PADDING
        mask[1, start : start + PADDING] = 0
        words = tiny.config.get_text_config().vocab_size
        batch = {"input_ids": torch.randint(1, words, mask.shape).masked_fill(mask == 0, 0), "attention_mask": mask}
    labels = _labels(tiny, mask)
    batch |= {"labels": labels} if labels is not None else {}

    kept = []
    handle = transformer_layers(tiny).layers[-1].register_forward_hook(lambda *call: kept.append(_hidden(call[2])))
    untouched, result = _forward(tiny, batch)
    handle.remove()
    length = kept[-1].shape[1]
    mask = mask if length == LENGTH else torch.ones(BATCH, length, dtype=torch.long)
    pooling = _pooling(result, kept[-1], mask)
    scores = torch.rand(BATCH, length).masked_fill(mask == 0, 2.0)
    if pooling is Pooling.FIRST:
        scores[:, 0] = -1.0
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
    if pooling is Pooling.LAST:
        scores[torch.arange(BATCH), last] = -1.0
    positions = scores.argsort(1)[:, :SELECTED].sort(1).values
    return _Trial(tiny, batch, side, positions, untouched.detach(), pooling)


def _labels(tiny: PreTrainedModel, mask: Tensor) -> Tensor | None:
    """Random labels of the kind that the head takes; None for a model without a head."""
    loss_type = "ForCausalLM" if tiny.can_generate() else tiny.loss_type
    if loss_type in ("ForCausalLM", "ForMaskedLM", "ForTokenClassification"):
        per_class = loss_type == "ForTokenClassification"
        classes = tiny.config.num_labels if per_class else tiny.config.get_text_config().vocab_size
        return torch.randint(0, classes, mask.shape).masked_fill(mask == 0, -100)
    if loss_type in ("ForSequenceClassification", "ForImageClassification"):
        return torch.randint(0, tiny.config.num_labels, mask.shape[:1])
    if loss_type is None or tiny.base_model is tiny:
        return None
    raise UnsupportedModelError(f"the head of {type(tiny).__name__} ({loss_type}) is not served")


def _hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _forward(tiny: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, Any]:
    result = tiny(**batch)
    return (result.logits if "labels" in batch else result.last_hidden_state), result


def _pooling(result: Any, hidden: Tensor, mask: Tensor) -> Pooling | None:
    """Which rows of the last layer's output `hidden` (B, S, D) the head for whole sequences depends on."""
    pooled = getattr(result, "pooler_output", None)
    if pooled is None and getattr(result, "logits", None) is not None and result.logits.ndim == 2:
        pooled = result.logits
    if pooled is None:
        return None
    weights = torch.linspace(-1, 1, pooled[0].numel(), dtype=pooled.dtype)
    (gradient,) = torch.autograd.grad((pooled.flatten(1) * weights).sum(), hidden, retain_graph=True)
    used = gradient.abs().sum(-1) > 0  # (B, S)
    last = torch.arange(mask.shape[1]) == mask.shape[1] - 1 - mask.flip(1).argmax(1, keepdim=True)
    for pooling, expected in (
        (Pooling.FIRST, torch.arange(mask.shape[1]).expand(mask.shape) == 0),
        (Pooling.LAST, last),
    ):
        if torch.equal(used, expected):
            return pooling
    return Pooling.ALL


# --- the comparison ---------------------------------------------------------------------------------------------------


def _compare(trial: _Trial, profile: Profile) -> None:
    """Raises UnsupportedModelError unless the patched model does what the definition says."""
    from tokentune.patching import Settings, install_hooks, remove_tokentune  # here: patching verifies in its turn

    tiny, positions = trial.tiny, trial.positions
    what = f"{type(tiny).__name__}, {trial.side} padding"
    defined_layers: list[Tensor] = []
    with (
        definition_of_the_method(tiny, positions, last_output=profile.rows is Rows.ALL),
        _recorded(tiny, defined_layers),
    ):
        defined, defined_gradients = _step(tiny, _selected_labels(trial), positions, profile)
    real = trial.batch.get("attention_mask", torch.ones(defined.shape[:2])).bool()
    per_token = defined.shape[:2] == real.shape and defined.ndim == 3
    seen = real if per_token else slice(None)
    _agree(defined[seen], trial.untouched[seen], f"{what}: outputs of its own attention function")

    install_hooks(tiny)
    tiny._tokentune = Settings(None, "random", profile)
    found_layers: list[Tensor] = []
    try:
        with _recorded(tiny, found_layers):
            found, gradients = _step(tiny, trial.batch | {"selected_positions": positions}, None, profile)
    except (RuntimeError, TypeError, AttributeError, IndexError, KeyError, AssertionError) as error:
        raise UnsupportedModelError(f"{what} fails on groups of tokens: {type(error).__name__}: {error}") from error
    finally:
        remove_tokentune(tiny)
    rows = torch.arange(BATCH)[:, None]
    if per_token:
        chosen = real[rows, positions]
        for index, (one, other) in enumerate(zip(found_layers[:-1], defined_layers[:-1], strict=True)):
            _agree(one[chosen], other[rows, positions][chosen], f"{what}: outputs of layer {index}")
    if per_token and profile.rows is not Rows.ALL:
        _agree(found[chosen], defined[rows, positions][chosen], f"{what}: outputs")
    else:
        _agree(found[seen], defined[seen], f"{what}: outputs")
    scale = max(gradient.abs().max() for gradient in defined_gradients.values())
    for name in defined_gradients.keys() | gradients.keys():
        if name not in gradients or name not in defined_gradients:
            raise UnsupportedModelError(f"{what}: only one of the two gives {name} a gradient")
        _agree(gradients[name], defined_gradients[name], f"{what}: gradient of {name}", 1e-3 * scale)


@contextmanager
def _recorded(model: PreTrainedModel, outputs: list[Tensor]) -> Iterator[None]:
    """Collects what each layer call returns: (B, S, D), or the selected rows (B, K, D) of a patched model."""

    def record(layer: nn.Module, args: tuple, output: Any) -> None:
        hidden = output if isinstance(output, TokenGroups) else _hidden(output)
        outputs.append((hidden.selected if isinstance(hidden, TokenGroups) else hidden).detach())

    handles = [layer.register_forward_hook(record) for layer in transformer_layers(model).layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _selected_labels(trial: _Trial) -> dict[str, Tensor]:
    labels = trial.batch.get("labels")
    if labels is None or labels.ndim == 1:
        return trial.batch
    masked = mask_unselected_labels(labels, trial.positions, causal=trial.tiny.can_generate())
    return trial.batch | {"labels": masked}


def _step(
    tiny: PreTrainedModel, batch: dict[str, Tensor], positions: Tensor | None, profile: Profile
) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and parameter gradients of one training step; without a head the loss is a fixed projection.

    `positions` are the rows that carry such a loss; None: all that come back.
    """
    tiny.zero_grad(set_to_none=True)
    output, result = _forward(tiny, batch)
    loss = result.loss if "labels" in batch else None
    if loss is None:
        rows = (
            output if positions is None or profile.rows is Rows.ALL else output[torch.arange(BATCH)[:, None], positions]
        )
        loss = (rows * torch.linspace(-1, 1, rows[0].numel(), dtype=rows.dtype).view(rows.shape[1:])).sum()
    loss.backward()
    return output.detach(), {n: p.grad for n, p in tiny.named_parameters() if p.grad is not None}


@contextmanager
def definition_of_the_method(model: PreTrainedModel, positions: Tensor, *, last_output: bool = False) -> Iterator[None]:
    """Within it, the unmodified model computes what the method is defined to compute for `positions` (B, K).

    `last_output`: the rest's rows of the last layer's output are constants too (for a head that looks at all rows).
    """
    own = _implementation(model)
    stack = transformer_layers(model)
    calls = 0

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

    def hold_output(layer: nn.Module, args: tuple, output: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls < stack.calls or not last_output:
            return None
        return (hold(output[0], 1), *output[1:]) if isinstance(output, tuple) else hold(output, 1)

    AttentionInterface.register(_DEFINITION, attention)
    AttentionMaskInterface.register(_DEFINITION, ALL_MASK_ATTENTION_FUNCTIONS[own])
    handles = [layer.register_forward_pre_hook(hold_input, with_kwargs=True) for layer in stack.layers]
    handles += [layer.register_forward_hook(hold_output) for layer in stack.layers]
    try:
        for config in stack.configs():
            config._attn_implementation_internal = _DEFINITION
        yield
    finally:
        for config in stack.configs():
            config._attn_implementation_internal = own
        for handle in handles:
            handle.remove()


def _agree(found: Tensor, expected: Tensor, what: str, floor: float | Tensor = 1e-9) -> None:
    error = (found - expected).abs().max() / expected.abs().max().clamp(min=floor)
    if not error <= TOLERANCE[found.dtype]:  # also where it is NaN
        raise UnsupportedModelError(f"{what} differ from the definition of the method by {error:.1e} (relative)")
