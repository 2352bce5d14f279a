"""The configurations of each suite, for machines without and with a GPU. Seconds per suite stand in `cpu.sh`, `gpu.sh`.

Ratios are between variants of one case, that is: measured in the same rounds.
"""

from collections.abc import Callable
from dataclasses import replace

from steps.cases import DTYPES, METHODS, TRAIN, Case, Shape, variants
from steps.report import BASES

SELECTIVE = ("tokentune", "tokentune_checkpointing")
SIX = BASES + SELECTIVE
TENTHS = tuple(round(0.1 * n, 1) for n in range(1, 11))
LENGTHS = (512, 1024, 2048, 4096, 8192)


def llama(key_value_heads: int, *, layers: int = 6, vocabulary: int = 8000) -> Shape:
    """The model of most CPU suites: hidden size 1024, 16 heads. 8,000 words keep the head from hiding the layers."""
    return Shape("llama-1024", 1024, 2816, layers, 16, key_value_heads, vocabulary)


def narrow(*, layers: int = 4) -> Shape:
    """Narrow enough for 8,192 tokens on a CPU: hidden size 256, 8 heads, 2 key-value heads, 2,000 words."""
    return Shape("llama-256", 256, 704, layers, 8, 2, 2000)


def table() -> list[Case]:
    """Time and bytes against plain training and checkpointing, float32 and bfloat16, 4 and 16 key-value heads."""
    cases = [
        Case("table", llama(heads), variants(SIX), train=train, dtype="float32")
        for train in ("full", "lora")
        for heads in (4, 16)
    ]
    bfloat16 = [Case("table", llama(4), variants(SIX), train=train, dtype="bfloat16") for train in ("full", "lora")]
    return cases + bfloat16


def head() -> list[Case]:
    """The same with Llama-2's 32,000 words: more of the step is the head, which the selected rows alone see."""
    shape = llama(4, vocabulary=32000)
    return [Case("head", shape, variants(SIX), train=train, rounds=7) for train in ("full", "lora")]


def lowest() -> list[Case]:
    """The lowest-memory mode at 24 layers."""
    methods = (*BASES, "tokentune_checkpointing", "tokentune_segments")
    timed = tuple(name for name in methods if METHODS[name].checkpointing)  # plain training's time says nothing new
    cases = [Case("lowest", llama(4, layers=24), variants(timed), train=train, rounds=6) for train in ("full", "lora")]
    cases.append(Case("lowest", llama(16, layers=24), variants(timed), rounds=3))
    cases.append(Case("lowest", llama(16, layers=24), variants(methods), train="lora", rounds=0))
    return cases


def layers() -> list[Case]:
    """Bytes alone at 6 and 32 layers: their difference, per added layer, is free of the head's bytes."""
    return [
        Case("layers", llama(heads, layers=count), variants((*SIX, "tokentune_segments")), train=train, rounds=0)
        for train in ("full", "lora")
        for heads in (4, 16)
        for count in (6, 32)
    ]


def proportions() -> list[Case]:
    """Bytes from 10 % of the tokens to all of them, with a look at the time that is too short for an interval."""
    chosen = variants(BASES) + variants(SELECTIVE, (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)) + variants(("tokentune_segments",))
    return [Case("proportions", llama(4), chosen, train=train, rounds=5) for train in ("full", "lora")]


def answers() -> list[Case]:
    """Long prompts: 5 % of the tokens are the answer, and are what is selected; 6 layers, then 24."""
    chosen = (*SIX, "tokentune_segments")
    cases = [
        Case("answers", llama(4), variants(chosen, (None,)), train=train, answers=0.05) for train in ("full", "lora")
    ]
    checkpointed = tuple(name for name in chosen if METHODS[name].checkpointing)
    deep = variants(("full", *checkpointed), (None,))
    return cases + [
        Case("answers", llama(heads, layers=24), deep, train=train, rounds=5, answers=0.05)
        for train in ("full", "lora")
        for heads in (4, 16)
    ]


def overhead() -> list[Case]:
    """All tokens selected: what the method itself costs."""
    chosen = variants(("full", "tokentune"), (1.0,))
    return [Case("overhead", llama(4), chosen, train=train, rounds=11) for train in ("full", "lora")]


def length() -> list[Case]:
    """Growth with the sequence, one sequence at a time, on the narrow model; beside an exact rival for long ones."""
    methods = (*BASES, "sequence_chunks", *SELECTIVE, "tokentune_segments")
    return [Case("length", narrow(), variants(methods), batch=1, length=count, rounds=3) for count in LENGTHS]


def long() -> list[Case]:
    """Up to 32,768 tokens on one layer: memory must not grow faster than the sequence."""
    methods = ("full", *SELECTIVE)
    lengths = (8192, 16384, 32768)
    return [Case("long", narrow(layers=1), variants(methods), batch=1, length=count, rounds=1) for count in lengths]


def depth() -> list[Case]:
    """Growth with layers, on the narrow model."""
    methods = (*SIX, "tokentune_segments")
    return [Case("depth", narrow(layers=count), variants(methods), rounds=3) for count in (6, 12, 24, 48)]


def grid() -> list[Case]:
    """Bytes alone: all ways to train, proportions and lengths up to 2,048, on the narrow model."""
    chosen = variants(BASES) + variants(SELECTIVE, TENTHS)
    return [
        Case("grid", narrow(), chosen, train=train, batch=1, length=count, rounds=0)
        for train in TRAIN
        for count in LENGTHS[:3]
    ]


def qlora() -> list[Case]:
    """A 4-bit base, with the share of the time that goes into dequantisation."""
    return [Case("qlora", llama(4), variants(SIX), train="qlora", dtype=dtype, rounds=5) for dtype in DTYPES]


LLAMA_2_7B = Shape("llama-2-7b", 4096, 11008, 32, 32, 32, 32000)
LLAMA_3_8B = Shape("llama-3-8b", 4096, 14336, 32, 32, 8, 128256)
SIZES = (
    Shape("llama-3.2-1b", 2048, 8192, 16, 32, 8, 128256),
    Shape("llama-3.2-3b", 3072, 8192, 28, 24, 8, 128256),
    LLAMA_2_7B,
    Shape("llama-2-13b", 5120, 13824, 40, 40, 40, 32000),
)
ALL_METHODS = (*SIX, "tokentune_segments", "tokentune_offload")


def on_gpu(suite: str, shape: Shape, train: str, methods: tuple[str, ...] = ALL_METHODS, **changes: object) -> Case:
    """As the training scripts do it: bfloat16 weights, adapters in float32 under autocast, AdamW, 2,048 tokens."""
    case = Case(suite, shape, variants(methods), train=train, dtype="bfloat16", batch=1, length=2048, optimizer=True)
    return replace(case, **{"autocast": train != "full", **changes})


def gpu_7b() -> list[Case]:
    return [on_gpu("gpu_7b", LLAMA_2_7B, train) for train in TRAIN]


def gpu_8b() -> list[Case]:
    return [on_gpu("gpu_8b", LLAMA_3_8B, train) for train in TRAIN]


def gpu_batch() -> list[Case]:
    """Four sequences at once: activations weigh more, as they do where the savings are largest."""
    return [on_gpu("gpu_batch", LLAMA_2_7B, train, batch=4, rounds=5) for train in TRAIN]


def gpu_masters() -> list[Case]:
    """Full training over float32 weights under autocast, `finetune.py`'s own default: 16 bytes per weight."""
    return [on_gpu("gpu_masters", LLAMA_2_7B, "full", SIX, rounds=5, dtype="float32", autocast=True)]


def gpu_sizes() -> list[Case]:
    return [on_gpu("gpu_sizes", shape, train, SIX, rounds=5) for shape in SIZES for train in ("full", "lora")]


def gpu_proportions() -> list[Case]:
    chosen = variants(BASES) + variants(SELECTIVE, TENTHS) + variants(("tokentune_segments",))
    return [on_gpu("gpu_proportions", LLAMA_2_7B, "lora", rounds=5, variants=chosen)]


def gpu_length() -> list[Case]:
    methods = (*SIX, "tokentune_segments")
    return [on_gpu("gpu_length", LLAMA_2_7B, "lora", methods, rounds=3, length=count) for count in LENGTHS]


CPU_SUITES: dict[str, Callable[[], list[Case]]] = {
    suite.__name__: suite
    for suite in (table, answers, overhead, lowest, layers, proportions, length, depth, head, qlora, grid, long)
}
GPU_SUITES: dict[str, Callable[[], list[Case]]] = {
    suite.__name__: suite for suite in (gpu_7b, gpu_8b, gpu_batch, gpu_proportions, gpu_length, gpu_sizes, gpu_masters)
}
SUITES = CPU_SUITES | GPU_SUITES


def cases_of(names: list[str]) -> list[Case]:
    """The cases of the named suites; `cpu` and `gpu` stand for all of theirs."""
    groups = {"cpu": CPU_SUITES, "gpu": GPU_SUITES}
    expanded = [suite for name in names for suite in groups.get(name, [name])]
    return [case for name in dict.fromkeys(expanded) for case in SUITES[name]()]
