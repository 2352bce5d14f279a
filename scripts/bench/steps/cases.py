"""What is measured: a Llama of random weights, how it is trained, and by which methods, side by side.

B sequences, S tokens per sequence
"""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tokentune import apply_tokentune, remove_tokentune
from tokentune.core.loss import take_loss_in_chunks
from tokentune.models.adapters import add_adapters

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TRAIN = ("full", "lora", "qlora")


@dataclass(frozen=True)
class Method:
    """How a step saves memory; `options` go to `apply_tokentune`.

    chunked: all tokens keep their gradients, and the loss is taken a chunk of rows at a time, as other trainers do.
    sequence_chunk: all tokens keep their gradients, and both passes go through the sequence by so many tokens at once.
    """

    tokentune: bool = False
    chunked: bool = False
    sequence_chunk: int | None = None
    checkpointing: bool = False
    options: dict[str, Any] = field(default_factory=dict)


METHODS = {
    "full": Method(),
    "checkpointing": Method(checkpointing=True),
    "full_chunked": Method(chunked=True),
    "checkpointing_chunked": Method(chunked=True, checkpointing=True),
    "tokentune": Method(tokentune=True),
    "tokentune_checkpointing": Method(tokentune=True, checkpointing=True),
    "tokentune_segments": Method(tokentune=True, checkpointing=True, options={"checkpoint_rest": "segments"}),
    "tokentune_offload": Method(tokentune=True, checkpointing=True, options={"offload_kv": True}),
    "sequence_chunks": Method(sequence_chunk=512),
}


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama; `name` is for readers."""

    name: str
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int


@dataclass(frozen=True)
class Variant:
    """One method; `proportion` is the share of the tokens that TokenTune selects.

    None: all tokens in methods that select none, the answers' positions in others.
    """

    method: str
    proportion: float | None = None


@dataclass(frozen=True)
class Case:
    """One model and batch, on which the variants take turns.

    rounds: timed steps per variant; 0: bytes alone, from one forward pass each.
    optimizer: whether AdamW is part of the step (its memory then counts, and its time).
    autocast: forward passes under bfloat16 autocast.
    answers: share of the tokens, the last ones, that are supervised; None: all of them. Selective methods without a
        proportion then select exactly the positions that predict these (`scripts/bench/steps/measure.py`).
    """

    suite: str
    shape: Shape
    variants: tuple[Variant, ...]
    train: str = "full"
    dtype: str = "float32"
    batch: int = 2
    length: int = 512
    rounds: int = 9
    optimizer: bool = False
    autocast: bool = False
    answers: float | None = None

    def settings(self, variant: Variant) -> dict[str, Any]:
        """Every setting of one row, flat."""
        own = asdict(self)
        shape = own.pop("shape")
        own.pop("variants")
        return own | shape | asdict(variant)

    def model_key(self) -> tuple:
        return self.shape, self.train, self.dtype


def variants(methods: tuple[str, ...], proportions: tuple[float | None, ...] = (0.3,)) -> tuple[Variant, ...]:
    """Each method, those that select at every proportion."""
    pairs = [(name, p) for name in methods for p in (proportions if METHODS[name].tokentune else (None,))]
    return tuple(Variant(name, proportion) for name, proportion in pairs)


def shrunk(case: Case) -> Case:
    """The same case on a model of thousands of weights, for trying the code path out: its figures say nothing.

    Layers and lengths stay different where they were different, so that fits over them still have their points.
    """
    shape = case.shape
    groups = max(1, shape.heads // shape.key_value_heads)
    small = Shape(
        name=shape.name,
        hidden_size=64,
        intermediate_size=96,
        layers=1 + shape.layers // 6,
        heads=4,
        key_value_heads=max(1, 4 // groups),
        vocabulary=128,
    )
    return replace(case, shape=small, length=max(16, case.length // 16), rounds=min(case.rounds, 2))


def build(case: Case, device: str) -> nn.Module:
    """The case's model on `device`, in training mode. 4-bit weights are quantised there, from 16-bit or wider ones."""
    shape = case.shape
    config = LlamaConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=16384,
        use_cache=False,
    )
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=DTYPES[case.dtype])
    if case.train == "qlora":
        quantise(model, DTYPES[case.dtype])
    if case.train != "full":
        targets = ["gate_proj", "up_proj", "down_proj"]
        quantized = case.train == "qlora"
        model = add_adapters(model, r=8, alpha=16, dropout=0.0, target_modules=targets, quantized=quantized)
    return model.train()


def quantise(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Puts NF4 weights with double quantisation, computing in `dtype`, in place of the layers' linear ones.

    What `BitsAndBytesConfig` does to a checkpoint that is loaded; a model of random weights has none to load.
    """
    import bitsandbytes as bnb

    layers = model.model.layers
    for name, linear in [(n, m) for n, m in layers.named_modules() if isinstance(m, nn.Linear)]:
        quantised = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
        )
        quantised.weight = bnb.nn.Params4bit(
            linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True, module=quantised
        )
        layers.set_submodule(name, quantised.to(linear.weight.device))
    model.is_loaded_in_4bit = True  # by which peft knows what to wrap


def inner_model(model: nn.Module) -> PreTrainedModel:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def switch(model: nn.Module, method: str) -> None:
    """Makes the next step of `model` one of `method`, whatever it was before."""
    settings = METHODS[method]
    inner = inner_model(model)
    remove_tokentune(model)
    inner.activation_checkpointing_disable()
    for remove in model.__dict__.pop("chunks", []):
        remove()
    if settings.tokentune:
        apply_tokentune(model, verify=False, **settings.options)
    if settings.chunked:
        model.chunks = take_loss_in_chunks(inner)
    if settings.checkpointing:
        inner.activation_checkpointing_enable()
