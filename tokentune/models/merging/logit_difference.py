"""How far two models' logits are apart, on inputs that depend on the model's configuration alone.

Legend: B sequences, S tokens, C outputs per token or per sequence (the vocabulary, or the classes).
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from tokentune.models.tasks import CAUSAL_LM, IMAGE, Head

TEXTS = (2, 32)  # (B, S) for logits of every token
CLASSIFIED = 8  # B, where there is one row of logits per sequence or image


@dataclass(frozen=True)
class LogitDifference:
    """Of two models' logits: the largest difference and the root mean square of all.

    `relative` and `relative_rms` are the same, divided by the standard deviation of the reference's logits.
    """

    largest: float
    relative: float
    rms: float
    relative_rms: float

    def __str__(self) -> str:
        return f"{self.largest:.3g} ({100 * self.relative:.3g} % of the logits' standard deviation)"


def logit_difference(reference: Tensor, other: Tensor) -> LogitDifference:
    """Both of one shape, float32."""
    difference, deviation = other - reference, reference.std().item()
    largest, rms = difference.abs().max().item(), difference.square().mean().sqrt().item()
    return LogitDifference(largest, largest / deviation, rms, rms / deviation)


def _own_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The floating-point parameters that a module's forward may read itself, without calling a submodule."""
    # peft's wrappers (of single tokens' rows, say) read the weight of the layer that they wrap
    owners = [module, getattr(module, "base_layer", None)]
    return [
        p for owner in owners if owner is not None for p in owner.parameters(recurse=False) if p.is_floating_point()
    ]


@contextmanager
def float32_arithmetic(model: nn.Module) -> Iterator[None]:
    """Within it, each module computes in float32 from the weights as they are held.

    Weights are float32 during their own module's forward alone: comparing a 16-bit model in float32 takes the memory of
    one layer's float32 copy, not of the whole model's. 4-bit weights stay as they are: their layers dequantize them.
    """
    held: dict[nn.Module, list[tuple[nn.Parameter, Tensor]]] = {}

    def widen(module: nn.Module, args: tuple) -> tuple:
        held[module] = [(p, p.data) for p in _own_parameters(module)]
        for parameter, data in held[module]:
            parameter.data = data.float()
        # (some models cast pixels to the type of their weights)
        return tuple(a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)

    def restore(module: nn.Module, args: tuple, output: object) -> None:
        for parameter, data in held.pop(module):
            parameter.data = data

    hooks = []
    for module in model.modules():
        if _own_parameters(module):
            hooks += [module.register_forward_pre_hook(widen), module.register_forward_hook(restore, always_call=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def probe_inputs(config: PreTrainedConfig, head: Head = CAUSAL_LM) -> dict[str, Any]:
    """The forward pass's arguments: token ids (B, S), or pixels (B, channels, height, width), by a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    if head is IMAGE:
        size, channels = config.image_size, getattr(config, "num_channels", 3)
        height, width = (size, size) if isinstance(size, int) else size
        return {"pixel_values": torch.randn(CLASSIFIED, channels, height, width, generator=generator)}
    text = config.get_text_config()
    sequences, length = TEXTS if head is CAUSAL_LM else (CLASSIFIED, TEXTS[1])
    length = min(length, getattr(text, "max_position_embeddings", None) or length)
    ids = torch.randint(text.vocab_size, (sequences, length), generator=generator)
    if head is CAUSAL_LM:
        return {"input_ids": ids, "use_cache": False}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}  # encoders would take the pad id for padding


@torch.no_grad()
def probe_logits(model: nn.Module, *, in_float32: bool, head: Head = CAUSAL_LM) -> Tensor:
    """Logits (B, S, C), or (B, C) of sequences and images, float32 on the CPU.

    Args:
        model: with or without an adapter, on one device.
        in_float32: compute in float32 from the weights as they are held, else in the weights' own type.
    """
    device = next(model.parameters()).device
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    inputs = probe_inputs(model.config, head)
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            pixels = value.is_floating_point() and not in_float32
            inputs[name] = value.to(device, dtype if pixels else None)
    with float32_arithmetic(model) if in_float32 else nullcontext():
        logits = model.eval()(**inputs).logits
    return logits.float().cpu()
