"""`--use_liger_kernel`: refused where it cannot work; beside TokenTune without its fused loss. No kernel runs here."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import tiny_bert_config, tiny_llama_config
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.integrations.liger import apply_liger_kernel

from tokentune import apply_tokentune
from tokentune.cli.arguments import parse_arguments
from tokentune.errors import UserError
from tokentune.models.builder import check_kernels
from tokentune.settings.finetune import Arguments
from tokentune.training.trainer_arguments import BESIDE_TOKENTUNE, build_training_arguments

REQUIRED = ["--model_name_or_path", "owner/model", "--dataset_name_or_path", "owner/data", "--use_liger_kernel"]
ROWS: list[int] = []  # of each call of the stand-in's norm
IDS, POSITIONS = torch.arange(3, 33).reshape(2, 15), torch.tensor([[1, 5, 9, 13], [0, 2, 3, 12]])


def apply_to_llama(
    model: nn.Module, fused_linear_cross_entropy: bool = True, cross_entropy: bool = False, rms_norm: bool = True
) -> None:
    """What Liger does to an instance, in PyTorch: methods of its modules, and of the model for its fused loss."""

    def norm(self: nn.Module, hidden: Tensor) -> Tensor:
        ROWS.append(hidden.shape[1])
        return nn.functional.rms_norm(hidden, hidden.shape[-1:], self.weight, self.variance_epsilon)

    def forward(self: nn.Module, *args: object, **kwargs: object) -> None:
        raise AssertionError("the fused loss is not to run")

    for module in model.modules():
        if rms_norm and type(module).__name__ == "LlamaRMSNorm":
            module.__dict__["forward"] = norm.__get__(module)
    if fused_linear_cross_entropy:
        model.__dict__["forward"] = forward.__get__(model)
    assert not cross_entropy


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package, whose import needs Triton."""
    package, transformers, patch = (ModuleType(name) for name in ("liger_kernel", "transformers", "monkey_patch"))
    patch.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": apply_to_llama}
    transformers._apply_liger_kernel_to_instance = lambda model, **config: apply_to_llama(model, **config)
    for name, module in (("", package), (".transformers", transformers), (".transformers.monkey_patch", patch)):
        monkeypatch.setitem(sys.modules, f"liger_kernel{name}", module)
    for place in ("tokentune.settings.model", "transformers.integrations.liger"):
        monkeypatch.setattr(f"{place}.is_liger_kernel_available", lambda: True)


def parse(monkeypatch: pytest.MonkeyPatch, *words: str) -> Arguments:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return parse_arguments([*REQUIRED, *words])


def test_refused_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--use_liger_kernel needs a GPU"):
        parse_arguments(REQUIRED)


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokentune.settings.model.is_liger_kernel_available", lambda: False)
    with pytest.raises(UserError, match="pip install liger-kernel"):
        parse(monkeypatch)


def test_model_without_kernels_is_refused(liger: None) -> None:
    check_kernels(tiny_llama_config())
    with pytest.raises(UserError, match="Liger has no kernels for bert; it has some for llama"):
        check_kernels(tiny_bert_config())


@pytest.mark.parametrize(("words", "expected"), [(["--tokentune"], BESIDE_TOKENTUNE), ([], None)])
def test_fused_loss_is_off_beside_tokentune(
    words: list[str], expected: dict | None, liger: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arguments = parse(monkeypatch, *words)
    monkeypatch.undo()
    settings = build_training_arguments(arguments, tmp_path)
    assert settings.use_liger_kernel and settings.liger_kernel_config == expected


def test_patched_norms_and_selection_go_together(liger: None) -> None:
    """Applied to a model that is patched already, as the Trainer does: the selection's own loss and gradients stay."""
    torch.manual_seed(1)
    model = apply_tokentune(LlamaForCausalLM(tiny_llama_config()).train(), verify=False)
    steps = []
    for kernels in (False, True):
        if kernels:
            apply_liger_kernel(model, BESIDE_TOKENTUNE)
        model.zero_grad()
        output = model(input_ids=IDS, labels=IDS, selected_positions=POSITIONS)
        output.loss.backward()
        steps.append((output.logits, {name: p.grad.clone() for name, p in model.named_parameters()}))
    assert steps[1][0].shape == (2, 4, 96)  # the rows of the selection alone reached the head
    assert ROWS == [4, 11, 11, 4, 4, 11, 4, 4]  # two norms a layer, for selected and rest, nested; the last one
    for name, gradient in steps[0][1].items():
        assert (steps[1][1][name] - gradient).abs().max() <= 1e-4 * gradient.abs().max(), name
