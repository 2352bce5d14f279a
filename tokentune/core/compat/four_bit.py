"""4-bit layers of bitsandbytes: keeps their weights in the layout that has a backward pass."""

from torch import nn

from tokentune.errors import UnsupportedModelError


def keep_4bit_layout(model: nn.Module) -> None:
    """Stops bitsandbytes from repacking 4-bit weights for inference.

    On CPUs with AVX512-BF16 the first forward pass in evaluation mode repacks them for a product without a backward
    pass. Training after an evaluation then loses every gradient through such a layer, at most with a warning (measured:
    relative error 2.1 of the adapters' gradients), and the block scales are rounded to bfloat16.
    Raises UnsupportedModelError where a layer was repacked already.
    """
    for name, layer in model.named_modules():
        if getattr(getattr(getattr(layer, "weight", None), "quant_state", None), "packing_format_for_cpu", False):
            raise UnsupportedModelError(f"{name} was run in evaluation mode and lost its backward pass: load it anew")
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
