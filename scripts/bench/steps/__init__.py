"""The parts of `step.py`: what is measured (cases, suites), how (measure), and what the figures say (report)."""

import logging
import os

# Other packages' words on their own internals: the profiler's on its starts and stops, bitsandbytes' on its kernels.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
