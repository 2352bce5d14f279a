#!/usr/bin/env bash
# LoRA + TokenTune, 30 % of the tokens at random, as in the paper: trains the adapter, then merges it into <run folder>/merged.
#     bash scripts/train/lora_tokentune_platypus_llama_2.sh
#     MODEL=./my-llama DATASET=rows.jsonl bash scripts/train/lora_tokentune_platypus_llama_2.sh --num_epochs 3
#
# MODEL            hub id or folder of the base          default meta-llama/Llama-2-7b-hf
# DATASET          hub id, file or folder of the data    default garage-bAInd/Open-Platypus
# MODEL_SAVE_PATH  folder for the run's folder           default models (a relative path is below the project)
# PYTHON           python to run                         default the active environment's, .venv's, python3
# Further flags go to tokentune/finetune.py; a flag given again replaces the one given here. The settings that all five
# scripts share stand in finetune() of scripts/common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

finetune --lora --tokentune --prefix_length 0.3 --selection random --bf16 --learning_rate 4e-4 "$@"
merge_adapter "$RUN_FOLDER"
