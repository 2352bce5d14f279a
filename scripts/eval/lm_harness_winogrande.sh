#!/usr/bin/env bash
# WinoGrande, 0-shot (the old public leaderboard: --num_fewshot 5), by EleutherAI's lm-evaluation-harness.
#     bash scripts/eval/lm_harness_winogrande.sh
#     MODEL=./my-model bash scripts/eval/lm_harness_winogrande.sh --limit 100 --device cpu
#
# MODEL            hub id or folder                      default the merged LoRA + TokenTune run, in MODEL_SAVE_PATH
# MODEL_SAVE_PATH  folder that holds that run's folder   default models (a relative path is below the project)
# RESULTS          folder for the results                default results (a relative path is below the project)
# NUM_PROCESSES    GPUs that share the questions         default 1
# PYTHON           python to run                         default the active environment's, .venv's, python3
# Further flags go to `lm_eval run`; a flag given again replaces the one given here.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

lm_harness winogrande 0 20 "$@"  # task, shots, batch size
