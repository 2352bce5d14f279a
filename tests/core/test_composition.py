"""With adapters, quantised bases, mixed precision, `torch.compile`: the definition's gradients, fewer bytes."""

import copy
from collections.abc import Callable

import oracle
import pytest
import torch
from conftest import tiny_bert_config, tiny_llama_config
from peft import IA3Config, LoraConfig, PeftConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import BertModel, BitsAndBytesConfig, LlamaForCausalLM

from tokentune import UnsupportedModelError, apply_tokentune, remove_tokentune
from tokentune.core.saved_tensors.saved_bytes import SavedForBackward

LENGTH, SELECTED = 48, 14
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = {
    "lora": LoraConfig(r=4, target_modules=LINEAR, task_type="CAUSAL_LM"),
    "lora-embedding": LoraConfig(r=4, target_modules=["embed_tokens", "down_proj"], task_type="CAUSAL_LM"),
    "dora": LoraConfig(r=4, target_modules=LINEAR, use_dora=True, task_type="CAUSAL_LM"),
    "rslora": LoraConfig(r=16, target_modules=LINEAR, use_rslora=True, task_type="CAUSAL_LM"),
    "ia3": IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
}


def llama(**changes: object) -> LlamaForCausalLM:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 96}
    return LlamaForCausalLM(tiny_llama_config(**{**sizes, **changes}))


def adapted(model: nn.Module, config: PeftConfig) -> nn.Module:
    """With adapters that are no longer what they start as: then every factor has a gradient."""
    model = get_peft_model(model, copy.deepcopy(config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batch(causal: bool = True) -> dict[str, Tensor]:
    """Two rows, one of them padded, a prompt without loss, and a selection."""
    ids = torch.randint(3, 90, (2, LENGTH))
    mask = torch.ones_like(ids)
    mask[1, -10:] = 0
    positions = torch.rand(2, LENGTH).masked_fill(mask == 0, -1).topk(SELECTED).indices.sort(1).values
    inputs = {"input_ids": ids, "attention_mask": mask, "selected_positions": positions}
    return inputs | {"labels": ids.masked_fill((mask == 0) | (torch.arange(LENGTH) < 6), -100)} if causal else inputs


def definition(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The loss by the definition, through the model without the method."""
    positions = inputs["selected_positions"]
    with oracle.constants_outside(model, positions, oracle.LLAMA):
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    return oracle.next_token_loss(logits.float(), inputs["labels"], positions)


def check(
    model: nn.Module, tolerance: float, most: float, *, call: Callable | None = None, plain: nn.Module | None = None
) -> None:
    """Gradients of a patched model against the definition's, and its saved bytes against the full model's.

    Args:
        tolerance: largest error over the parameters, relative to the parameter's largest entry.
        most: saved bytes, relative to the full model's.
        call: what is called, where that is not `model` itself.
        plain: what the definition runs through; without a selection the patched model itself is the original one.
    """
    call, plain, inputs = model if call is None else call, model if plain is None else plain, batch()
    with SavedForBackward(model) as saved:
        loss = call(**inputs).loss
    found = oracle.gradients(model, loss)
    model.zero_grad(set_to_none=True)
    full = {name: value for name, value in inputs.items() if name != "selected_positions"}
    with SavedForBackward(model) as saved_full:
        call(**full)
    assert saved.bytes < most * saved_full.bytes, saved.bytes / saved_full.bytes
    expected_loss = definition(plain, inputs)
    expected = oracle.gradients(plain, expected_loss)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=tolerance)
    assert found.keys() == expected.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    scale = max(gradient.float().abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        assert gradient.abs().sum() > 0, name
        error = (found[name] - gradient).abs().max() / max(gradient.abs().max(), 1e-2 * scale)
        assert error < tolerance, f"{name}: {error:.1e}"


# --- adapters and quantised bases -------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["adapter", "tokentune"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters(name: str, first: str) -> None:
    if first == "adapter":
        model = apply_tokentune(adapted(llama().double(), ADAPTERS[name]))
    else:
        model = adapted(apply_tokentune(llama().double()), ADAPTERS[name])
    check(model.double(), 1e-5, 0.5)


def test_adapters_can_be_left_merged_and_unloaded() -> None:
    model = adapted(apply_tokentune(llama(), 0.3), ADAPTERS["lora"])
    inputs = batch()
    plain = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    model.eval()
    with_adapter = model(**plain).logits
    with model.disable_adapter():
        assert not torch.allclose(model(**plain).logits, with_adapter)
        assert model(**inputs).logits.shape[1] == SELECTED
    merged = model.merge_and_unload()
    assert (merged(**plain).logits - with_adapter).abs().max() < 1e-4
    assert merged(**inputs).logits.shape[1] == SELECTED
    assert remove_tokentune(merged)(**plain).logits.shape[1] == LENGTH


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
def test_prompt_learning_is_refused(config: type) -> None:
    """Its tokens stand in front of the batch's: positions would mean others, and most would not be trained."""
    model = get_peft_model(llama(), config(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(UnsupportedModelError, match="prompt learning"):
        apply_tokentune(model, 0.3)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_bases(bits: int, tmp_path) -> None:
    llama().save_pretrained(tmp_path)
    config = (
        BitsAndBytesConfig(load_in_8bit=True)
        if bits == 8
        else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    )
    base = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32)
    check(apply_tokentune(adapted(base, ADAPTERS["lora"])).train(), 1e-4 if bits == 4 else 0.02, 0.5)


def test_4_bit_training_goes_on_after_an_evaluation(tmp_path) -> None:
    """Some CPUs repack 4-bit weights in an evaluation, for a product without a backward pass."""
    llama().save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)

    def load() -> nn.Module:
        return LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32)

    inputs = batch()
    model = apply_tokentune(adapted(load(), ADAPTERS["lora"])).train()
    before = oracle.gradients(model, model(**inputs).loss)
    with torch.no_grad():
        model.eval()(**{name: inputs[name] for name in ("input_ids", "attention_mask")})
    after = oracle.gradients(model, model.train()(**inputs).loss)
    assert all(torch.equal(after[name], gradient) for name, gradient in before.items())
    evaluated = load().eval()
    with torch.no_grad():
        evaluated(input_ids=inputs["input_ids"])
    if getattr(evaluated.model.layers[0].mlp.up_proj.weight.quant_state, "packing_format_for_cpu", False):
        with pytest.raises(UnsupportedModelError, match="load it anew"):
            apply_tokentune(evaluated)


# --- precisions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_autocast(method: str, dtype: torch.dtype) -> None:
    """Two summation orders of 16-bit products apart; a weight whose gradient got lost would be off by 1."""
    model = llama() if method == "full" else adapted(llama(), ADAPTERS["lora"])
    with torch.autocast("cpu", dtype=dtype):
        check(apply_tokentune(model), 0.1, 0.5)


def test_gradient_scaler_steps_with_the_unscaled_gradients() -> None:
    torch.manual_seed(1)
    scaled, plain = apply_tokentune(llama()), apply_tokentune(llama(), verify=False)
    plain.load_state_dict(scaled.state_dict())
    inputs, scaler = batch(), torch.amp.GradScaler("cpu", init_scale=2.0**12)
    before = [p.detach().clone() for p in plain.parameters()]
    for model in (scaled, plain):
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(**inputs).loss
        if model is scaled:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        else:
            loss.backward()
            optimizer.step()
    assert scaler.get_scale() == 2.0**12  # nothing overflowed
    for old, one, two in zip(before, scaled.parameters(), plain.parameters(), strict=True):
        assert (one - two).abs().max() <= 0.05 * (two - old).abs().max()  # float16 loses small gradients unscaled
        assert (two - old).abs().max() > 0


# --- torch.compile ----------------------------------------------------------------------------------------------------


def _compile_parts(model: nn.Module, backend: str = "aot_eager") -> nn.Module:
    for layer in model.model.layers:
        layer.mlp.compile(backend=backend)
        layer.input_layernorm.compile(backend=backend)
    return model


def _compile_layers(model: nn.Module, backend: str = "eager") -> nn.Module:
    for layer in model.model.layers:
        layer.compile(backend=backend)
    return model


def _compile_model(model: nn.Module, backend: str = "eager") -> nn.Module:
    return torch.compile(model, backend=backend)


@pytest.mark.filterwarnings("ignore")  # dynamo's own, about what it traces
@pytest.mark.parametrize(
    ("compile_it", "order"),
    [
        (_compile_parts, "patched first"),
        (_compile_parts, "compiled and run first"),
        (_compile_layers, "patched first"),
        (_compile_model, "compiled and run first"),
    ],
)
def test_compiled(compile_it: Callable, order: str) -> None:
    """Compiled before or after, in parts or whole: the selection counts, also in code compiled without it."""
    torch._dynamo.reset()
    model = llama(num_hidden_layers=2)
    plain = copy.deepcopy(model)
    if order == "patched first":
        call = compile_it(apply_tokentune(model))
    else:
        call = compile_it(model)
        call(input_ids=batch()["input_ids"])
        assert apply_tokentune(call) is call
    check(model, 1e-4, 0.5, call=call, plain=plain)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("compile_it", "checkpointing", "drawn"),
    [
        (_compile_parts, True, True),
        (_compile_layers, True, False),
        (_compile_model, False, True),
    ],
)
def test_compiled_for_batches_of_several_lengths(compile_it: Callable, checkpointing: bool, drawn: bool) -> None:
    """From the second length on sizes are symbols. The compiled model gives what the same model gives uncompiled."""
    torch._dynamo.reset()
    model = llama(num_hidden_layers=2).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    plain = apply_tokentune(copy.deepcopy(model), 0.3)
    call = compile_it(apply_tokentune(model, 0.3), "aot_eager")
    for seed, length in enumerate((48, 31, 17)):
        inputs = {name: value[:, :length] for name, value in batch().items()}
        inputs["selected_positions"] = torch.rand(2, length).topk(length // 3).indices.sort(1).values
        if drawn:
            inputs.pop("selected_positions")
        found, expected = [], []
        for one, gradients in ((call, found), (plain, expected)):
            torch.manual_seed(seed)
            gradients.append(oracle.gradients(one, one(**inputs).loss))
        names = {name.removeprefix("_orig_mod."): gradient for name, gradient in found[0].items()}
        assert names.keys() == expected[0].keys()
        for name, gradient in expected[0].items():
            assert (names[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max().clamp(min=1e-6), name
    torch._dynamo.reset()


# --- data parallel ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drawn", [False, True])
def test_replicas_of_data_parallel_are_refused(drawn: bool) -> None:
    inputs = batch()
    if drawn:
        inputs.pop("selected_positions")
    replica = apply_tokentune(llama(), 0.3)._replicate_for_data_parallel()  # what nn.DataParallel makes, one per device
    with pytest.raises(UnsupportedModelError, match="DistributedDataParallel"):
        replica(**inputs)


# --- dropout ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["attention_probs_dropout_prob", "hidden_dropout_prob"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_dropout_keeps_the_distribution_of_outputs(kind: str, attention: str) -> None:
    """Mean and variance over many passes, with and without the selection, of both groups behind the first layer and of
    the selected behind the second, which depend on what dropout did to the rest's keys and values."""
    model = BertModel._from_config(tiny_bert_config(**{kind: 0.3}), attn_implementation=attention).train()
    with torch.no_grad():
        for parameter in model.parameters():  # attention that is far from uniform, and layers that matter
            parameter.mul_(8.0 if parameter.ndim > 1 else 1.0)
    apply_tokentune(model)
    selected, rest = [0, 3, 7, 11], [1, 2, 4, 5, 6, 8, 9, 10]
    runs, rows = 50, 64  # one sequence many times in a batch: the draws of its rows are independent
    ids, positions = torch.randint(3, 90, (1, 12)).expand(rows, -1), torch.tensor([selected]).expand(rows, -1)
    behind_first: list[Tensor] = []

    def keep(layer: nn.Module, args: tuple, output: Tensor | tuple[Tensor, Tensor]) -> None:
        behind_first.append(torch.cat(output, 1) if isinstance(output, tuple) else output[:, selected + rest])

    model.encoder.layer[0].register_forward_hook(keep)

    def outputs(*, selective: bool, count: int) -> Tensor:  # (count x rows, 12 + 4, D)
        found = []
        for _ in range(count):
            last = model(ids, selected_positions=positions if selective else None).last_hidden_state
            found.append(torch.cat([behind_first.pop(), last if selective else last[:, selected]], 1))
        return torch.cat(found)

    with torch.no_grad():
        full, selective = outputs(selective=False, count=runs), outputs(selective=True, count=runs)
        model.eval()
        without = outputs(selective=False, count=1)
    error = full.var(0).add(selective.var(0)).div(len(full)).sqrt()  # of the difference of two means
    deviations = (full.mean(0) - selective.mean(0)) / error
    assert deviations.abs().max() < 5 and deviations.pow(2).mean() < 1.5
    assert ((full.mean(0) - without[0]) / error).abs().max() > 8  # dropout was at work, and this can see far less
    assert (full.var(0) / selective.var(0)).log().abs().mean() < 0.1
