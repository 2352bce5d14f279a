#!/usr/bin/env bash
# Named entities, BERT-base on CoNLL-2003: full training, 30 % of the tokens at random, and 30 % with those of entities
# preferred; entity F1 of three seeds each.
#     bash scripts/ner/conll2003_bert_base.sh
#     DATASET=train.jsonl EVAL_DATASET=validation.jsonl bash scripts/ner/conll2003_bert_base.sh --num_epochs 5
#
# MODEL            hub id or folder of the encoder       default google-bert/bert-base-cased
# DATASET          hub id, file or folder of the rows    default lhoestq/conll2003
# EVAL_DATASET     the same for validation rows          default the data set's own split
# MODEL_SAVE_PATH  folder for the runs' folders          default models (a relative path is below the project)
# PYTHON           python to run                         default the active environment's, .venv's, python3
# Further flags go to tokentune/classify.py; a flag given again replaces the one given here.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

data=(--dataset_name_or_path "${DATASET:-lhoestq/conll2003}")
if [[ -n ${EVAL_DATASET:-} ]]; then data+=(--eval_dataset_name_or_path "$EVAL_DATASET"); fi

# entities FLAGS ...: one run; words in `tokens`, their classes in `ner_tags`.
entities() {
    classify \
        --task_type token \
        --model_name_or_path "${MODEL:-google-bert/bert-base-cased}" \
        "${data[@]}" \
        --label_column ner_tags \
        --seeds 1 2 3 \
        --global_batch_size 32 \
        --num_epochs 3 \
        --learning_rate 5e-5 \
        --weight_decay 0.01 \
        --warmup_steps 0.1 \
        --lr_scheduler_type linear \
        --max_length 256 \
        "$@"
}

entities "$@"
entities --tokentune --prefix_length 0.3 "$@"
entities --tokentune --prefix_length 0.3 --selection labelled "$@"
score_table
