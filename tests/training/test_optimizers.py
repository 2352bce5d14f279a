"""`--optim`: every optimizer of the Trainer that is installed trains, with and without the update in the backward."""

import copy
import logging
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from conftest import tiny_llama_config
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedTokenizerFast, TrainingArguments

from tokentune import apply_tokentune
from tokentune.cli.arguments import parse_arguments
from tokentune.data.collators import SeededRows
from tokentune.errors import UserError
from tokentune.settings.low_rank import check_projected_layers
from tokentune.training.optimizer_in_backward import OptimizerInBackward
from tokentune.training.optimizers import check_optimizer, in_backward
from tokentune.training.trainer import SelectiveTrainer, build_trainer, save_result
from tokentune.training.trainer_arguments import build_training_arguments

ROWS = [{"input_ids": list(range(n, n + 12)), "labels": [-100] * 4 + list(range(n + 4, n + 12))} for n in range(3, 15)]
IN_BACKWARD = "--optim_in_backward --max_grad_norm 0"
INSTALLED = ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"]
INSTALLED += ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit", "ademamix"]
PACKAGES = {"galore_adamw": "galore_torch", "galore_adafactor": "galore_torch", "apollo_adamw": "apollo_torch"}
PACKAGES |= {"schedule_free_adamw": "schedulefree"}


def settings_for(words: str, folder: Path) -> tuple[Any, TrainingArguments]:
    required = [
        "--model_name_or_path",
        "tiny",
        "--dataset_name_or_path",
        "rows.jsonl",
        "--model_save_path",
        str(folder),
    ]
    fixed = "--report_to none --warmup_steps 1 --logging_steps 1 --global_batch_size 4 --learning_rate 1e-2 --tokentune"
    arguments = parse_arguments([*required, *fixed.split(), "--prefix_length", "0.5", *words.split()])
    return arguments, build_training_arguments(arguments, folder)


def trainer_for(words: str, folder: Path, tokenizer_dir: Path, dtype: torch.dtype = torch.float32) -> SelectiveTrainer:
    arguments, settings = settings_for(words, folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_llama_config(hidden_size=64, intermediate_size=160)).to(dtype)
    model = apply_tokentune(model, verify=False)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_dir, pad_token="<unk>")
    return build_trainer(model, settings, SeededRows(ROWS, 1), None, tokenizer, arguments)


def weights(trainer: SelectiveTrainer) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


@pytest.mark.parametrize("when", ["", IN_BACKWARD], ids=["after", "within"])
@pytest.mark.parametrize("name", [*INSTALLED, *PACKAGES])
def test_trains(name: str, when: str, tmp_path: Path, tiny_llama_dir: Path) -> None:
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    trainer = trainer_for(f"--optim {name} {when}", tmp_path, tiny_llama_dir)
    start = weights(trainer)
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, OptimizerInBackward) is bool(when)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 3 and all(entry["grad_norm"] > 0 for entry in entries)
    for parameter, value in weights(trainer).items():
        assert value.isfinite().all() and not torch.equal(value, start[parameter]), parameter


@pytest.mark.parametrize("name", ["adamw_torch", "adafactor"])
def test_trainer_updates_the_same_within_the_backward_pass(name: str, tmp_path: Path, tiny_llama_dir: Path) -> None:
    """Weight decay groups, schedule and normaliser included."""
    found = []
    for words in ("--max_grad_norm 0", IN_BACKWARD):
        trainer = trainer_for(f"--optim {name} {words}", tmp_path, tiny_llama_dir, torch.float64)
        trainer.train()
        found.append((weights(trainer), [entry["grad_norm"] for entry in trainer.state.log_history if "loss" in entry]))
    for parameter, value in found[0][0].items():
        assert torch.equal(found[1][0][parameter], value), parameter
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-5)


def test_checkpoint_of_a_run_within_the_backward_pass_resumes(tmp_path: Path, tiny_llama_dir: Path) -> None:
    words = f"{IN_BACKWARD} --save_steps 2"
    whole = trainer_for(words, tmp_path / "run", tiny_llama_dir, torch.float64)
    whole.train()
    assert (tmp_path / "run" / "checkpoint-2" / "optimizer.pt").exists()
    resumed = trainer_for(words, tmp_path / "run", tiny_llama_dir, torch.float64)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert resumed.state.global_step == 3
    for parameter, value in weights(whole).items():
        assert torch.equal(weights(resumed)[parameter], value), parameter


def test_clipping_is_the_flags(tmp_path: Path) -> None:
    assert settings_for("", tmp_path)[1].max_grad_norm == 1.0
    assert settings_for("--max_grad_norm 0.3", tmp_path)[1].max_grad_norm == 0.3


def test_embeddings_keep_wide_states_beside_8_bit_ones() -> None:
    bitsandbytes.optim.GlobalOptimManager.get_instance().initialize()  # it remembers other models of this process
    model = nn.Sequential(nn.Embedding(128, 64), nn.Linear(64, 128))
    cls, options = in_backward(bitsandbytes.optim.AdamW, {"lr": 1e-2, "optim_bits": 8}, model)
    optimizer = cls(list(model.parameters()), **options)
    model(torch.arange(8)).sum().backward()
    kinds = {name: optimizer.optimizers[p].state[p]["state1"].dtype for name, p in model.named_parameters()}
    assert kinds == {"0.weight": torch.float32, "1.weight": torch.uint8, "1.bias": torch.float32}


def test_low_rank_projections_are_of_all_layers_and_nothing_else(tmp_path: Path, tiny_llama_dir: Path) -> None:
    pytest.importorskip("galore_torch")
    trainer = trainer_for("--optim galore_adamw --optim_args rank=4", tmp_path, tiny_llama_dir)
    trainer.create_optimizer()
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    plain, projected = ({names[id(p)] for p in group["params"]} for group in trainer.optimizer.param_groups)
    assert trainer.optimizer.param_groups[1]["rank"] == 4
    assert len(projected) == 2 * 7 and all("layers" in name and name.endswith("proj.weight") for name in projected)
    assert {"lm_head.weight", "model.embed_tokens.weight"} < plain


def test_layerwise_optimizers_are_those_within_the_backward_pass(tmp_path: Path) -> None:
    pytest.importorskip("galore_torch")
    arguments, settings = settings_for("--optim galore_adamw_layerwise --max_grad_norm 0", tmp_path)
    assert arguments.optimization.optim_in_backward and settings.optim == "galore_adamw"


def test_schedule_free_weights_are_averaged_where_they_are_used(tmp_path: Path, tiny_llama_dir: Path) -> None:
    pytest.importorskip("schedulefree")
    for when in ("", IN_BACKWARD):
        trainer = trainer_for(f"--optim schedule_free_adamw {when}", tmp_path, tiny_llama_dir)
        trainer.train()
        trained = copy.deepcopy(weights(trainer))
        save_result(trainer, tmp_path / "result", torch.float32)
        saved = LlamaForCausalLM.from_pretrained(tmp_path / "result")
        assert not torch.equal(saved.lm_head.weight, trained["lm_head.weight"])
        assert torch.equal(saved.lm_head.weight, weights(trainer)["lm_head.weight"])


# ---- refused ---------------------------------------------------------------------------------------------------------

REFUSED = [
    ("--optim_in_backward", "--optim_in_backward cannot clip gradients by their common norm, .*--max_grad_norm 0"),
    (f"{IN_BACKWARD} --gradient_accumulation_steps 2", "cannot add up --gradient_accumulation_steps 2 micro-batches"),
    ("--optim galore_adamw_layerwise", "--optim galore_adamw_layerwise cannot clip"),
    ("--optim lomo", "--optim lomo cannot clip"),
    (f"--optim lomo {IN_BACKWARD}", "drop --optim_in_backward"),
    ("--optim galore_adamw --lora", "leave --lora and --qlora out"),
    ("--optim apollo_adamw --qlora", "leave --lora and --qlora out"),
    ("--max_grad_norm -1", "--max_grad_norm -1.0: must be 0 or more"),
    ("--optim sgd --optim_args momentum", "--optim sgd --optim_args momentum cannot be used here"),
    ("--optim sgd --optim_args momentum=-2", "Invalid momentum value: -2.0"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED, ids=[words for words, _ in REFUSED])
def test_refused(words: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        settings_for(words, tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--optim_in_backward cannot average gradients over processes"):
        settings_for(IN_BACKWARD, tmp_path)


def test_loss_scaling_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    with pytest.raises(UserError, match="--optim_in_backward with --fp16"):
        settings_for(f"{IN_BACKWARD} --fp16", tmp_path)


@pytest.mark.parametrize(
    ("name", "package"), [("galore_adamw", "galore-torch"), ("apollo_adamw", "apollo-torch"), ("lomo", "lomo-optim")]
)
def test_missing_package_is_named(name: str, package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for family in ("galore_torch", "apollo_torch", "lomo"):
        monkeypatch.setattr(f"transformers.trainer_optimizer.is_{family}_available", lambda: False)
    with pytest.raises(UserError, match=f"--optim {name}: its package is missing; `pip install {package}`"):
        settings_for(f"--optim {name} --max_grad_norm 0", tmp_path)


def test_what_fails_in_its_first_step_is_refused_before_a_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As GaLore's 8-bit AdamW does without a GPU."""

    def step(self: Any, closure: Any = None) -> None:
        raise AssertionError("Torch not compiled with CUDA enabled")

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    with pytest.raises(UserError, match="--optim sgd cannot be used here: AssertionError: Torch not compiled"):
        settings_for("--optim sgd", tmp_path)


def test_check_changes_no_random_state(tmp_path: Path) -> None:
    _, settings = settings_for("", tmp_path)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    check_optimizer(settings)
    assert torch.equal(torch.rand(2), expected)


def test_options_without_effect_say_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="tokentune"):
        settings_for("--optim sgd --optim_args momentum=0.9", tmp_path)
        assert "--optim_args" not in caplog.text
        settings_for("--optim_args momentum=0.9", tmp_path)
    assert "--optim_args momentum=0.9 changes nothing: --optim adamw_torch has no such options" in caplog.text


def test_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(UserError, match="--optim galore_adamw: GPT2LMHeadModel has no linear layers"):
        check_projected_layers(
            GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=96)), "galore_adamw"
        )
