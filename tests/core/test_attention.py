"""Every path of attention against its definition, in float64 with gradients, and what it holds in memory.

B sequences, S tokens, K selected, H heads, G key-value heads, d head size
"""

from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
from conftest import tiny_bert_config, tiny_llama_config
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertModel, LlamaForCausalLM, LlamaModel
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    packed_sequence_mask_function,
    sdpa_mask,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

from tokentune import UnsupportedModelError, apply_tokentune
from tokentune.core.attention import blockwise as blocks
from tokentune.core.attention.kernels import attend
from tokentune.core.attention.masks import DeferredMask, GroupMask, mask_from_functions, mask_from_tensor
from tokentune.core.groups import gather_tokens, in_sequence_order, token_order
from tokentune.core.saved_tensors.saved_bytes import SavedForBackward

BATCH, LENGTH, HEADS, GROUPS, SIZE = 2, 37, 6, 2, 8
DOCUMENTS = torch.tensor([[0] * 9 + [1] * 20 + [2] * 8, [0] * 30 + [1] * 7])
MASK_FUNCTIONS = {
    "causal": causal_mask_function,
    "window": sliding_window_causal_mask_function(6),
    "chunks": chunked_causal_mask_function(7, torch.zeros(BATCH, dtype=torch.long)),
    "documents": and_masks(packed_sequence_mask_function(DOCUMENTS), causal_mask_function),
    "everything": bidirectional_mask_function,
    "window both ways": sliding_window_bidirectional_mask_function(4),
    "a first part seen by all": or_masks(causal_mask_function, lambda batch, head, query, key: key < 5),
}


def padding(side: str) -> Tensor | None:
    """(B, S), True at real tokens: the second sequence is the shorter one."""
    if side == "none":
        return None
    real = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    real[1, slice(0, 11) if side == "left" else slice(LENGTH - 11, None)] = False
    return real


def two_groups(count: int) -> tuple[Tensor, Tensor]:
    """Positions of the selected (B, K) and of the rest (B, R)."""
    positions = torch.stack([torch.randperm(LENGTH)[:count].sort().values for _ in range(BATCH)])
    order = token_order(positions, LENGTH)
    return order[:, :count], order[:, count:]


def inputs(count: int, value_size: int = SIZE, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Query (B, H, Q, d), key (B, G, S, d) and value (B, G, S, d'), laid out as projections leave them."""
    shapes = ((count, HEADS, SIZE), (LENGTH, GROUPS, SIZE), (LENGTH, GROUPS, value_size))
    return [torch.randn(BATCH, *shape).to(dtype).transpose(1, 2).detach().requires_grad_() for shape in shapes]


def definition(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Softmax attention by hand, in float64: `seen` (B, 1 or H, Q, S), bool or additive -> (B, Q, H, d')."""
    query, key, value = query.double(), key.double(), value.double()
    key, value = (tensor.repeat_interleave(HEADS // GROUPS, 1) for tensor in (key, value))
    scores = query @ key.mT * scale
    scores = scores.masked_fill(~seen, -1e300) if seen.dtype == torch.bool else scores + seen
    return (scores.softmax(-1) @ value).transpose(1, 2)


# The Llama's own eager function takes its softmax in float32.
DTYPE = {"sdpa": torch.float64, "eager": torch.float32}
TOLERANCE = {"sdpa": 1e-13, "eager": 1e-5}


def assert_same(found: Tensor, expected: Tensor, leaves: list[Tensor], real: Tensor, tolerance: float) -> None:
    """Outputs (B, Q, H, d') and gradients of rows that see anything, `real` (B, Q)."""
    weights = torch.randn_like(expected) * real[..., None, None]
    assert (found - expected)[real].abs().max() <= tolerance * expected[real].abs().max()
    gradients = [torch.autograd.grad((out.double() * weights).sum(), leaves) for out in (found, expected)]
    for mine, other in zip(*gradients, strict=True):
        assert (mine - other).abs().max() <= tolerance * other.abs().max()


PATHS = ("one block", "blocks", "positions unread", "one call", "blocks of other kernels", "heads one by one", "eager")


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Makes `attend` take one of its ways; returns the implementation to name."""
    monkeypatch.setattr(blocks, "CPU_BLOCK", 100 if request.param == "one block" else 5)
    if request.param == "one call":
        monkeypatch.setattr("tokentune.core.attention.kernels._in_blocks", lambda *_: False)
    if request.param == "positions unread":
        monkeypatch.setattr("tokentune.core.attention.masks._readable", lambda positions: False)
    if request.param in ("blocks of other kernels", "heads one by one"):  # as on CUDA
        monkeypatch.setitem(blocks.KERNELS, "cpu", blocks.KERNELS["cuda"])
        monkeypatch.setattr(blocks, "takes_grouped_heads", lambda *_: request.param == "blocks of other kernels")
    return "eager" if request.param == "eager" else "sdpa"


@cache
def module() -> nn.Module:
    """An attention module, for `eager` to find its function by."""
    attention = LlamaModel(tiny_llama_config()).layers[0].self_attn
    attention.num_key_value_groups = HEADS // GROUPS
    return attention


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("kind", MASK_FUNCTIONS)
def test_every_path_is_attention_by_its_definition(kind: str, side: str, path: str) -> None:
    function, real = MASK_FUNCTIONS[kind], padding(side)
    options = {"mask_function": function, "attention_mask": real}
    whole = sdpa_mask(BATCH, LENGTH, LENGTH, **options, allow_is_causal_skip=False)
    whole = torch.ones(BATCH, 1, LENGTH, LENGTH, dtype=torch.bool) if whole is None else whole
    recipe = mask_from_functions(BATCH, LENGTH, LENGTH, **options)
    for group, positions in zip(("selected", "unselected"), two_groups(13), strict=True):
        query, key, value = leaves = inputs(positions.shape[1], dtype=DTYPE[path])
        mask = None if recipe is None else GroupMask(recipe, group, positions, LENGTH)
        seen = whole.take_along_dim(positions[:, None, :, None], 2)
        found, _ = attend(module(), query, key, value, mask, path, scaling=0.3)
        assert_same(found, definition(*leaves, seen, 0.3), leaves, seen.any(-1)[:, 0], TOLERANCE[path])


@pytest.mark.parametrize("heads", [1, HEADS])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
def test_finished_masks_are_read_in_pieces(dtype: torch.dtype, heads: int, path: str) -> None:
    seen = torch.rand(BATCH, heads, LENGTH, LENGTH) > 0.5
    whole = seen if dtype == torch.bool else torch.randn(seen.shape, dtype=dtype)
    positions = two_groups(13)[0]
    query, key, value = leaves = inputs(13, dtype=DTYPE[path])
    mask = GroupMask(mask_from_tensor(whole), "selected", positions, LENGTH)
    rows = whole.take_along_dim(positions[:, None, :, None], 2)
    found, _ = attend(module(), query, key, value, mask, path, scaling=0.3)
    assert_same(found, definition(*leaves, rows, 0.3), leaves, torch.ones(BATCH, 13, dtype=torch.bool), TOLERANCE[path])


@pytest.mark.parametrize("value_size", [4, 12])
def test_values_may_have_a_head_size_of_their_own(value_size: int, path: str) -> None:
    positions = two_groups(13)[0]
    leaves = inputs(13, value_size, DTYPE[path])
    mask = GroupMask(mask_from_functions(BATCH, LENGTH, LENGTH), "selected", positions, LENGTH)
    found, _ = attend(module(), *leaves, mask, path, scaling=SIZE**-0.5)
    seen = positions[:, None, :, None] >= torch.arange(LENGTH)
    assert_same(
        found, definition(*leaves, seen, SIZE**-0.5), leaves, torch.ones(BATCH, 13, dtype=torch.bool), TOLERANCE[path]
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.bfloat16, 0.03), (torch.float16, 4e-3)])
def test_lower_precisions(dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "CPU_BLOCK", 5)
    positions = two_groups(13)[0]
    leaves = inputs(13, dtype=dtype)
    mask = GroupMask(mask_from_functions(BATCH, LENGTH, LENGTH), "selected", positions, LENGTH)
    found, _ = attend(module(), *leaves, mask, "sdpa")
    assert found.dtype == dtype
    seen = positions[:, None, :, None] >= torch.arange(LENGTH)
    real = torch.ones(BATCH, 13, dtype=torch.bool)
    assert_same(found, definition(*leaves, seen, SIZE**-0.5), leaves, real, tolerance)


def test_autocast_reaches_the_kernel() -> None:
    leaves = inputs(13, dtype=torch.float32)
    mask = GroupMask(mask_from_functions(BATCH, LENGTH, LENGTH), "selected", two_groups(13)[0], LENGTH)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = attend(module(), *leaves, mask, "sdpa")
    assert found.dtype == torch.bfloat16
    found.float().sum().backward()
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves)


def test_gradients_that_are_not_laid_out_densely() -> None:
    positions = two_groups(13)[0]
    leaves = inputs(13)
    mask = GroupMask(mask_from_functions(BATCH, LENGTH, LENGTH), "selected", positions, LENGTH)
    found, _ = attend(module(), *leaves, mask, "sdpa", scaling=1.0)
    expected = definition(*leaves, positions[:, None, :, None] >= torch.arange(LENGTH), 1.0)
    for mine, other in zip(*(torch.autograd.grad(out.sum(), leaves) for out in (found, expected)), strict=True):
        assert (mine - other).abs().max() < 1e-13 * (1 + other.abs().max())


def test_fake_tensors_pass_through() -> None:
    """For counting bytes without computing: no block may depend on the positions' values."""
    with FakeTensorMode():
        query, key, value = leaves = inputs(13, dtype=torch.float32)
        positions = torch.empty(BATCH, 13, dtype=torch.long)
        mask = GroupMask(mask_from_functions(BATCH, LENGTH, LENGTH), "selected", positions, LENGTH)
        found, _ = attend(module(), query, key, value, mask, "sdpa")
        gradients = torch.autograd.grad(found.sum(), leaves)
    assert found.shape == (BATCH, 13, HEADS, SIZE)
    assert [gradient.shape for gradient in gradients] == [leaf.shape for leaf in leaves]


def test_dropout_drops() -> None:
    leaves = inputs(13)
    mask = GroupMask(mask_from_functions(BATCH, LENGTH, LENGTH), "selected", two_groups(13)[0], LENGTH)
    plain, _ = attend(module(), *leaves, mask, "sdpa", dropout=0.0)
    found = torch.stack([attend(module(), *leaves, mask, "sdpa", dropout=0.5)[0] for _ in range(400)])
    assert not torch.equal(found[0], found[1])
    deviation = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - plain).abs() <= 6 * deviation + 1e-12).all()


def test_keys_are_joined_in_sequence_order_and_only_the_selected_get_gradients() -> None:
    whole = torch.randn(BATCH, LENGTH, GROUPS, SIZE, dtype=torch.float64)
    groups = two_groups(13)
    selected, rest = (gather_tokens(whole, positions).transpose(1, 2).requires_grad_() for positions in groups)
    places = [(positions + LENGTH * torch.arange(BATCH)[:, None]).flatten() for positions in groups]
    joined = in_sequence_order(selected, rest, places)
    assert torch.equal(joined.transpose(1, 2), whole)
    weights = torch.randn_like(joined)
    (joined * weights).sum().backward()
    assert rest.grad is None
    assert torch.equal(selected.grad.transpose(1, 2), gather_tokens(weights.transpose(1, 2), groups[0]))


def covered(recipe: DeferredMask, length: int, block: int) -> float:
    """The share of the K x S rectangle that kernels are called on, with every third token selected."""
    spans = GroupMask(recipe, "selected", torch.arange(0, length, 3)[None], length).spans(block)
    assert [span.start for span in spans] == list(range(0, spans[-1].stop, block))
    return sum((span.stop - span.start) * (span.last - span.first) for span in spans) / (spans[-1].stop * length)


def test_keys_that_no_query_of_a_block_sees_are_not_computed() -> None:
    length, recipe = 1200, partial(mask_from_functions, 1, 1200, 1200)
    assert 0.5 <= covered(recipe(), length, 20) < 0.53
    assert covered(recipe(mask_function=sliding_window_causal_mask_function(60)), length, 20) < 0.11
    documents = torch.arange(length)[None] // 100
    packed = and_masks(packed_sequence_mask_function(documents), causal_mask_function)
    assert covered(recipe(mask_function=packed), length, 20) < 0.12
    real = torch.arange(length)[None] >= 600
    assert covered(recipe(attention_mask=real), length, 20) < 0.16  # left padding


def test_only_the_edges_of_a_mask_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = mask_from_functions(1, 1200, 1200, mask_function=sliding_window_causal_mask_function(600))
    mask = GroupMask(recipe, "selected", torch.arange(0, 1200, 3)[None], 1200)
    span = mask.spans(20)[-1]
    expected = mask.additive(torch.float64)[:, :, span.start : span.stop, span.first : span.last]
    asked, visible = [], recipe.visible

    def counted(queries: Tensor, first: int, last: int) -> Tensor:
        asked.append(last - first)
        return visible(queries, first, last)

    monkeypatch.setattr(recipe, "visible", counted)
    assert torch.equal(mask.piece(span, torch.float64), expected)
    assert sum(asked) < 130 < span.last - span.first


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that any operation returns, views by the memory behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> object:
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // tensor.element_size())
        return output


def long_step(model: nn.Module, length: int, **extra: Tensor) -> tuple[int, int]:
    """Bytes saved for the backward pass of one step, and numbers in the largest tensor of all."""
    embeddings = torch.randn(1, length, model.config.hidden_size, requires_grad=True)
    positions = torch.arange(0, length, 4)[None]
    with Largest() as largest:
        with SavedForBackward(model) as saved:
            output = model(inputs_embeds=embeddings, selected_positions=positions, **extra).last_hidden_state
        output.sum().backward()
    return saved.bytes, largest.numbers


def all_real(length: int) -> dict[str, Tensor]:
    return {}


def left_padded(length: int) -> dict[str, Tensor]:
    return {"attention_mask": (torch.arange(length) >= length // 8).long()[None]}


def packed(length: int) -> dict[str, Tensor]:
    return {"position_ids": torch.arange(length)[None] % (length // 4)}


@pytest.mark.parametrize("batch", [all_real, left_padded, packed])
def test_memory_grows_with_the_sequence_not_with_its_square(
    batch: Callable[[int], dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "CPU_LONG", 10**9)  # the same block size for both
    model = LlamaModel(tiny_llama_config(max_position_embeddings=4096)).train()
    apply_tokentune(model, verify=False)
    short, long = (long_step(model, length, **batch(length)) for length in (1024, 2048))
    assert long[0] == 2 * short[0]
    assert long[1] <= 2 * short[1]
    assert long[1] < 2048**2 / 16


def test_bytes_saved_by_attention_are_those_of_its_inputs_and_output() -> None:
    """No mask, no scores, and no head repeated: queries and outputs of K rows, keys and values of S with G heads."""
    count = 13
    leaves = inputs(count, dtype=torch.float32)
    mask = GroupMask(mask_from_functions(BATCH, LENGTH, LENGTH), "selected", two_groups(count)[0], LENGTH)
    with SavedForBackward(nn.Identity()) as saved:
        attend(module(), *leaves, mask, "sdpa")
    numbers = 2 * count * HEADS * SIZE + 2 * LENGTH * GROUPS * SIZE + count * HEADS
    assert saved.bytes == 4 * BATCH * numbers


def test_a_mask_of_padding_alone_is_kept_as_one_row() -> None:
    model = BertModel(tiny_bert_config(max_position_embeddings=256)).train()
    apply_tokentune(model, verify=False)
    ids, positions = torch.randint(3, 90, (2, 256)), torch.arange(0, 256, 4).expand(2, -1)
    counts = []
    for real in (torch.ones_like(ids), (torch.arange(256) < 200).long().expand(2, -1)):
        with SavedForBackward(model) as saved:
            model(ids, attention_mask=real, selected_positions=positions)
        counts.append(saved.bytes)
    assert counts[1] - counts[0] == 2 * 256 * 4


@pytest.mark.parametrize("name", ["flash_attention_2", "paged|sdpa", "kernels-community/flash-attn2"])
def test_implementations_that_cannot_be_served_are_refused_by_name(name: str) -> None:
    leaves = inputs(13)
    mask = GroupMask(mask_from_functions(BATCH, LENGTH, LENGTH), "selected", two_groups(13)[0], LENGTH)
    with pytest.raises(UnsupportedModelError) as error:
        attend(module(), *leaves, mask, name)
    assert name in str(error.value)
    assert all(served in str(error.value) for served in ('"sdpa"', '"eager"', '"flex_attention"'))


def test_flex_attention_is_refused_on_cpus() -> None:
    model = LlamaForCausalLM._from_config(tiny_llama_config(), attn_implementation="flex_attention")
    with pytest.raises(UnsupportedModelError, match="no backward pass on CPUs"):
        apply_tokentune(model, verify=False)
        model(torch.randint(3, 90, (1, 8)), selected_positions=torch.tensor([[1, 4]]))  # of a machine with a GPU


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("kind", MASK_FUNCTIONS)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_block_masks_of_flex_attention_mean_the_same(kind: str, side: str) -> None:
    """Its forward pass alone, which runs uncompiled on a CPU."""
    options = {"mask_function": MASK_FUNCTIONS[kind], "attention_mask": padding(side)}
    recipe = mask_from_functions(BATCH, LENGTH, LENGTH, **options)
    if recipe is None:
        return
    positions = two_groups(13)[0]
    mask = GroupMask(recipe, "selected", positions, LENGTH)
    leaves = [leaf.detach() for leaf in inputs(13)]
    found = flex_attention(*leaves, block_mask=mask.block_mask(), enable_gqa=True)
    seen = sdpa_mask(BATCH, LENGTH, LENGTH, **options, allow_is_causal_skip=False)
    seen = seen.take_along_dim(positions[:, None, :, None], 2)
    real = seen.any(-1)[:, 0]
    difference = found.transpose(1, 2) - definition(*leaves, seen, SIZE**-0.5)
    assert difference[real].abs().max() < 1e-13
    assert mask.block_mask() is mask.block_mask()


def test_a_finished_mask_is_refused_by_flex_attention() -> None:
    recipe = mask_from_tensor(torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool))
    with pytest.raises(UnsupportedModelError, match="finished mask"):
        GroupMask(recipe, "selected", two_groups(3)[0][:1], LENGTH).block_mask()
