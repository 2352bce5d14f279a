"""Short runs of `finetune.py` to kill, interrupt and resume, and what must come out of them all the same."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from children import CHILDREN, begin_child
from safetensors.torch import load_file

import tokentune.finetune
import tokentune.training.checkpoints.saving
import tokentune.training.checkpoints.writing
from tokentune.cli.command import run_command
from tokentune.training.trainer import SelectiveTrainer

# Windows of 3, 3 and 2 micro-batches of 2 rows: 3 steps in an epoch, 9 in the run.
STEPS = (
    "--global_batch_size 6 --gradient_accumulation_steps 3 --num_epochs 3 --warmup_steps 1 --learning_rate 5e-3 "
    "--max_length 128 --report_to none --logging_steps 4 --save_steps 2 --skip_verification --data_cache none "
)
METHOD = "--lora --tokentune --prefix_length 0.3 --skip_memory_probe"  # with dropout
MICRO_BATCHES = 8  # of an epoch


class Killed(BaseException):
    """Ends a run in this process without giving it any time, as SIGKILL does."""


Run = Callable[[Path, str], Path]


def kill_myself(*args: object, **kwargs: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def child(words: list[str], prepare: Callable[[pytest.MonkeyPatch], None] | None, output: Path) -> None:
    """A run in a process of its own, which takes what `prepare` does to it; what it says goes into a file."""
    begin_child(output)
    if prepare is not None:
        prepare(pytest.MonkeyPatch())
    run_command(lambda: tokentune.finetune.main(words))


def exit_code(target: Callable, *args: object) -> int:
    process = CHILDREN.Process(target=target, args=args)
    process.start()
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


@pytest.fixture(scope="module")
def run(tiny_llama_dir: Path, alpaca_file: Path) -> Iterator[Run]:
    """Runs the command, in this process, into a folder for models; returns the run's own folder."""
    patch = pytest.MonkeyPatch()
    patch.setattr(tokentune.finetune, "draw_curves", lambda *args: None)  # a second for each run
    names = f"--model_name_or_path {tiny_llama_dir} --dataset_name_or_path {alpaca_file} --eval_steps 3 "
    names += f"--eval_dataset_name_or_path {alpaca_file} "

    def run(folder: Path, words: str) -> Path:
        tokentune.finetune.main([*(names + STEPS + words).split(), "--model_save_path", str(folder)])
        return run_folder_in(folder)

    run.names = names
    yield run
    patch.undo()


@pytest.fixture(scope="module")
def uninterrupted(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("uninterrupted"), METHOD)


def run_folder_in(folder: Path) -> Path:
    (found,) = [path for path in folder.iterdir() if path.is_dir()]
    return found


def assert_same_run(folder: Path, expected: Path) -> None:
    """Weights to the last bit, and the same figures but for times and memory."""
    (name,) = [path.name for path in expected.glob("*.safetensors")]
    weights, reference = load_file(folder / name), load_file(expected / name)
    assert weights.keys() == reference.keys()
    assert [key for key in weights if not torch.equal(weights[key], reference[key])] == []
    figures = [json.loads((path / "training_summary.json").read_text(encoding="utf-8")) for path in (folder, expected)]
    for name in ("tokens", "validation_loss", "optimizer_steps", "loss", "saved_for_backward_bytes"):
        assert figures[0][name] == figures[1][name], name
    logs = [[(e["step"], e["loss"], e["grad_norm"], e["learning_rate"]) for e in f["log"]] for f in figures]
    assert logs[0] == logs[1]
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


def stop_at(patch: pytest.MonkeyPatch, micro_batch: int, stop: Callable[[], None]) -> None:
    """Calls `stop` before the given micro-batch of this process, from 0."""
    real, count = SelectiveTrainer.training_step, iter(range(10_000))

    def step(trainer: SelectiveTrainer, *args: object) -> torch.Tensor:
        if next(count) == micro_batch:
            stop()
        return real(trainer, *args)

    patch.setattr(SelectiveTrainer, "training_step", step)


def die() -> None:
    raise Killed


def interrupted_copy(uninterrupted: Path, folder: Path, *, keep: tuple[int, ...]) -> Path:
    """The folder that a run killed after step 8 leaves, with the checkpoints of these steps."""
    copy = folder / uninterrupted.name
    for step in keep:
        shutil.copytree(uninterrupted / f"checkpoint-{step}", copy / f"checkpoint-{step}")
    return copy
