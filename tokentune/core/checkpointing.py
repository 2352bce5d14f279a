"""Selective checkpointing: each layer's input is saved, and the layer is recomputed for the selected tokens alone.

    B sequences, S tokens, K selected, R = S - K unselected, D hidden size, G key-value heads, d head size

Gradient checkpointing saves each layer's input, (B, S, D), and runs the whole layer again in the backward pass. Here
the pass of the unselected tokens has no gradients to recompute: the selected tokens need only its keys and values. What
is saved of a layer is its input for the selected rows, (B, K, D), and of the unselected tokens one of

    keys_values     2 x (B, G, R, d): nothing of them is computed twice
    hidden_states   (B, R, D), their input of the layer, where that is smaller (no grouped heads): the norm and the
                    projections run again for them, up to the keys and values
    segments        (B, R, D) at the first of every n layers: their pass is computed again from there, through one
                    segment at a time, of whose layers the smaller of the two above is held until they have their
                    gradients; n makes what is saved and what is held smallest together

`auto` takes segments where they at least halve what the others keep, the smaller of the two otherwise: in deep models
without grouped heads that select few tokens. There the second pass of the unselected tokens adds about 2 (1 - r) to the
2 + 6 r units of a step (r the selected share; ordinary checkpointing: 8). Weights that are split over processes are
gathered once more for it, and offloading leaves nothing to save: there `auto` never takes it.

All are exact, with dropout too: a recomputation starts from the states that the random generators had in the forward
pass. `torch.utils.checkpoint` does the recomputing. During a selective forward the layers call it in place of the
function that `gradient_checkpointing_enable` gave them.
"""

import math
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from tokentune.core.compat.fsdp import gathered, runs_together
from tokentune.core.groups import TokenGroups
from tokentune.core.layers import Stack, is_checkpointed
from tokentune.core.saved_tensors.offloading import HostMemory
from tokentune.core.saved_tensors.saved_bytes import in_own_storage
from tokentune.core.selective_layer import join_key_values, run_unselected
from tokentune.core.step import UNSELECTED, LayerCall, PassDone, Step, activate, uncompiled
from tokentune.core.temporary import set_until_undone
from tokentune.errors import UnsupportedModelError

CHECKPOINT_REST = ("auto", "keys_values", "hidden_states", "segments")
SMALLER = "smaller"  # of keys_values and hidden_states: what `auto` is where it cannot be segments
_FUNCTION = "_gradient_checkpointing_func"  # transformers' name for what a layer calls instead of its own forward


def checkpoint_layers(stack: Stack, step: Step, choice: str, offload_kv: bool, undo: ExitStack) -> None:
    """Makes the layers on which gradient checkpointing is enabled use ours, until `undo` is closed.

    Args:
        choice: one of `CHECKPOINT_REST`.
        offload_kv: save the part of the unselected tokens in the CPU's memory, where the model is on an accelerator.

    Raises UnsupportedModelError where the model checkpoints more than single layers, or `segments` with others between.
    """
    for module in stack.around:
        if is_checkpointed(module):
            own = isinstance(module, GradientCheckpointingLayer)
            if own or not all(isinstance(layer, GradientCheckpointingLayer) for layer in stack.layers):
                raise UnsupportedModelError(f"{type(module).__name__} checkpoints several layers at once")
    chosen = [layer for layer in stack.layers if is_checkpointed(layer)]
    if not chosen or not torch.is_grad_enabled():
        return
    if choice == "segments" and len(chosen) < len(stack.layers):
        raise UnsupportedModelError("checkpoint_rest segments needs gradient checkpointing of every layer")
    if choice == "segments" and step.plan.all_rows_between_layers:
        raise UnsupportedModelError("checkpoint_rest segments runs layers again without the hooks that others put on")
    if choice == "auto":
        on_cpu = offload_kv or any(_keeps_inputs_on_cpu(getattr(layer, _FUNCTION)) for layer in chosen)
        served = len(chosen) == len(stack.layers) and not step.plan.all_rows_between_layers
        if on_cpu or not served or step.plan.cached_kv is not None or runs_together(chosen[0]):
            choice = SMALLER
    checkpointing = SelectiveCheckpointing(step, choice, offload_kv)
    undo.callback(step.forget_unselected)
    for layer in chosen:
        inputs_on_cpu = _keeps_inputs_on_cpu(getattr(layer, _FUNCTION))
        set_until_undone(undo, layer, _FUNCTION, partial(checkpointing.run, inputs_on_cpu))
        if "__call__" in vars(GradientCheckpointingLayer):
            # transformers below 5.23 checkpoints a layer's call with its hooks: the forward alone, as later ones do
            set_until_undone(undo, layer, "gradient_checkpointing", False)
            set_until_undone(undo, layer, "forward", _checkpointed_forward(layer))


def _checkpointed_forward(layer: GradientCheckpointingLayer) -> Callable:
    forward = layer.forward

    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        return getattr(layer, _FUNCTION)(partial(forward, **kwargs), *args)

    return checkpointed


def _keeps_inputs_on_cpu(function: Callable) -> bool:
    """Whether the model's own checkpointing was enabled with transformers' `offload=True`."""
    code = getattr(getattr(function, "func", function), "__code__", None)
    return code is not None and save_on_cpu.__name__ in code.co_freevars + code.co_names


@dataclass
class _Layer:
    """What is needed to run one layer of the step again."""

    step: Step
    call: LayerCall  # as it was before anything ran, without the hidden states
    function: Callable  # its own forward, for the selected rows: (hidden (B, K, D), *more_args)
    more_args: tuple
    states_before: list[Tensor]  # of the random generators
    states_after_unselected: list[Tensor] | None = None
    saved: tuple[Tensor, ...] | None = None  # of the unselected tokens: set by `_Save` in the backward pass, until used

    def run_unselected(self, unselected_pass: Callable, step: Step, call: LayerCall) -> None:
        """The unselected tokens' pass. Recomputations, which skip it, go on with the random numbers after it."""
        unselected_pass(step, call)
        self.states_after_unselected = random_states(call.joined_kv[0])


@dataclass
class SelectiveCheckpointing:
    """The checkpointing of one step's layers."""

    step: Step
    choice: str  # one of `CHECKPOINT_REST`, or SMALLER
    offload_kv: bool
    host: HostMemory | None = None
    segment: "_Segment | None" = None
    layers_per_segment: int | None = None  # known once the first layer ran

    @uncompiled
    def run(self, inputs_on_cpu: bool, function: Callable, hidden: Tensor, *more_args: Any) -> Any:
        """A layer's forward for the selected rows: `function(hidden (B, K, D), *more_args)`, recomputed later."""
        call = self.step.call
        if call.running == UNSELECTED or not torch.is_grad_enabled():
            return function(hidden, *more_args)
        bare_call = replace(call, last=False, groups=None)
        layer = _Layer(self.step, bare_call, function, more_args, random_states(hidden))
        call.unselected_pass = partial(layer.run_unselected, call.unselected_pass)
        replay = _Replay(layer)
        if self.choice in ("auto", "segments") and call.groups.unselected.shape[1] > 0:
            if self.segment is None or self.segment.full:
                self.segment = _Segment(self.layers_per_segment, call.groups.unselected)
            replay.segment, replay.index = self.segment, self.segment.add(layer, hidden)
        with save_on_cpu(pin_memory=hidden.device.type != "cpu") if inputs_on_cpu else nullcontext():
            options = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), replay)}
            output = checkpoint(function, hidden, *more_args, **options)
            if self.layers_per_segment is None and call.unselected_kv is not None:
                self._plan(call, hidden, replay)
            return self._save(output, layer, call)

    def _plan(self, call: LayerCall, hidden: Tensor, replay: "_Replay") -> None:
        """After the first layer, which shows how large keys and values are: whether there are segments, how long."""
        sizes = hidden.nbytes, call.groups.unselected.nbytes, sum(tensor.nbytes for tensor in call.unselected_kv)
        self.layers_per_segment, worthwhile = plan_segments(self.step.expected_calls, *sizes)
        if self.choice == "auto" and not worthwhile:
            self.choice = SMALLER
        if self.choice in ("auto", "segments"):
            self.segment.length = self.layers_per_segment
        else:
            self.segment = replay.segment = None

    def _save(self, output: Any, layer: _Layer, call: LayerCall) -> Any:
        """The layer's output, tied to what is saved of the unselected tokens for the layer's recomputation."""
        if call.unselected_kv is None:  # every token is selected
            return output
        if self.segment is not None:
            if not (call.last or self.segment.full):
                return output
            holder, tensors = self.segment, self.segment.close()
        else:
            holder, tensors = layer, tuple(map(in_own_storage, self._smaller(call)))
        selected, *others = output if isinstance(output, tuple) else (output,)
        with self._offloading(selected):
            selected = _Save.apply(selected, holder, *tensors)
        return (selected, *others) if isinstance(output, tuple) else selected

    def _smaller(self, call: LayerCall) -> tuple[Tensor, ...]:
        if self.choice == "keys_values" or self.step.plan.cached_kv is not None:  # cached: there are no hidden states
            return call.unselected_kv
        hidden_states = call.groups.unselected
        return (hidden_states,) if self.choice == "hidden_states" else smaller_of(hidden_states, call.unselected_kv)

    def _offloading(self, selected: Tensor) -> Any:
        if not self.offload_kv or selected.device.type == "cpu":
            return nullcontext()
        if self.host is None:
            self.host = HostMemory(selected.device)
        return saved_tensors_hooks(self.host.store, self.host.fetch)


def plan_segments(layers: int, selected: float, unselected: float, keys_values: float) -> tuple[int, bool]:
    """How many layers a segment has, and whether segments at least halve what is kept.

    For L layers, saved in the forward pass and held in the backward pass, where a is a layer's selected input, b its
    unselected one, c the unselected keys and values (all in bytes, or in another unit):

        segments    L a + ceil(L / n) b + n min(b, c)       the least of it over n; the largest n of several
        otherwise   L a + L min(b, c)
    """
    smaller = min(unselected, keys_values)

    def kept(n: int) -> float:
        return layers * selected + math.ceil(layers / n) * unselected + n * smaller

    best = min(range(layers, 0, -1), key=kept)
    return best, 2 * kept(best) <= layers * (selected + smaller)


def smaller_of(hidden_states: Tensor, keys_values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What a layer can be recomputed from with the fewest bytes: (B, R, D), or 2 x (B, G, R, d)."""
    larger = sum(tensor.nbytes for tensor in keys_values) > hidden_states.nbytes
    return (hidden_states,) if larger else keys_values


# ---------------------------------------------------------------------------------------------------- recomputing


class _Save(torch.autograd.Function):
    """The identity. It saves tensors for what runs next in the backward pass, which finds them in `holder.saved`.

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
        ctx.holder.saved = ctx.saved_tensors
        return gradient, None, *(None for _ in ctx.saved_tensors)


class _Replay(ExitStack):
    """The context of a recomputation: the step is under way again, at this layer. Entered once per backward pass."""

    def __init__(self, layer: _Layer):
        super().__init__()
        self.layer = layer
        self.segment: _Segment | None = None  # where there is one, it makes them
        self.index = 0  # of the layer in it

    def __enter__(self) -> None:
        """Instead of the unselected tokens' pass, their keys and values are those saved, or are made again."""
        layer, step = self.layer, self.layer.step
        activate(step, self)
        self.callback(setattr, step, "call", None)
        saved, layer.saved = layer.saved, None
        if self.segment is not None:
            saved = self.segment.take(self.index)
            set_random_states(layer.states_before, saved[0])
        hidden_states = TokenGroups(None, saved[0]) if saved is not None and len(saved) == 1 else None

        def unselected_pass(step: Step, call: LayerCall) -> None:
            if hidden_states is not None:
                run_unselected(step, call)
            else:
                call.unselected_kv = saved
                join_key_values(step, call)
            set_random_states(layer.states_after_unselected, call.joined_kv[0])

        options = {"with_gradients": True, "unselected_ends_early": True}
        step.call = replace(layer.call, groups=hidden_states, unselected_pass=unselected_pass, **options)


@dataclass
class _Segment:
    """Consecutive layers, through which the unselected tokens' pass is recomputed at once."""

    length: int | None  # in layers; None: `SelectiveCheckpointing._plan` says it after the first
    first_input: Tensor | None  # (B, R, D), until autograd saves it
    layers: list[_Layer] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)  # (B, K, D) each, likewise
    saved: tuple[Tensor, ...] | None = None  # set by `_Save` in the backward pass: unselected input, selected inputs
    held: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)  # of each layer not recomputed yet: `smaller_of`

    @property
    def full(self) -> bool:
        return len(self.layers) == self.length

    def add(self, layer: _Layer, hidden: Tensor) -> int:
        self.layers.append(layer)
        self.inputs.append(hidden.detach())
        return len(self.layers) - 1

    def close(self) -> tuple[Tensor, ...]:
        """What is to be saved of the whole segment."""
        tensors = (in_own_storage(self.first_input), *self.inputs)
        self.first_input, self.inputs = None, []
        return tensors

    def take(self, index: int) -> tuple[Tensor, ...]:
        """What one layer is recomputed from, of unselected tokens. The first call makes it for the whole segment."""
        if self.saved is not None:
            (unselected, *inputs), self.saved = self.saved, None
            with torch.no_grad():
                for number, (layer, hidden) in enumerate(zip(self.layers, inputs, strict=True)):
                    unselected = self._redo(number, layer, hidden, unselected)
        return self.held.pop(index)

    def _redo(self, number: int, layer: _Layer, hidden: Tensor, unselected: Tensor) -> Tensor | None:
        """The unselected tokens' pass through one layer, within the selected tokens' one. Returns (B, R, D)."""

        def unselected_pass(step: Step, call: LayerCall) -> None:
            run_unselected(step, call)
            raise PassDone  # nothing else is needed of the selected rows

        last = number == len(self.layers) - 1
        options = {"with_gradients": False, "unselected_ends_early": last}
        groups = TokenGroups(hidden, unselected)
        call = layer.step.call = replace(layer.call, groups=groups, unselected_pass=unselected_pass, **options)
        set_random_states(layer.states_before, hidden)
        # FSDP has gathered the weights of the segment's last layer now, and of no other.
        with suppress(PassDone), gathered(layer.call.layer, stays=last):
            layer.function(hidden, *layer.more_args)
        self.held[number] = tuple(map(in_own_storage, smaller_of(unselected, call.unselected_kv)))
        return call.unselected_output


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
