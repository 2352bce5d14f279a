#!/usr/bin/env bash
# Merges an adapter into its base, by default the one of scripts/train/lora_tokentune_platypus_llama_2.sh:
#     bash scripts/merge.sh
#     bash scripts/merge.sh --peft_model_path ./models/another-run --dtype float32
#
# MODEL            hub id or folder of the base          default meta-llama/Llama-2-7b-hf
# DATASET          hub id, file or folder of the data    default garage-bAInd/Open-Platypus
# MODEL_SAVE_PATH  folder that holds the run's folder    default models (a relative path is below the project)
# PYTHON           python to run                         default the active environment's, .venv's, python3
# The first three name the run's folder, as they did in training; --peft_model_path names it directly. The result goes
# into its subfolder merged. Further flags go to tokentune/merge.py; a flag given again replaces the one given here.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

find_python torch transformers peft
adapter=$(last_value --peft_model_path "" "$@")
if [[ -z $adapter ]]; then adapter=$(run_folder --lora --tokentune --prefix_length 0.3); fi
if [[ -n ${MODEL:-} ]]; then set -- --base_model_name_or_path "$MODEL" "$@"; fi
merge_adapter "$adapter" "$@"
