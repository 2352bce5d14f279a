#!/usr/bin/env bash
# BERT-base on GLUE with TokenTune: all weights, gradients for 16 tokens of each text, three seeds a task.
#     bash scripts/glue/tokentune_bert_base.sh
#     TASKS="mrpc rte" bash scripts/glue/tokentune_bert_base.sh --prefix_length 0.25
#
# MODEL            hub id or folder of the encoder       default google-bert/bert-base-uncased
# DATASET          hub id, file or folder of the rows    default nyu-mll/glue
# EVAL_DATASET     the same for validation rows          default the data set's own split
#                  {task} in either stands for the task's name: DATASET='rows/{task}.train.jsonl'
# TASKS            which tasks                           default cola sst2 mrpc stsb qqp mnli qnli rte
# MODEL_SAVE_PATH  folder for the runs' folders          default models (a relative path is below the project)
# PYTHON           python to run                         default the active environment's, .venv's, python3
# Further flags go to tokentune/classify.py; a flag given again replaces the one given here. The settings that the GLUE
# scripts share stand in glue() of scripts/common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

glue google-bert/bert-base-uncased --tokentune --prefix_length 16 "$@"
score_table
