"""What one of several GPUs holds and sends: the footprint of one device, shared out as DDP, ZeRO-2 and FSDP2 do it.

    N processes, A micro-batches per step; bytes of W weights, G gradients, O optimizer states on one device

| | weights | gradients | optimizer | sent per step, by each process |
|---|---|---|---|---|
| ddp | W | 2 G (DDP's buckets are a copy) | O | 2 (N - 1) / N * G |
| zero2 | W | G / N | O / N | (N - 1) / N * (A G + W') |
| fsdp | W / N | G / N | O / N | A (N - 1) / N * (2 W' + G) |

W' are the weights in the type that is computed in; of FSDP those of the output head are gathered once, not twice. What
is sent is that of ring collectives: N - 1 of N parts for a gather or a reduction to parts, twice that for one to all
(ZeRO: Rajbhandari et al., SC 2020, section 7; FSDP: Zhao et al., VLDB 2023). FSDP splits the first dimension of each
weight, in equal parts that are filled up: of a matrix with 8 rows each of 64 processes holds one. While layers compute
it has besides, whole: two layers and the buffer of a third (the next one is gathered ahead), the head, and in the
backward pass the largest unit's gradients with the buffer that they are added up in.

Activations are those of one device. In mixed precision FSDP and ZeRO compute in 16 bits throughout: no layer keeps a
cast copy of its weights, and hidden states are in 16 bits.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig

from tokentune.core.layers import inner_model, transformer_layers
from tokentune.core.profile import Profile
from tokentune.errors import UserError
from tokentune.memory.accounting import REST, LiveBytes
from tokentune.memory.footprint import GRADIENTS, OPTIMIZER, WEIGHTS, Footprint, measure, skeleton
from tokentune.models.builder import autocast_dtype
from tokentune.models.tasks import CAUSAL_LM, Head
from tokentune.settings.finetune import Arguments

_NAMES = {"ddp": "DDP", "zero2": "ZeRO-2", "fsdp": "FSDP"}
SHARDINGS = tuple(_NAMES)
BUCKET_ELEMENTS = 500_000_000  # DeepSpeed's reduce_bucket_size


@dataclass
class Shares:
    """Bytes of one process of several, beside its activations.

    Attributes:
        weights, gradients, optimizer: while nothing computes.
        gathered, reduced: whole weights, and gradients on their way, that are there for a moment.
        sent: in an optimizer step.
    """

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    reduced: int
    sent: int


@dataclass
class _Unit:
    """Weights that FSDP gathers together. Bytes.

    Attributes:
        share, trained_share: of the process that holds most.
        whole: in the type that is computed in.
        gradients: whole, in that type.
        reduced: whole, in the type that gradients are added up in.
    """

    share: int = 0
    trained_share: int = 0
    whole: int = 0
    gradients: int = 0
    reduced: int = 0


def measure_share(
    config: PreTrainedConfig,
    arguments: Arguments,
    shape: tuple[int, int],
    *,
    processes: int,
    sharding: str,
    device: str = "cuda",
    head: Head = CAUSAL_LM,
    profile: Profile | None = None,
) -> Footprint:
    """`footprint.measure`, of one of several processes.

    Args:
        shape: (B, S) of one process's micro-batch.
        sharding: one of `SHARDINGS`.

    Raises:
        UserError: what the engine cannot serve.
    """
    if sharding == "fsdp" and arguments.adapters.qlora:
        raise UserError("FSDP leaves 4-bit weights whole: take --sharding ddp")
    model = skeleton(config, arguments, head, profile)
    alive: list[LiveBytes] = []
    one = measure(
        config,
        arguments,
        shape,
        device=device,
        head=head,
        profile=profile,
        all_in=None if sharding == "ddp" else autocast_dtype(arguments),
        inspect=alive.append,
    )
    shares = shares_of(model, one, arguments, processes, sharding)
    phase, at_peak = _peak(alive[0], shares, one, processes, sharding)
    return Footprint(
        weights=shares.weights,
        gradients=shares.gradients,
        optimizer=shares.optimizer,
        activations=one.activations,
        peak=sum(at_peak.values()),
        peak_phase=phase,
        at_peak=at_peak,
        activations_by=one.activations_by,
        host=one.host,
        sent=shares.sent,
    )


def shares_of(model: nn.Module, one: Footprint, arguments: Arguments, processes: int, sharding: str) -> Shares:
    """How a model's weights, gradients and optimizer states are shared out.

    Args:
        model: on any device, with its adapters.
        one: its footprint on one device.
    """
    shares = {"ddp": _of_ddp, "zero2": _of_zero2, "fsdp": _of_fsdp}[sharding]
    return shares(model, one, arguments, processes)


def _of_ddp(model: nn.Module, one: Footprint, arguments: Arguments, processes: int) -> Shares:
    sent = 2 * (processes - 1) / processes * one.gradients
    return Shares(one.weights, 2 * one.gradients, one.optimizer, 0, 0, round(sent))


def _of_zero2(model: nn.Module, one: Footprint, arguments: Arguments, processes: int) -> Shares:
    """In mixed precision DeepSpeed has 16-bit weights, and float32 masters of them with the optimizer's parts."""
    mixed = autocast_dtype(arguments) is not None
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    states = one.optimizer / max(1, one.gradients) * 4 * trained if mixed else one.optimizer
    rounds = arguments.optimization.gradient_accumulation_steps
    return Shares(
        weights=one.weights,
        gradients=math.ceil(one.gradients / processes),
        optimizer=math.ceil((states + (4 * trained if mixed else 0)) / processes),
        gathered=0,
        reduced=2 * min(BUCKET_ELEMENTS, trained) * (2 if mixed else 4),  # two buckets, in turns
        sent=round((processes - 1) / processes * (rounds + 1) * one.gradients),
    )


def _of_fsdp(model: nn.Module, one: Footprint, arguments: Arguments, processes: int) -> Shares:
    layers, embeddings, head, others = _units(model, processes, autocast_dtype(arguments))
    units = [*layers, embeddings, head, others]
    gradients = sum(unit.trained_share for unit in units)
    states = one.optimizer / max(1, one.gradients)  # of both, bytes per byte, whatever type they are in
    segments = arguments.memory.gradient_checkpointing and arguments.memory.checkpoint_rest == "segments"
    gathers = (3 if segments else 2) * sum(unit.whole for unit in units if unit is not head) + head.whole
    rounds = arguments.optimization.gradient_accumulation_steps
    ahead = 3 if processes > 1 else 1
    return Shares(
        weights=sum(unit.share for unit in units),
        gradients=gradients,
        optimizer=round(states * gradients),
        gathered=head.whole + others.whole + ahead * max(unit.whole for unit in layers),
        reduced=max(unit.gradients + unit.reduced for unit in units),
        sent=round((processes - 1) / processes * rounds * (gathers + sum(unit.reduced for unit in units))),
    )


def _units(model: nn.Module, processes: int, compute: torch.dtype | None) -> tuple[list[_Unit], _Unit, _Unit, _Unit]:
    """FSDP's units as accelerate makes them: each layer, the embeddings, the head, and what is left."""
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


def _peak(live: LiveBytes, shares: Shares, one: Footprint, processes: int, sharding: str) -> tuple[str, dict[str, int]]:
    """The phase in which most is alive, and what that is."""
    split = sharding == "fsdp"
    gradients = shares.gradients / max(1, one.gradients)

    def factors(phase: str) -> dict[str, float]:
        updates = 1.0 if sharding == "ddp" else 1 / processes
        # The update's temporaries are made of gradients and states: in parts where those are, in their type.
        rest = updates * (gradients * processes if split else 1.0) if phase == "optimizer" else 1.0
        return {WEIGHTS: 0.0, OPTIMIZER: 0.0, GRADIENTS: gradients, REST: rest}

    def fixed(phase: str) -> dict[str, int]:
        computes = phase != "optimizer"
        moment = (shares.gathered if computes else 0) + (shares.reduced if phase == "backward" else 0)
        return {WEIGHTS: shares.weights, OPTIMIZER: shares.optimizer, "engine": moment}

    return live.highest(factors, fixed)


def describe(sharding: str, processes: int) -> str:
    """For a title."""
    return f"each of {processes} GPUs with {_NAMES[sharding]}"
