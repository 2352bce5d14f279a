"""The mean of the corrected gradient over all draws is the gradient over all tokens, by plain autograd, in float64.

    S tokens of a row

Every subset of the tokens that a draw leaves to chance is drawn once, through the model's own draw (its uniform numbers
are 0 for the tokens of the subset and almost 1 for the others), and counts with its probability.
"""

import copy
from collections.abc import Iterator
from itertools import combinations, product
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_llama_config
from families import ROUTED, Family
from family_check import Float64, build
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from tokentune import UnsupportedModelError, apply_tokentune
from tokentune.core.checkpointing import CHECKPOINT_REST
from tokentune.core.patched import last_draw
from tokentune.core.scoring_pass import ScoringOptions
from tokentune.sampling.sampler import select_tokens, target_mask

Gradients = dict[str, Tensor]
SIZE = 6
OWN = """from tokentune.sampling.strategies import Choice

def rising(tokens):
    place = tokens.real.cumsum(-1).double()
    return Choice(tokens.uniform, place / (place + 2), independent=True)
"""


def llama(layers: int, kind: type = LlamaForCausalLM, **changes: Any) -> nn.Module:
    torch.manual_seed(3)
    model = kind._from_config(tiny_llama_config(num_hidden_layers=layers, **changes)).double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def row(prompt: int = 3, size: int = SIZE) -> dict[str, Tensor]:
    """One row, whose first tokens are not supervised."""
    ids = torch.randint(3, 90, (1, size), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids.masked_fill(torch.arange(size) < prompt, -100)}


def subsets(probability: list[float]) -> Iterator[tuple[Tensor, float]]:
    """Uniform numbers (1, S) that select each subset in turn, and the subset's probability."""
    for drawn in product(*((True, False) if p < 1 else (True,) for p in probability)):
        chances = [p if own else 1 - p for p, own in zip(probability, drawn, strict=True)]
        yield torch.tensor([[0.0 if own else 0.999999 for own in drawn]]), prod(chances)


def gradients_of(model: nn.Module, inputs: dict[str, Any]) -> Gradients:
    model.zero_grad(set_to_none=True)
    with Float64():
        loss = model(**inputs).loss
        loss.backward()
    own = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return own | {"loss": loss.detach().clone()}


def distance(found: Gradients, expected: Gradients) -> float:
    """The largest error of a weight's gradient, or of the loss, over the norm of that gradient."""
    assert found.keys() <= expected.keys()
    zero = torch.zeros(())
    return max(float((found.get(n, zero) - value).norm() / value.norm()) for n, value in expected.items())


def mean_over_draws(model: nn.Module, inputs: dict[str, Tensor], probability: list[float]) -> Gradients:
    mean: Gradients = {}
    total = 0.0
    for uniform, chance in subsets(probability):
        for name, value in gradients_of(model, inputs | {"selection_draws": uniform}).items():
            mean[name] = mean.get(name, 0) + chance * value
        total += chance
    assert total == pytest.approx(1, rel=1e-12)
    return mean


@pytest.fixture
def rising(tmp_path: Path) -> str:
    file = tmp_path / "own.py"
    file.write_text(OWN)
    return f"{file}:rising"


IN_PROMPT = {  # size, strategy, the probability of each token
    "random": (0.3, "random", [0.3] * SIZE),
    "a number of tokens": (2, "random", [2 / SIZE] * SIZE),
    "beside the answers": ("answers+0.4", "supervised", [0.4, 0.4, 1, 1, 1, 0.4]),
    "rising": (2, "rising", [1 / 3, 2 / 4, 3 / 5, 4 / 6, 5 / 7, 6 / 8]),
    "rising beside the answers": ("answers+0.4", "rising", [1 / 3, 2 / 4, 1, 1, 1, 3 / 5]),
}


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("case", IN_PROMPT)
def test_the_mean_of_all_draws_is_the_full_gradient(case: str, layers: int, request: pytest.FixtureRequest) -> None:
    size, strategy, probability = IN_PROMPT[case]
    strategy = request.getfixturevalue("rising") if strategy == "rising" else strategy
    model, inputs = llama(layers), row()
    full = gradients_of(copy.deepcopy(model), inputs)
    apply_tokentune(model, size, selection=strategy, verify=False, gradient_correction=1.0)
    assert distance(mean_over_draws(model, inputs, probability), full) <= 1e-12
    apply_tokentune(model, size, selection=strategy, verify=False, gradient_correction=0.5)
    assert distance(mean_over_draws(model, inputs, probability), full) > 0.01


def test_without_scales_or_weights_it_is_not() -> None:
    """Of the same draws: losses are weighted in both, paths in one."""
    model, inputs = llama(3), row()
    full = gradients_of(copy.deepcopy(model), inputs)
    apply_tokentune(model, verify=False)
    mean: Gradients = {}
    for uniform, chance in subsets([0.3] * SIZE):
        targets = target_mask(inputs["labels"], causal=True)
        drawn = select_tokens(
            torch.ones(1, SIZE), 0.3, targets=targets, strategy="random", scores=uniform, independent=True
        )
        given = {"selected_positions": drawn.positions, "selection_weights": drawn.weights}
        given |= {} if drawn.fillers is None else {"selection_fillers": drawn.fillers}
        for name, value in gradients_of(model, inputs | given).items():
            mean[name] = mean.get(name, 0) + chance * value
    assert float(mean["loss"]) == pytest.approx(float(full["loss"]), rel=1e-12)
    assert distance(mean, full) > 0.1


@pytest.mark.parametrize("layers", [1, 3])
def test_draws_that_depend_on_one_another_leave_a_bias(layers: int) -> None:
    """All sets of 3 tokens, each as often: what is scaled by marginal probabilities is then too small."""
    model, inputs = llama(layers), row()
    full = gradients_of(copy.deepcopy(model), inputs)
    apply_tokentune(model, verify=False, gradient_correction=1.0)
    positions = torch.tensor(list(combinations(range(SIZE), 3)))
    halves = torch.full(positions.shape, 0.5, dtype=torch.float64)
    rows = {name: value.expand(len(positions), -1) for name, value in inputs.items()}
    given = {"selected_positions": positions, "selection_probabilities": halves, "selection_weights": 1 / halves}
    found = gradients_of(model, rows | given)
    assert float(found["loss"]) == pytest.approx(float(full["loss"]), rel=1e-12)
    assert distance(found, full) > 0.01


# --- as one batch -----------------------------------------------------------------------------------------------------
#
# With probability 1/2 all subsets are equally likely: the loss of a batch that has each of them as a row is their mean.
# Its rows select from no token to all of them, so that most are filled up.


def every_subset(inputs: dict[str, Tensor], padding: int = 0) -> dict[str, Tensor]:
    uniform = torch.cat([draws for draws, _ in subsets([0.5] * SIZE)])
    wide = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    rows = {name: value.expand(len(uniform), -1) for name, value in inputs.items()}
    rows["attention_mask"] = torch.ones_like(rows["input_ids"])
    rows = {name: nn.functional.pad(value, (0, padding), value=wide[name]) for name, value in rows.items()}
    return rows | {"selection_draws": nn.functional.pad(uniform, (0, padding))}


FAMILIES = [
    Family("Llama", "LlamaForCausalLM"),
    Family("Llama", "LlamaForCausalLM", attention="eager"),
    Family("Mistral", "MistralForCausalLM", {"sliding_window": 3}),
    Family("Mixtral", "MixtralForCausalLM", ROUTED),
    Family("Gemma 2", "Gemma2ForCausalLM", {"head_dim": 16, "attn_logit_softcapping": 2.0}, "eager"),
    Family("GPT-2", "GPT2LMHeadModel", layers="h"),
]


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: f"{family.name}-{family.attention}")
def test_families(family: Family, padding: int) -> None:
    model, inputs = build(family), row()
    full = gradients_of(copy.deepcopy(model), inputs)
    apply_tokentune(model, 0.5, selection="random", gradient_correction=1.0)
    assert distance(gradients_of(model, every_subset(inputs, padding)), full) <= 1e-11
    counts = last_draw(model)
    assert counts.selected == 2**SIZE * SIZE // 2 and counts.supervised == 2**SIZE * 3 // 2  # without fillers


@pytest.mark.parametrize("rest", CHECKPOINT_REST)
def test_checkpointing_gives_the_same_gradients_to_the_last_bit(rest: str) -> None:
    found = []
    for checkpointed in (False, True):
        model = apply_tokentune(
            llama(3), 0.5, selection="random", verify=False, gradient_correction=1.0, checkpoint_rest=rest
        )
        if checkpointed:
            model.activation_checkpointing_enable()
        model(**every_subset(row())).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.equal(found[1][name], value) for name, value in found[0].items())


def test_adapters() -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model, inputs = get_peft_model(llama(3), lora).double(), row()
    full = gradients_of(copy.deepcopy(model), inputs)
    apply_tokentune(model, 0.5, selection="random", verify=False, gradient_correction=1.0)
    assert distance(gradients_of(model, every_subset(inputs)), full) <= 1e-12
    nothing = gradients_of(model, inputs | {"selection_draws": torch.full((1, SIZE), 0.9)})
    assert nothing.keys() == full.keys() and not any(value.any() for value in nothing.values())


def test_after_a_scoring_pass() -> None:
    model, inputs = llama(3), row()
    full = gradients_of(copy.deepcopy(model), inputs)
    options = {"selection": "random", "scoring_pass": ScoringOptions(), "gradient_correction": 1.0}
    apply_tokentune(model, 0.5, verify=False, **options)
    assert distance(gradients_of(model, every_subset(inputs)), full) <= 1e-12
    assert float(last_draw(model).loss) / (2**SIZE * 3) == pytest.approx(float(full["loss"]), rel=1e-6)


def test_hooks_of_others_on_a_layer() -> None:
    model, inputs = llama(3), row()
    full = gradients_of(copy.deepcopy(model), inputs)
    apply_tokentune(model, 0.5, selection="random", verify=False, gradient_correction=1.0)
    model.model.layers[1].register_forward_hook(lambda *_: None)
    assert distance(gradients_of(model, every_subset(inputs)), full) <= 1e-12


def test_a_pooled_token_is_always_selected_and_not_scaled() -> None:
    model = llama(3, LlamaForSequenceClassification, num_labels=3, pad_token_id=0)
    inputs = row() | {"labels": torch.tensor([1])}
    full = gradients_of(copy.deepcopy(model), inputs)
    apply_tokentune(model, 0.4, selection="random", gradient_correction=1.0)
    assert distance(mean_over_draws(model, inputs, [0.4] * (SIZE - 1) + [1]), full) <= 1e-12


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        (0.3, {}, "supervised selects what has a loss first"),
        (0.3, {"selection": "stratified"}, "stratified does not draw each token independently"),
        ("answers+0.1", {"selection": "contiguous"}, "take random, or a prefix_length of answers"),
        (0.3, {"selection": "gradient"}, "gradient does not draw"),
        ("answers", {}, "nothing to correct: add a share"),
    ],
)
def test_draws_that_cannot_be_corrected(size: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apply_tokentune(llama(1), size, verify=False, gradient_correction=0.5, **options)


def test_given_positions_need_their_probabilities() -> None:
    model, inputs = llama(1), row()
    apply_tokentune(model, verify=False, gradient_correction=1.0)
    inputs["selected_positions"] = torch.tensor([[0, 2, 4]])
    with pytest.raises(ValueError, match="needs selection_probabilities"):
        model(**inputs)
    for wrong, why in ((torch.ones(1, 2), "of the shape"), (torch.tensor([[0.5, 0.0, 1.0]]), "above 0 and at most 1")):
        with pytest.raises(ValueError, match=why):
            model(**inputs, selection_probabilities=wrong)
    with torch.no_grad():
        assert model(**inputs).logits.shape[:2] == (1, 3)  # nothing is corrected
    every = {"selected_positions": torch.arange(SIZE)[None]}
    expected = gradients_of(copy.deepcopy(apply_tokentune(llama(1), verify=False)), inputs | every)
    assert distance(gradients_of(model, inputs | every), expected) <= 1e-12  # all tokens: ordinary training


def test_a_loss_of_others_takes_no_weights_and_what_works_is_named() -> None:
    model, inputs = llama(3), row()
    full = gradients_of(copy.deepcopy(model), inputs)
    model.forward = lambda *args, **kwargs: LlamaForCausalLM.forward(model, *args, **kwargs)  # as of another library
    apply_tokentune(model, 0.5, selection="random", verify=False, gradient_correction=1.0)
    with pytest.raises(UnsupportedModelError, match=r"gradient_correction needs them .* take answers\+0.1"):
        model(**inputs)
    apply_tokentune(model, "answers+0.4", verify=False, gradient_correction=1.0)
    assert distance(mean_over_draws(model, inputs, [0.4, 0.4, 1, 1, 1, 0.4]), full) <= 1e-12
