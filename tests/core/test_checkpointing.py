"""Selective checkpointing: the same gradients to the last bit, dropout included, for exactly the bytes it promises."""

import copy
from contextlib import ExitStack
from types import SimpleNamespace

import oracle
import pytest
import torch
from conftest import tiny_llama_config
from peft import LoraConfig, get_peft_model
from selective_cases import BATCH, CASES, LENGTH, assert_same_gradients, build, definition, draw, padded_batch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, LlamaModel

from tokentune import UnsupportedModelError, apply_tokentune
from tokentune.core.attention.skipped_queries import skipped_query_projections
from tokentune.core.checkpointing import CHECKPOINT_REST, _Segment, checkpoint_layers, plan_segments
from tokentune.core.saved_tensors.saved_bytes import SavedForBackward

LAYERS = 5
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")


def with_checkpointing(model: nn.Module, rest: str = "auto", **options: object) -> nn.Module:
    model = apply_tokentune(model, verify=False, checkpoint_rest=rest)
    model.activation_checkpointing_enable(**options)
    return model


def run(model: nn.Module, positions: Tensor, ids: Tensor, mask: Tensor, labels: Tensor | None = None) -> tuple:
    """Loss, gradients by name, and the random number that comes next: a step must not use up more of them."""
    torch.manual_seed(7)
    labels = {} if labels is None else {"labels": labels}
    out = model(input_ids=ids, attention_mask=mask, selected_positions=positions, **labels)
    loss = out.loss if labels else (out.last_hidden_state * torch.linspace(-1, 1, 32)).sum()
    following = torch.rand(1)
    loss.backward()
    return loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, following


def assert_identical(found: tuple, expected: tuple) -> None:
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[2], expected[2])
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert torch.equal(found[1][name], gradient), name


@pytest.mark.parametrize("rest", CHECKPOINT_REST)
@pytest.mark.parametrize("name", ["llama", "bert-classes"])
def test_gradients_follow_the_definition(name: str, rest: str) -> None:
    model = build(name, num_hidden_layers=LAYERS)
    ids, mask = padded_batch()
    positions = draw(5, first="bert" in name)
    _, loss, labels = definition(name, model, ids, mask, positions)
    expected = oracle.gradients(model, loss)
    model = with_checkpointing(model, rest)
    found = model(ids, attention_mask=mask, labels=labels, selected_positions=positions).loss
    assert_same_gradients(oracle.gradients(model, found), expected)


@pytest.mark.parametrize("rest", CHECKPOINT_REST)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CASES)
def test_nothing_changes_but_the_memory(name: str, side: str, dropout: float, rest: str) -> None:
    if "bert" in name:
        changes = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    else:
        changes = {"attention_dropout": dropout}
    model = build(name, num_hidden_layers=LAYERS, **changes)
    ids, mask = padded_batch(side)
    positions = draw(4, first="bert" in name)
    labels = {"bert-classes": torch.tensor([0, 1, 1]), "llama-bare": None, "bert-bare": None}.get(name, ids % 2)
    expected = run(apply_tokentune(copy.deepcopy(model), verify=False), positions, ids, mask, labels)
    assert_identical(run(with_checkpointing(model, rest), positions, ids, mask, labels), expected)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("rest", CHECKPOINT_REST)
def test_adapters_with_dropout_in_every_precision(rest: str, precision: str) -> None:
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    base = LlamaForCausalLM(tiny_llama_config(num_hidden_layers=LAYERS)).to(dtype)
    names = ["q_proj", "k_proj", "v_proj", "down_proj"]
    config = LoraConfig(r=4, lora_dropout=0.2, target_modules=names, task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(base, config).train()
    ids, mask = padded_batch()
    positions, results = draw(4, first=False), []
    for checkpointed in (False, True):
        each = copy.deepcopy(model)
        apply_tokentune(each, verify=False, checkpoint_rest=rest)
        if checkpointed:
            each.get_base_model().activation_checkpointing_enable()
            each.get_base_model().disable_input_require_grads()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast"):
            results.append(run(each, positions, ids, mask, ids))
    assert_identical(results[1], results[0])
    assert len(results[0][1]) == 2 * len(names) * LAYERS
    assert all(gradient.abs().sum() > 0 for gradient in results[0][1].values())


def saved_bytes(layers: int, rest: str | None, heads: int, count: int = 16, method: str = "tokentune") -> int:
    """What one forward pass of a bare float32 Llama keeps: 2 x 64 tokens, hidden size 64, head size 16."""
    config = tiny_llama_config(
        hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_key_value_heads=heads
    )
    model = LlamaModel(config).train()
    ids = torch.randint(3, 90, (2, 64))
    kwargs = {}
    if method == "tokentune":
        model = apply_tokentune(model, verify=False, checkpoint_rest=rest or "auto")
        kwargs["selected_positions"] = torch.arange(count).expand(2, -1)
    if rest is not None:
        model.activation_checkpointing_enable()
    with SavedForBackward(model) as saved:
        model(ids, **kwargs)
    return saved.bytes


@pytest.mark.parametrize(("heads", "smaller"), [(1, "keys_values"), (4, "hidden_states")])
def test_bytes_of_a_layer(heads: int, smaller: str) -> None:
    """Each added layer keeps its selected input and the rest's part, no byte more; `auto` takes the smaller part."""
    selected, rest, hidden = 2 * 16, 2 * 48, 64
    expected = {
        "keys_values": 4 * (selected * hidden + rest * 2 * heads * 16),
        "hidden_states": 4 * (selected + rest) * hidden,
    }
    expected["auto"] = expected[smaller]
    for kind, size in expected.items():
        assert saved_bytes(7, kind, heads) - saved_bytes(6, kind, heads) == size, kind
    assert expected["auto"] == min(expected.values())
    checkpointing = saved_bytes(7, "auto", heads, method="plain") - saved_bytes(6, "auto", heads, method="plain")
    assert checkpointing == 4 * (selected + rest) * hidden


def test_bytes_of_segments() -> None:
    """Nine layers are three segments: nine selected inputs, three of the rest. Four layers: two segments of two."""
    selected, rest = 4 * 2 * 16 * 64, 4 * 2 * 48 * 64
    assert saved_bytes(9, "segments", 4) - saved_bytes(4, "segments", 4) == 5 * selected + rest


def test_auto_takes_segments_where_they_halve_what_is_kept() -> None:
    """25 layers without grouped heads, 4 of 64 tokens selected: the first of each segment, and no other rest."""
    few = {rest: saved_bytes(25, rest, 4, count=4) for rest in CHECKPOINT_REST}
    assert few["auto"] == few["segments"] < few["hidden_states"] / 3
    for heads, count in ((1, 4), (4, 32)):  # grouped heads; half of the tokens
        sizes = {rest: saved_bytes(25, rest, heads, count=count) for rest in CHECKPOINT_REST}
        assert sizes["auto"] == min(sizes["keys_values"], sizes["hidden_states"]) > sizes["segments"]


def test_gradients_of_a_deep_model_whose_segments_auto_chose() -> None:
    model = build("llama", num_hidden_layers=25, num_key_value_heads=4, attention_dropout=0.3)
    ids, mask = padded_batch()
    positions = draw(1, first=False)
    checkpointed = with_checkpointing(copy.deepcopy(model))
    expected = run(apply_tokentune(model, verify=False), positions, ids, mask, ids)
    with SavedForBackward(checkpointed) as auto:
        assert_identical(run(checkpointed, positions, ids, mask, ids), expected)
    segments = with_checkpointing(copy.deepcopy(model), "segments")
    with SavedForBackward(segments) as asked:
        run(segments, positions, ids, mask, ids)
    assert auto.bytes == asked.bytes


@pytest.mark.parametrize(
    ("layers", "selected", "unselected", "keys_values", "expected"),
    [
        (24, 1, 19, 38, (6, True)),  # 24 + 4 x 19 + 6 x 19 = 214, of 24 x 20 = 480; five layers: as much, one rest more
        (24, 1, 19, 9.5, (8, False)),  # 24 + 3 x 19 + 8 x 9.5 = 157, of 24 x 10.5 = 252
        (24, 6, 14, 28, (6, False)),  # 144 + 10 x 14 = 284, of 480
        (2, 1, 19, 38, (2, False)),
        (1, 1, 19, 38, (1, False)),
    ],
)
def test_how_long_segments_are(
    layers: int, selected: float, unselected: float, keys_values: float, expected: tuple[int, bool]
) -> None:
    assert plan_segments(layers, selected, unselected, keys_values) == expected


def test_a_backward_pass_holds_one_segment_at_a_time(monkeypatch) -> None:
    """Nine layers: a segment's three pairs of keys and values are made at once, and gone before the next one's are."""
    model = with_checkpointing(build("llama", num_hidden_layers=9), "segments")
    ids, mask = padded_batch()
    loss = model(ids, attention_mask=mask, labels=ids, selected_positions=draw(4, first=False)).loss
    segments, held = [], []
    take = _Segment.take

    def watched(self: _Segment, *args: object) -> tuple[Tensor, Tensor]:
        found = take(self, *args)
        segments.append(self)
        held.append(sum(len(segment.held) for segment in {id(s): s for s in segments}.values()))
        return found

    monkeypatch.setattr(_Segment, "take", watched)
    loss.backward()
    assert held == [2, 1, 0] * 3


def test_every_token_selected_is_ordinary_checkpointing() -> None:
    model = build("llama", num_hidden_layers=LAYERS)
    ids, mask = padded_batch()
    plain = copy.deepcopy(model)
    plain.activation_checkpointing_enable()
    labels = ids.masked_fill(mask == 0, -100)
    expected = oracle.gradients(plain, plain(ids, attention_mask=mask, labels=labels).loss)
    everything = torch.arange(LENGTH).expand(BATCH, -1)
    for rest in CHECKPOINT_REST:
        each = with_checkpointing(copy.deepcopy(model), rest)
        found = each(ids, attention_mask=mask, labels=labels, selected_positions=everything).loss
        assert_same_gradients(oracle.gradients(each, found), expected)


def test_ordinary_forwards_stay_what_they_were() -> None:
    """Without a selection: the model's own checkpointing; in evaluation: none. Errors leave nothing behind."""
    model = build("llama")
    ids, mask = padded_batch()
    before = model(ids, attention_mask=mask).logits
    plain = oracle.gradients(model, model(ids, attention_mask=mask, labels=ids).loss)
    with_checkpointing(model)
    function = model.model.layers[0]._gradient_checkpointing_func
    assert torch.equal(model(ids, attention_mask=mask).logits, before)
    assert_same_gradients(oracle.gradients(model, model(ids, attention_mask=mask, labels=ids).loss), plain)
    positions = draw(3, first=False)
    with torch.no_grad():
        model(ids, attention_mask=mask, selected_positions=positions)
    handle = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(ids, attention_mask=mask, selected_positions=positions)
    handle.remove()
    assert model.model.layers[0]._gradient_checkpointing_func is function
    assert torch.equal(model(ids, attention_mask=mask).logits, before)
    model.gradient_checkpointing_disable()
    with SavedForBackward(model) as saved:
        model(ids, attention_mask=mask, labels=ids, selected_positions=positions)
    model.activation_checkpointing_enable()
    with SavedForBackward(model) as checkpointed:
        model(ids, attention_mask=mask, labels=ids, selected_positions=positions)
    assert checkpointed.bytes < 0.6 * saved.bytes


@pytest.mark.parametrize("rest", CHECKPOINT_REST)
def test_graphs_that_live_side_by_side_or_longer(rest: str) -> None:
    """Two forwards before their backwards, in either order, and one graph used twice."""
    model = with_checkpointing(build("bert-classes", num_hidden_layers=LAYERS, hidden_dropout_prob=0.2), rest)
    ids, mask = padded_batch()
    batches = [(ids, mask), (ids.flip(0), mask.flip(0))]
    labels, positions = torch.tensor([0, 1, 1]), draw(4, first=True)

    def losses() -> list[Tensor]:
        torch.manual_seed(3)
        return [model(i, attention_mask=m, labels=labels, selected_positions=positions).loss for i, m in batches]

    expected = [oracle.gradients(model, loss) for loss in losses()]
    late = losses()
    assert_same_gradients(oracle.gradients(model, late[1]), expected[1])
    assert_same_gradients(oracle.gradients(model, late[0]), expected[0])
    model.zero_grad()
    again = losses()[0]
    again.backward(retain_graph=True)
    again.backward()
    doubled = {name: gradient / 2 for name, gradient in _gradients(model).items()}
    assert_same_gradients(doubled, expected[0])


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("options", [{"every_n_layers": 2}, {"offload": True}])
def test_the_models_own_options(options: dict) -> None:
    model = build("llama", num_hidden_layers=LAYERS, attention_dropout=0.2)
    ids, mask = padded_batch()
    positions = draw(4, first=False)
    expected = run(apply_tokentune(copy.deepcopy(model), verify=False), positions, ids, mask, ids)
    assert_identical(run(with_checkpointing(model, **options), positions, ids, mask, ids), expected)


def test_what_cannot_be_checkpointed_is_refused() -> None:
    with pytest.raises(ValueError, match="keys_values"):
        apply_tokentune(build("llama"), checkpoint_rest="everything")
    model = with_checkpointing(build("llama", num_hidden_layers=LAYERS), "segments", every_n_layers=2)
    ids, mask = padded_batch()
    with pytest.raises(UnsupportedModelError, match="every layer"):
        model(ids, attention_mask=mask, selected_positions=draw(4, first=False))
    around = nn.Module()  # a backbone that checkpoints its layers itself
    around.gradient_checkpointing = True
    stack = SimpleNamespace(around=[around], layers=nn.ModuleList([nn.Linear(2, 2)]))
    with pytest.raises(UnsupportedModelError, match="several layers"):
        checkpoint_layers(stack, None, "auto", False, ExitStack())


def test_a_recomputation_makes_no_queries_for_the_rest() -> None:
    """The kept hidden states of the rest are run again for keys and values alone."""
    ids, mask = padded_batch()
    positions = draw(4, first=False)
    rest_rows = LENGTH - positions.shape[1]
    rows_of = {}
    for name in ("q_proj", "k_proj"):
        model = with_checkpointing(build("llama", num_hidden_layers=LAYERS), "hidden_states")
        weight = getattr(model.model.layers[0].self_attn, name).weight
        rows_of[name] = seen = []
        linear = nn.functional.linear

        def counted(hidden: Tensor, w: Tensor, *args: Tensor, linear=linear, weight=weight, seen=seen) -> Tensor:
            seen.extend([hidden.shape[1]] if w is weight else [])
            return linear(hidden, w, *args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nn.functional, "linear", counted)
            run(model, positions, ids, mask, ids % 2)
    assert rows_of["k_proj"].count(rest_rows) == 2 and rows_of["q_proj"].count(rest_rows) == 1
    assert rows_of["k_proj"].count(positions.shape[1]) == rows_of["q_proj"].count(positions.shape[1]) == 2


def test_keys_that_are_made_of_queries_are_found_out() -> None:
    """The verification meets NaN where the projection that was left out is needed after all."""
    model, hidden = build("llama", num_hidden_layers=LAYERS), torch.ones(1, 2, 32).double()
    for layer in model.model.layers:
        with skipped_query_projections(layer):
            attention = layer.self_attn
            assert attention.q_proj(hidden).isnan().all()
            assert not attention.k_proj(hidden).isnan().any()
        assert "forward" not in attention.q_proj.__dict__


def test_projections_with_dropout_or_hooks_run_as_ever() -> None:
    model = get_peft_model(
        LlamaModel(tiny_llama_config()), LoraConfig(target_modules=["q_proj"], lora_dropout=0.5, r=2)
    ).train()
    layer = model.get_base_model().layers[0]
    with skipped_query_projections(layer):
        assert not layer.self_attn.q_proj(torch.ones(1, 2, 32)).isnan().any()
    layer.eval().self_attn.q_proj.register_forward_hook(lambda *_: None)
    with skipped_query_projections(layer):
        assert not layer.self_attn.q_proj(torch.ones(1, 2, 32)).isnan().any()
