#!/usr/bin/env bash
# The five tasks for a base and for the merged model trained from it, and a table of both.
#     bash scripts/eval/all.sh
#     MODEL=./models/my-run/merged bash scripts/eval/all.sh --limit 100
#
# MODEL            what was trained: a folder            default the merged LoRA + TokenTune run, in MODEL_SAVE_PATH
# BASE             what it was trained from              default as the run's own files name it
# MODEL_SAVE_PATH, RESULTS, NUM_PROCESSES and PYTHON as in the scripts of one task each.
# Further flags go to `lm_eval run`. A task whose result is there already is skipped, so that this can be stopped and
# started again. The table alone, of the results so far: python scripts/eval/report.py --results results
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

find_python torch transformers accelerate lm_eval rich
MODEL=${MODEL:-$(merged_model)}
BASE=${BASE:-$(base_of "$MODEL")}
for model in "$BASE" "$MODEL"; do
    for task in arc hellaswag mmlu truthfulqa winogrande; do
        MODEL=$model SKIP_FINISHED=1 bash "$PROJECT_ROOT/scripts/eval/lm_harness_$task.sh" "$@"
    done
done
"$PYTHON" "$PROJECT_ROOT/scripts/eval/report.py" --results "$(in_project "${RESULTS:-results}")" \
    --base "$(results_name "$BASE")" --model "$(results_name "$MODEL" | cut -d / -f 1)"
