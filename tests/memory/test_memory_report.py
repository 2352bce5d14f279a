"""What a run's memory held, and the advice where it did not suffice."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_llama_config

from tokentune import finetune
from tokentune.cli.arguments import parse_arguments
from tokentune.errors import UserError
from tokentune.memory.accounting import Footprint
from tokentune.memory.advice import advice
from tokentune.memory.footprint import measure
from tokentune.memory.report import REPORT_NAME, is_out_of_memory, memory_watched
from tokentune.settings.finetune import Arguments
from tokentune.training.trainer import SelectiveTrainer

REQUIRED = "--model_name_or_path owner/model --dataset_name_or_path owner/data --report_to none"


def command(model: Path, data: Path, folder: Path, *words: str) -> list[str]:
    names = ["--model_name_or_path", str(model), "--dataset_name_or_path", str(data), "--model_save_path", str(folder)]
    sizes = "--global_batch_size 4 --max_length 64 --warmup_steps 0 --report_to none --report_memory"
    return [*names, *sizes.split(), *words]


def test_report_of_a_run(tiny_llama_dir: Path, alpaca_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    words = ["--lora", "--tokentune", "--prefix_length", "0.5", "--skip_verification", "--max_length", "512"]
    finetune.main(command(tiny_llama_dir, alpaca_file, tmp_path, *words))
    (path,) = tmp_path.glob(f"*/{REPORT_NAME}")
    report = json.loads(path.read_text())
    summary = json.loads((path.parent / "training_summary.json").read_text())
    assert report["activations"] == summary["saved_for_backward_bytes"] == sum(report["activations_by"].values())
    assert {"attention", "mlp", "adapters"} <= report["activations_by"].keys()
    trained = 4 * summary["model"]["trainable_parameters"]
    assert report["gradients"] == trained
    assert report["optimizer"] == pytest.approx(2 * trained, rel=0.02)
    parts = ("weights", "gradients", "optimizer", "activations", "rest")
    assert sum(report[name] for name in parts) == report["peak"]
    assert report["out_of_memory"] is False
    changes = [entry["change"] for entry in report["advice"]]
    tokens = report["batch"]["tokens"]  # of the rows, which are shorter than they could be
    assert report["batch"]["sequences"] == 4 and tokens < 512
    assert {"--gradient_accumulation_steps 2", f"--max_length {tokens // 2}"} <= set(
        changes
    ) and "--lora" not in changes
    savings = [entry["saving"] for entry in report["advice"]]
    assert savings == sorted(savings, reverse=True) and savings[-1] > 0
    said = capfd.readouterr().err
    assert "What would help most" in said and "attention" in said


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["GPU", "CPU"],
)
def test_out_of_memory_ends_with_advice(
    error: RuntimeError,
    tiny_llama_dir: Path,
    alpaca_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    def training_step(*_: object) -> None:
        raise error

    monkeypatch.setattr(SelectiveTrainer, "training_step", training_step)
    with pytest.raises(
        UserError, match=r"out of memory in training, whose step needs about .* would save most"
    ) as told:
        finetune.main(command(tiny_llama_dir, alpaca_file, tmp_path))
    assert len(str(told.value).splitlines()) == 1
    (path,) = tmp_path.glob(f"*/{REPORT_NAME}")
    report = json.loads(path.read_text())
    assert report["out_of_memory"] is True
    assert report["activations"] is None and report["weights"] > 0
    assert report["advice"][0]["change"] in str(told.value)
    assert "not reached" in capfd.readouterr().err


def test_other_errors_are_left_alone() -> None:
    arguments = parse_arguments(REQUIRED.split())
    with pytest.raises(RuntimeError, match="size mismatch"), memory_watched(arguments, tiny_llama_config()):
        raise RuntimeError("size mismatch")
    assert not is_out_of_memory(RuntimeError("size mismatch"))
    assert not is_out_of_memory(ValueError("can't allocate memory"))


def test_advice_is_what_the_estimator_finds() -> None:
    config, shape = tiny_llama_config(hidden_size=128, intermediate_size=320), (2, 64)
    arguments = parse_arguments(f"{REQUIRED} --tokentune --prefix_length 0.6 --skip_verification".split())
    now = measure(config, arguments, shape)
    asked: list[tuple[int, int]] = []

    def run(changed: Arguments, shape: tuple[int, int]) -> Footprint:
        asked.append(shape)
        if changed.adapters.qlora:
            raise UserError("cannot be run without data")
        return measure(config, changed, shape)

    found = {entry["change"]: entry for entry in advice(arguments, shape, now.peak, run)}
    assert "--qlora" not in found and "--tokentune --prefix_length 0.3" not in found
    lora = parse_arguments(f"{REQUIRED} --tokentune --prefix_length 0.6 --skip_verification --lora".split())
    assert found["--lora"]["peak"] == measure(config, lora, shape).peak == now.peak - found["--lora"]["saving"]
    assert (1, 64) in asked and (2, 32) in asked


def test_snapshot_needs_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is there")
    with pytest.raises(UserError, match="--memory_snapshot is a history of the GPU's allocator"):
        parse_arguments([*REQUIRED.split(), "--memory_snapshot", "history.pickle"])


def test_snapshot_is_written_whatever_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    recorder = SimpleNamespace(
        _record_memory_history=lambda *_, **options: calls.append(options), _dump_snapshot=calls.append
    )
    monkeypatch.setattr(torch.cuda, "memory", recorder)
    arguments = parse_arguments(REQUIRED.split())
    arguments.memory.memory_snapshot = "history.pickle"
    trainer = SimpleNamespace()
    with pytest.raises(ValueError, match="broken"), memory_watched(arguments, tiny_llama_config(), trainer):
        raise ValueError("broken")
    assert calls == [{"max_entries": 200_000}, "history.pickle", {"enabled": None}]
