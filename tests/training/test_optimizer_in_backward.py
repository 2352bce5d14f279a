"""The update within the backward pass: the ordinary optimizer's weights, with one gradient at a time."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_llama_config
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaForCausalLM
from transformers.optimization import Adafactor

from tokentune import apply_tokentune
from tokentune.training.optimizer_in_backward import OptimizerInBackward

IDS = torch.arange(3, 33).reshape(2, 15)
POSITIONS = torch.tensor([[1, 5, 9, 13], [0, 2, 3, 12]])
OPTIMIZERS = {
    "adamw": (AdamW, {"lr": 1e-2}),
    "sgd": (SGD, {"lr": 1e-1, "momentum": 0.9}),
    "adafactor": (Adafactor, {"lr": 1e-2, "scale_parameter": False, "relative_step": False}),
}


def build(selective: bool = True, checkpointing: bool = False, **changes: object) -> nn.Module:
    torch.manual_seed(1)
    model = LlamaForCausalLM(tiny_llama_config(**changes)).double().train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    return apply_tokentune(model, verify=False) if selective else model


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """As the Trainer's: no decay of vectors."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]


def train(model: nn.Module, optimizer: Optimizer, steps: int = 3) -> dict[str, Tensor]:
    """Weights after some steps of other rows each, with a learning rate that falls."""
    schedule = LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
    inputs = {"selected_positions": POSITIONS} if hasattr(model, "_tokentune") else {}
    for step in range(steps):
        ids = IDS.roll(step, dims=1)
        model(input_ids=ids, labels=ids, **inputs).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("selective", [False, True], ids=["plain", "tokentune"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_same_weights_as_the_ordinary_optimizer(name: str, selective: bool, checkpointing: bool, tied: bool) -> None:
    cls, options = OPTIMIZERS[name]
    options = options | ({} if name == "adafactor" else {"foreach": False})  # which sums in another order
    weights = []
    for in_backward in (False, True):
        model = build(selective, checkpointing, tie_word_embeddings=tied)
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        if in_backward:
            optimizer = OptimizerInBackward(groups(model), build=cls, **options)
        else:
            optimizer = cls(groups(model), **options)
        weights.append(train(model, optimizer))
    for parameter, value in weights[0].items():
        assert not torch.equal(value, start[parameter]), parameter
        assert torch.equal(weights[1][parameter], value), parameter


@pytest.mark.parametrize("selective", [False, True], ids=["plain", "tokentune"])
def test_one_gradient_exists_at_a_time(selective: bool) -> None:
    model = build(selective, tie_word_embeddings=True)
    alive: list[int] = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda parameter: alive.append(sum(p.grad.nbytes for p in model.parameters() if p.grad is not None))
        )
    train(model, OptimizerInBackward(groups(model), build=AdamW, lr=1e-2), steps=1)
    sizes = [parameter.nbytes for parameter in model.parameters()]
    assert sorted(alive) == sorted(sizes)  # once per parameter, the tied one included, and it alone
    assert max(alive) < sum(sizes) / 4
    assert all(parameter.grad is None for parameter in model.parameters())


def test_norm_of_all_gradients_is_known_afterwards() -> None:
    model = build()
    inputs = {"input_ids": IDS, "labels": IDS, "selected_positions": POSITIONS}
    model(**inputs).loss.backward()
    expected = torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
    model.zero_grad()
    optimizer = OptimizerInBackward(groups(model), build=AdamW, lr=1e-2)
    model(**inputs).loss.backward()
    optimizer.step()
    assert optimizer.gradient_norm() == pytest.approx(expected.item(), rel=1e-5)


def test_state_is_saved_and_resumed(tmp_path: Path) -> None:
    whole = build()
    expected = train_halves(whole, OptimizerInBackward(groups(whole), build=AdamW, lr=1e-2), None, tmp_path)
    resumed = build()
    found = train_halves(resumed, OptimizerInBackward(groups(resumed), build=AdamW, lr=1e-2), build, tmp_path)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def train_halves(model: nn.Module, optimizer: Optimizer, fresh: Any, folder: Path) -> dict[str, Tensor]:
    """Two steps and two more; with `fresh` the second half by a new model and a new optimizer from the file."""
    train(model, optimizer, steps=2)
    if fresh is not None:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "checkpoint.pt")
        saved = torch.load(folder / "checkpoint.pt", weights_only=True)
        model = fresh()
        model.load_state_dict(saved["model"])
        optimizer = OptimizerInBackward(groups(model), build=AdamW, lr=1.0)
        optimizer.load_state_dict(saved["optimizer"])
        assert {group["lr"] for group in optimizer.param_groups} != {1.0}
    for group in optimizer.param_groups:
        group.pop("initial_lr", None)
    return train(model, optimizer, steps=2)


def test_state_of_another_optimizer_is_refused() -> None:
    model = build()
    with pytest.raises(ValueError, match="optimizers of 0 parameters, the model has 21"):
        OptimizerInBackward(groups(model), build=AdamW).load_state_dict(AdamW(model.parameters()).state_dict())


def test_frozen_parameters_are_left_out() -> None:
    model = build()
    model.lm_head.requires_grad_(False)
    optimizer = OptimizerInBackward(groups(model), build=SGD, lr=0.1)
    assert model.lm_head.weight not in optimizer.optimizers and len(optimizer.optimizers) == 20
