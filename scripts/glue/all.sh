#!/usr/bin/env bash
# The whole table: BERT-base and BERT-large on GLUE, full training and TokenTune, three seeds a task.
#     bash scripts/glue/all.sh
#     TASKS="cola mrpc stsb rte" MODEL_SAVE_PATH=/big/disk bash scripts/glue/all.sh --bf16
#
# TASKS, DATASET, EVAL_DATASET, MODEL_SAVE_PATH and PYTHON as in the scripts of one row each;
# further flags go to all runs. A run that is there already is not repeated, so that this can be stopped and started
# again. The table alone, of the runs so far: python scripts/glue/table.py models
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

unset MODEL
for size in base large; do
    glue "google-bert/bert-$size-uncased" "$@"
    glue "google-bert/bert-$size-uncased" --tokentune --prefix_length 16 "$@"
done
score_table
