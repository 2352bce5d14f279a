"""Which arguments of the layers have a row per token: also where a table happens to be as long as the sequence."""

import contextlib

import oracle
import pytest
import torch
from conftest import tiny_llama_config
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from tokentune import UnsupportedModelError, apply_tokentune
from tokentune.core.groups import TokenGroups
from tokentune.core.layers import arguments_per_token, has_row_per_token, map_tensors, transformer_layers
from tokentune.core.patched import profile_of
from tokentune.core.step import SELECTED, Step
from tokentune.core.step_plan import StepPlan
from tokentune.verify.trial import LENGTH, OTHER_LENGTH


class LayerWithTables(LlamaDecoderLayer):
    """Adds what the mean of its first table and the token's own number of the other, both handed to it, come to."""

    def forward(self, hidden_states: Tensor, tables: dict[str, Tensor], **kwargs: object) -> Tensor:
        hidden = super().forward(hidden_states, **kwargs)
        width = hidden.shape[-1]
        bias = tables["bias"].tanh().mean(-1)[0] * torch.linspace(-1, 1, width, dtype=hidden.dtype)
        return hidden + bias + tables["of_tokens"][..., None] * hidden


class LlamaWithTables(LlamaForCausalLM):
    """`bias` (1, config.table) has nothing to do with tokens."""

    def __init__(self, config: object) -> None:
        super().__init__(config)
        self.model.layers = nn.ModuleList([LayerWithTables(config, n) for n in range(config.num_hidden_layers)])
        self.table = nn.Parameter(torch.zeros(1, config.table))
        self.post_init()

    def forward(self, input_ids: Tensor | None = None, **kwargs: object) -> object:
        of_tokens = (input_ids % 7).to(self.dtype) / 7  # (B, S)
        return super().forward(input_ids, tables={"bias": self.table, "of_tokens": of_tokens}, **kwargs)


def with_tables(table: int) -> nn.Module:
    model = LlamaWithTables(tiny_llama_config(table=table)).double()
    nn.init.normal_(model.table)
    return model


@pytest.mark.parametrize("table", [24, 5, LENGTH, OTHER_LENGTH, 3])
@pytest.mark.parametrize("length", [24, LENGTH])
def test_a_table_as_long_as_the_sequence_is_no_row_per_token(table: int, length: int) -> None:
    """Sizes that coincide on purpose: with the batch's, with the verification's, with neither."""
    model = with_tables(table)
    ids = torch.randint(3, 90, (2, length))
    positions = torch.stack([torch.randperm(length)[:7].sort().values for _ in range(2)])
    with oracle.constants_outside(model, positions, oracle.LLAMA):
        logits = model(ids).logits
    loss = oracle.next_token_loss(logits, ids, positions)
    expected = oracle.gradients(model, loss)
    apply_tokentune(model)
    assert profile_of(model).per_token == {
        "tables.bias": False,
        "tables.of_tokens": True,
        "position_embeddings.0": True,
        "position_embeddings.1": True,
        "position_ids": True,
        "attention_mask": False,
    }
    found = model(ids, labels=ids, selected_positions=positions).loss
    assert found.item() == pytest.approx(loss.item(), rel=1e-6)
    gradients = oracle.gradients(model, found)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (gradients[name] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-9)
        assert error < 1e-5, f"{name}: {error:.1e}"


def test_what_had_a_row_per_token_has_one_for_each_token() -> None:
    step = Step(StepPlan(torch.tensor([[0, 2]])), [], 1, lambda *_: None, per_token={"numbers": True, "table": False})
    step.set_positions(torch.zeros(1, 4, 3))
    numbers = {"numbers": torch.arange(4.0)[None], "table": torch.arange(4.0)[None], "unknown": torch.arange(4.0)[None]}
    rows = step.rows_of(numbers, SELECTED)
    assert [len(rows[name][0]) for name in numbers] == [2, 4, 2]
    with pytest.raises(UnsupportedModelError, match=r"argument numbers of shape \(1, 6\) has no row for each of 4"):
        step.rows_of({"numbers": torch.zeros(1, 6)}, SELECTED)


def test_shapes_are_compared_at_all_lengths() -> None:
    config = BertConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, vocab_size=50)
    model = BertModel(config)
    stack = transformer_layers(model)
    tables = {5: torch.zeros(1, 5), 9: torch.zeros(1, 9)}

    def run(length: int) -> None:
        hidden = torch.zeros(2, length, 8)
        more = {"always": hidden, "fixed": tables[5], "changing": tables[length], "scalar": torch.tensor(5)}
        for layer in stack.layers:
            with contextlib.suppress(TypeError):  # the layer itself has no use for them
                layer(hidden, None, more)

    found = arguments_per_token(stack, run, 2, (5, 9))
    assert found == {"1.always": True, "1.fixed": False, "1.changing": True, "1.scalar": False}
    assert not any(layer._forward_pre_hooks for layer in stack.layers)


def test_tensors_of_nested_arguments() -> None:
    groups = TokenGroups(torch.ones(1), torch.zeros(1))
    seen = map_tensors([groups, {"a": (torch.ones(2), "word")}, None], lambda tensor, path: (path, len(tensor)))
    assert seen == [TokenGroups(("0.0", 1), ("0.1", 1)), {"a": (("1.a.0", 2), "word")}, None]
    assert not has_row_per_token(torch.zeros(2, 4, 4, 4), 2, 4)  # a mask of every head, for 4 heads and 4 tokens
    assert has_row_per_token(torch.zeros(1, 4, 4), 2, 4) and not has_row_per_token(torch.zeros(3, 4), 2, 4)
