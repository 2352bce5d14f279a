"""The scoring pass: the same step as without it, the scores by definition, and the loss over all tokens.

B sequences, S tokens, K selected, V vocabulary
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_bert_config, tiny_llama_config
from families import FAMILIES, Family
from family_check import Float64, batch_for, build, selection
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertForMaskedLM, LlamaConfig, LlamaForCausalLM

import tokentune.core.scoring_pass
from tokentune import UnsupportedModelError, apply_tokentune, remove_tokentune
from tokentune.cli.arguments import parse_arguments
from tokentune.core import model_sampling as drawing
from tokentune.core.layers import transformer_layers
from tokentune.core.patched import last_draw
from tokentune.core.profile import Profile, Rows
from tokentune.core.saved_tensors.saved_bytes import SavedForBackward
from tokentune.core.scoring_pass import ScoringOptions, run_scoring_pass
from tokentune.memory.footprint import measure
from tokentune.models.builder import prepare_model
from tokentune.sampling.sampler import Selection

NAMES = ("Llama", "Mistral", "Mixtral", "Qwen3", "Gemma 2", "Gemma 3", "Phi-3", "GPT-2", "GPT-OSS", "DeepSeek-V3")
CAUSAL = [family for family in FAMILIES if family.name in NAMES and family.model.endswith(("ForCausalLM", "HeadModel"))]
by_family = pytest.mark.parametrize("family", CAUSAL, ids=lambda family: f"{family.name}-{family.attention}")
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")


def llama(**changes: object) -> LlamaForCausalLM:
    torch.manual_seed(1)
    return LlamaForCausalLM(tiny_llama_config(**changes)).double().train()


def batch(model: nn.Module, side: str = "right") -> dict[str, Tensor]:
    """Three rows, two of them padded; the first four tokens of each row carry no loss."""
    inputs = batch_for(model, side)
    inputs["labels"] = inputs["labels"].masked_fill(inputs["attention_mask"].cumsum(1) <= 4, -100)
    return inputs


def step(model: nn.Module, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients, in float64 throughout."""
    model.zero_grad(set_to_none=True)
    with Float64():
        loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: tuple, expected: tuple, tolerance: float = 1e-12) -> None:
    assert (found[0] - expected[0]).abs() <= tolerance * expected[0].abs()
    assert found[1].keys() == expected[1].keys()
    scale = max(gradient.abs().max() for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).abs().max() <= tolerance * max(gradient.abs().max(), 1e-3 * scale), name


def drawing_these(monkeypatch: pytest.MonkeyPatch, positions: Tensor, weights: Tensor | None = None) -> None:
    monkeypatch.setattr(drawing, "select_tokens", lambda *args, **options: Selection(positions, weights))


def with_scoring_pass(model: nn.Module, strategy: str = "random", **options: Any) -> nn.Module:
    given = {name: options.pop(name) for name in ("draw", "layers", "reference") if name in options}
    return apply_tokentune(
        model, 0.4, selection=strategy, verify=False, scoring_pass=ScoringOptions(**given), **options
    )


def scores_of(model: nn.Module, inputs: dict[str, Tensor], needs: tuple[str, ...], **options: Any) -> dict[str, Tensor]:
    with Float64():
        return run_scoring_pass(model, transformer_layers(model), inputs, ScoringOptions(**options), needs).scores


def whole(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """By autograd through the unmodified model: each target's loss and the norm of its gradient at the head, (B, S)."""
    kept = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda head, args: kept.append(args[0]))
    with Float64():
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False).logits
    handle.remove()
    targets = F.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), kept[0])
    return losses.detach(), gradient.norm(dim=-1)


# ---------------------------------------------------------------------------------------------------------- the step


@pytest.mark.parametrize("side", ["right", "left"])
@by_family
def test_a_step_after_a_scoring_pass_is_the_ordinary_one(
    family: Family, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(family)
    inputs = batch(model, side)
    positions = selection(inputs, inputs["input_ids"].shape[1])
    apply_tokentune(model, verify=False)
    if family.name == "GPT-2":  # what the verification would find out
        model._tokentune.profile = Profile(Rows.GATHERED, None)
    expected = step(model, **inputs, selected_positions=positions)
    drawing_these(monkeypatch, positions)
    assert_same(step(with_scoring_pass(model), **inputs), expected)


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
def test_checkpointing_after_a_scoring_pass_gives_the_same_gradients_to_the_last_bit(
    adapted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, saved = [], []
    inputs = batch(llama())
    drawing_these(monkeypatch, selection(inputs, 15))
    for checkpointed in (False, True):
        model = llama(num_hidden_layers=4, attention_dropout=0.2)
        if adapted:
            torch.manual_seed(2)
            config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.1, init_lora_weights=False)
            model = get_peft_model(model, config)
        model = with_scoring_pass(model, "random", chunked_loss=True)
        if checkpointed:
            (model.get_base_model() if adapted else model).activation_checkpointing_enable()
        torch.manual_seed(3)
        with SavedForBackward(model) as kept:
            loss = model(**inputs).loss
        loss.backward()
        saved.append(kept.bytes)
        results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(gradient, results[1][1][name]) for name, gradient in results[0][1].items())
    assert saved[1] < saved[0]


def test_nothing_of_the_rest_runs_after_a_scoring_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_scoring_pass(llama())
    inputs = batch(model)
    rows: list[int] = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[1]))
    positions = selection(inputs, 15)
    drawing_these(monkeypatch, positions)
    step(model, **inputs)
    assert rows == [15, positions.shape[1]]


def test_keys_and_values_are_dropped_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_scoring_pass(llama(num_hidden_layers=3))
    left = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, args: left.append(current()))
    from tokentune.core.step import CURRENT_STEP

    def current() -> int | None:
        return None if CURRENT_STEP.get() is None else len(CURRENT_STEP.get().plan.cached_kv)

    step(model, **batch(model))
    assert left == [None] * 3 + [2, 1, 0]


# --------------------------------------------------------------------------------------------------------- the scores


@pytest.mark.parametrize("side", ["right", "left"])
@by_family
def test_losses_and_gradient_norms_are_those_of_autograd(family: Family, side: str) -> None:
    model = build(family)
    inputs = batch(model, side)
    losses, norms = whole(model, inputs)
    found = scores_of(model, inputs, ("gradient",))
    torch.testing.assert_close(found["loss"], losses, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(found["gradient"], norms, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("layers", [None, 1])
@by_family
def test_attention_received_is_the_sum_of_the_weights(family: Family, layers: int | None, monkeypatch) -> None:
    monkeypatch.setattr("tokentune.core.attention.received._SCORE_BYTES", 4 * 3 * 4 * 15 * 4)  # blocks of four queries
    model = build(family)
    inputs = batch(model)
    found = scores_of(model, inputs, ("attention",), layers=layers)["attention"]
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with torch.no_grad(), Float64():
        given = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "use_cache": False}
        weights = eager(**given, output_attentions=True).attentions[(layers or 0) - 1]  # (B, H, S, S)
    real = inputs["attention_mask"]
    expected = (weights * real[:, None, :, None]).mean(1).sum(1)
    torch.testing.assert_close(found, expected * real, rtol=1e-10, atol=1e-12)


def test_the_first_layers_score_as_a_model_of_so_many_layers() -> None:
    model = llama(num_hidden_layers=4)
    inputs = batch(model)
    found = scores_of(model, inputs, ("gradient",), layers=2)
    assert len(model.model.layers) == 4
    shorter = llama(num_hidden_layers=4)
    shorter.model.layers = shorter.model.layers[:2]
    losses, norms = whole(shorter, inputs)
    torch.testing.assert_close(found["loss"], losses, rtol=1e-12, atol=0)
    torch.testing.assert_close(found["gradient"], norms, rtol=1e-10, atol=0)


def test_excess_loss_is_the_difference_to_the_reference() -> None:
    model, reference = llama(), llama(num_hidden_layers=1)
    inputs = batch(model)
    found = scores_of(model, inputs, ("excess_loss",), reference=reference)["excess_loss"]
    torch.testing.assert_close(found, whole(model, inputs)[0] - whole(reference, inputs)[0], rtol=1e-11, atol=1e-12)
    with pytest.raises(ValueError, match="give ScoringOptions a reference"):
        scores_of(model, inputs, ("excess_loss",))


# --------------------------------------------------------------------------------------------------------- the weights


@pytest.mark.parametrize("items", [None, 40], ids=["mean", "sum"])
@pytest.mark.parametrize("chunked", [None, True])
@pytest.mark.parametrize("adapted", [False, True], ids=["trained head", "frozen head"])
def test_weights_are_factors_of_the_losses(adapted: bool, chunked: bool | None, items: int | None) -> None:
    model = llama()
    if adapted:
        torch.manual_seed(2)
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["down_proj"], init_lora_weights=False)).double()
    inputs = batch(llama())
    positions = selection(inputs, 15)
    weights = torch.rand(positions.shape, dtype=torch.float64) * 3
    apply_tokentune(model, verify=False, chunked_loss=chunked)

    # Independently: the weighted sum over the selective step's own logits, for all targets of the batch.
    plain = {name: value for name, value in inputs.items() if name != "labels"}
    with Float64():
        logits = model(**plain, selected_positions=positions).logits  # (B, K, V)
    targets = F.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    losses = F.cross_entropy(logits.transpose(1, 2), targets.gather(1, positions), reduction="none")
    expected = (losses * weights).sum() / (items or (targets != -100).sum())
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    given = {"selected_positions": positions, "selection_weights": weights}
    found = step(model, **inputs, **given, **({} if items is None else {"num_items_in_batch": items}))
    assert_same(found, (expected.detach(), gradients))


def test_weights_are_refused_where_they_have_no_place() -> None:
    torch.manual_seed(0)
    encoder = apply_tokentune(BertForMaskedLM(tiny_bert_config()), verify=False)
    positions, ids = torch.tensor([[0, 2]]), torch.arange(5, 11)[None]
    with pytest.raises(UnsupportedModelError, match="factors of a causal model's own losses"):
        encoder(input_ids=ids, labels=ids, selected_positions=positions, selection_weights=torch.ones(1, 2))


@pytest.mark.parametrize("strategy", ["gradient", "loss", "tokenseek"])
def test_the_mean_over_draws_is_the_loss_over_all_tokens(strategy: str) -> None:
    model = with_scoring_pass(llama(), strategy)
    inputs = batch(model)
    torch.manual_seed(5)
    losses = [step(model, **inputs, selection_draws=torch.rand(3, 15))[0] for _ in range(200)]
    drawn = last_draw(model)
    whole_loss = drawn.loss / drawn.targets
    spread = torch.stack(losses).std() / len(losses) ** 0.5
    assert abs(torch.stack(losses).mean() - whole_loss) <= 4 * spread + 1e-9


# ------------------------------------------------------------------------------------------------------- what is drawn


@pytest.mark.parametrize("draw", ["proportional", "top"])
@pytest.mark.parametrize("strategy", ["gradient", "loss", "attention", "tokenseek", "random", "supervised"])
def test_draws_depend_on_the_given_numbers_alone(strategy: str, draw: str) -> None:
    inputs = batch(llama()) | {"selection_draws": torch.rand(3, 15, generator=torch.Generator().manual_seed(3))}
    found = []
    for seed in (1, 2):
        model = with_scoring_pass(llama(), strategy, draw=draw)
        torch.manual_seed(seed)
        found.append((*step(model, **inputs), last_draw(model).positions))
    assert torch.equal(found[0][2], found[1][2])
    assert torch.equal(found[0][0], found[1][0])


def test_counts_of_the_last_draw() -> None:
    model = with_scoring_pass(llama(), "attention")
    inputs = batch(model)
    assert last_draw(model) is None
    step(model, **inputs)
    drawn, real = last_draw(model), inputs["attention_mask"]
    targets = F.pad(inputs["labels"], (0, 1), value=-100)[:, 1:] != -100
    assert drawn.selected == real.gather(1, drawn.positions).sum() == 6 + 5 + 4  # 0.4 of 15, 12 and 10
    assert drawn.supervised == targets.gather(1, drawn.positions).sum()
    assert drawn.targets == targets.sum()
    assert (drawn.loss - whole(model, inputs)[0].sum()).abs() < 1e-10


@pytest.mark.parametrize("strategy", ["random", "gradient"])
def test_all_tokens_selected_is_ordinary_training(strategy: str) -> None:
    inputs = batch(llama())
    expected = step(llama(), **inputs)
    model = llama()
    apply_tokentune(model, 1.0, selection=strategy, scoring_pass=ScoringOptions(), verify=False)
    assert_same(step(model, **inputs), expected, 1e-9)


def test_a_step_after_the_first_layers_is_the_ordinary_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_scoring_pass(llama(num_hidden_layers=3), "gradient", layers=1)
    inputs = batch(model)
    positions = selection(inputs, 15)
    expected = step(model, **inputs, selected_positions=positions)
    drawing_these(monkeypatch, positions)
    assert_same(step(model, **inputs), expected)
    assert last_draw(model).loss is None


def test_a_scoring_pass_is_in_the_mode_of_the_step_and_outside_of_training_there_is_none(monkeypatch) -> None:
    model = with_scoring_pass(llama(), "gradient")
    modes: list[bool] = []
    model.model.norm.register_forward_pre_hook(lambda module, args: modes.append(module.training))
    inputs = batch(model)
    step(model, **inputs)
    assert modes == [True, True]
    with torch.no_grad(), Float64():
        found = model.eval()(**inputs, selection_draws=torch.rand(3, 15)).loss
        expected = remove_tokentune(model)(**inputs).loss
    assert torch.equal(found, expected) and len(modes) == 4


def test_what_a_scoring_pass_changes_is_put_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_scoring_pass(llama(), "gradient", layers=1)
    model.activation_checkpointing_enable()
    inputs = batch(model)
    monkeypatch.setattr("tokentune.core.scoring_pass.row_gradients", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**inputs)
    monkeypatch.undo()
    assert len(model.model.layers) == 2 and model.model.layers[0].gradient_checkpointing
    assert model.config._attn_implementation == "sdpa" and not model.lm_head._forward_pre_hooks
    model(**inputs).loss.backward()


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"scoring_pass": ScoringOptions(layers=2)}, ValueError, "a scoring pass through 2 of 2 layers"),
        ({"scoring_pass": ScoringOptions(), "checkpoint_rest": "segments"}, ValueError, "keeps hidden states"),
        ({"selection": "excess_loss"}, ValueError, "give ScoringOptions a reference"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        apply_tokentune(llama(), 0.4, verify=False, **options)


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="draw must be one of"):
        ScoringOptions("best")
    with pytest.raises(ValueError, match="layers must be at least 1"):
        ScoringOptions(layers=0)


def test_old_names_work_with_a_warning() -> None:
    options = ScoringOptions("top")
    with pytest.warns(DeprecationWarning, match="is now scoring_pass"):
        model = apply_tokentune(llama(), 0.4, selection="loss", verify=False, look=options)
    assert model._tokentune.scoring is options
    with pytest.warns(DeprecationWarning, match="is now selection"):
        assert apply_tokentune(llama(), 0.4, strategy="random", verify=False)._tokentune.strategy == "random"


def test_encoders_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"a scoring pass: .* is no language model"):
        apply_tokentune(BertForMaskedLM(tiny_bert_config()), 0.4, selection="gradient", verify=False)


def test_verification_finds_a_scoring_pass_that_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    right = tokentune.core.scoring_pass.attention_received
    wrong = lambda *args, **options: 1.001 * right(*args, **options)  # noqa: E731
    monkeypatch.setattr("tokentune.core.scoring_pass.attention_received", wrong)
    with pytest.raises(UnsupportedModelError, match="attention of tokens differ from the definition"):
        apply_tokentune(llama(), 0.4, selection="attention")
    apply_tokentune(llama(), 0.4, selection="gradient")


# ------------------------------------------------------------------------------------------------------- whole commands


@pytest.mark.parametrize(
    "words",
    [
        ["gradient"],
        ["loss", "--gradient_accumulation_steps", "2"],
        ["tokenseek", "--selection_draw", "top", "--lora", "--bf16", "--gradient_checkpointing"],
        ["random", "--selection_pass"],
        ["random", "--selection_pass", "--packing", "--max_length", "512"],
    ],
    ids=lambda words: " ".join(words[:3:2]),
)
def test_a_run_logs_the_loss_that_an_evaluation_finds(
    words: list[str], tiny_llama_dir: Path, alpaca_file: Path, tmp_path: Path
) -> None:
    """In the first step, before anything was learnt, the batch being the whole data."""
    from tokentune import finetune

    words = ["--tokentune", "--prefix_length", "0.1", "--selection", *words]
    files = {"--model_name_or_path": tiny_llama_dir, "--dataset_name_or_path": alpaca_file}
    files |= {"--eval_dataset_name_or_path": alpaca_file, "--model_save_path": tmp_path}
    numbers = {
        "--max_length": 256,
        "--global_batch_size": 16,
        "--max_steps": 1,
        "--eval_steps": 1,
        "--logging_steps": 1,
        "--warmup_steps": 0,
    }
    given = [str(word) for pair in (files | numbers).items() for word in pair]
    finetune.main([*given, *words, "--report_to", "none"])
    (path,) = tmp_path.glob("*/training_summary.json")
    summary = json.loads(path.read_text())
    tolerance = 2e-3 if "--bf16" in words else 1e-5
    assert summary["log"][0]["loss_all_tokens"] == pytest.approx(summary["validation_loss"]["base"], rel=tolerance)
    tokens = summary["tokens"]
    assert 0 < tokens["selected_supervised"] <= tokens["selected"] < 0.15 * tokens["processed"]


@pytest.mark.parametrize("words", [["--selection", "supervised"], ["--packing"], ["--prefix_length", "0.2:0.4"]])
def test_a_scoring_pass_changes_nothing_of_a_selection_without_scores(
    words: list[str], tiny_llama_dir: Path, alpaca_file: Path, tmp_path: Path
) -> None:
    """Whatever the split into micro-batches: the weights of a run with `--selection_pass` are those of one without."""
    from tokentune import finetune

    given = f"--model_name_or_path {tiny_llama_dir} --dataset_name_or_path {alpaca_file} --tokentune --max_steps 3 "
    given += "--prefix_length 0.3 --global_batch_size 6 --warmup_steps 0 --optim sgd --learning_rate 0.5 "
    given += "--skip_verification --report_to none --max_grad_norm 1"
    weights = []
    for number, more in enumerate(([], ["--selection_pass", "--gradient_accumulation_steps", "3"])):
        folder = tmp_path / str(number)
        finetune.main([*given.split(), *words, *more, "--model_save_path", str(folder)])
        (path,) = folder.glob("*/model.safetensors")
        weights.append(load_file(path))
    before = load_file(tiny_llama_dir / "model.safetensors")
    for name, weight in weights[0].items():
        assert torch.allclose(weight, weights[1][name], rtol=0, atol=2e-6), name
    assert max(float((weights[0][name] - before[name]).abs().max()) for name in before if name in weights[0]) > 1e-3


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--selection_layers", "2"], "--selection_layers 2: the model has 2"),
        (["--selection_layers", "1", "--selection_pass"], "give one of them"),
        (["--gradient_checkpointing", "--checkpoint_rest", "segments"], "--checkpoint_rest segments keeps hidden"),
    ],
)
def test_flags_that_a_scoring_pass_cannot_follow_are_refused(words: list[str], reason: str, refused: Callable) -> None:
    assert reason in refused("--tokentune", "--selection", "gradient", *words)


def test_a_reference_with_another_vocabulary_is_refused(refused: Callable, tmp_path: Path) -> None:
    LlamaForCausalLM(tiny_llama_config()).save_pretrained(tmp_path / "other")
    words = ["--selection", "excess_loss", "--selection_reference_model", str(tmp_path / "other")]
    assert "has a vocabulary of 96 tokens, the model one of" in refused("--tokentune", *words)


@pytest.mark.parametrize("words", ["gradient", "tokenseek --gradient_checkpointing", "attention --selection_layers 1"])
def test_an_estimated_step_keeps_what_a_real_one_keeps(words: str, tiny_llama_dir: Path) -> None:
    given = f"--model_name_or_path {tiny_llama_dir} --dataset_name_or_path unused --report_to none --tokentune "
    arguments = parse_arguments(f"{given} --prefix_length 0.25 --selection {words}".split())
    config = LlamaConfig.from_pretrained(tiny_llama_dir)
    found = measure(config, arguments, (2, 64), device="cpu", profile=Profile(Rows.SELECTED, None))
    model = prepare_model(arguments, torch.float32).train()
    ids = torch.randint(3, 90, (2, 64))
    inputs = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids), "num_items_in_batch": 126}
    with SavedForBackward(model) as saved:
        model(**inputs, selection_draws=torch.rand(2, 64))
    assert found.activations == pytest.approx(saved.bytes, rel=0.02)
    if "layers" not in words:  # the keys and values of all layers, when the step begins
        kept = 2 * 64 * 2 * 16 * 4 * config.num_hidden_layers  # B S, keys and values, G d, bytes
        assert found.peak - found.weights - found.optimizer > kept
