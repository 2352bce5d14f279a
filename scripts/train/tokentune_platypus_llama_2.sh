#!/usr/bin/env bash
# TokenTune alone, 30 % of the tokens at random, as in the paper: all weights are trained and saved, so that there is nothing to merge.
#     bash scripts/train/tokentune_platypus_llama_2.sh
#     MODEL=./my-llama DATASET=rows.jsonl bash scripts/train/tokentune_platypus_llama_2.sh --num_epochs 3
#
# MODEL            hub id or folder of the base          default meta-llama/Llama-2-7b-hf
# DATASET          hub id, file or folder of the data    default garage-bAInd/Open-Platypus
# MODEL_SAVE_PATH  folder for the run's folder           default models (a relative path is below the project)
# PYTHON           python to run                         default the active environment's, .venv's, python3
# Further flags go to tokentune/finetune.py; a flag given again replaces the one given here. The settings that all five
# scripts share stand in finetune() of scripts/common.sh.
#
# All weights in float32, gradients and AdamW's two moments take 16 bytes per weight: over 100 GiB for 7 billion. --bf16
# computes in bfloat16 and keeps these; --base_dtype bfloat16 halves them, at the price of losing the smallest updates.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

finetune --tokentune --prefix_length 0.3 --selection random --learning_rate 4e-5 "$@"
