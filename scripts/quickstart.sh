#!/usr/bin/env bash
# The whole job on the CPU, in some minutes, on a model and data that the repository makes itself:
#     bash scripts/quickstart.sh [--fresh] [--seed N]
# base model -> data -> LoRA -> LoRA + TokenTune -> merge -> lm-eval of all three -> memory and time -> tables and picture.
# Prompts are ten to eighty times as long as answers: TokenTune selects all tokens that predict an answer, and 30 % of the
# others (--prefix_length answers+0.3). By the answers alone this base, which never saw a prompt, learns less in the time.
#     --fresh     start over; without it, finished steps of an earlier call are skipped
#     --seed N    another world, other questions, another base (default 0)
# Writes into quickstart/ below the project, or into QUICKSTART_DIR. OMP_NUM_THREADS: cores to use (default: up to four).

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

CODE=$PROJECT_ROOT/scripts/quickstart
DIR=$(in_project "${QUICKSTART_DIR:-quickstart}")
STEPS=10
SEED=0
FRESH=no
while [[ $# -gt 0 ]]; do
    case $1 in
        --fresh) FRESH=yes ;;
        --seed)
            SEED=${2:-}
            shift $(($# > 1))
            ;;
        --seed=*) SEED=${1#*=} ;;
        -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;;
        *) die "unknown option: $1" "usage: bash scripts/quickstart.sh [--fresh] [--seed N]" ;;
    esac
    shift
done
[[ $SEED =~ ^[0-9]+$ ]] || die "--seed needs a whole number, not '$SEED'"

# step NAME TITLE COMMAND ...: a stage with a number. One that runs makes all later ones run again: they build on it.
step=0
step() {
    local name=$1 title=$2 marker number
    shift 2
    step=$((step + 1))
    if [[ ! -e $DIR/.done/$step-$name ]]; then
        for marker in "$DIR"/.done/*; do
            number=${marker##*/}
            number=${number%%-*}
            [[ ! -e $marker || $number -lt $step ]] || rm "$marker"
        done
    fi
    stage "$step-$name" "[$step/$STEPS] $title" "$@"
}

make_base() {
    rm -rf "$DIR/base"
    "$PYTHON" "$CODE/make_base.py" --output_dir "$DIR/base" --seed "$SEED"
}

make_data() {
    rm -rf "$DIR/data"
    "$PYTHON" "$CODE/make_data.py" --output_dir "$DIR/data" --seed "$SEED"
}

# finetune_quickstart FLAGS ...: LoRA on the instruction set, and what FLAGS add, into a folder below models/.
finetune_quickstart() {
    "$PYTHON" -u "$PROJECT_ROOT/tokentune/finetune.py" \
        --model_name_or_path "$DIR/base" \
        --dataset_name_or_path "$DIR/data/train.jsonl" \
        --model_save_path "$DIR/models" \
        --lora --lora_r 16 --lora_alpha 32 --lora_dropout 0 --lora_target_modules all-linear \
        --global_batch_size 32 \
        --num_epochs 1 \
        --learning_rate 3e-3 \
        --warmup_steps 20 \
        --max_length 96 \
        --group_by_length \
        --add_eos_token \
        --logging_steps 20 \
        --overwrite_output_dir \
        "$@"
}

merge_quickstart() {
    rm -rf "$RUN/merged"
    "$PYTHON" "$PROJECT_ROOT/tokentune/merge.py" \
        --base_model_name_or_path "$DIR/base" --peft_model_path "$RUN" --output_dir "$RUN/merged"
}

# evaluate NAME MODEL: lm-eval's results and all answers in evaluation/NAME. MODEL: a folder, or one and its adapter's.
evaluate() {
    rm -rf "$DIR/evaluation/$1"
    (
        cd "$DIR" # the tasks look for data/held_out/ from here
        LMEVAL_LOG_LEVEL=WARNING "$PYTHON" -m lm_eval run \
            --model hf \
            --model_args "pretrained=$2,dtype=float32" \
            --include_path "$CODE/tasks" \
            --tasks quickstart \
            --batch_size 64 \
            --device cpu \
            --log_samples \
            --output_path "$DIR/evaluation/$1"
    )
}

measure() {
    "$PYTHON" "$CODE/measure.py" \
        --model "$DIR/base" --data "$DIR/data/train.jsonl" --output "$DIR/measurements.json"
}

report() { "$PYTHON" "$CODE/report.py" --folder "$DIR"; }

ensure_venv "$PROJECT_ROOT/scripts/eval/requirements.txt" lm_eval

# Everything is local, and too small to gain from a GPU or from many cores.
cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores < 4 ? cores : 4))}
export CUDA_VISIBLE_DEVICES='' ACCELERATE_USE_CPU=true HF_HUB_OFFLINE=1 HF_DATASETS_CACHE=$DIR/.cache
export HF_DATASETS_DISABLE_PROGRESS_BARS=1 TOKENIZERS_PARALLELISM=false
# Waiting threads soon sleep. By default they spin for milliseconds: where another program wants a core too, that made
# steps twenty times slower; on an idle machine this costs nothing. (GNU's OpenMP, PyTorch's on Linux, reads it.)
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-5000}

RUN=$DIR/models/base-train-lora-tokentune-answers+0.3
mkdir -p "$DIR"
MADE_WITH="seed $SEED, $STEPS steps" # another version of this script may have left the folder
if [[ -e $DIR/.done && ($FRESH == yes || $(cat "$DIR/.made_with" 2>/dev/null) != "$MADE_WITH") ]]; then
    say "starting over in $DIR"
    rm -rf "$DIR"/{.done,.cache,base,data,models,evaluation,measurements.json,report.json,report.png}
fi
mkdir -p "$DIR/.done"
echo "$MADE_WITH" >"$DIR/.made_with"

SECONDS=0
step base "base model: tokenizer, small Llama, pre-training on generated notes" make_base
step data "data: instruction set and held-out questions" make_data
step before "lm-eval of the base" evaluate base "$DIR/base"
step lora "fine-tuning: LoRA alone, gradients for all tokens" finetune_quickstart
step finetune "fine-tuning: LoRA + TokenTune, gradients for the answers and 30 % of the prompts" finetune_quickstart \
    --tokentune --prefix_length answers+0.3
step merge "merge: base + adapter -> full checkpoint" merge_quickstart
step plain "lm-eval of LoRA alone" evaluate lora "$DIR/base,peft=$DIR/models/base-train-lora"
step after "lm-eval of the merged model" evaluate merged "$RUN/merged"
step measure "memory and time of a step: all weights and LoRA, each plain and with TokenTune" measure
step report "table and picture" report
say "all done in $SECONDS s with $OMP_NUM_THREADS threads; everything is in $DIR"
say "  picture:        $DIR/report.png"
say "  training:       $RUN/training_curves.png"
say "  merged model:   $RUN/merged"
