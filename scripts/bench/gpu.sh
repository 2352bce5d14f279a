#!/usr/bin/env bash
# Time and memory of a training step on a GPU: Llama-2-7B and Llama-3-8B sizes at 2,048 tokens, random weights.
#     bash scripts/bench/gpu.sh
#     bash scripts/bench/gpu.sh --suites gpu_7b gpu_8b     # some of it
#     bash scripts/bench/gpu.sh --small --device cpu --output /tmp/step.json     # the same code on tiny models
#
# Full, LoRA and QLoRA x plain, checkpointing, TokenTune, both, lowest memory; then batches of four, proportions, lengths
# up to 8,192, sizes from 1B to 13B, float32 masters. Made for 80 GB and more: what does not fit is noted as such.
# Stops after 8 minutes between two models: call again to go on, until it says 0 models left. --minutes 60 does it in
# one call. PYTHON: python to run. Further flags go to scripts/bench/step.py; a flag given again replaces the one here.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

find_python torch transformers peft bitsandbytes
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
"$PYTHON" -u "$PROJECT_ROOT/scripts/bench/step.py" \
    --device cuda \
    --suites gpu \
    --minutes 8 \
    --output "$PROJECT_ROOT/scripts/bench/results/step_gpu.json" \
    "$@"
