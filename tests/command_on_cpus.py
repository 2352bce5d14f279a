"""finetune.py on CPUs under an engine that accelerate gives to accelerators alone. Started by tests, by torchrun:

PYTHONPATH=. torchrun --nproc-per-node 2 tests/command_on_cpus.py fsdp2 FLAGS OF FINETUNE.PY
"""

import os
import sys

from distributed_worker import ENGINES, let_engines_run_on_cpus

from tokentune.cli.command import run_command
from tokentune.finetune import main
from tokentune.settings import machine

if __name__ == "__main__":
    os.environ.update(ENGINES[sys.argv.pop(1)])
    let_engines_run_on_cpus()
    machine.has_accelerator = lambda: True
    run_command(main)
