"""Commands on several processes (torchrun, gloo): one message for all, a killed process, engines, resuming.

Small differences are allowed for where sums of float32 numbers are made in another order.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from classification_models import save_tiny_bert, write_texts
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
FINETUNE = str(ROOT / "tokentune" / "finetune.py")
ON_CPUS = str(ROOT / "tests" / "command_on_cpus.py")
SELECTIVE = ["--tokentune", "--prefix_length", "0.3", "--skip_verification", "--skip_memory_probe"]
LONG = ["--global_batch_size", "4", "--num_epochs", "20", "--save_steps", "20"]  # 80 steps
SHORT = ["--global_batch_size", "4", "--num_epochs", "3", "--save_steps", "5"]  # 12 steps


def environment() -> dict[str, str]:
    alone = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    return os.environ | alone | {"PYTHONPATH": str(ROOT)}


def torchrun(processes: int, *command: str) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *launcher, *command]


def run(words: list[str], *, fails: bool = False) -> str:
    """What the command says on both streams."""
    ended = subprocess.run(
        words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=200
    )
    assert (ended.returncode != 0) is fails, ended.stdout[-4000:]
    return ended.stdout


@pytest.fixture(scope="module")
def finetune(tiny_llama_dir: Path, alpaca_file: Path) -> Callable[..., list[str]]:
    """finetune.py on the tiny Llama: by `engine` on so many processes; None: plain."""

    def words(engine: str | None, processes: int, folder: Path, *flags: str) -> list[str]:
        given = ["--model_name_or_path", str(tiny_llama_dir), "--dataset_name_or_path", str(alpaca_file)]
        given += ["--model_save_path", str(folder), "--max_length", "64", "--logging_steps", "1"]
        given += ["--warmup_steps", "1", "--report_to", "none", *flags]
        if engine is None:
            return [sys.executable, FINETUNE, *given]
        command = [FINETUNE] if engine == "ddp" else [ON_CPUS, engine]
        return torchrun(processes, *command, *given)

    return words


def weights_of(folder: Path) -> dict:
    (file,) = [path for path in folder.glob("*/*.safetensors")]
    return load_file(file)


def largest_difference(first: Path, second: Path) -> float:
    one, other = weights_of(first), weights_of(second)
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def test_a_users_mistake_is_told_once(finetune: Callable, tmp_path: Path) -> None:
    said = run(finetune("ddp", 2, tmp_path, *SELECTIVE, "--learning_rate", "0"), fails=True)
    assert said.count("--learning_rate 0: nothing would be learnt") == 1


# ---- a process that is killed ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "step", "victim"), [("ddp", 12, 0), ("fsdp2", 47, 1)])
def test_a_killed_process_ends_the_run_which_goes_on_from_its_checkpoint(
    engine: str, step: int, victim: int, finetune: Callable, tmp_path: Path
) -> None:
    """... on two processes, and on one; killed before its first checkpoint, and after its second."""
    unharmed, output, killed = tmp_path / "unharmed", tmp_path / "output", tmp_path / "killed"
    run(finetune(engine, 2, unharmed, *SELECTIVE, *LONG))
    with output.open("w") as file:
        words = finetune(engine, 2, killed, *SELECTIVE, *LONG)
        running = subprocess.Popen(words, env=environment(), stdout=file, stderr=subprocess.STDOUT)
    wait_for(lambda: f"step {step}/" in output.read_text(), running)
    os.kill(process_of_rank(victim, running.pid), signal.SIGKILL)
    since = time.monotonic()
    assert running.wait(timeout=60) != 0
    assert time.monotonic() - since < 30
    text = output.read_text()
    assert text.count("another process of this run has ended") == 1 and "error: " in text
    assert f"rank      : {victim}" in text and "SIGKILL" in text  # the launcher's own words

    copy = shutil.copytree(killed, tmp_path / "copy")
    begun = next(killed.glob("*/checkpoint-*[0-9]"), None) is not None
    for processes, folder in ((2, killed), (1, copy)):
        alone = engine == "ddp" and processes == 1
        words = finetune(None if alone else engine, processes, folder, *SELECTIVE, *LONG, "--resume_from_checkpoint")
        said = run(words)
        assert ("going on from" if begun else "holds no whole checkpoint yet") in said
        assert largest_difference(unharmed, folder) < 1e-6


def wait_for(condition: Callable[[], bool], running: subprocess.Popen) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert running.poll() is None and time.monotonic() < until
        time.sleep(0.01)


def process_of_rank(rank: int, launcher: int) -> int:
    """The process of this rank below a launcher (Linux)."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            variables = (process / "environ").read_bytes().split(b"\0")
        except (OSError, IndexError):
            continue
        if parent == launcher and f"RANK={rank}".encode() in variables:
            return int(process.name)
    raise AssertionError(f"no process of rank {rank}")


# ---- engines, by the command -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_fsdp_by_the_command(finetune: Callable, tmp_path: Path) -> None:
    """Verification, checkpoints in parts, the result, its summary and memory report; one process gets there too."""
    alone, split = tmp_path / "alone", tmp_path / "split"
    flags = [*SELECTIVE, *SHORT, "--report_memory"]
    flags.remove("--skip_verification")
    run(finetune(None, 1, alone, *flags))
    said = run(finetune("fsdp2", 2, split, *flags))
    assert largest_difference(alone, split) < 1e-6
    assert said.count("saved in") == 1

    (one,), (other,) = alone.iterdir(), split.iterdir()
    summaries = [json.loads((folder / "training_summary.json").read_text()) for folder in (one, other)]
    assert summaries[0]["tokens"] == summaries[1]["tokens"] and summaries[0]["model"] == summaries[1]["model"]
    losses = [[entry["loss"] for entry in summary["log"]] for summary in summaries]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    reports = [json.loads((folder / "memory_report.json").read_text()) for folder in (one, other)]
    for part in ("weights", "gradients", "optimizer"):
        assert reports[1][part] == pytest.approx(reports[0][part] / 2, rel=0.02)
    offered = " ".join(entry["change"] for entry in reports[1]["advice"])
    assert "--gradient_checkpointing" in offered and "--qlora" not in offered and "8bit" not in offered

    (other / "training_summary.json").unlink()
    shutil.rmtree(other / "checkpoint-10")
    resumed = run(finetune("fsdp2", 2, split, *flags, "--resume_from_checkpoint"))
    assert "checkpoint-5" in resumed
    assert largest_difference(alone, split) < 1e-6


# ---- encoders --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_encoder_on_two_processes(tmp_path: Path) -> None:
    """The same weights and scores as one process's, with a last batch that is not full."""
    model = save_tiny_bert(tmp_path / "tiny-bert")
    train = write_texts(tmp_path / "texts.jsonl", 30, seed=0)
    held_out = write_texts(tmp_path / "held_out.jsonl", 11, seed=1)
    words = [str(ROOT / "tokentune" / "classify.py"), "--model_name_or_path", str(model)]
    words += ["--dataset_name_or_path", str(train), "--eval_dataset_name_or_path", str(held_out)]
    words += ["--num_epochs", "2", "--global_batch_size", "8", "--learning_rate", "5e-3", "--max_length", "32"]
    words += ["--report_to", "none", "--logging_steps", "1", "--tokentune", "--prefix_length", "4"]
    run([sys.executable, *words, "--model_save_path", str(tmp_path / "one")])
    said = run(torchrun(2, *words, "--model_save_path", str(tmp_path / "two")))
    assert said.count("saved in") == 1
    assert largest_difference(tmp_path / "one", tmp_path / "two") < 1e-5
