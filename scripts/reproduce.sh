#!/usr/bin/env bash
# The paper's main experiment, from training to figures: Llama-2-7B on Open-Platypus, all weights, LoRA and QLoRA, each
# plain and with TokenTune; merge; the five lm-eval tasks for the base and every model; memory table and figures.
#     bash scripts/reproduce.sh                            on a GPU of 80 GB
#     bash scripts/reproduce.sh --num_epochs 2             flags go to every training run, after its own
#     bash scripts/reproduce.sh --small                    all of it on the CPU in minutes: a tiny model and little data
# Called again, it goes on where it stopped: what is finished is not done again (--fresh starts over).
#
# RUNS            which of: full tokentune lora lora_tokentune qlora qlora_tokentune            default all six
# PROPORTIONS     further proportions of selected tokens for LoRA + TokenTune, beside 0.3       default "0.1 0.2 0.5"
# TASKS           which of: arc hellaswag mmlu truthfulqa winogrande                            default all five
# MODEL, DATASET  as in scripts/train                                                           default the paper's
# SHARED          for --small: folder with models/llama-tiny, data/alpaca_en.*.jsonl            default ../shared
# REPRODUCE_DIR   output folder                      default reproduce, or reproduce-small, below the project
# PYTHON          python to run
#
# ALL_WEIGHTS     flags of full and tokentune alone                                   default "--base_dtype bfloat16"
# The released scripts train all weights in bfloat16, which takes 54 GB for Llama-2-7B and loses the smallest updates;
# ALL_WEIGHTS="--base_dtype float32" keeps them and takes 108 GB, before activations.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

CODE=$PROJECT_ROOT/scripts/reproduce
TRAIN=$PROJECT_ROOT/scripts/train
FIGURES=$PROJECT_ROOT/scripts/figures
SMALL=no
FRESH=no
FLAGS=(--report_to none) # never empty: bash 3.2 cannot expand empty arrays under set -u
while [[ $# -gt 0 ]]; do
    case $1 in
        --small) SMALL=yes ;;
        --fresh) FRESH=yes ;;
        -h | --help) sed -n '2,/^source/{/^source/!s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}" && exit ;;
        *) FLAGS+=("$1") ;;
    esac
    shift
done
RUNS=${RUNS-full tokentune lora lora_tokentune qlora qlora_tokentune}
TASKS=${TASKS:-arc hellaswag mmlu truthfulqa winogrande}
for run in $RUNS; do
    case $run in
        full | tokentune | lora | lora_tokentune | qlora | qlora_tokentune) ;;
        *) die "RUNS: there is no run named $run" "there are: full tokentune lora lora_tokentune qlora qlora_tokentune" ;;
    esac
done
for task in $TASKS; do
    [[ -f $PROJECT_ROOT/scripts/eval/lm_harness_$task.sh ]] || die "TASKS: there is no task named $task" \
        "there are: arc hellaswag mmlu truthfulqa winogrande"
done

# What the two sizes of the experiment differ in: model, data, flags, tasks, benchmark.
STEP_FLAGS=(--suites gpu_7b)
EVAL_FLAGS=(--log_samples)
TABLE_FLAGS=()
read -ra ALL_WEIGHTS <<<"${ALL_WEIGHTS:---base_dtype bfloat16}"
if [[ $SMALL == yes ]]; then
    SHARED=${SHARED:-$PROJECT_ROOT/../shared}
    if [[ ! -d $SHARED/models/llama-tiny || ! -f $SHARED/data/alpaca_en.train.jsonl ]]; then
        say "nothing done: --small needs models/llama-tiny and data/alpaca_en.*.jsonl in SHARED=$SHARED"
        exit 0
    fi
    SHARED=$(CDPATH='' cd -- "$SHARED" && pwd -P)
    DIR=$(in_project "${REPRODUCE_DIR:-reproduce-small}")
    MODEL=$SHARED/models/llama-tiny
    DATASET=$DIR/data/train.jsonl
    PROPORTIONS=${PROPORTIONS-0.1 0.5}
    TASKS=arc # stands for all: one script is called the way the others are
    FLAGS+=(--eval_dataset_name_or_path "$DIR/data/validation.jsonl" --max_length 128 --global_batch_size 16)
    FLAGS+=(--gradient_accumulation_steps 2 --warmup_steps 2 --num_workers 0 --logging_steps 2)
    STEP_FLAGS+=(--small --device cpu)
    TABLE_FLAGS=(--small)
    EVAL_FLAGS=(--tasks reproduce_alpaca --include_path "$CODE/tasks" --num_fewshot 0 --device cpu)
    export CUDA_VISIBLE_DEVICES='' ACCELERATE_USE_CPU=true HF_HUB_OFFLINE=1 HF_DATASETS_CACHE=$DIR/.cache
    export HF_DATASETS_DISABLE_PROGRESS_BARS=1 LMEVAL_LOG_LEVEL=WARNING
    export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-5000} # as in the quick start: waiting threads sleep soon
else
    DIR=$(in_project "${REPRODUCE_DIR:-reproduce}")
    PROPORTIONS=${PROPORTIONS-0.1 0.2 0.5}
    MODEL=${MODEL:-meta-llama/Llama-2-7b-hf}
    DATASET=${DATASET:-garage-bAInd/Open-Platypus}
fi
TABLE_FLAGS+=(--folder "$DIR")
export MODEL DATASET MODEL_SAVE_PATH=$DIR/models RESULTS=$DIR/results TOKENIZERS_PARALLELISM=false

small_data() {
    rm -rf "$DIR/data"
    "$PYTHON" "$CODE/small_data.py" --output_dir "$DIR/data" \
        --train "$SHARED/data/alpaca_en.train.jsonl" --validation "$SHARED/data/alpaca_en.validation.jsonl"
}

# train RUN: what an interrupted call left of this run is replaced. Its folder is noted for the evaluation.
train() {
    local run=$1
    export RUN_FOLDER_NOTE=$DIR/.done/folder-of-$run
    case $run in
        full) finetune --learning_rate 4e-5 --bf16 "${ALL_WEIGHTS[@]}" --overwrite_output_dir "${FLAGS[@]}" ;;
        tokentune)
            bash "$TRAIN/$run"_platypus_llama_2.sh --bf16 "${ALL_WEIGHTS[@]}" --overwrite_output_dir "${FLAGS[@]}"
            ;;
        *) bash "$TRAIN/$run"_platypus_llama_2.sh --overwrite_output_dir "${FLAGS[@]}" ;;
    esac
    unset RUN_FOLDER_NOTE
}

# train_at PROPORTION: LoRA + TokenTune as in scripts/train, for the figure of losses alone: nothing is merged.
train_at() {
    finetune --lora --tokentune --bf16 --learning_rate 4e-4 --overwrite_output_dir --selection random "${FLAGS[@]}" \
        --prefix_length "$1"
}

# model_of RUN: the base, or where that run's model is: merged, if it had adapters.
model_of() {
    case $1 in
        base) printf '%s' "$MODEL" ;;
        full | tokentune) cat "$DIR/.done/folder-of-$1" ;;
        *) printf '%s/merged' "$(cat "$DIR/.done/folder-of-$1")" ;;
    esac
}

# evaluate TASK RUN: lm-eval's results in RESULTS. The small run's questions are looked up from $DIR.
evaluate() {
    local model
    model=$(model_of "$2")
    (cd "$DIR" && MODEL=$model bash "$PROJECT_ROOT/scripts/eval/lm_harness_$1.sh" "${EVAL_FLAGS[@]}")
}

measure() { "$PYTHON" -u "$PROJECT_ROOT/scripts/bench/step.py" --output "$DIR/step.json" "${STEP_FLAGS[@]}"; }

table() { "$PYTHON" "$CODE/table.py" "${TABLE_FLAGS[@]}"; }

figures() {
    mkdir -p "$DIR/figures"
    "$PYTHON" "$FIGURES/evaluation.py" --input "$DIR/results" --output "$DIR/figures/evaluation.png"
    "$PYTHON" "$FIGURES/loss_by_proportion.py" --input "$DIR/models" --output "$DIR/figures/loss_by_proportion.png"
    "$PYTHON" "$FIGURES/memory_breakdown.py" --input "$DIR/step.json" --output "$DIR/figures/memory_breakdown.png"
}

find_python torch transformers peft accelerate datasets bitsandbytes lm_eval matplotlib
export PYTHON
if [[ $FRESH == yes ]]; then
    say "starting over in $DIR"
    rm -rf "$DIR"/{.done,.cache,data,models,results,figures,step.json,report.json,report.md}
fi
mkdir -p "$DIR/.done"

SECONDS=0
if [[ $SMALL == yes ]]; then stage data "data: rows to train on, questions to ask" small_data; fi
for run in $RUNS; do stage "train-$run" "training: $run" train "$run"; done
for share in $PROPORTIONS; do stage "train-lora_tokentune-$share" "training: proportion $share" train_at "$share"; done
for task in $TASKS; do
    for run in base $RUNS; do stage "evaluate-$task-$run" "lm-eval $task: $run" evaluate "$task" "$run"; done
done
stage measure "memory and time of one step" measure
say "table and figures" # seconds, so always made anew
table
figures
say "all done in $SECONDS s; everything is in $DIR: report.md, figures/, results/, models/"
