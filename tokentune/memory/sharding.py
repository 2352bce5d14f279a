"""What one of several GPUs holds and sends: the footprint of one device, shared out as DDP, ZeRO-2 and FSDP2 do it.

    N processes, A micro-batches per step; bytes of W weights, G gradients, O optimizer states on one device

| | weights | gradients | optimizer | sent per step, by each process |
|---|---|---|---|---|
| ddp | W | 2 G (DDP's buckets are a copy) | O | 2 (N - 1) / N * G |
| zero2 | W | G / N | O / N | (N - 1) / N * (A G + W') |
| fsdp | W / N | G / N | O / N | A (N - 1) / N * (2 W' + G) |

W' are the weights in the type of the matrix products; FSDP gathers those of the output head once, not twice. What is
sent is that of ring collectives: N - 1 of N parts for a gather or a reduce-scatter, twice that for an all-reduce
(ZeRO: Rajbhandari et al., SC 2020, section 7; FSDP: Zhao et al., VLDB 2023). FSDP splits the first dimension of each
weight into equal parts, with padding: of a matrix with 8 rows each of 64 processes holds one. While layers compute,
whole weights are there too: two layers and the buffer of a third (the next one is gathered ahead), the head, and in
the backward pass the gradients of the largest unit with the buffer that they are added up in.

Activations are those of one device. In mixed precision FSDP and ZeRO compute in 16 bits throughout: no layer keeps a
cast copy of its weights, and hidden states are in 16 bits.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn

from tokentune.core.layers import inner_model, transformer_layers
from tokentune.errors import UserError
from tokentune.memory.accounting import GRADIENTS, OPTIMIZER, REST, WEIGHTS, Footprint, LiveBytes
from tokentune.models.builder import autocast_dtype
from tokentune.settings.finetune import Arguments

NAMES = {"ddp": "DDP", "zero2": "ZeRO-2", "fsdp": "FSDP"}
BUCKET_ELEMENTS = 500_000_000  # DeepSpeed's reduce_bucket_size


@dataclass
class _Unit:
    """Bytes of weights that FSDP gathers together.

    Attributes:
        share, trained_share: of the process that holds most.
        whole: in the type of the matrix products.
        gradients: whole, in that type.
        reduced: whole, in the type that gradients are added up in.
    """

    share: int = 0
    trained_share: int = 0
    whole: int = 0
    gradients: int = 0
    reduced: int = 0


class Sharing:
    """How an engine shares the training of a model out; made before the model is cast to `dtype`.

    Attributes:
        dtype: the type that the engine computes in throughout; None: as on one device.
    """

    def __init__(self, model: nn.Module, arguments: Arguments, processes: int, engine: str):
        """`engine`: one of `NAMES`. Raises UserError: what it cannot serve."""
        if engine == "fsdp" and arguments.adapters.qlora:
            raise UserError("FSDP leaves 4-bit weights whole: take --sharding ddp")
        self.arguments, self.processes, self.engine = arguments, processes, engine
        compute = autocast_dtype(arguments)
        self.dtype = None if engine == "ddp" else compute
        self.trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        self.units = _units(model, processes, compute) if engine == "fsdp" else None

    def footprint(self, one: Footprint, live: LiveBytes) -> Footprint:
        """What one process holds and sends. `one`, `live`: the step on one device, and what counted its bytes."""
        share, gathered, reduced = {"ddp": self._ddp, "zero2": self._zero2, "fsdp": self._fsdp}[self.engine](one)
        gradients = share.gradients / max(1, one.gradients)

        def change(phase: str, sizes: dict[str, int]) -> dict[str, int]:
            factors, moment = {GRADIENTS: gradients}, gathered + (reduced if phase == "backward" else 0)
            if phase == "optimizer":
                # The update's temporaries are made of gradients and states: in parts where those are, in their type.
                factors[REST] = 1.0 if self.engine == "ddp" else 1 / self.processes
                factors[REST] *= gradients * self.processes if self.engine == "fsdp" else 1.0
                moment = 0
            changed = {kind: round(size * factors.get(kind, 1.0)) for kind, size in sizes.items()}
            return changed | {WEIGHTS: share.weights, OPTIMIZER: share.optimizer, "engine": moment}

        phase, at_peak = live.highest(change)
        return replace(share, peak=sum(at_peak.values()), peak_phase=phase, at_peak=at_peak)

    # One process's share (its peak is that of one device), and bytes that are there for a moment: whole weights, and
    # gradients on their way.

    def _ddp(self, one: Footprint) -> tuple[Footprint, int, int]:
        return replace(one, gradients=2 * one.gradients, sent=round(2 * self._ring * one.gradients)), 0, 0

    def _zero2(self, one: Footprint) -> tuple[Footprint, int, int]:
        """In mixed precision DeepSpeed has 16-bit weights, and float32 masters of them with the optimizer's parts."""
        states, trained = one.optimizer, self.trained
        if self.dtype is not None:
            states = one.optimizer / max(1, one.gradients) * 4 * trained + 4 * trained
        share = replace(
            one,
            gradients=math.ceil(one.gradients / self.processes),
            optimizer=math.ceil(states / self.processes),
            sent=round(self._ring * (self._micro_batches + 1) * one.gradients),
        )
        return share, 0, 2 * min(BUCKET_ELEMENTS, trained) * (4 if self.dtype is None else 2)  # two buckets, in turns

    def _fsdp(self, one: Footprint) -> tuple[Footprint, int, int]:
        layers, embeddings, head, others = self.units
        units = [*layers, embeddings, head, others]
        gradients = sum(unit.trained_share for unit in units)
        memory = self.arguments.memory
        passes = 3 if memory.gradient_checkpointing and memory.checkpoint_rest == "segments" else 2
        gathers = passes * sum(unit.whole for unit in units if unit is not head) + head.whole
        share = replace(
            one,
            weights=sum(unit.share for unit in units),
            gradients=gradients,
            optimizer=round(one.optimizer / max(1, one.gradients) * gradients),  # in proportion, in whatever type
            sent=round(self._ring * self._micro_batches * (gathers + sum(unit.reduced for unit in units))),
        )
        ahead = 3 if self.processes > 1 else 1
        gathered = head.whole + others.whole + ahead * max(unit.whole for unit in layers)
        return share, gathered, max(unit.gradients + unit.reduced for unit in units)

    @property
    def _ring(self) -> float:
        return (self.processes - 1) / self.processes

    @property
    def _micro_batches(self) -> int:
        return self.arguments.optimization.accumulation


def _units(model: nn.Module, processes: int, compute: torch.dtype | None) -> tuple[list[_Unit], _Unit, _Unit, _Unit]:
    """FSDP's units as accelerate makes them: each layer, the embeddings, the head, and all other weights."""
    core = inner_model(model)
    output = core.get_output_embeddings()
    head = [] if output is None else [*output.parameters()]
    parts = [[*layer.parameters()] for layer in transformer_layers(core).layers]
    parts += [[p for p in core.get_input_embeddings().parameters() if not any(p is tied for tied in head)], head]
    seen = {id(parameter) for parameters in parts for parameter in parameters}
    parts.append([parameter for parameter in model.parameters() if id(parameter) not in seen])
    *layers, embeddings, head, others = (_unit(parameters, processes, compute) for parameters in parts)
    return layers, embeddings, head, others


def _unit(parameters: Iterable[nn.Parameter], processes: int, compute: torch.dtype | None) -> _Unit:
    unit = _Unit()
    for parameter in parameters:
        count, rows = parameter.numel(), parameter.shape[0] if parameter.ndim else 1
        held = 4 if compute is not None and parameter.requires_grad else parameter.dtype.itemsize
        share = math.ceil(rows / processes) * (count // rows) * held
        computed = (compute or parameter.dtype).itemsize
        unit.share += share
        unit.whole += count * computed
        if parameter.requires_grad:
            unit.trained_share += share
            unit.gradients += count * computed
            unit.reduced += count * held
    return unit
