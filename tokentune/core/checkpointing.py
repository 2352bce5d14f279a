"""Selective checkpointing: keep what a layer was given, and recompute it for the selected tokens alone.

    B sequences, S tokens, K selected, R = S - K rest, D hidden size, G key-value heads, d head size

Gradient checkpointing keeps each layer's input, (B, S, D), and runs the whole layer again in the backward pass. Here
the forward pass of the rest has no gradients to recompute: the selected rows need of it only its keys and values. What
is kept of a layer is its input for the selected rows, (B, K, D), and of the rest one of

    keys_values     2 x (B, G, R, d): nothing of the rest is computed twice
    hidden_states   (B, R, D), its input of the layer, where that is smaller (no grouped heads): the layer's norm and
                    projections run again for the rest, up to the keys and values
    segments        (B, R, D) at the first of every √layers layers: the rest's pass is redone from there, through one
                    segment at a time, whose keys and values are held until its layers have their gradients

`auto` takes the smaller of the first two. All are exact, dropout included: a recomputation finds the random states that
the forward pass had. `torch.utils.checkpoint` does the recomputing. It is handed to the layers, in place of the
function that `gradient_checkpointing_enable` gave them, for the length of a selective forward.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from tokentune.core.compat.fsdp import gathered
from tokentune.core.groups import TokenGroups
from tokentune.core.layers import Stack
from tokentune.core.saved_tensors.offloading import HostMemory
from tokentune.core.selective_layer import join_key_values, run_unselected
from tokentune.core.step import UNSELECTED, LayerCall, PassDone, Step, activate, uncompiled
from tokentune.errors import UnsupportedModelError

CHECKPOINT_REST = ("auto", "keys_values", "hidden_states", "segments")
_FUNCTION = "_gradient_checkpointing_func"  # transformers' name for what a layer calls instead of its own forward


def checkpoint_layers(stack: Stack, step: Step, rest: str, offload_kv: bool) -> list[Callable[[], None]]:
    """Makes the layers on which gradient checkpointing is enabled use ours. Returns what undoes it, last first.

    Args:
        rest: one of `CHECKPOINT_REST`.
        offload_kv: keep the rest's part in the CPU's memory, where the model is on an accelerator.

    Raises:
        UnsupportedModelError: the model checkpoints more than single layers, or `segments` with other layers between.
    """
    for module in stack.around:
        if module.training and getattr(module, "gradient_checkpointing", False):
            own = isinstance(module, GradientCheckpointingLayer)
            if own or not all(isinstance(layer, GradientCheckpointingLayer) for layer in stack.layers):
                raise UnsupportedModelError(f"{type(module).__name__} checkpoints several layers at once")
    chosen = [layer for layer in stack.layers if layer.training and getattr(layer, "gradient_checkpointing", False)]
    if not chosen or not torch.is_grad_enabled():
        return []
    if rest == "segments" and len(chosen) < len(stack.layers):
        raise UnsupportedModelError("checkpoint_rest segments needs gradient checkpointing of every layer")
    if rest == "segments" and step.plan.all_rows_between_layers:
        raise UnsupportedModelError("checkpoint_rest segments runs layers again without the hooks that others put on")
    checkpointing = SelectiveCheckpointing(step, rest, offload_kv)
    undo: list[Callable[[], None]] = [step.forget_unselected]
    for layer in chosen:
        original = getattr(layer, _FUNCTION)
        undo.append(partial(setattr, layer, _FUNCTION, original))
        setattr(layer, _FUNCTION, partial(checkpointing.run, _keeps_inputs_on_cpu(original)))
    return undo


def _keeps_inputs_on_cpu(function: Callable) -> bool:
    """Whether the model's own checkpointing was enabled with transformers' `offload=True`."""
    code = getattr(getattr(function, "func", function), "__code__", None)
    return code is not None and save_on_cpu.__name__ in code.co_freevars + code.co_names


@dataclass
class _Layer:
    """What it takes to run one layer of the step again."""

    step: Step
    layer: nn.Module
    args: tuple  # of the layer's call, for all tokens, without the hidden states
    kwargs: dict[str, Any]
    function: Callable  # its own forward, for the selected rows: (hidden (B, K, D), *more_args)
    more_args: tuple
    states_before: list[Tensor]  # of the random generators
    states_after_unselected: list[Tensor] | None = None
    kept: tuple[Tensor, ...] | None = None  # of the rest, in the backward pass: from `_Keep`, until it was used

    def call(self, groups: TokenGroups | None, **options: Any) -> LayerCall:
        return LayerCall(self.layer, False, groups, self.args, self.kwargs, **options)


class SelectiveCheckpointing:
    """The checkpointing of one step's layers."""

    def __init__(self, step: Step, rest: str, offload_kv: bool):
        self.step = step
        self.rest = rest
        self.offload_kv = offload_kv
        self.host: HostMemory | None = None
        self.segment: _Segment | None = None

    @uncompiled
    def run(self, inputs_on_cpu: bool, function: Callable, hidden: Tensor, *more_args: Any) -> Any:
        """A layer's forward for the selected rows: `function(hidden (B, K, D), *more_args)`, recomputed later."""
        call = self.step.call
        if call.running == UNSELECTED or not torch.is_grad_enabled():
            return function(hidden, *more_args)
        layer = _Layer(
            *(self.step, call.layer, call.args, call.kwargs, function, more_args), states_before=random_states(hidden)
        )
        call.unselected_pass = partial(_run_unselected_and_note_states, layer, call.unselected_pass)
        replay = self._replay(layer, hidden, call)
        with save_on_cpu(pin_memory=hidden.device.type != "cpu") if inputs_on_cpu else nullcontext():
            contexts = partial(_contexts, layer, replay)
            output = checkpoint(function, hidden, *more_args, use_reentrant=False, context_fn=contexts)
            return self._keep(output, layer, call)

    def _replay(self, layer: _Layer, hidden: Tensor, call: LayerCall) -> Callable[[_Layer], LayerCall]:
        """How the layer's call is to be set up when it is recomputed: what stands in for the rest's pass."""
        if self.rest != "segments":
            return _from_kept
        if self.segment is None or self.segment.full:
            self.segment = _Segment(math.ceil(math.sqrt(self.step.expected_calls)), call.groups.unselected)
        return partial(_from_segment, self.segment, self.segment.add(layer, hidden))

    def _keep(self, output: Any, layer: _Layer, call: LayerCall) -> Any:
        """The layer's output, tied to what is kept of the rest for the layer's recomputation."""
        if call.unselected_kv is None:  # every token is selected
            return output
        if self.rest == "segments":
            if not (call.last or self.segment.full):
                return output
            holder, tensors = self.segment, self.segment.close()
        else:
            holder, tensors = layer, self._smaller(call)
        selected, *others = output if isinstance(output, tuple) else (output,)
        with self._offloading(selected):
            selected = _Keep.apply(selected, holder, *tensors)
        return (selected, *others) if isinstance(output, tuple) else selected

    def _smaller(self, call: LayerCall) -> tuple[Tensor, ...]:
        keys_values, hidden_states = call.unselected_kv, (call.groups.unselected,)
        looked = self.step.plan.cached_kv is not None  # whose hidden states nobody has
        if (
            self.rest == "keys_values"
            or looked
            or (self.rest == "auto" and _bytes(keys_values) <= _bytes(hidden_states))
        ):
            return tuple(map(_alone, keys_values))
        return tuple(map(_alone, hidden_states))

    def _offloading(self, selected: Tensor) -> Any:
        if not self.offload_kv or selected.device.type == "cpu":
            return nullcontext()
        if self.host is None:
            self.host = HostMemory(selected.device)
        return saved_tensors_hooks(self.host.store, self.host.fetch)


# ---------------------------------------------------------------------------------------------------- recomputing


class _Keep(torch.autograd.Function):
    """The identity, which keeps tensors for what runs next in the backward pass: `holder.kept` gets them there.

    Saved by autograd, they live as long as the graph, count as saved, and pass through
    hooks that move saved tensors.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, holder: Any, *tensors: Tensor) -> Tensor:
        ctx.holder = holder
        ctx.save_for_backward(*tensors)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        ctx.holder.kept = ctx.saved_tensors
        return gradient, None, *(None for _ in ctx.saved_tensors)


class _Replay:
    """The context of a recomputation: the step is under way again, at this layer. Entered once per backward pass."""

    def __init__(self, layer: _Layer, make_call: Callable[[_Layer], LayerCall]):
        self.layer = layer
        self.make_call = make_call
        self.undo: list[Callable[[], None]] = []

    def __enter__(self) -> None:
        self.undo = activate(self.layer.step)
        self.layer.step.call = self.make_call(self.layer)

    def __exit__(self, *_: Any) -> None:
        self.layer.step.call = None
        while self.undo:
            self.undo.pop()()


def _contexts(layer: _Layer, replay: Callable[[_Layer], LayerCall]) -> tuple[Any, _Replay]:
    return nullcontext(), _Replay(layer, replay)


def _run_unselected_and_note_states(layer: _Layer, unselected_pass: Callable, step: Step, call: LayerCall) -> None:
    """The rest's pass of the forward pass; its recomputations go on with the random numbers that come after it."""
    unselected_pass(step, call)
    layer.states_after_unselected = random_states(call.joined_kv[0])


def _from_kept(layer: _Layer) -> LayerCall:
    """Selected rows over the rest's keys and values as they were kept, or as its kept hidden states give them."""
    kept, layer.kept = layer.kept, None
    groups = TokenGroups(None, kept[0]) if kept is not None and len(kept) == 1 else None

    def unselected_pass(step: Step, call: LayerCall) -> None:
        if groups is None:
            call.unselected_kv = kept
            join_key_values(step, call)
        else:
            run_unselected(step, call)
        set_random_states(layer.states_after_unselected, call.joined_kv[0])

    return layer.call(groups, with_gradients=True, unselected_pass=unselected_pass, unselected_ends_early=True)


@dataclass
class _Segment:
    """Some layers in a row, through which the rest's forward pass is redone at once."""

    length: int
    first_input: Tensor | None  # (B, R, D), until it is kept by autograd
    layers: list[_Layer] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)  # (B, K, D) each, likewise
    kept: tuple[Tensor, ...] | None = None  # in the backward pass, from `_Keep`: the rest's input, the selected rows'
    keys_values: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def full(self) -> bool:
        return len(self.layers) == self.length

    def add(self, layer: _Layer, hidden: Tensor) -> int:
        self.layers.append(layer)
        self.inputs.append(hidden.detach())
        return len(self.layers) - 1

    def close(self) -> tuple[Tensor, ...]:
        """What is to be kept of the whole segment."""
        tensors = (_alone(self.first_input), *self.inputs)
        self.first_input, self.inputs = None, []
        return tensors

    def take(self, index: int, step: Step) -> tuple[Tensor, Tensor]:
        """The rest's keys and values of one layer; the first time, made for all layers of the segment."""
        if self.kept is not None:
            (rest, *inputs), self.kept = self.kept, None
            under_way = step.call
            with torch.no_grad():
                for number, (layer, hidden) in enumerate(zip(self.layers, inputs, strict=True)):
                    rest = self._redo(number, layer, hidden, rest)
            step.call = under_way
        return self.keys_values.pop(index)

    def _redo(self, number: int, layer: _Layer, hidden: Tensor, rest: Tensor) -> Tensor | None:
        """The rest's pass through one layer, which needs the selected rows' keys and values. Returns (B, R, D)."""

        def unselected_pass(step: Step, call: LayerCall) -> None:
            run_unselected(step, call)
            raise PassDone  # of the selected rows nothing else is needed

        last = number == len(self.layers) - 1
        call = layer.call(
            TokenGroups(hidden, rest), with_gradients=False, unselected_pass=unselected_pass, unselected_ends_early=last
        )
        layer.step.call = call
        set_random_states(layer.states_before, hidden)
        # Of the segment's layers FSDP has the last one's weights whole now, whose turn it is.
        with suppress(PassDone), gathered(layer.layer, stays=last):
            layer.function(hidden, *layer.more_args)
        self.keys_values[number] = tuple(map(_alone, call.unselected_kv))
        return call.unselected_output


def _from_segment(segment: _Segment, index: int, layer: _Layer) -> LayerCall:
    def unselected_pass(step: Step, call: LayerCall) -> None:
        call.unselected_kv = segment.take(index, step)
        join_key_values(step, call)
        set_random_states(layer.states_after_unselected, call.joined_kv[0])

    return layer.call(None, with_gradients=True, unselected_pass=unselected_pass)


# ---------------------------------------------------------------------------------------------------- small things


def random_states(tensor: Tensor) -> list[Tensor]:
    """The states of the generators that work on this tensor's device may draw from: the CPU's and the device's."""
    states = [torch.get_rng_state()]
    device = getattr(torch, tensor.device.type)
    if getattr(device, "_initialized", False):
        states.append(device.get_rng_state(tensor.device))
    return states


def set_random_states(states: list[Tensor], tensor: Tensor) -> None:
    """Puts back what `random_states` returned."""
    torch.set_rng_state(states[0])
    for state in states[1:]:
        getattr(torch, tensor.device.type).set_rng_state(state, tensor.device)


def _alone(tensor: Tensor) -> Tensor:
    """The tensor without whatever else its storage holds: kept, a slice of a fused projection would keep it all."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _bytes(tensors: tuple[Tensor, ...]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
