#!/usr/bin/env bash
# Time and memory of a training step on the CPU, everything that README and docs say about them:
#     bash scripts/bench/cpu.sh
#     bash scripts/bench/cpu.sh --suites table lowest     # some of it
#     bash scripts/bench/cpu.sh --small --output /tmp/step.json     # tiny models, to try it out
#
# About 100 minutes on 2 quiet cores with 16 GiB. Goes on where an earlier call stopped; --fresh measures everything
# anew. PYTHON: python to run. Further flags go to scripts/bench/step.py; a flag given again replaces the one here.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

find_python torch transformers peft bitsandbytes
"$PYTHON" -u "$PROJECT_ROOT/scripts/bench/step.py" \
    --device cpu \
    --suites cpu \
    --output "$PROJECT_ROOT/scripts/bench/results/step_cpu.json" \
    "$@"
