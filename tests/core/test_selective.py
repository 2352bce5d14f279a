"""Outputs and gradients against the definition of the method, in float64."""

import copy
import pickle

import oracle
import pytest
import torch
from conftest import tiny_llama_config
from selective_cases import (
    BATCH,
    CASES,
    LENGTH,
    assert_close,
    assert_same_gradients,
    build,
    call,
    definition,
    draw,
    padded_batch,
    rows,
)
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from tokentune import apply_tokentune, remove_tokentune
from tokentune.core.saved_tensors.saved_bytes import SavedForBackward


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_definition_for_every_count(name: str, side: str) -> None:
    model = build(name)
    patched = apply_tokentune(copy.deepcopy(model), verify=False)
    ids, mask = padded_batch(side)
    for count in range(1, LENGTH + 1):
        positions = draw(count, first=name.startswith("bert"))
        if name == "llama" and LENGTH - 2 not in positions[0]:  # the mean needs a target: row 0 has no padding
            positions[0, -1] = LENGTH - 2
            positions = positions.sort(dim=1).values
        expected, loss, labels = definition(name, model, ids, mask, positions)
        expected_gradients = oracle.gradients(model, loss)
        output, found_loss = call(patched, ids, mask, labels, positions)
        assert output.shape == expected.shape
        real = rows(mask[..., None], positions)[..., 0].bool() if output.ndim == 3 else slice(None)
        assert_close(output[real], expected[real], f"output at K = {count}")
        assert_close(found_loss, loss, f"loss at K = {count}")
        assert_same_gradients(oracle.gradients(patched, found_loss), expected_gradients)


@pytest.mark.parametrize(
    ("name", "attention"), [("llama", "sdpa"), ("bert-classes", "sdpa"), ("bert-classes", "eager")]
)
def test_attention_implementations(name: str, attention: str) -> None:
    model = build(name, attention)
    ids, mask = padded_batch()
    positions = draw(5, first=True)
    _, loss, labels = definition(name, model, ids, mask, positions)
    expected = oracle.gradients(model, loss)
    apply_tokentune(model, verify=False)
    _, found = call(model, ids, mask, labels, positions)
    assert_same_gradients(oracle.gradients(model, found), expected)
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_finished_masks_are_honored(kind: str) -> None:
    model = build("llama")
    ids, _ = padded_batch()
    seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril() & (torch.rand(BATCH, 1, LENGTH, LENGTH) > 0.2)
    seen |= torch.eye(LENGTH, dtype=torch.bool)
    full = seen if kind == "bool" else torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -1e30)
    positions = draw(4, first=False)
    with oracle.constants_outside(model, positions, oracle.LLAMA):
        expected = rows(model(ids, attention_mask=full).logits, positions)
    apply_tokentune(model, verify=False)
    found = model(ids, attention_mask=full, selected_positions=positions).logits
    assert_close(found, expected, "logits")
    gradients = [oracle.gradients(model, output.pow(2).sum()) for output in (expected, found)]
    assert_same_gradients(gradients[1], gradients[0])


def test_all_tokens_selected_is_ordinary_training() -> None:
    model = build("llama")
    ids, mask = padded_batch()
    labels = ids.masked_fill(mask == 0, -100)
    ordinary = model(ids, attention_mask=mask, labels=labels)
    expected = oracle.gradients(model, ordinary.loss)
    apply_tokentune(model, verify=False)
    positions = torch.arange(LENGTH).expand(BATCH, -1)
    found = model(ids, attention_mask=mask, labels=labels, selected_positions=positions)
    assert_close(found.loss, ordinary.loss, "loss")
    assert_same_gradients(oracle.gradients(model, found.loss), expected)


def test_forward_values_do_not_depend_on_the_selection() -> None:
    model = apply_tokentune(build("llama"), verify=False)
    ids, mask = padded_batch()
    first, second = torch.tensor([[0, 2, 4]] * BATCH), torch.tensor([[1, 2, 3]] * BATCH)
    one = model(ids, attention_mask=mask, selected_positions=first).logits[:, 1]
    two = model(ids, attention_mask=mask, selected_positions=second).logits[:, 1]
    assert_close(one, two, "the row of position 2")


@pytest.mark.parametrize("name", CASES)
def test_without_a_selection_the_model_is_the_original_bit_for_bit(name: str) -> None:
    model = build(name)
    ids, mask = padded_batch()
    before = model(ids, attention_mask=mask)[0]
    apply_tokentune(model, prefix_length=0.3, verify=False)
    model(ids, attention_mask=mask, selected_positions=draw(4, first=True))
    assert torch.equal(model(ids, attention_mask=mask)[0], before)
    remove_tokentune(model)
    assert torch.equal(model(ids, attention_mask=mask)[0], before)


def test_patching_leaves_no_trace(tmp_path) -> None:
    model = build("llama")
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    apply_tokentune(apply_tokentune(model, verify=False), verify=False)  # twice is once
    assert [len(layer._forward_pre_hooks) for layer in model.model.layers] == [1, 1]
    model.save_pretrained(tmp_path)
    assert "tokentune" not in (tmp_path / "config.json").read_text()
    remove_tokentune(model)
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert not [key for m in model.modules() for key in vars(m) if "tokentune" in key]


def test_copies_pickles_and_generation_are_the_originals() -> None:
    model = build("llama").eval()
    del model._loss_function
    ids = padded_batch()[0]
    logits, text = model(ids).logits, model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    apply_tokentune(model, prefix_length=3, verify=False)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        assert torch.equal(copied(ids).logits, logits)
        assert torch.equal(copied.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0), text)
        assert copied(ids, selected_positions=torch.tensor([[1, 4]] * BATCH)).logits.shape[1] == 2


def test_draws_its_own_selection_in_training_with_labels() -> None:
    model = apply_tokentune(build("llama"), prefix_length=0.3, verify=False)
    ids, mask = padded_batch()
    labels = ids.masked_fill(mask == 0, -100)
    assert model(ids, attention_mask=mask, labels=labels).logits.shape[1] == 3  # round(0.3 x 11)
    assert model(ids, attention_mask=mask).logits.shape[1] == LENGTH
    assert model.eval()(ids, attention_mask=mask, labels=labels).logits.shape[1] == LENGTH
    apply_tokentune(model.train(), prefix_length=4)  # patched already: the new setting counts
    assert model(ids, attention_mask=mask, labels=labels).logits.shape[1] == 4


def test_own_draw_keeps_the_meaning_of_num_items_in_batch() -> None:
    model = apply_tokentune(LlamaForCausalLM(tiny_llama_config()), prefix_length=0.5, verify=False)
    ids, mask = padded_batch("left")
    labels = ids.masked_fill(mask == 0, -100)
    items = int((labels[:, 1:] != -100).sum()) - 2  # in two rows the first real token stands behind padding
    losses = [model(ids, attention_mask=mask, labels=labels, num_items_in_batch=items).loss.item() for _ in range(300)]
    full = model.eval()(ids, attention_mask=mask, labels=labels.masked_fill(mask.cumsum(1) == 1, -100)).loss.item()
    spread = torch.tensor(losses).std().item() / len(losses) ** 0.5
    assert abs(sum(losses) / len(losses) - full) < 4 * spread + 0.02 * full


def test_encoders_draw_the_pooled_token() -> None:
    model = apply_tokentune(build("bert-classes"), prefix_length=3, verify=False)
    seen = []
    model.bert.encoder.layer[0].attention.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    ids, mask = padded_batch()
    for _ in range(5):
        model(ids, attention_mask=mask, labels=torch.tensor([0, 1, 0])).loss.backward()
    assert seen == [3, LENGTH - 3] * 5
    with pytest.raises(ValueError, match="position 0 must be selected"):
        model(ids, attention_mask=mask, selected_positions=torch.tensor([[1, 2]] * BATCH))


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([[0, 2], [1, 3]], "2 rows, the batch 3"),
        ([[2, 1]] * BATCH, "ascending"),
        ([[1, 1]] * BATCH, "distinct"),
        ([[1, LENGTH]] * BATCH, "between 0 and 10"),
        ([[-1, 1]] * BATCH, "between"),
        ([[]] * BATCH, "int64"),
    ],
)
def test_positions_that_cannot_be_are_refused(positions: list[list[int]], message: str) -> None:
    model = apply_tokentune(build("llama"), verify=False)
    ids, mask = padded_batch()
    with pytest.raises(ValueError, match=message):
        model(ids, attention_mask=mask, selected_positions=torch.tensor(positions))
    assert model(ids, attention_mask=mask).logits.shape[1] == LENGTH  # nothing is left behind


@pytest.mark.parametrize("argument", ["output_attentions", "output_hidden_states", "logits_to_keep"])
def test_what_would_mix_up_rows_is_refused(argument: str) -> None:
    model = apply_tokentune(build("llama"), verify=False)
    ids, _ = padded_batch()
    with pytest.raises(ValueError, match=argument):
        model(ids, selected_positions=torch.tensor([[1, 4]] * BATCH), **{argument: 1})


def test_a_cache_is_refused() -> None:
    model = apply_tokentune(build("llama"), verify=False)
    ids, _ = padded_batch()
    positions = torch.tensor([[1, 4]] * BATCH)
    with pytest.raises(ValueError, match="past_key_values"):
        model(ids, selected_positions=positions, past_key_values=model(ids, use_cache=True).past_key_values)
    assert model(ids, selected_positions=positions, use_cache=True).past_key_values is None
    with pytest.raises(RuntimeError, match="called `forward` in place of the model"):
        model.forward(ids, selected_positions=positions)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("layer", [0, 1], ids=["in the rest's pass", "in the selected's"])
def test_an_error_inside_a_layer_leaves_the_model_intact(layer: int, error: type[BaseException]) -> None:
    model = apply_tokentune(build("llama"), verify=False)
    ids, mask = padded_batch()
    before = model(ids, attention_mask=mask).logits

    def fail(*_: object) -> None:
        raise error

    handle = model.model.layers[layer].mlp.register_forward_pre_hook(fail)
    with pytest.raises(error):
        model(ids, attention_mask=mask, selected_positions=torch.tensor([[1, 4]] * BATCH))
    handle.remove()
    assert torch.equal(model(ids, attention_mask=mask).logits, before)
    assert model(ids, attention_mask=mask, selected_positions=torch.tensor([[1, 4]] * BATCH)).logits.shape[1] == 2


def test_a_head_that_pools_the_last_token_is_right_and_needs_it() -> None:
    model = LlamaForSequenceClassification(tiny_llama_config(num_labels=2, pad_token_id=0)).double()
    ids, mask = padded_batch()
    ids = ids.masked_fill(mask == 0, 0)
    labels = torch.tensor([0, 1, 1])
    positions = torch.tensor([[2, 6, 10], [1, 2, 7], [0, 3, 4]])  # last non-pad tokens: 10, 7, 4
    with oracle.constants_outside(model, positions, oracle.LLAMA):
        expected = model(ids, attention_mask=mask, labels=labels)
    apply_tokentune(model, prefix_length=3)
    found = model(ids, attention_mask=mask, labels=labels, selected_positions=positions)
    assert (found.logits - expected.logits).abs().max() < 1e-6  # the model's own norms round to float32
    gradients = [oracle.gradients(model, out.loss) for out in (expected, found)]
    for name, gradient in gradients[0].items():
        assert (gradients[1][name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name
    with pytest.raises(ValueError, match="last token that has not the pad token's id"):
        model(ids, attention_mask=mask, labels=labels, selected_positions=positions - (positions == 7).long())
    model(ids, attention_mask=mask, labels=labels).loss.backward()  # its own draw holds it


def test_saves_what_the_selection_is_meant_to_save() -> None:
    """Every token-wise activation shrinks to a quarter of the rows; joined keys and values keep all of them."""
    config = tiny_llama_config(hidden_size=64, intermediate_size=128, num_hidden_layers=4)
    model = LlamaForCausalLM(config)
    ids = torch.randint(3, 90, (2, 64))
    counts = {}
    apply_tokentune(model, verify=False)
    for k in (16, 64):
        with SavedForBackward(model) as saved:
            model(ids, labels=ids, selected_positions=torch.arange(k).expand(2, -1))
        counts[k] = saved.bytes
    assert counts[16] < 0.40 * counts[64]


def test_every_token_selected_costs_what_ordinary_training_costs() -> None:
    model = build("llama")
    ids, mask = padded_batch()
    labels = ids.masked_fill(mask == 0, -100)
    everything = torch.arange(LENGTH).expand(BATCH, -1)
    with SavedForBackward(model) as plain:
        expected = model(ids, attention_mask=mask, labels=labels)
    apply_tokentune(model, verify=False)
    with SavedForBackward(model) as whole:
        found = model(ids, attention_mask=mask, labels=labels, selected_positions=everything)
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(found.logits, expected.logits)
    assert whole.bytes == plain.bytes
    with pytest.raises(ValueError, match="distinct and ascending"):
        model(ids, attention_mask=mask, labels=labels, selected_positions=everything.flip(1))
