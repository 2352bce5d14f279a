"""finetune.py on CPUs under an engine that accelerate gives to accelerators alone. Started by tests, by torchrun:

PYTHONPATH=. torchrun --nproc-per-node 2 tests/command_on_cpus.py fsdp2 FLAGS OF FINETUNE.PY
"""

import os
import sys

from distributed_worker import ENGINES, let_engines_run_on_cpus
from tokentune.training.trainer.distributed import engines as distributed

from tokentune.errors import run_command
from tokentune.finetune import main

if __name__ == "__main__":
    os.environ.update(ENGINES[sys.argv.pop(1)])
    let_engines_run_on_cpus()
    distributed.has_accelerators = lambda: True
    run_command(main)
