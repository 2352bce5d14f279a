#!/usr/bin/env bash
# Images, ViT-base on photographs of bean leaves (three classes, 1,034 training images): full training against half of
# the patches; accuracy of three seeds each.
#     bash scripts/vision/beans_vit_base.sh
#     DATASET=images/train EVAL_DATASET=images/validation bash scripts/vision/beans_vit_base.sh --num_epochs 8
#
# MODEL            hub id or folder of the encoder       default google/vit-base-patch16-224-in21k
# DATASET          hub id or folder of images            default AI-Lab-Makerere/beans
# EVAL_DATASET     the same for validation images        default the data set's own split
# MODEL_SAVE_PATH  folder for the runs' folders          default models (a relative path is below the project)
# PYTHON           python to run                         default the active environment's, .venv's, python3
# Further flags go to tokentune/classify.py; a flag given again replaces the one given here.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

data=(--dataset_name_or_path "${DATASET:-AI-Lab-Makerere/beans}")
if [[ -n ${EVAL_DATASET:-} ]]; then data+=(--eval_dataset_name_or_path "$EVAL_DATASET"); fi

# images FLAGS ...: one run.
images() {
    classify \
        --task_type image \
        --model_name_or_path "${MODEL:-google/vit-base-patch16-224-in21k}" \
        "${data[@]}" \
        --seeds 1 2 3 \
        --global_batch_size 32 \
        --num_epochs 4 \
        --learning_rate 5e-5 \
        --weight_decay 0.01 \
        --warmup_steps 0.1 \
        --lr_scheduler_type linear \
        "$@"
}

images "$@"
images --tokentune --prefix_length 0.5 "$@"
score_table
