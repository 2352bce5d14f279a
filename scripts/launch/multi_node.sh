#!/usr/bin/env bash
# Several machines, by torchrun: the same line on each of them. Arguments are finetune.py's.
#     MAIN_MACHINE=10.0.0.1 MACHINES=2 bash scripts/launch/multi_node.sh --model_name_or_path ...
#
# MAIN_MACHINE     address of one of the machines, where they meet     required
# MACHINES         how many there are                                  required
# NUM_PROCESSES    GPUs of each machine                                default 8
# PORT             of the main machine, free and open to the others    default 29500
# RUN_ID           the same on all machines of a run                   default tokentune
# ENGINE           ddp, or fsdp2, which splits the weights             default fsdp2
# PYTHON           python to run                                       default the active environment's, .venv's, python3
# The model, the data and --model_save_path must be on a disk that all machines see. When a machine or process fails,
# all end; the same line with --resume_from_checkpoint goes on from the last checkpoint.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

[[ -n ${MAIN_MACHINE:-} && -n ${MACHINES:-} ]] || die "MAIN_MACHINE and MACHINES are needed" \
    "MAIN_MACHINE=10.0.0.1 MACHINES=2 bash $0 ..."
find_python torch transformers peft accelerate datasets
case ${ENGINE:-fsdp2} in
    ddp) ;;
    fsdp2) # what fsdp2.yaml says, which torchrun does not read
        export ACCELERATE_USE_FSDP=true FSDP_VERSION=2 FSDP_AUTO_WRAP_POLICY=TRANSFORMER_BASED_WRAP
        export FSDP_RESHARD_AFTER_FORWARD=true FSDP_STATE_DICT_TYPE=SHARDED_STATE_DICT
        export FSDP_CPU_RAM_EFFICIENT_LOADING=true
        ;;
    *) die "ENGINE=$ENGINE: give ddp or fsdp2" ;;
esac
exec "$PYTHON" -m torch.distributed.run \
    --nnodes "$MACHINES" \
    --nproc-per-node "${NUM_PROCESSES:-8}" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$MAIN_MACHINE:${PORT:-29500}" \
    --rdzv-id "${RUN_ID:-tokentune}" \
    "$PROJECT_ROOT/tokentune/finetune.py" "$@"
