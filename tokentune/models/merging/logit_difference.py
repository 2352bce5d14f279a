"""How far two models' logits are apart, on inputs that depend on the model's configuration alone.

Legend: B sequences, S tokens, C outputs per token or per sequence (the vocabulary, or the classes).
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from tokentune.models.tasks import CAUSAL_LM, IMAGE, Head

TEXTS = (2, 32)  # (B, S) for logits of every token
CLASSIFIED = 8  # B, where there is one row of logits per sequence or image


@dataclass(frozen=True)
class LogitDifference:
    """Of two models: the largest of all differences of a logit, and their root mean square.

    `relative` and `relative_rms` are the same over the standard deviation of the reference's logits.
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
    """The floating-point ones that a module's forward may read without a call of its submodules'."""
    # peft's wrappers (of single tokens' rows, say) take the weight of what they wrap and compute by themselves
    base = getattr(module, "base_layer", None)
    owners = [module] if base is None else [module, base]
    return [p for owner in owners for p in owner.parameters(recurse=False) if p.is_floating_point()]


@contextmanager
def float32_arithmetic(model: nn.Module) -> Iterator[None]:
    """Within it, each module computes in float32 from the weights as they are held.

    Its weights are widened just for its own forward, so that comparing a 16-bit model in float32 takes the room of
    one layer's float32 copy, not of the whole model's. 4-bit weights stay as they are: their layers widen them.
    """
    held: dict[nn.Module, list[tuple[nn.Parameter, Tensor]]] = {}

    def widen(module: nn.Module, args: tuple) -> tuple:
        held[module] = [(p, p.data) for p in _own_parameters(module)]
        for parameter, data in held[module]:
            parameter.data = data.float()
        # (some models turn pixels into the type that they find their weights in)
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


def probe_inputs(config: PreTrainedConfig, head: Head = CAUSAL_LM) -> dict[str, Tensor]:
    """Token ids (B, S), or pixels (B, channels, height, width), drawn with a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    if head is IMAGE:
        size, channels = config.image_size, getattr(config, "num_channels", 3)
        height, width = (size, size) if isinstance(size, int) else size
        return {"pixel_values": torch.randn(CLASSIFIED, channels, height, width, generator=generator)}
    text = config.get_text_config()
    sequences, length = TEXTS if head is CAUSAL_LM else (CLASSIFIED, TEXTS[1])
    length = min(length, getattr(text, "max_position_embeddings", None) or length)
    inputs = {"input_ids": torch.randint(text.vocab_size, (sequences, length), generator=generator)}
    # encoders take a padding token's id for padding; nothing here is
    return inputs | ({} if head is CAUSAL_LM else {"attention_mask": torch.ones(sequences, length, dtype=torch.long)})


@torch.no_grad()
def probe_logits(model: nn.Module, *, in_float32: bool, head: Head = CAUSAL_LM) -> Tensor:
    """Logits (B, S, C), or (B, C) of sequences and images, float32 on the CPU.

    Args:
        model: with or without an adapter, on one device.
        in_float32: compute in float32 from the weights as they are held, else in the weights' own type.
    """
    place = next(model.parameters())
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    inputs = probe_inputs(model.config, head)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(torch.float32 if in_float32 else dtype)
    if head is CAUSAL_LM:
        inputs["use_cache"] = False
    inputs = {name: value.to(place.device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    with float32_arithmetic(model) if in_float32 else nullcontext():
        logits = model.eval()(**inputs).logits
    return logits.float().cpu()
