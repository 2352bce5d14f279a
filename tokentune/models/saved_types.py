"""The types that weights and buffers are saved in: transformers keeps some in float32 in a 16-bit model."""

import copy
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import build_glob_alternation

from tokentune.core.compat.fsdp import made_whole, own_class


def kept_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> set[str]:
    """Names of the weights and buffers that transformers holds in float32 in a model of this class and `dtype`.

    Above all biases of routers, whose differences 16 bits would round away. The rules are `from_pretrained`'s.
    """
    if dtype is torch.float32:
        return set()
    with torch.device("meta"), made_whole():
        skeleton = own_class(model)._from_config(copy.deepcopy(model.config), dtype=dtype)
    pattern = build_glob_alternation(list(model._get_dtype_plan(dtype)))[0]
    return {
        name
        for name, tensor in _named_tensors(skeleton)
        if tensor.is_floating_point() and (tensor.dtype is torch.float32 or (pattern.pattern and pattern.search(name)))
    }


def hold_in(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Casts a model to `dtype` in place, except for the tensors that transformers keeps in float32."""
    kept = kept_in_float32(model, dtype)
    held = {name: tensor.data for name, tensor in _named_tensors(model) if name in kept}
    model.to(dtype)
    for name, tensor in _named_tensors(model):
        if name in held:
            tensor.data = held[name]


def _named_tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
