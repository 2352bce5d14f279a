"""Tensors without data that Python sees on a GPU, also on a machine without one.

An estimate runs the real training step on them. On "cuda" the models and this package take the code paths of a GPU, on
"cpu" those of the CPU. In C++ the tensors are on torch's meta device, so what torch chooses by device in C++ is
replaced by function modes: mixed precision (`_Autocast`), and the kernels of attention and of mixtures of experts
(`_Kernels`).
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_CUDA = torch.device("cuda", 0)
_MOST_REAL_NUMBERS = 2**24  # largest tensor of positions, masks or counters that is computed with real values


@contextmanager
def fake_device(kind: str) -> Iterator[None]:
    """Within it, new tensors have no data; `kind` is their device, "cuda" (which need not exist) or "cpu"."""
    gpu = kind == "cuda"
    mode = (_FakeCuda if gpu else FakeTensorMode)(allow_non_fake_inputs=True)
    autocast = _Autocast()
    replacements = (
        (torch.Tensor, "_make_subclass", staticmethod(_make_subclass)),
        (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
        (torch.cuda, "get_device_capability", lambda *_: (8, 0)),  # Ampere, as in `_attention`
        (torch.cuda, "_initialized", False),  # so that no random state of a real GPU is read
        (torch.cuda, "synchronize", lambda *_: None),
        (torch.Tensor, "record_stream", lambda *_: None),
        *((torch.cuda, name, _NoStream) for name in ("Stream", "current_stream", "stream")),
        (torch, "clear_autocast_cache", autocast.casts.clear),
    )
    with ExitStack() as stack:
        for replacement in replacements if gpu else ():
            stack.enter_context(replaced(*replacement))
        stack.enter_context(mode)
        stack.enter_context(_SmallRealTensors())
        stack.enter_context(_Kernels(gpu))
        if gpu:
            stack.enter_context(autocast)  # innermost, so attention gets tensors that are cast
        yield


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Within it, `owner` has `value` as its attribute `name`."""
    own = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


class _NoStream(nullcontext):
    """Stands for a CUDA stream, the current stream, and the context manager that sets it."""

    def wait_stream(self, other: Any) -> None:
        pass


_torch_make_subclass = torch.Tensor._make_subclass


def _make_subclass(cls: type, data: Tensor, requires_grad: bool = False, **options: Any) -> Tensor:
    """`torch.Tensor._make_subclass`, but C++ sees the meta device of a fake tensor; Python sees the fake device.

    Autograd in C++ asks the device for streams, which fails if torch has no CUDA or the machine no GPU.
    """
    if issubclass(cls, FakeTensor):
        options["dispatch_device"] = False
    return _torch_make_subclass(cls, data, requires_grad, **options)


class _FakeCuda(FakeTensorMode):
    """Puts tensors on the fake device that C++ code asks for on the meta device, to match a given tensor."""

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "meta":
            kwargs = dict(kwargs) | {"device": _CUDA}
        return super().dispatch(func, types, args, kwargs)


class _SmallRealTensors(TorchDispatchMode):
    """Computes on real tensors with real values: positions, masks and step counters on the CPU, which code reads."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        with unset_fake_temporarily() if self._is_real(func, args, kwargs) else nullcontext():
            return func(*args, **kwargs)

    def _is_real(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        device = kwargs.get("device")
        if torch.device(device or "cpu").type != "cpu":
            return False
        if any(isinstance(tensor, FakeTensor) or tensor.device.type != "cpu" for tensor in tensors):
            return False
        if not tensors:  # a new tensor: real if it holds indices, not if it holds floating-point values
            if kwargs.get("dtype") is None:
                return func.overloadpacket is torch.ops.aten.arange and all(isinstance(bound, int) for bound in args)
            return device is not None and not (kwargs["dtype"].is_floating_point or kwargs["dtype"].is_complex)
        try:
            shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
        except RuntimeError:
            shape = max((tensor.shape for tensor in tensors), key=lambda shape: shape.numel())
        return shape.numel() <= _MOST_REAL_NUMBERS


# --- mixed precision --------------------------------------------------------------------------------------------------

# torch's lists for CUDA ("Autocast Op Reference"), limited to what the models of transformers call.
_IN_16_BITS: set[Callable] = {
    *(F.linear, F.bilinear, F.conv1d, F.conv2d, F.conv3d, F.scaled_dot_product_attention, F.prelu),
    *(torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.addbmm, torch.baddbmm, torch.mv, torch.einsum),
    *(torch.conv1d, torch.conv2d, torch.conv3d, torch.chain_matmul, torch.linalg.multi_dot),
    *(Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, Tensor.mm, Tensor.bmm, Tensor.addmm, Tensor.baddbmm),
}
_IN_32_BITS: set[Callable] = {
    *(F.layer_norm, F.group_norm, F.nll_loss, F.cross_entropy, F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.kl_div),
    *(F.softplus, F.cosine_similarity, F.softmax, F.log_softmax, F.binary_cross_entropy_with_logits, F.normalize),
    *(torch.layer_norm, torch.softmax, torch.log_softmax, torch.exp, torch.log, torch.pow, torch.rsqrt, torch.norm),
    *(torch.cumsum, torch.cumprod, torch.sum, torch.prod, torch.erfinv, torch.cosh, torch.sinh, torch.tan),
    *(Tensor.pow, Tensor.__pow__, Tensor.rsqrt, Tensor.exp, Tensor.log, Tensor.softmax, Tensor.log_softmax),
    *(Tensor.norm, Tensor.sum, Tensor.prod, Tensor.cumsum, Tensor.cumprod, Tensor.reciprocal, torch.reciprocal),
}


class _Autocast(TorchFunctionMode):
    """Casts arguments as `torch.autocast("cuda")` does, with its cache of 16-bit weights."""

    def __init__(self) -> None:
        super().__init__()
        self.casts: dict[int, tuple[Tensor, Tensor]] = {}  # id of a weight -> (weight, its 16-bit copy)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, dtype = kwargs or {}, None
        if torch.is_autocast_enabled("cuda"):
            if func in _IN_16_BITS:
                dtype = torch.get_autocast_dtype("cuda")
            elif func in _IN_32_BITS and kwargs.get("dtype") is None:
                dtype = torch.float32
        if dtype is not None:
            args = tuple(self._cast(value, dtype) for value in args)
            kwargs = {name: self._cast(value, dtype) for name, value in kwargs.items()}
        return func(*args, **kwargs)

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if not (isinstance(value, Tensor) and value.is_floating_point() and value.device.type == "cuda"):
            return value
        if value.dtype in (dtype, torch.float64):
            return value
        weight = value.is_leaf and value.requires_grad and not value._is_view()
        if not (weight and value.dtype is torch.float32 and torch.is_autocast_cache_enabled()):
            return value.to(dtype)
        if id(value) not in self.casts:
            # As in torch: a copy made without gradients would be reused in passes that need gradients.
            with torch.enable_grad():
                self.casts[id(value)] = value, value.to(dtype)
        return self.casts[id(value)][1]


# --- kernels ----------------------------------------------------------------------------------------------------------


class _Kernels(TorchFunctionMode):
    """What torch runs on a GPU, in place of what it runs on its meta device; on a CPU the products of experts alone."""

    def __init__(self, gpu: bool) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch._grouped_mm:  # what F.grouped_mm calls
            return _ExpertProduct.apply(*args[:2])
        if self.gpu:
            if func is F.scaled_dot_product_attention:
                return _attention(*args, **kwargs)
            # `to(other)`: in C++ both are on the meta device.
            if func is Tensor.to and len(args) > 1 and isinstance(args[1], Tensor):
                return args[0].to(args[1].device, args[1].dtype)
            kwargs.pop("pin_memory", None)  # memory without data cannot be pinned
        return func(*args, **kwargs)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Scaled-dot-product attention by the kernel that torch chooses on Ampere and later GPUs.

    FlashAttention for 16 bits without a mask, also with grouped heads. The memory-efficient kernel for float32 or with
    a mask. For grouped heads that FlashAttention does not take, torch's plain fallback, with the scores in memory.
    """
    aten, width = torch.ops.aten, query.shape[-1]
    in_16_bits = query.dtype in (torch.float16, torch.bfloat16)
    if attn_mask is None and in_16_bits and width == value.shape[-1] <= 256 and width % 8 == 0:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    groups = query.shape[1] // key.shape[1] if enable_gqa else 1
    if groups == 1:
        if attn_mask is not None:
            if attn_mask.dtype is torch.bool:
                attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, float("-inf"))
            attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
        gradients = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, gradients, dropout_p, is_causal, scale=scale
        )[0]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-2, -1)
    if attn_mask is not None:
        scores = scores + attn_mask
    return F.dropout(scores.softmax(-1), dropout_p) @ value


class _ExpertProduct(torch.autograd.Function):
    """The product of each token with its expert's weights, which torch refuses in float32 on the meta device only.

    Tokens sorted by expert (S, D), weights (experts, D, E) -> (S, E). Saves what torch saves for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weights: Tensor) -> Tensor:
        for_tokens, for_weights = ctx.needs_input_grad
        ctx.save_for_backward(tokens if for_weights else None, weights if for_tokens else None)
        ctx.shapes = tokens.shape, weights.shape
        return tokens.new_empty(tokens.shape[0], weights.shape[2])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        pairs = zip(ctx.needs_input_grad, ctx.shapes, strict=True)
        return tuple(gradient.new_empty(shape) if needed else None for needed, shape in pairs)


# --- models -----------------------------------------------------------------------------------------------------------


def to_fake(model: nn.Module, kind: str, dtype: torch.dtype) -> nn.Module:
    """Moves a model from the meta device to the fake one, in place. To be called within `fake_device`.

    `dtype`: the type of the weights before their quantization to 4 bits.
    """
    made: dict[int, tuple[Tensor, Tensor]] = {}  # id of a tensor -> (the tensor, its fake one); tied ones stay tied
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    made[id(tensor)] = tensor, _fake(tensor, kind, dtype)
                tensors[name] = made[id(tensor)][1]
    return model


def _fake(tensor: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    if hasattr(tensor, "quant_type"):
        return _fake_4bit(tensor, kind, dtype)
    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=kind)
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _fake_4bit(weight: Any, kind: str, dtype: torch.dtype) -> nn.Parameter:
    """A `Params4bit` of bitsandbytes, not quantized yet, in the form that it has after double quantization.

    Two values in a byte, one 8-bit scale for each block, and a float32 scale for every 256 of these.
    """
    from bitsandbytes.functional import QuantState

    block = weight.blocksize or 64
    blocks = -(-weight.numel() // block)
    scales = QuantState(
        absmax=torch.empty(-(-blocks // 256), device=kind),
        blocksize=256,
        code=torch.empty(256, device=kind),
        dtype=torch.float32,
    )
    packed = torch.empty((weight.numel() + 1) // 2, 1, dtype=torch.uint8, device=kind)
    parameter = nn.Parameter(packed, requires_grad=False)
    parameter.bnb_quantized = True
    parameter.quant_state = QuantState(
        absmax=torch.empty(blocks, dtype=torch.uint8, device=kind),
        shape=weight.shape,
        code=torch.empty(16, device=kind),
        blocksize=block,
        quant_type=weight.quant_type,
        dtype=dtype,
        offset=torch.empty((), device=kind),
        state2=scales,
    )
    for name in ("quant_type", "compress_statistics", "blocksize", "quant_storage"):
        setattr(parameter, name, getattr(weight, name))
    return parameter


def run_backward(loss: Tensor) -> None:
    """`loss.backward()` with the function modes active; the public function would disable them."""
    torch.autograd.graph._engine_run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )
