"""scripts/launch: the configurations and scripts, LAUNCH in the training scripts, and a process that ends too soon."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from bash_scripts import TRAIN, call, flags_of

ROOT = Path(__file__).resolve().parents[2]
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


def test_training_script_launches_by_name(recorder: tuple, tmp_path: Path) -> None:
    env, calls = recorder
    result = call(FULL, cwd=tmp_path, env=env | {"LAUNCH": "fsdp2", "NUM_PROCESSES": "8"})
    assert result.returncode == 0, result.stderr
    naming, training = calls()
    assert naming[:2] == ["-u", FINETUNE] and naming[-1] == "--print_run_folder"
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(LAUNCH / "fsdp2.yaml"), "--num_processes", "8"]
    assert training[:7] == [*launcher, FINETUNE]
    assert flags_of(training[7:])["--gradient_accumulation_steps"] == ["4"]  # of a global batch of 32, one row each


def test_training_script_launches_by_a_command(recorder: tuple, tmp_path: Path) -> None:
    env, calls = recorder
    result = call(FULL, cwd=tmp_path, env=env | {"LAUNCH": f"{env['PYTHON']} -m torch.distributed.run --nnodes 2"})
    assert result.returncode == 0, result.stderr
    _, training = calls()
    assert training[:5] == ["-m", "torch.distributed.run", "--nnodes", "2", FINETUNE]


def test_unknown_launcher_is_refused(recorder: tuple, tmp_path: Path) -> None:
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
def test_several_machines_by_torchrun(engine: str, recorder: tuple, tmp_path: Path) -> None:
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


def test_slurm_hands_its_job_to_torchrun(recorder: tuple, tmp_path: Path) -> None:
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
from tokentune.training.distributed.interruptions import interruptible
from tokentune.training.distributed.peers import end_when_stuck

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
