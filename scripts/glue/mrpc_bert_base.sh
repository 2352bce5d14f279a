#!/usr/bin/env bash
# The paper's first experiment: BERT-base on MRPC, all tokens against 50 % and 25 % of them, memory and score.
#     bash scripts/glue/mrpc_bert_base.sh
#     MODEL=./my-bert bash scripts/glue/mrpc_bert_base.sh --seeds 1 2 3 4 5
#
# MODEL            hub id or folder of the encoder       default google-bert/bert-base-uncased
# DATASET          hub id, file or folder of the rows    default nyu-mll/glue
# EVAL_DATASET     the same for validation rows          default the data set's own split
#                  {task} in either stands for the task's name: DATASET='rows/{task}.train.jsonl'
# MODEL_SAVE_PATH  folder for the runs' folders          default models (a relative path is below the project)
# PYTHON           python to run                         default the active environment's, .venv's, python3
# Further flags go to tokentune/classify.py; a flag given again replaces the one given here. The settings that the GLUE
# scripts share stand in glue() of scripts/common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

TASKS=mrpc
glue google-bert/bert-base-uncased "$@"
for proportion in 0.5 0.25; do
    glue google-bert/bert-base-uncased --tokentune --prefix_length "$proportion" "$@"
done
score_table
