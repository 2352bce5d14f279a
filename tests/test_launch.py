"""scripts/launch: the configurations and scripts, LAUNCH in the training scripts, and a process that ends too soon."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from test_scripts import TRAIN, call, flags_of, recorder  # noqa: F401 (a fixture)

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "scripts" / "launch"
FULL = TRAIN / "tokentune_platypus_llama_2.sh"
FINETUNE = str(ROOT / "tokentune" / "finetune.py")


@pytest.mark.parametrize(
    ("name", "kind"), [("single", "NO"), ("ddp", "MULTI_GPU"), ("fsdp2", "FSDP"), ("zero3", "DEEPSPEED")]
)
def test_accelerate_reads_the_configuration(name: str, kind: str) -> None:
    config = load_config_from_file(str(LAUNCH / f"{name}.yaml"))
    assert str(config.distributed_type).removeprefix("DistributedType.") == kind
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_auto_wrap_policy"] == "TRANSFORMER_BASED_WRAP"
    if name == "zero3":
        assert config.deepspeed_config["zero_stage"] == 3


def test_training_script_launches_by_name(recorder: tuple, tmp_path: Path) -> None:  # noqa: F811
    env, calls = recorder
    result = call(FULL, cwd=tmp_path, env=env | {"LAUNCH": "fsdp2", "NUM_PROCESSES": "8"})
    assert result.returncode == 0, result.stderr
    naming, training = calls()
    assert naming[:2] == ["-u", FINETUNE] and naming[-1] == "--print_run_folder"
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(LAUNCH / "fsdp2.yaml"), "--num_processes", "8"]
    assert training[:7] == [*launcher, FINETUNE]
    assert flags_of(training[7:])["--gradient_accumulation_steps"] == ["4"]  # of a global batch of 32, one row each


def test_training_script_launches_by_a_command(recorder: tuple, tmp_path: Path) -> None:  # noqa: F811
    env, calls = recorder
    result = call(FULL, cwd=tmp_path, env=env | {"LAUNCH": f"{env['PYTHON']} -m torch.distributed.run --nnodes 2"})
    assert result.returncode == 0, result.stderr
    _, training = calls()
    assert training[:5] == ["-m", "torch.distributed.run", "--nnodes", "2", FINETUNE]


def test_unknown_launcher_is_refused(recorder: tuple, tmp_path: Path) -> None:  # noqa: F811
    env, calls = recorder
    result = call(FULL, cwd=tmp_path, env=env | {"LAUNCH": "fsdp"})
    assert (result.returncode, calls()) == (2, [])
    assert (
        "there is no scripts/launch/fsdp.yaml" in result.stderr and "give single, ddp, fsdp2 or zero3" in result.stderr
    )


ENVIRONMENT = """
import json, os
with open(os.environ["CALLS"] + ".env", "w") as file:
    json.dump({k: v for k, v in os.environ.items() if k.startswith(("FSDP", "ACCELERATE"))}, file)
"""


@pytest.mark.parametrize("engine", ["fsdp2", "ddp"])
def test_several_machines_by_torchrun(engine: str, recorder: tuple, tmp_path: Path) -> None:  # noqa: F811
    env, calls = recorder
    python = Path(env["PYTHON"])
    python.write_text(python.read_text() + ENVIRONMENT)
    env |= {"MAIN_MACHINE": "10.0.0.1", "MACHINES": "2", "NUM_PROCESSES": "4", "ENGINE": engine}
    result = call(LAUNCH / "multi_node.sh", "--lora", cwd=tmp_path, env=env)
    assert result.returncode == 0, result.stderr
    (words,) = calls()
    assert words[:2] == ["-m", "torch.distributed.run"] and words[-2:] == [FINETUNE, "--lora"]
    flags = flags_of(words[2:-2])
    assert (flags["--nnodes"], flags["--nproc-per-node"]) == (["2"], ["4"])
    assert flags["--rdzv-endpoint"] == ["10.0.0.1:29500"]
    handed_down = json.loads(Path(env["CALLS"] + ".env").read_text())
    if engine == "ddp":
        assert handed_down == {}
        return
    config = load_config_from_file(str(LAUNCH / "fsdp2.yaml")).fsdp_config
    for name, value in handed_down.items():  # the same as the configuration file says
        if name.startswith("FSDP"):
            assert str(config[name.lower()]).lower() == value.lower(), name
    assert handed_down["ACCELERATE_USE_FSDP"] == "true"


def test_several_machines_need_an_address(tmp_path: Path) -> None:
    result = call(LAUNCH / "multi_node.sh", cwd=tmp_path)
    assert result.returncode == 2 and "MAIN_MACHINE and MACHINES are needed" in result.stderr


def test_slurm_hands_its_job_to_torchrun(recorder: tuple, tmp_path: Path) -> None:  # noqa: F811
    env, calls = recorder
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in (("scontrol", "printf 'node-3\\nnode-7\\n'"), ("srun", 'shift; exec "$@"')):
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    env |= {"SLURM_JOB_NODELIST": "node-[3,7]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "123"}
    env |= {"SLURM_GPUS_ON_NODE": "8", "PROJECT": str(ROOT), "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    result = call(LAUNCH / "slurm.sh", "--resume_from_checkpoint", cwd=tmp_path, env=env)
    assert result.returncode == 0, result.stderr
    (words,) = calls()
    flags = flags_of(words[2:-2])
    assert flags["--rdzv-endpoint"] == ["node-3:20123"] and flags["--rdzv-id"] == ["123"]
    assert flags["--nproc-per-node"] == ["8"] and words[-1] == "--resume_from_checkpoint"


STUCK = """
import os, sys
from datetime import timedelta
from torch.distributed import TCPStore
from tokentune.runs.interruptions import interruptible
from tokentune.runs.peers import end_when_stuck

with interruptible(), end_when_stuck(seconds=1.0):
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    print("waiting", flush=True)
    store.wait(["never"], timedelta(seconds=60))  # in C++, where no Python code runs
"""


def test_a_process_that_waits_for_a_dead_one_ends_when_told_to() -> None:
    env = os.environ | {"WORLD_SIZE": "2", "RANK": "1", "PYTHONPATH": str(ROOT)}
    running = subprocess.Popen([sys.executable, "-c", STUCK], env=env, stdout=-1, stderr=-1, text=True)
    assert running.stdout.readline() == "waiting\n"
    time.sleep(1)  # from printing to waiting
    running.send_signal(signal.SIGTERM)
    _, said = running.communicate(timeout=30)
    assert running.returncode == 128 + signal.SIGTERM
    assert "rank 1 was told to end while it waited for another process" in said


# ---- real processes --------------------------------------------------------------------------------------------------


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", **more}


@pytest.fixture
def command(tiny_llama_dir: Path, alpaca_file: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """torchrun of two processes of finetune.py, on the tiny Llama."""

    def words(*flags: object) -> list[str]:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", FINETUNE]
        required = ["--model_name_or_path", tiny_llama_dir, "--dataset_name_or_path", alpaca_file]
        fixed = ["--model_save_path", tmp_path, "--max_length", 64, "--logging_steps", 1, "--warmup_steps", 1]
        selective = ["--tokentune", "--prefix_length", 0.3, "--skip_verification", "--skip_memory_probe"]
        return list(map(str, [*launcher, *required, *fixed, *selective, "--report_to", "none", *flags]))

    return words


def test_a_users_mistake_is_told_once(command: Callable[..., list[str]]) -> None:
    ended = subprocess.run(
        command("--learning_rate", 0), env=environment(), capture_output=True, text=True, timeout=120
    )
    assert ended.returncode != 0
    assert ended.stderr.count("--learning_rate 0: nothing would be learnt") == 1


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "processes"), [(0, 2), (1, 1)])
def test_a_killed_process_ends_the_run_which_goes_on_from_its_checkpoint(
    victim: int, processes: int, command: Callable[..., list[str]], tmp_path: Path
) -> None:
    """... on two processes, or on one."""
    flags = ("--global_batch_size", 4, "--num_epochs", 6, "--save_steps", 5)
    whole = subprocess.run(
        command(*flags, "--model_save_path", tmp_path / "whole"), env=environment(), capture_output=True, timeout=200
    )
    assert whole.returncode == 0, whole.stderr[-3000:]

    output = tmp_path / "output"
    with output.open("w") as file:
        words = command(*flags, "--model_save_path", tmp_path / "killed")
        running = subprocess.Popen(words, env=environment(), stdout=file, stderr=subprocess.STDOUT)
    wait_for(lambda: "step 8/" in output.read_text(), running)
    os.kill(process_of_rank(victim, running.pid), signal.SIGKILL)
    killed = time.monotonic()
    assert running.wait(timeout=60) != 0
    assert time.monotonic() - killed < 30
    text = output.read_text()
    assert text.count("another process of this run has ended") == 1 and "error: " in text
    assert f"rank      : {victim}" in text and "SIGKILL" in text  # the launcher's own words

    words = command(*flags, "--model_save_path", tmp_path / "killed", "--resume_from_checkpoint")
    words = words if processes == 2 else [sys.executable, *words[words.index(FINETUNE) :]]
    resumed = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=200)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "going on from" in resumed.stderr
    first, second = (result_of(tmp_path / name) for name in ("whole", "killed"))
    assert first.keys() == second.keys()
    assert all((first[name] - second[name]).abs().max() < 1e-6 for name in first)


def result_of(folder: Path) -> dict:
    from safetensors.torch import load_file

    (file,) = folder.glob("*/model.safetensors")
    return load_file(file)


def wait_for(condition: Callable[[], bool], running: subprocess.Popen) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert running.poll() is None and time.monotonic() < until
        time.sleep(0.1)


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
