# shellcheck shell=bash
# What the bash scripts share. Not a command: each script starts with
#     source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
# It then stops at its first error, and has
#     PROJECT_ROOT           the project's folder, whatever folder the script was called from
#     ensure_venv, find_python                            set PYTHON, with and without installing packages
#     finetune, run_folder, merge_adapter, lm_harness     the steps of scripts/train, merge.sh and scripts/eval
#     stage                                               a finished stage of a long script is not done again
#     classify, glue, score_table                         the steps of scripts/glue, scripts/ner and scripts/vision
#
# The scripts do not change folder: relative paths in flags, MODEL and DATASET are found from where you call. What they
# write (MODEL_SAVE_PATH, RESULTS) goes below the project unless it is an absolute path.
# Works with the bash 3.2 that macOS ships: no expansion of empty arrays, no associative arrays.

set -euo pipefail

PROJECT_ROOT=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)

say() { printf '== %s\n' "$*" >&2; }  # progress on stderr: stdout belongs to the commands

# die MESSAGE [ADVICE ...]
die() {
    printf 'error: %s\n' "$1" >&2
    shift
    [[ $# -eq 0 ]] || printf '  %s\n' "$@" >&2
    exit 2
}

in_project() { case $1 in /*) printf '%s' "$1" ;; *) printf '%s' "$PROJECT_ROOT/$1" ;; esac; }

# stage NAME TITLE COMMAND ...: runs a stage of a long script and notes in $DIR/.done/NAME that it is finished; skips it
# where that is noted already.
stage() {
    local name=$1 title=$2 started=$SECONDS
    shift 2
    if [[ -e $DIR/.done/$name ]]; then
        say "$title: finished earlier, skipped"
        return
    fi
    say "$title"
    "$@"
    mkdir -p "$DIR/.done"
    touch "$DIR/.done/$name"
    say "finished in $((SECONDS - started)) s"
}

# --------------------------------------------------------------------------------------------------------------- Python

# has_modules PYTHON MODULE ...: whether this Python is recent enough and finds the modules. Looks them up without
# importing them (torch alone takes seconds), and not in the current folder: a folder `datasets` there would pass for
# the package.
has_modules() {
    command -v "$1" >/dev/null || return 1
    "$1" -c '
import importlib.util, sys
sys.path = [entry for entry in sys.path if entry]
found = all(importlib.util.find_spec(name) for name in sys.argv[1:])
sys.exit(not (found and sys.version_info >= (3, 11)))' "${@:2}" >/dev/null 2>&1
}

# The python of the active virtual or conda environment, if any. It counts only where it has the packages: conda
# activates a bare `base` for many users.
active_pythons() {
    [[ -z ${VIRTUAL_ENV:-} ]] || printf '%s\n' "$VIRTUAL_ENV/bin/python"
    [[ -z ${CONDA_PREFIX:-} ]] || printf '%s\n' "$CONDA_PREFIX/bin/python"
}

# install_hint MODULE ...: how to install the requirements that these modules are among.
install_hint() {
    local file=requirements.txt
    case " $* " in
        *" pytest "*) file=tests/requirements.txt ;;
        *" lm_eval "*) file=scripts/eval/requirements.txt ;;
    esac
    printf '%s' "cd '$PROJECT_ROOT' && python3 -m venv .venv && .venv/bin/python -m pip install -r $file"
}

# find_python MODULE ...: sets PYTHON to the first of $PYTHON, the active environment's, .venv's and python3 that has
# the modules. Training must not install packages behind the user's back: where none has them, it says how to install.
find_python() {
    local candidate
    if [[ -n ${PYTHON:-} ]]; then
        has_modules "$PYTHON" "$@" || die "PYTHON=$PYTHON is not a Python 3.11 or newer that has all of: $*" \
            "leave PYTHON out, or install them: $(install_hint "$@")"
        return
    fi
    while IFS= read -r candidate; do
        if has_modules "$candidate" "$@"; then
            PYTHON=$candidate
            return
        fi
    done < <(active_pythons && printf '%s\n' "$PROJECT_ROOT/.venv/bin/python" python3)
    die "found no Python 3.11 or newer that has all of: $*" "install them: $(install_hint "$@")"
}

# all_requirements FILE: its lines, with those of the files that it names with -r.
all_requirements() {
    local line
    while IFS= read -r line || [[ -n $line ]]; do
        case $line in
            "" | "#"*) ;;
            "-r "*) all_requirements "$(dirname "$1")/${line#-r }" ;;
            *) printf '%s\n' "$line" ;;
        esac
    done <"$1"
}

# ensure_venv FILE MODULE ...: sets PYTHON to one with all that the commands need, and MODULE ..., of the requirements in
# FILE: $PYTHON where given, the active environment's where it has the modules, else that of .venv, which is created
# where it is missing and filled where it lacks a line of FILE. OWN_VENV: that environment alone.
ensure_venv() {
    local requirements=$1 venv=${OWN_VENV:-$PROJECT_ROOT/.venv} candidate missing=all
    local stamp=$venv/requirements.installed.txt  # the lines that were installed, written after success only
    shift
    set -- torch transformers peft accelerate datasets bitsandbytes sentencepiece google.protobuf matplotlib rich \
        tensorboard "$@"
    if [[ -n ${PYTHON:-} && -z ${OWN_VENV:-} ]]; then
        find_python "$@"
        return
    fi
    while IFS= read -r candidate; do
        if [[ $candidate != "$venv/bin/python" ]] && has_modules "$candidate" "$@"; then
            say "using the active environment: $candidate (its own package versions, not those of the project)"
            PYTHON=$candidate
            return
        fi
    done < <([[ -n ${OWN_VENV:-} ]] || active_pythons)

    PYTHON=$venv/bin/python
    if ! has_modules "$PYTHON"; then
        say "creating $venv"
        candidate=$(base_python)
        "$candidate" -m venv --clear "$venv"
    fi
    # Without pip: an interrupted `python3 -m venv`, or one made by uv.
    has_modules "$PYTHON" pip || "$PYTHON" -m ensurepip --upgrade >/dev/null
    [[ ! -e $stamp ]] || missing=$(all_requirements "$requirements" | grep -vxF -f "$stamp" || true)
    if [[ -n $missing ]]; then
        say "installing ${requirements#"$PROJECT_ROOT"/} into $venv (several minutes the first time)"
        rm -f "$stamp"
        # Of pip's hundreds of lines, show the large downloads and the long last step; its errors come on stderr.
        # shellcheck disable=SC2046  # cpu_torch_index prints two words or none
        "$PYTHON" -m pip install --progress-bar off --requirement "$requirements" $(cpu_torch_index) |
            awk '/Downloading .*\(([0-9][0-9][0-9.]* MB|[0-9.]+ GB)\)/ { print; fflush() }
                 /^Installing collected packages/ { print "  Unpacking"; fflush() }' >&2
        all_requirements "$requirements" >"$stamp"
        say "installed"
    fi
}

# The first Python that is recent enough to make a virtual environment with: transformers 5.23 needs 3.11.
base_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11; do
        if has_modules "$candidate" venv; then
            printf '%s' "$candidate"
            return
        fi
    done
    die "Python 3.11 or newer with its venv module is needed; python3 is: $(python3 --version 2>&1 || true)"
}

# The index of PyTorch's CPU builds, for Linux machines without an accelerator (PyPI's Linux wheel brings gigabytes of
# CUDA libraries), unless it cannot be reached: pip would retry it for every single package.
cpu_torch_index() {
    local url=https://download.pytorch.org/whl/cpu
    [[ $(uname -s) == Linux && ! -e /dev/nvidiactl && ! -e /dev/kfd && ! -e /dev/dxg ]] || return 0
    "$PYTHON" -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=5)' "$url/torch/" \
        >/dev/null 2>&1 || return 0
    printf '%s' "--extra-index-url $url"
}

# ---------------------------------------------------------------------------------------------------------------- flags

# last_value FLAG DEFAULT ARGS ...: the value that argparse takes for FLAG from ARGS (`--flag value` or `--flag=value`,
# with - or _; the last one wins), or DEFAULT.
last_value() {
    local flag=$1 value=$2 name
    shift 2
    while [[ $# -gt 0 ]]; do
        name=${1%%=*}
        if [[ ${name//-/_} == "${flag//-/_}" ]]; then
            if [[ $1 == *=* ]]; then value=${1#*=}; else value=${2:-$value}; fi
        fi
        shift
    done
    printf '%s' "$value"
}

# ---------------------------------------------------------------------------------------------- fine-tuning and merging

# choose_launcher: sets LAUNCHER to what starts finetune.py: python, or what LAUNCH names, the file scripts/launch/
# <LAUNCH>.yaml for NUM_PROCESSES processes (default: one per GPU), or a whole command such as "torchrun --nnodes 2 ...".
choose_launcher() {
    local config=$PROJECT_ROOT/scripts/launch/${LAUNCH:-}.yaml
    LAUNCHER=("$PYTHON" -u)
    case ${LAUNCH:-} in
        "") return ;;
        *[[:space:]]*) read -r -a LAUNCHER <<<"$LAUNCH" && return ;;
    esac
    [[ -f $config ]] || die "LAUNCH=$LAUNCH: there is no scripts/launch/$LAUNCH.yaml" \
        "give single, ddp, fsdp2 or zero3, or a whole command: LAUNCH=\"accelerate launch --config_file my.yaml\""
    [[ -n ${NUM_PROCESSES:-} ]] ||
        NUM_PROCESSES=$("$PYTHON" -c 'import torch; print(max(1, torch.accelerator.device_count()))')
    LAUNCHER=("$PYTHON" -m accelerate.commands.launch --config_file "$config" --num_processes "$NUM_PROCESSES")
    SHARES=$NUM_PROCESSES
}

# llama_2_on_platypus FLAGS ...: calls finetune.py with the settings that the released training scripts share, and FLAGS
# after them: where a flag is given twice, the last one counts. Each of SHARES processes does its share of the batch.
llama_2_on_platypus() {
    "${LAUNCHER[@]}" "$PROJECT_ROOT/tokentune/finetune.py" \
        --model_name_or_path "${MODEL:-meta-llama/Llama-2-7b-hf}" \
        --dataset_name_or_path "${DATASET:-garage-bAInd/Open-Platypus}" \
        --prompt_template_name_or_path "$PROJECT_ROOT/tokentune/alpaca_template.json" \
        --global_batch_size 32 \
        --gradient_accumulation_steps "$((32 / ${SHARES:-1}))" \
        --num_epochs 1 \
        --num_workers 4 \
        --weight_decay 0.01 \
        --warmup_steps 100 \
        --lr_scheduler_type cosine \
        --model_save_path "$(in_project "${MODEL_SAVE_PATH:-models}")" \
        --save_steps 1000 \
        --save_total_limit 2 \
        --max_length 2048 \
        "$@"
}

# run_folder FLAGS ...: prints the folder of the run with these flags. finetune.py itself names it, so that overridden
# flags lead to the right folder; it checks all of them on the way.
run_folder() {
    local LAUNCHER=("$PYTHON" -u)
    llama_2_on_platypus "$@" --print_run_folder
}

# finetune FLAGS ...: trains, and sets RUN_FOLDER; writes it to the file RUN_FOLDER_NOTE, where a caller names one.
finetune() {
    find_python torch transformers peft accelerate datasets
    case " $* " in
        *" --help "* | *" -h "*)
            LAUNCHER=("$PYTHON" -u)
            llama_2_on_platypus "$@"
            exit
            ;;
    esac
    choose_launcher
    RUN_FOLDER=$(run_folder "$@")
    say "fine-tuning into $RUN_FOLDER"
    llama_2_on_platypus "$@"
    [[ -z ${RUN_FOLDER_NOTE:-} ]] || printf '%s' "$RUN_FOLDER" >"$RUN_FOLDER_NOTE"
}

# merge_adapter FOLDER [FLAGS ...]: the adapter in FOLDER and its base into the full checkpoint FOLDER/merged. The base
# is the one that the adapter's own configuration names; FLAGS override.
merge_adapter() {
    local adapter=${1%/} base
    shift
    [[ -f $adapter/adapter_config.json ]] || die "there is no adapter in $adapter (adapter_config.json is missing)" \
        "train one first: bash $PROJECT_ROOT/scripts/train/lora_tokentune_platypus_llama_2.sh" \
        "or name its folder: bash $PROJECT_ROOT/scripts/merge.sh --peft_model_path FOLDER"
    base=$("$PYTHON" -c 'import json, sys; print(json.load(open(sys.argv[1]))["base_model_name_or_path"])' \
        "$adapter/adapter_config.json")
    say "merging into $(last_value --output_dir "$adapter/merged" "$@")"
    "$PYTHON" "$PROJECT_ROOT/tokentune/merge.py" \
        --base_model_name_or_path "$base" \
        --peft_model_path "$adapter" \
        --output_dir "$adapter/merged" \
        "$@"
}

# ------------------------------------------------------------------------------------------------------- classification

# classify FLAGS ...: trains, unless the run is there already, so that a script of several runs can be started again.
# --help shows classify.py's flags and ends the script.
classify() {
    local folder
    find_python torch transformers peft accelerate datasets sklearn
    case " $* " in
        *" --help "* | *" -h "*)
            classification "$@"
            exit
            ;;
    esac
    folder=$(classification "$@" --print_run_folder)
    if [[ -f $folder/classification_summary.json && " $* " != *" --overwrite_output_dir "* ]]; then
        say "there already (--overwrite_output_dir repeats it): $folder"
        return
    fi
    say "training into $folder"
    classification "$@"
}

# classification FLAGS ...: calls classify.py, its runs below MODEL_SAVE_PATH.
classification() {
    "$PYTHON" -u "$PROJECT_ROOT/tokentune/classify.py" \
        --model_save_path "$(in_project "${MODEL_SAVE_PATH:-models}")" \
        "$@"
}

# glue MODEL FLAGS ...: fine-tunes MODEL on each of TASKS, three seeds each, with the settings that BERT's authors have
# for GLUE (Devlin et al., NAACL 2019: batches of 32, three epochs, 128 tokens, no WNLI). MNLI is evaluated on its
# matched half; TASKS=mnli_mismatched trains again for the other one.
glue() {
    local model=${MODEL:-$1} rows=${DATASET:-nyu-mll/glue} task data
    shift
    for task in ${TASKS:-cola sst2 mrpc stsb qqp mnli qnli rte}; do
        data=(--dataset_name_or_path "${rows//\{task\}/$task}")
        if [[ -n ${EVAL_DATASET:-} ]]; then
            data+=(--eval_dataset_name_or_path "${EVAL_DATASET//\{task\}/$task}")
        fi
        classify \
            --model_name_or_path "$model" \
            "${data[@]}" \
            --task_name "$task" \
            --seeds 1 2 3 \
            --global_batch_size 32 \
            --num_epochs 3 \
            --learning_rate 2e-5 \
            --weight_decay 0.01 \
            --warmup_steps 0.1 \
            --lr_scheduler_type linear \
            --max_length 128 \
            "$@"
    done
}

# score_table: prints the scores and bytes of all classification runs below MODEL_SAVE_PATH; to be called after one.
score_table() {
    "$PYTHON" "$PROJECT_ROOT/scripts/glue/table.py" "$(in_project "${MODEL_SAVE_PATH:-models}")"
}

# ----------------------------------------------------------------------------------------------------------- evaluation

# lm_harness TASK SHOTS BATCH_SIZE [FLAGS ...]: lm-evaluation-harness on MODEL; a GPU is used where there is one. With
# SKIP_FINISHED set, a task whose result is there already is skipped.
lm_harness() {
    local task=$1 shots=$2 batch_size=$3 model=${MODEL:-} tasks launcher stem
    shift 3
    find_python torch transformers accelerate lm_eval
    # A model given the harness's own way: named here too, so that its results get their own folder.
    if [[ " $* " =~ [[:space:],]pretrained=([^,[:space:]]+) ]]; then model=${BASH_REMATCH[1]}; fi
    [[ -n $model ]] || model=$(merged_model)
    check_folder "$model"
    # lm-eval adds a second --tasks to the first instead of replacing it: ours is given only where you give none.
    tasks=$(last_value -t "$(last_value --tasks "" "$@")" "$@")
    [[ -n $tasks ]] || set -- --tasks "$task" "$@"
    shots=$(last_value -f "$(last_value --num_fewshot "$shots" "$@")" "$@")
    stem=$(in_project "${RESULTS:-results}")/$(results_name "$model")/$(basename "${tasks:-$task}")_${shots}shot
    if [[ -n ${SKIP_FINISHED:-} ]] && has_result "$stem"; then
        say "there already: ${stem}_*.json"
        return
    fi
    launcher=(-m lm_eval)
    if [[ ${NUM_PROCESSES:-1} -gt 1 ]]; then
        launcher=(-m accelerate.commands.launch --num_processes "$NUM_PROCESSES" -m lm_eval)
    fi
    "$PYTHON" "${launcher[@]}" run \
        --model hf \
        --model_args "pretrained=$model,dtype=auto" \
        --num_fewshot "$shots" \
        --batch_size "$batch_size" \
        --output_path "$stem.json" \
        "$@"
}

# has_result STEM: whether lm-eval wrote STEM_<date>.json to its end; an interruption may leave the beginning of one.
has_result() {
    local file
    for file in "$1"_[0-9]*.json; do
        [[ ! -f $file || $(tail -c 1 "$file") != "}" ]] || return 0
    done
    return 1
}

# check_folder MODEL: ends where a name that is spelt like a path, which no hub id is, names no folder.
check_folder() {
    case $1 in
        . | .. | ./* | ../* | /* | */ | */*/*)
            [[ -d $1 ]] || die "MODEL=$1: no such folder (now in $PWD)" "give a folder, or a hub id such as owner/name"
            ;;
    esac
}

# merged_model: prints the folder that is evaluated where no MODEL is named.
merged_model() {
    local model
    model=$(in_project "${MODEL_SAVE_PATH:-models}")
    model=${model%/}/meta-llama-Llama-2-7b-hf-garage-bAInd-Open-Platypus-lora-tokentune-0.3/merged
    [[ -d $model ]] || die "there is no merged model at $model" \
        "train it: bash $PROJECT_ROOT/scripts/train/lora_tokentune_platypus_llama_2.sh" \
        "or choose another one: MODEL=<folder or hub id> bash $0"
    printf '%s' "$model"
}

# base_of FOLDER: prints what a model was trained from, as its run noted it: in the folder itself, or in the one above
# a merged one.
base_of() {
    "$PYTHON" -c '
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
for path in (folder / "training_summary.json", folder.parent / "training_summary.json"):
    if path.is_file():
        sys.exit(print(json.loads(path.read_text(encoding="utf-8"))["settings"]["model_name_or_path"]))
path = folder.parent / "adapter_config.json"
sys.exit(print(json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]) if path.is_file() else 1)' \
        "$1" || die "nothing in $1 says what it was trained from" "name it: BASE=<folder or hub id> bash $0"
}

# results_name MODEL: the folder of a model's results below RESULTS: <run folder>/merged for a merged run, its own name
# for another folder, and a hub id with / as -.
results_name() {
    local name
    if [[ -d $1 ]]; then
        name=$(CDPATH='' cd -- "$1" && pwd -P)
        case $name in
            */merged) name=$(basename "$(dirname "$name")")/merged ;;
            *) name=$(basename "$name") ;;
        esac
    else
        name=${1//\//-}
    fi
    printf '%s' "$name"
}
