"""Others' forward hooks on a layer: they see and change all of its rows, as in the unmodified model."""

import copy
from collections.abc import Callable
from functools import partial

import oracle
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import LoraConfig, get_peft_model
from selective_cases import CASES, LENGTH, assert_close, assert_same_gradients, build, loss64, padded_batch, rows
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from tokentune import UnsupportedModelError, apply_tokentune, remove_tokentune
from tokentune.core.compat import foreign_hooks
from tokentune.core.groups import TokenGroups
from tokentune.core.scoring_pass import ScoringOptions

POSITIONS = torch.tensor([[0, 2, 5, 9], [0, 3, 4, 6], [0, 1, 2, 4]])


def steer(layer: nn.Module, args: tuple, output: Tensor) -> Tensor:
    """A vector, as for steering a model, that is trained itself."""
    return output + layer.vector


def late(layer: nn.Module, args: tuple, output: Tensor) -> Tensor:
    """From a place in the sequence on."""
    changed = output.clone()
    changed[:, 4:] *= 1.5
    return changed


def centred(layer: nn.Module, args: tuple, output: Tensor) -> Tensor:
    """Mixes tokens, to which those of the rest are constants."""
    return output - 0.5 * output.mean(1, keepdim=True)


def centred_by_definition(layer: nn.Module, args: tuple, output: Tensor) -> Tensor:
    chosen = oracle.chosen_mask(POSITIONS, LENGTH)[..., None]
    return centred(layer, args, torch.where(chosen, output, output.detach()))


def before(layer: nn.Module, args: tuple, kwargs: dict) -> tuple:
    hidden = args[0]
    return (hidden * torch.linspace(0.5, 1.5, hidden.shape[1], dtype=hidden.dtype)[:, None], *args[1:]), kwargs


class Scaled:
    """Not a function."""

    def __call__(self, layer: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output * 2


HOOKS = {
    "steer": steer,
    "late": late,
    "centred": centred,
    "before": before,
    "object": Scaled(),
    "partial": partial(late),
}


def put(model: nn.Module, family: tuple, index: int, hook: Callable, options: dict) -> None:
    layers = next(m for n, m in model.named_modules() if n.endswith(family[0]) and isinstance(m, nn.ModuleList))
    layer = layers[index]
    if hook is steer and not hasattr(layer, "vector"):
        layer.vector = nn.Parameter(torch.linspace(-1, 1, 32, dtype=torch.float64))
    if hook is before:
        layer.register_forward_pre_hook(hook, with_kwargs=True, **options)
    else:
        layer.register_forward_hook(hook, **options)


def defined(name: str, model: nn.Module, ids: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    with oracle.constants_outside(model, POSITIONS, CASES[name][2]):
        out = model(ids, attention_mask=mask)
    output = rows(out.logits if name == "llama" else out.last_hidden_state, POSITIONS)
    return output, oracle.gradients(model, loss_of(output))


def loss_of(output: Tensor) -> Tensor:
    return (output * torch.linspace(-1, 1, output[0].numel(), dtype=output.dtype).view(output.shape[1:])).sum()


@pytest.mark.parametrize("order", ["before", "after", "prepended"])
@pytest.mark.parametrize(
    "hook",
    [steer, late, centred, before, Scaled(), partial(late)],
    ids=lambda hook: getattr(hook, "__name__", type(hook).__name__),
)
@pytest.mark.parametrize(("name", "index"), [("llama", 0), ("llama", 1), ("bert-bare", 0), ("bert-bare", 1)])
def test_others_hooks_work_as_ever(name: str, index: int, hook: Callable, order: str) -> None:
    """At the first layer and at the last; put on before the model was patched, or afterwards."""
    model, (ids, mask) = build(name), padded_batch()
    family = CASES[name][2]
    plain = copy.deepcopy(model)
    put(plain, family, index, centred_by_definition if hook is centred else hook, {})
    if order == "before":
        put(model, family, index, hook, {})
    apply_tokentune(model, verify=False)
    if order != "before":
        put(model, family, index, hook, {"prepend": order == "prepended"})
    expected, gradients = defined(name, plain, ids, mask)
    for _ in range(2):  # the second step finds the hooks in their new order
        out = model(ids, attention_mask=mask, selected_positions=POSITIONS)
        output = out.logits if name == "llama" else out.last_hidden_state
        real = rows(mask, POSITIONS).bool()
        assert_close(output[real], expected[real], "outputs")
        assert_same_gradients(oracle.gradients(model, loss_of(output)), gradients)
    without = remove_tokentune(model)(ids, attention_mask=mask)
    again = plain(ids, attention_mask=mask)
    assert torch.equal(without[0], again[0])


def test_hooks_on_every_layer_with_checkpointing() -> None:
    model, (ids, mask) = build("llama"), padded_batch()
    plain = copy.deepcopy(model)
    for index, hook in ((0, late), (0, before), (1, steer), (1, late)):
        put(model, oracle.LLAMA, index, hook, {})
        put(plain, oracle.LLAMA, index, hook, {})
    model.loss_function = plain.loss_function = loss64
    expected, gradients = defined("llama", plain, ids, mask)
    apply_tokentune(model, chunked_loss=False)
    model.activation_checkpointing_enable()
    for rest in ("auto", "keys_values", "hidden_states"):
        apply_tokentune(model, checkpoint_rest=rest, chunked_loss=False)
        output = model(ids, attention_mask=mask, selected_positions=POSITIONS).logits
        real = rows(mask, POSITIONS).bool()
        assert_close(output[real], expected[real], "outputs")
        assert_same_gradients(oracle.gradients(model, loss_of(output)), gradients)
    apply_tokentune(model, checkpoint_rest="segments")
    with pytest.raises(UnsupportedModelError, match="without the hooks that others put on"):
        model(ids, attention_mask=mask, selected_positions=POSITIONS)


def test_a_scoring_pass_keeps_nothing_that_hooks_could_see() -> None:
    model, (ids, mask) = build("llama"), padded_batch()
    model.__dict__.pop("_loss_function", None)
    put(model, oracle.LLAMA, 0, late, {})
    apply_tokentune(model, 4, scoring_pass=ScoringOptions(), verify=False)
    with pytest.raises(UnsupportedModelError, match="others' hooks on the layers"):
        model(ids, attention_mask=mask, labels=ids)


def test_hooks_that_only_read_see_the_sequence() -> None:
    model, (ids, mask) = build("llama"), padded_batch()
    plain, seen = copy.deepcopy(model), {}
    apply_tokentune(model, verify=False)
    for name, one in (("plain", plain), ("patched", model)):
        seen[name] = []
        for layer in one.model.layers:
            layer.register_forward_hook(lambda layer, args, output, to=seen[name]: to.append((args[0], output)))
    with torch.no_grad():
        plain(ids, attention_mask=mask)
        model(ids, attention_mask=mask, selected_positions=POSITIONS)
    for (_, output), (_, expected) in zip(seen["patched"], seen["plain"], strict=True):
        assert output.shape == (len(ids), LENGTH, 32)
        assert_close(output[mask.bool()], expected[mask.bool()], "what a hook sees")


def test_without_hooks_of_others_the_pair_travels() -> None:
    """Only what has to be is copied: the model's own hooks and engines' are used to pairs."""
    model, (ids, mask) = apply_tokentune(build("llama"), verify=False), padded_batch()
    seen = []

    def engine(layer: nn.Module, args: tuple, output: object) -> None:
        seen.append(type(output))

    engine.__module__ = "torch.distributed.somewhere"
    model.model.layers[0].register_forward_hook(engine)
    model(ids, attention_mask=mask, selected_positions=POSITIONS)
    assert seen == [TokenGroups]


# ------------------------------------------------------------------------------------------ hooks that see some tokens


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    texts: list[str] = []
    monkeypatch.setattr(
        foreign_hooks.logger, "warning_once", lambda text: texts.append(text) if text not in texts else 0
    )
    return texts


def _scaled_by_place(module: nn.Module, args: tuple, output: object) -> None:
    """Stands for a hook that is another one for a part of the tokens."""


def run(model: nn.Module) -> None:
    ids, mask = padded_batch()
    model(input_ids=ids, attention_mask=mask, selected_positions=POSITIONS)


PARTS = {
    "llama": {
        "model.layers.1.mlp": "once per group",
        "model.layers.0.self_attn": "once per group",
        "model.layers.1.input_layernorm": "once per group",
        "model.norm": "the selected rows alone",
        "lm_head": "the selected rows alone",
        "model": "the selected rows alone",
    },
    "bert-masked-lm": {
        "bert.encoder.layer.0.output.LayerNorm": "once per group",
        "cls.predictions.transform.LayerNorm": "the selected rows alone",
        "bert.encoder": "the selected rows alone",
    },
}


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize(("name", "part"), [(name, part) for name, parts in PARTS.items() for part in parts])
def test_hooks_on_parts_are_told_of(name: str, part: str, order: str, told: list[str]) -> None:
    """Once, when the model is patched or in the first step."""
    model = build(name)
    if order == "after":
        apply_tokentune(model, verify=False)
    model.get_submodule(part).register_forward_hook(_scaled_by_place)
    if order == "before":
        apply_tokentune(model, verify=False)
    assert len(told) == (order == "before")
    run(model)
    run(model)
    assert len(told) == 1
    assert f"_scaled_by_place on {part} " in told[0] and PARTS[name][part] in told[0] and "layer itself" in told[0]


def test_replaced_forwards_and_global_hooks_are_told_of(told: list[str]) -> None:
    model = build("llama")
    layer, attention = model.model.layers[0], model.model.layers[1].self_attn
    for module in (layer, attention):
        module.forward = partial(lambda own, *args, **kwargs: own(*args, **kwargs), module.forward)
    handle = register_module_forward_hook(_scaled_by_place)
    try:
        apply_tokentune(model, verify=False)
    finally:
        handle.remove()
    assert [f"the forward put on model.layers.{n} is called once per group" in "".join(told) for n in (0, 1)] == [1, 0]
    assert "the forward put on model.layers.1.self_attn is" in "".join(told)
    assert "global module hook _scaled_by_place is called once per group" in "".join(told) and len(told) == 3


def test_a_pre_hook_with_keywords_and_an_object_are_told_of(told: list[str]) -> None:
    model = build("llama")
    model.model.layers[0].mlp.register_forward_pre_hook(before, with_kwargs=True)
    model.model.layers[1].mlp.register_forward_hook(Scaled())
    apply_tokentune(model, verify=False)
    assert ["before on model.layers.0.mlp" in told[0], "Scaled on model.layers.1.mlp" in told[1]] == [True, True]


@pytest.mark.parametrize("which", ["lora", "requires_grad", "layer", "engine", "embedding", "wrapper", "wholes"])
def test_hooks_that_see_all_they_need_are_not_told_of(which: str, told: list[str]) -> None:
    model = build("bert-classes" if which == "wholes" else "llama")
    if which == "lora":
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    elif which == "requires_grad":
        model.enable_input_require_grads()
    elif which == "layer":
        model.model.layers[0].register_forward_hook(_scaled_by_place)
    elif which == "embedding":
        model.model.embed_tokens.register_forward_hook(_scaled_by_place)
    elif which == "wrapper":
        for module in list(model.modules()):
            add_hook_to_module(module, ModelHook())
    elif which == "wholes":  # its head gets the pooled token of each sequence
        model.classifier.register_forward_hook(_scaled_by_place)
    else:
        fully_sharded = partial(lambda *args: None)
        fully_sharded.func.__module__ = "torch.distributed.fsdp.somewhere"
        model.model.norm.register_forward_hook(fully_sharded)
    apply_tokentune(model, verify=False)
    run(model)
    assert told == []
