"""The corrected gradient against its definition, written out pair by pair in float64."""

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import tiny_bert_config, tiny_llama_config
from families import ROUTED, Family
from family_check import Float64, batch_for, build, selection, step
from peft import LoraConfig, get_peft_model
from selective_cases import assert_same_gradients
from torch import Tensor, nn
from transformers import BertModel, LlamaForCausalLM

from tokentune import UnsupportedModelError, apply_tokentune
from tokentune.core import selective_layer as selective
from tokentune.core.attention import blockwise as blocks
from tokentune.core.attention import correction
from tokentune.core.attention import kernels as attention
from tokentune.core.attention.correction import OwnTokens
from tokentune.core.attention.masks import GroupMask, mask_from_functions, mask_from_tensor
from tokentune.core.checkpointing import CHECKPOINT_REST
from tokentune.core.profile import Profile, Rows
from tokentune.core.saved_tensors.saved_bytes import SavedForBackward

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
LLAMA = Family("Llama", "LlamaForCausalLM")
SERVED = [
    LLAMA,
    Family("Llama", "LlamaForCausalLM", attention="eager"),
    Family("Mistral", "MistralForCausalLM", {"sliding_window": 4}),
    Family("Qwen3", "Qwen3ForCausalLM", {"head_dim": 24}),
    Family("Phi-3", "Phi3ForCausalLM", {"sliding_window": 4}),
    Family("Mixtral", "MixtralForCausalLM", ROUTED),
    Family("Granite", "GraniteForCausalLM", {"attention_multiplier": 0.7}),
    Family("Gemma 2", "Gemma2ForCausalLM", {"head_dim": 16, "attn_logit_softcapping": 2.0}, "eager"),
    Family("GPT-OSS", "GptOssForCausalLM", {**ROUTED, "head_dim": 16, "sliding_window": 4}, "eager"),
    Family("GPT-2", "GPT2LMHeadModel", layers="h"),
]


# --- the definition ---------------------------------------------------------------------------------------------------


def chances(positions: Tensor) -> Tensor:
    """Probabilities (B, K) from 0.2 to 1, other ones for each token."""
    return torch.linspace(0.2, 1.0, positions.numel(), dtype=torch.float64).view(positions.shape)


@contextmanager
def corrected(model: nn.Module, family: Family, positions: Tensor, scales: Tensor) -> Iterator[None]:
    """Within it, the unmodified (eager) model's gradients are the corrected ones, with `scales` (B, K).

    Each pair of a query i and a key j has a key and a value of its own: with the gradient times s_j where both are
    selected, as it is where they are the same token, and constant where j is not selected.
    """

    def factors(length: int) -> Tensor:
        found = torch.zeros(len(positions), length, length, dtype=torch.float64)
        for row, places in enumerate(positions.tolist()):
            for i in places:
                for j, scale in zip(places, scales[row].tolist(), strict=True):
                    found[row, i, j] = 1.0 if i == j else scale
        return found[:, None, :, :, None]  # (B, 1, S, S, 1)

    def of_pairs(tensor: Tensor, heads: int) -> Tensor:  # (B, G, S, d) -> (B, H, S, S, d)
        tensor = tensor.repeat_interleave(heads // tensor.shape[1], 1)[:, :, None]
        return tensor.detach() + factors(tensor.shape[3]) * (tensor - tensor.detach())

    def written_out(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        scaling = options.get("scaling") or query.shape[-1] ** -0.5
        scores = (query[:, :, :, None] * of_pairs(key, query.shape[1])).sum(-1) * scaling  # (B, H, S, S)
        if options.get("softcap") is not None:
            scores = torch.tanh(scores / options["softcap"]) * options["softcap"]
        scores = scores + mask
        if options.get("s_aux") is not None:
            sinks = options["s_aux"].view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, sinks], dim=-1)
        weights = scores.softmax(-1)[..., : key.shape[2], None]
        return (weights * of_pairs(value, query.shape[1])).sum(3).transpose(1, 2), None

    class Corrected:
        def get_interface(self, name: str, default: Any) -> Any:
            return written_out

    def hold(layer: nn.Module, args: tuple, kwargs: dict) -> tuple:
        hidden = args[0] if args else kwargs["hidden_states"]
        chosen = torch.zeros(hidden.shape[:2], dtype=torch.bool)
        for row, places in enumerate(positions.tolist()):
            chosen[row, places] = True
        hidden = torch.where(chosen[..., None], hidden, hidden.detach())
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

    layers = next(m for n, m in model.named_modules() if f".{n}".endswith(f".{family.layers}"))
    file = sys.modules[type(layers[0]).__module__]
    original, handles = file.ALL_ATTENTION_FUNCTIONS, []
    try:
        file.ALL_ATTENTION_FUNCTIONS = Corrected()
        handles = [layer.register_forward_pre_hook(hold, with_kwargs=True) for layer in layers]
        yield
    finally:
        file.ALL_ATTENTION_FUNCTIONS = original
        for handle in handles:
            handle.remove()


def defined_gradients(model: nn.Module, family: Family, inputs: dict, positions: Tensor, exponent: float) -> tuple:
    """Loss and gradients by the definition; the model is left as it is."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    labels = torch.full_like(inputs["labels"], -100)
    for row, places in enumerate(positions.tolist()):
        for place in places:
            if place + 1 < labels.shape[1]:
                labels[row, place + 1] = inputs["labels"][row, place + 1]
    with Float64(), corrected(model, family, positions, chances(positions) ** -exponent):
        return step(model, inputs | {"labels": labels}, positions)


def patched_step(model: nn.Module, inputs: dict, positions: Tensor, exponent: float, **options: Any) -> tuple:
    apply_tokentune(model, verify=False, gradient_correction=exponent, **options)
    if "GPT2" in type(model).__name__:  # what the verification would find out
        model._tokentune.profile = Profile(Rows.GATHERED, None)
    given = {"selected_positions": positions, "selection_probabilities": chances(positions)}
    with Float64():
        return step(model, inputs | given, positions)


@pytest.mark.parametrize(
    ("family", "side"),
    [(family, "left") for family in SERVED] + [(family, "right") for family in SERVED[:3]],
    ids=lambda value: f"{value.name}-{value.attention}" if isinstance(value, Family) else value,
)
def test_gradients_follow_the_definition(family: Family, side: str) -> None:
    model = build(family)
    inputs = batch_for(model, side)
    positions = selection(inputs, inputs["input_ids"].shape[1], 6)
    _, expected = defined_gradients(model, family, inputs, positions, 1.0)
    _, uncorrected = defined_gradients(model, family, inputs, positions, 0.0)
    _, found = patched_step(model, inputs, positions, 1.0)
    assert_same_gradients(found, expected)
    name = next(name for name in expected if "embed" in name or "wte" in name)
    assert (expected[name] - uncorrected[name]).norm() > 0.05 * expected[name].norm()  # it is worth comparing


@pytest.mark.parametrize(("count", "exponent"), [(1, 1.0), (2, 0.5), (14, 0.5), (15, 1.0)])
def test_any_number_of_tokens(count: int, exponent: float) -> None:
    model = build(LLAMA)
    inputs = batch_for(model, "right", padded=False)
    positions = torch.rand(3, 15).topk(count).indices.sort().values
    _, expected = defined_gradients(model, LLAMA, inputs, positions, exponent)
    _, found = patched_step(model, inputs, positions, exponent)
    assert_same_gradients(found, expected)


@pytest.mark.parametrize("kernel", ["of CUDA", "one call"])
def test_kernels_that_do_not_tell_their_sums(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernel == "of CUDA":
        monkeypatch.setitem(blocks.KERNELS, "cpu", blocks.KERNELS["cuda"])
    else:
        monkeypatch.setattr(attention, "_in_blocks", lambda *_: False)
    model = build(SERVED[2])
    inputs = batch_for(model, "left")
    positions = selection(inputs, 15, 6)
    _, expected = defined_gradients(model, SERVED[2], inputs, positions, 1.0)
    _, found = patched_step(model, inputs, positions, 1.0)
    assert_same_gradients(found, expected)


def test_adapters_and_chunked_loss() -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(build(LLAMA), lora).double()
    inputs = batch_for(model, "left")
    positions = selection(inputs, 15, 6)
    _, expected = defined_gradients(model, LLAMA, inputs, positions, 1.0)
    _, found = patched_step(model, inputs, positions, 1.0, chunked_loss=True)
    assert any("lora" in name for name in found)
    assert_same_gradients(found, expected)


# --- every way to run it ----------------------------------------------------------------------------------------------


def plain_step(model: nn.Module, inputs: dict, positions: Tensor, exponent: float, **options: Any) -> tuple:
    """Loss, output and gradients as training takes them, without any change of casts."""
    apply_tokentune(model, verify=False, chunked_loss=False, gradient_correction=exponent, **options)
    model.zero_grad(set_to_none=True)
    result = model(**inputs, selected_positions=positions, selection_probabilities=chances(positions))
    result.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return result.loss.detach(), result.logits.detach(), gradients


def test_nothing_changes_forward() -> None:
    model = build(LLAMA, torch.float32)
    inputs = batch_for(model, "left")
    positions = selection(inputs, 15)
    loss, logits, gradients = plain_step(model, inputs, positions, 0.0)
    corrected_loss, corrected_logits, corrected_gradients = plain_step(model, inputs, positions, 1.0)
    assert torch.equal(corrected_loss, loss)
    assert torch.equal(corrected_logits, logits)
    assert any(not torch.equal(corrected_gradients[name], gradients[name]) for name in gradients)


@pytest.mark.parametrize("rest", CHECKPOINT_REST)
def test_checkpointing_gives_the_same_gradients_to_the_last_bit(rest: str) -> None:
    model = build(LLAMA, torch.float32)
    inputs = batch_for(model, "right")
    positions = selection(inputs, 15)
    *_, expected = plain_step(model, inputs, positions, 1.0)
    model.activation_checkpointing_enable()
    *_, found = plain_step(model, inputs, positions, 1.0, checkpoint_rest=rest)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("precision", "kind"),
    [("float16", "sdpa"), ("bfloat16", "sdpa"), ("autocast", "sdpa"), ("bfloat16", "eager")],
)
def test_sixteen_bits(precision: str, kind: str) -> None:
    """As near to float32's gradient as the uncorrected one is, within a factor."""
    model = build(Family("Llama", "LlamaForCausalLM", attention=kind), torch.float32)
    inputs = batch_for(model, "left")
    positions = selection(inputs, 15)

    def off(exponent: float) -> float:
        *_, expected = plain_step(model, inputs, positions, exponent)
        narrow = copy.deepcopy(model)
        if precision != "autocast":
            narrow.to(getattr(torch, precision))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            *_, found = plain_step(narrow, inputs, positions, exponent)
        flat = [torch.cat([gradient.flatten().float() for gradient in each.values()]) for each in (found, expected)]
        return float((flat[0] - flat[1]).norm() / flat[1].norm())

    assert off(1.0) <= 2 * off(0.0)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_it_keeps_one_number_per_query_and_head(checkpointed: bool) -> None:
    model = build(LLAMA, torch.float32)
    inputs = batch_for(model, "right", length=64)
    positions = selection(inputs, 64, 20)
    if checkpointed:
        model.activation_checkpointing_enable()
    saved = []
    for exponent in (0.0, 1.0):
        apply_tokentune(model, verify=False, gradient_correction=exponent)
        with SavedForBackward(model) as counted:
            model(**inputs, selected_positions=positions, selection_probabilities=chances(positions))
        saved.append(counted.bytes)
    layers, heads, batch, count = 4, 4, *positions.shape
    own_weights, scales = layers * batch * heads * count * 4, batch * count * 8
    assert saved[1] - saved[0] == (0 if checkpointed else own_weights + scales)


def test_without_it_nothing_of_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selective, "scale_gradient", lambda *_: 1 / 0)
    for function in ("require_correctable_call", "correct"):
        monkeypatch.setattr(correction, function, lambda *_: 1 / 0)
    model = build(LLAMA, torch.float32)
    inputs = batch_for(model, "right")
    plain_step(model, inputs, selection(inputs, 15), 0.0)


# --- each token's weight of itself ------------------------------------------------------------------------------------


@pytest.mark.parametrize("finished", [False, True])
def test_own_weights_are_those_of_the_softmax(finished: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """For kernels that do not tell their softmax's sums; in many blocks, and with a finished mask's biases."""
    monkeypatch.setattr(correction, "SCORE_NUMBERS", 2 * 4 * 12 * 3)  # three queries
    batch, heads, groups, length, count, size = 2, 4, 2, 12, 7, 8
    bias = float(finished) * torch.randn(batch, heads, length, length).double()
    bias = bias.masked_fill(torch.ones(length, length).triu(1).bool(), torch.finfo(torch.float64).min)
    recipe = mask_from_tensor(bias) if finished else mask_from_functions(batch, length, length)
    positions = torch.stack([torch.randperm(length)[:count].sort().values for _ in range(batch)])
    mask = GroupMask(recipe, "selected", positions, length)
    query = torch.randn(batch, heads, count, size).double()
    key = torch.randn(batch, groups, length, size).double()
    places = (positions + torch.arange(batch)[:, None] * length).flatten()
    own = OwnTokens(None, None, torch.ones(batch, count), places, positions)
    found = correction.fused_weights(None, query, key, mask, own, 0.4)
    scores = query @ key.repeat_interleave(2, 1).transpose(2, 3) * 0.4
    scores = scores + bias.take_along_dim(positions[:, None, :, None], 2)
    expected = scores.softmax(-1).take_along_dim(positions[:, None, :, None], 3)[..., 0]
    assert torch.allclose(found, expected, rtol=1e-12)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_verification_finds_a_wrong_correction(monkeypatch: pytest.MonkeyPatch) -> None:
    own = correction._scaling
    monkeypatch.setattr(correction, "_scaling", lambda *args: 1.1 * own(*args))
    with pytest.raises(UnsupportedModelError, match=r"gradient_correction: gradient of .* differ from the definition"):
        apply_tokentune(build(LLAMA, torch.float32), gradient_correction=0.5)


def test_attention_both_ways_is_refused() -> None:
    model = BertModel(tiny_bert_config())
    with pytest.raises(UnsupportedModelError, match="see one another both ways"):
        apply_tokentune(model, gradient_correction=1.0)
    model(input_ids=torch.ones(1, 3, dtype=torch.long))  # and left as it was


def test_attention_dropout_is_refused() -> None:
    model = LlamaForCausalLM(tiny_llama_config(attention_dropout=0.1))
    with pytest.raises(UnsupportedModelError, match="attention dropout"):
        apply_tokentune(model, verify=False, gradient_correction=1.0)


@pytest.mark.parametrize("exponent", [-0.1, 1.5, float("nan")])
def test_only_numbers_from_0_to_1(exponent: float) -> None:
    with pytest.raises(ValueError, match="from 0 to 1"):
        apply_tokentune(LlamaForCausalLM(tiny_llama_config()), verify=False, gradient_correction=exponent)
