"""`answers+q` in a model: each row's gradient is that of its own positions alone, by the definition, in any batch."""

import copy
from typing import Any

import oracle
import pytest
import torch
from conftest import tiny_bert_config, tiny_llama_config
from families import ROUTED, Family
from family_check import Float64, build
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForSequenceClassification,
)

from tokentune import apply_tokentune
from tokentune.core.checkpointing import CHECKPOINT_REST
from tokentune.core.patched import last_draw
from tokentune.core.scoring_pass import ScoringOptions
from tokentune.sampling.sampler import Selection, select_tokens, target_mask
from tokentune.sampling.schedule import Answers

SIZE = 12
# Real tokens of each row, and how many of them, the last ones, are supervised.
ROWS = {
    "padded": [(12, 4), (9, 2), (5, 4), (7, 0)],
    "equal": [(12, 9), (12, 1), (12, 0), (12, 4)],  # padding cannot fill the rows up
    "mixed": [(12, 2), (11, 11), (12, 1), (4, 1)],  # the second one has no prompt
    "whole": [(12, 2), (12, 12), (10, 3)],
}


def llama(**changes: Any) -> nn.Module:
    torch.manual_seed(3)
    return LlamaForCausalLM(tiny_llama_config(**changes)).double().train()


def batch_of(rows: list[tuple[int, int]], side: str = "right", *, causal: bool = True) -> dict[str, Tensor]:
    """Ids, labels and mask of rows whose padding stands on a side, and the positions in the text."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 96, (len(rows), SIZE), generator=generator)
    place = torch.arange(SIZE).expand(len(rows), -1)
    lengths, supervised = (torch.tensor(column)[:, None] for column in zip(*rows, strict=True))
    if side == "left":
        place = place - (SIZE - lengths)
    real = (place >= 0) & (place < lengths)
    labels = (ids if causal else ids % 5).masked_fill(~real | (place < lengths - supervised), -100)
    batch = {"input_ids": ids, "attention_mask": real.long(), "labels": labels}
    return batch | ({"position_ids": place.clamp(min=0)} if causal else {})


def drawn_for(batch: dict[str, Tensor], share: float, *, causal: bool, always: Tensor | None = None) -> tuple:
    """Uniform numbers, and the draw that they give."""
    mask, labels = batch["attention_mask"], batch["labels"]
    uniform = torch.rand(mask.shape, generator=torch.Generator().manual_seed(2))
    targets = None
    if labels.ndim == 2:
        before = torch.cat([torch.zeros_like(mask[:, :1]), mask[:, :-1]], dim=1).bool()
        targets = target_mask(labels.masked_fill(~before, -100) if causal else labels, causal=causal)
    return uniform, select_tokens(mask, Answers(share), targets=targets, always=always, scores=uniform)


def own_positions(batch: dict[str, Tensor], drawn: Selection, row: int) -> Tensor:
    """The row's positions without padding and fillers, counted from its first real token: (1, K_row)."""
    mask, positions = batch["attention_mask"][row], drawn.positions[row]
    own = mask[positions].bool()
    if drawn.fillers is not None:
        own &= ~drawn.fillers[row]
    return (positions[own] - int(mask.argmax()))[None]


def alone(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    real = batch["attention_mask"][row].bool()
    return {name: value[row][real][None] if value.ndim == 2 else value[row, None] for name, value in batch.items()}


def expected_gradients(model: nn.Module, batch: dict[str, Tensor], drawn: Selection) -> dict[str, Tensor]:
    """By the definition, of the mean over the supervised targets of all rows, each row on its own."""
    model, total, count = copy.deepcopy(model), 0.0, 0
    for row in range(len(batch["input_ids"])):
        inputs, positions = alone(batch, row), own_positions(batch, drawn, row)
        labels = inputs.pop("labels")
        targets = int((labels[:, 1:] != -100).sum())
        if targets:
            with oracle.constants_outside(model, positions, oracle.LLAMA), Float64():
                total = total + targets * oracle.next_token_loss(model(**inputs).logits, labels, positions)
            count += targets
    return oracle.gradients(model, total / count) | {"loss": total.detach() / count}


def gradients_of(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    with Float64():
        loss = model(**inputs).loss
        loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None} | {"loss": loss.detach()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert {name for name, value in found.items() if value.any()} == {n for n, v in expected.items() if v.any()}
    scale = max(value.abs().max() for value in expected.values())
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= tolerance * max(value.abs().max(), 1e-3 * scale), name


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("share", [0.0, 0.25])
@pytest.mark.parametrize("rows", ROWS)
def test_each_row_has_the_gradient_of_its_own_positions(rows: str, share: float, side: str) -> None:
    model, batch = llama(), batch_of(ROWS[rows], side)
    uniform, drawn = drawn_for(batch, share, causal=True)
    assert (drawn.fillers is not None) == (rows != "padded")
    expected = expected_gradients(model, batch, drawn)
    apply_tokentune(model, str(Answers(share)), chunked_loss=False)
    assert_same(gradients_of(model, batch | {"selection_draws": uniform}), expected)
    counts = last_draw(model)
    assert counts.supervised == (target_mask(batch["labels"], causal=True) & batch["attention_mask"].bool()).sum()
    assert counts.selected == sum(own_positions(batch, drawn, row).numel() for row in range(len(uniform)))


FAMILIES = [
    Family("Mistral", "MistralForCausalLM", {"sliding_window": 4}),
    Family("Mixtral", "MixtralForCausalLM", ROUTED),
    Family("Gemma 2", "Gemma2ForCausalLM", {"head_dim": 16, "attn_logit_softcapping": 2.0}, "eager"),
    Family("GPT-OSS", "GptOssForCausalLM", {**ROUTED, "head_dim": 16, "sliding_window": 4}, "eager"),
    Family("GPT-2", "GPT2LMHeadModel", layers="h"),
]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_row_s_gradient_does_not_depend_on_its_batch(family: Family) -> None:
    model, batch = build(family), batch_of(ROWS["whole"])
    _, drawn = drawn_for(batch, 0.25, causal=True)
    apply_tokentune(model, chunked_loss=False)
    given = {"selected_positions": drawn.positions, "selection_fillers": drawn.fillers, "num_items_in_batch": 9}
    found, expected = gradients_of(model, batch | given), {}
    for row in range(len(batch["input_ids"])):
        given = {"selected_positions": own_positions(batch, drawn, row), "num_items_in_batch": 9}
        for name, value in gradients_of(model, alone(batch, row) | given).items():
            expected[name] = expected.get(name, 0) + value
    assert_same(found, expected, tolerance=1e-11)


@pytest.mark.parametrize("rows", ROWS)
def test_a_loss_in_chunks(rows: str) -> None:
    model, batch = llama(), batch_of(ROWS[rows])
    uniform, drawn = drawn_for(batch, 0.25, causal=True)
    expected = expected_gradients(model, batch, drawn)
    apply_tokentune(model, "answers+0.25", chunked_loss=True)
    assert_same(gradients_of(model, batch | {"selection_draws": uniform}), expected)


@pytest.mark.parametrize("rest", CHECKPOINT_REST)
@pytest.mark.parametrize("rows", ["equal", "whole"])
def test_checkpointing_gives_the_same_gradients_to_the_last_bit(rows: str, rest: str) -> None:
    """In `whole` every position of the batch is selected, most of them as fillers."""
    batch, found = batch_of(ROWS[rows]), []
    uniform, _ = drawn_for(batch, 0.25, causal=True)
    for checkpointed in (False, True):
        model = apply_tokentune(llama(), "answers+0.25", checkpoint_rest=rest, chunked_loss=False)
        if checkpointed:
            model.activation_checkpointing_enable()
        loss = model(**batch, selection_draws=uniform).loss
        found.append(oracle.gradients(model, loss))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[1][name], gradient) for name, gradient in found[0].items())


def test_hooks_of_others_on_a_layer() -> None:
    model, batch = llama(), batch_of(ROWS["equal"])
    uniform, drawn = drawn_for(batch, 0.25, causal=True)
    expected = expected_gradients(model, batch, drawn)
    apply_tokentune(model, "answers+0.25", chunked_loss=False)
    model.model.layers[0].register_forward_hook(lambda *_: None)
    assert_same(gradients_of(model, batch | {"selection_draws": uniform}), expected)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_fillers_get_no_gradient_at_all(implementation: str) -> None:
    model, batch = llama(attn_implementation=implementation), batch_of(ROWS["whole"])
    uniform, drawn = drawn_for(batch, 0.0, causal=True)
    embedded = model.get_input_embeddings()(batch.pop("input_ids")).detach().requires_grad_()
    apply_tokentune(model, "answers")
    gradients_of(model, batch | {"inputs_embeds": embedded, "selection_draws": uniform})
    with_gradients = embedded.grad.any(-1)
    for row in range(len(uniform)):
        assert with_gradients[row].nonzero().flatten().tolist() == own_positions(batch, drawn, row)[0].tolist()


def test_the_loss_is_that_of_full_training_whatever_the_draw() -> None:
    model, batch = llama(), batch_of(ROWS["mixed"])
    with Float64():
        full = model(**batch).loss
    apply_tokentune(model, "answers+0.25", chunked_loss=False)
    for number_of_targets in (None, 7):
        options = {} if number_of_targets is None else {"num_items_in_batch": torch.tensor(number_of_targets)}
        targets = (batch["labels"][:, 1:] != -100).sum()
        with Float64():
            loss = model(**batch, **options).loss
        assert loss.item() == pytest.approx((full if not options else full * targets / 7).item(), rel=1e-12)


def test_all_tokens_supervised_is_full_training() -> None:
    model, batch = llama(), batch_of([(12, 12), (8, 8)])
    full = gradients_of(model, batch)
    apply_tokentune(model, "answers", chunked_loss=False)
    assert_same(gradients_of(model, batch), full)


# --- encoders ---------------------------------------------------------------------------------------------------------


def test_token_labels() -> None:
    torch.manual_seed(3)
    model = BertForTokenClassification(tiny_bert_config(num_labels=5)).double().train()
    batch = batch_of(ROWS["equal"], causal=False)
    _, drawn = drawn_for(batch, 0.25, causal=False)
    plain, total, count = copy.deepcopy(model), 0.0, 0
    for row in range(len(batch["labels"])):
        inputs, positions = alone(batch, row), own_positions(batch, drawn, row)
        labels = inputs.pop("labels")
        with oracle.constants_outside(plain, positions, oracle.BERT), Float64():
            logits = plain(**inputs).logits
        total = total + cross_entropy(logits[0, positions[0]], labels[0, positions[0]], reduction="sum")
        count += int((labels != -100).sum())
    expected = oracle.gradients(plain, total / count) | {"loss": total.detach() / count}
    apply_tokentune(model)
    given = {"selected_positions": drawn.positions, "selection_fillers": drawn.fillers}
    assert_same(gradients_of(model, batch | given), expected)
    apply_tokentune(model, "answers+0.25", selection="random")
    uniform, _ = drawn_for(batch, 0.25, causal=False)
    assert_same(gradients_of(model, batch | {"selection_draws": uniform}), expected)


def test_all_tokens_labelled_is_full_training_to_the_bit() -> None:
    model = BertForTokenClassification(tiny_bert_config(num_labels=5)).train()
    batch = batch_of([(12, 12), (12, 12)], causal=False)
    full = gradients_of(model, batch)
    apply_tokentune(model, "answers")
    found = gradients_of(model, batch)
    assert found.keys() == full.keys() and all(torch.equal(found[name], full[name]) for name in full)


def test_a_pooled_head() -> None:
    torch.manual_seed(3)
    model = BertForSequenceClassification(tiny_bert_config(num_labels=3)).double().train()
    batch = batch_of([(12, 0), (9, 0), (3, 0)], causal=False) | {"labels": torch.tensor([0, 2, 1])}
    first = torch.zeros(3, SIZE, dtype=torch.bool)
    first[:, 0] = True
    uniform, drawn = drawn_for(batch, 0.3, causal=False, always=first)
    assert [own_positions(batch, drawn, row).numel() for row in range(3)] == [4, 3, 2]
    plain = copy.deepcopy(model)
    logits = []
    for row in range(3):
        inputs = alone(batch, row)
        inputs.pop("labels")
        with oracle.constants_outside(plain, own_positions(batch, drawn, row), oracle.BERT), Float64():
            logits.append(plain(**inputs).logits)
    loss = cross_entropy(torch.cat(logits), batch["labels"])
    expected = oracle.gradients(plain, loss) | {"loss": loss.detach()}
    apply_tokentune(model, "answers+0.3", selection="random")
    assert_same(gradients_of(model, batch | {"selection_draws": uniform}), expected)


def test_a_head_that_averages_over_all_tokens_takes_fillers_as_constants() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    tokens = {f"{name}_token_id": n for n, name in enumerate(("pad", "bos", "eos", "cls", "sep"))}
    config = ModernBertConfig(**sizes, **tokens, classifier_pooling="mean", num_labels=3, vocab_size=96)
    model = apply_tokentune(ModernBertForSequenceClassification(config).double().train())
    ids = torch.randint(5, 96, (2, SIZE))
    positions, fillers = torch.tensor([[0, 3, 5, 7], [0, 2, 4, 6]]), torch.zeros(2, 4, dtype=torch.bool)
    fillers[1, 1:3] = True
    together = {"selected_positions": positions, "selection_fillers": fillers}
    together |= {"input_ids": ids, "labels": torch.tensor([0, 2])}
    found = gradients_of(model, together)
    expected: dict[str, Tensor] = {}
    for row, own in enumerate(([0, 3, 5, 7], [0, 6])):
        inputs = {"input_ids": ids[row, None], "labels": together["labels"][row, None]}
        for name, value in gradients_of(model, inputs | {"selected_positions": torch.tensor([own])}).items():
            expected[name] = expected.get(name, 0) + value / 2
    assert_same(found, expected)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selection": "reference"}, "counts of its own"),
        ({"selection": "loss"}, "scores"),
        ({"scoring_pass": ScoringOptions()}, "scoring pass"),
        ({"prefix_length": "answers+2"}, "share of the other tokens"),
        ({"prefix_length": "answers+0.3:answers"}, "one size"),
    ],
)
def test_refused_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apply_tokentune(llama(), **{"prefix_length": "answers+0.1"} | options)


def test_refused_fillers() -> None:
    model, batch = apply_tokentune(llama(), chunked_loss=False), batch_of(ROWS["equal"])
    positions = torch.arange(SIZE).expand(4, -1).contiguous()
    fillers = torch.ones(4, SIZE, dtype=torch.bool)
    for wrong, message in ((fillers, "positions with a loss"), (fillers[:, 1:], "shape"), (fillers.long(), "bool")):
        with pytest.raises(ValueError, match=message):
            model(**batch, selected_positions=positions, selection_fillers=wrong)
