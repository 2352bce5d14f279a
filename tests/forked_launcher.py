"""torchrun of this machine, as a function: its processes are forked, and run finetune.py on CPUs under any engine."""

import os
import signal
from pathlib import Path

import torch
from children import CHILDREN, begin_child
from distributed_worker import ENGINES, let_engines_run_on_cpus
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import tokentune.finetune
from tokentune.cli.command import run_command
from tokentune.settings import machine


def start_launcher(engine: str, processes: int, words: list[str], output: Path):
    """Starts `launch` in a process of its own; returns that, a multiprocessing.Process."""
    launcher = CHILDREN.Process(target=launch, args=(engine, processes, words, output))
    launcher.start()
    return launcher


def launch(engine: str, processes: int, words: list[str], output: Path) -> None:
    """torchrun --standalone --nproc-per-node `processes`; raises, as it does, when one of the processes fails."""
    begin_child(output)
    os.environ.update({"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        rdzv_configs={"timeout": 900},
        max_restarts=0,
        start_method="fork",
    )
    elastic_launch(config, run_process)(engine, words)


def run_process(engine: str, words: list[str]) -> None:
    """One process of several."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher's own handlers, which are forked too
    signal.signal(signal.SIGINT, signal.default_int_handler)
    print(f"rank {os.environ['RANK']} is process {os.getpid()}", flush=True)
    torch.set_num_threads(1)
    os.environ.update(ENGINES[engine])
    if engine != "ddp":
        let_engines_run_on_cpus()
        machine.has_accelerator = lambda: True
    tokentune.finetune.draw_curves = lambda *args: None  # a second for each run
    run_command(lambda: tokentune.finetune.main(words))
