"""Commands on several processes (torchrun, gloo): one message for all, a killed process, engines, resuming.

Small differences are allowed for where sums of float32 numbers are made in another order.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from classification_models import save_tiny_bert, write_texts
from forked_launcher import start_launcher
from safetensors.torch import load_file

import tokentune.finetune
from tokentune import classify

ROOT = Path(__file__).resolve().parents[2]
SELECTIVE = ["--tokentune", "--prefix_length", "0.3", "--skip_verification", "--skip_memory_probe"]
LONG = ["--global_batch_size", "4", "--num_epochs", "12", "--save_steps", "12"]  # 48 steps
SHORT = ["--global_batch_size", "4", "--num_epochs", "3", "--save_steps", "5"]  # 12 steps


@pytest.fixture(scope="module")
def words(tiny_llama_dir: Path, alpaca_file: Path) -> Callable[..., list[str]]:
    """finetune.py's, on the tiny Llama."""

    def words(folder: Path, *flags: str) -> list[str]:
        given = ["--model_name_or_path", str(tiny_llama_dir), "--dataset_name_or_path", str(alpaca_file)]
        given += ["--model_save_path", str(folder), "--max_length", "64", "--logging_steps", "1"]
        return [*given, "--warmup_steps", "1", "--report_to", "none", *flags]

    return words


@pytest.fixture
def run(words: Callable, tmp_path: Path) -> Callable[..., str]:
    """Runs finetune.py under an engine; returns what it says on both streams."""

    def run(engine: str, processes: int, folder: Path, *flags: str, fails: bool = False) -> str:
        output = tmp_path / "said"
        output.unlink(missing_ok=True)
        launcher = start_launcher(engine, processes, words(folder, *flags), output)
        launcher.join(200)
        said = output.read_text()
        assert launcher.exitcode is not None and (launcher.exitcode != 0) is fails, said[-4000:]
        return said

    return run


@pytest.fixture(scope="module")
def run_here(words: Callable) -> Callable[..., None]:
    """Runs finetune.py in this process."""

    def run(folder: Path, *flags: str) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tokentune.finetune, "draw_curves", lambda *args: None)  # a second for each run
            tokentune.finetune.main(words(folder, *flags))

    return run


def weights_of(folder: Path) -> dict:
    (file,) = [path for path in folder.glob("*/*.safetensors")]
    return load_file(file)


def largest_difference(first: Path, second: Path) -> float:
    one, other = weights_of(first), weights_of(second)
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def test_a_users_mistake_is_told_once(run: Callable, tmp_path: Path) -> None:
    said = run("ddp", 2, tmp_path, *SELECTIVE, "--learning_rate", "0", fails=True)
    assert said.count("--learning_rate 0: nothing would be learnt") == 1


# ---- a process that is killed ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unharmed(run_here: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unharmed")
    run_here(folder, *SELECTIVE, *LONG)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "step", "victim"), [("ddp", 6, 0), ("fsdp2", 28, 1)])
def test_a_killed_process_ends_the_run_which_goes_on_from_its_checkpoint(
    engine: str,
    step: int,
    victim: int,
    run: Callable,
    run_here: Callable,
    words: Callable,
    unharmed: Path,
    tmp_path: Path,
) -> None:
    """... on two processes, and on one; killed before its first checkpoint, and after its second."""
    output, killed = tmp_path / "output", tmp_path / "killed"
    output.touch()
    launcher = start_launcher(engine, 2, words(killed, *SELECTIVE, *LONG), output)
    until = time.monotonic() + 120
    while f"step {step}/" not in output.read_text():
        assert launcher.is_alive() and time.monotonic() < until, output.read_text()[-4000:]
        time.sleep(0.01)
    os.kill(int(re.search(rf"rank {victim} is process (\d+)", output.read_text())[1]), signal.SIGKILL)
    since = time.monotonic()
    launcher.join(60)
    assert launcher.exitcode not in (0, None)
    assert time.monotonic() - since < 30
    text = output.read_text()
    assert text.count("another process of this run has ended") == 1 and "error: " in text

    copy = shutil.copytree(killed, tmp_path / "copy")
    begun = next(killed.glob("*/checkpoint-*[0-9]"), None) is not None
    assert begun is (engine == "fsdp2")
    flags = (*SELECTIVE, *LONG, "--resume_from_checkpoint")
    said = run(engine, 2, killed, *flags)
    assert ("going on from" if begun else "holds no whole checkpoint yet") in said
    if engine == "ddp":
        run_here(copy, *flags)
    else:
        run(engine, 1, copy, *flags)
    for folder in (killed, copy):
        assert largest_difference(unharmed, folder) < 1e-6


# ---- engines, by the command -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_fsdp_by_the_command(run: Callable, run_here: Callable, tmp_path: Path) -> None:
    """Verification, the result, its summary and memory report; one process gets there too."""
    alone, split = tmp_path / "alone", tmp_path / "split"
    flags = [*SELECTIVE, *SHORT, "--report_memory"]
    flags.remove("--skip_verification")
    run_here(alone, *flags)
    said = run("fsdp2", 2, split, *flags)
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


# ---- encoders --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_encoder_on_two_processes(tmp_path: Path) -> None:
    """The same weights and scores as one process's, with a last batch that is not full. By torchrun itself."""
    model = save_tiny_bert(tmp_path / "tiny-bert")
    train = write_texts(tmp_path / "texts.jsonl", 30, seed=0)
    held_out = write_texts(tmp_path / "held_out.jsonl", 11, seed=1)
    words = ["--model_name_or_path", str(model), "--report_to", "none", "--logging_steps", "1"]
    words += ["--dataset_name_or_path", str(train), "--eval_dataset_name_or_path", str(held_out)]
    words += ["--num_epochs", "2", "--global_batch_size", "8", "--learning_rate", "5e-3", "--max_length", "32"]
    words += ["--tokentune", "--prefix_length", "4", "--model_save_path"]
    classify.main([*words, str(tmp_path / "one")])
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "tokentune" / "classify.py"), *words, str(tmp_path / "two")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
    )
    assert ended.returncode == 0, ended.stdout[-4000:]
    assert ended.stdout.count("saved in") == 1
    assert largest_difference(tmp_path / "one", tmp_path / "two") < 1e-5
