#!/usr/bin/env bash
#SBATCH --job-name=tokentune
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --output=%x-%j.log
# Several machines, by SLURM. Arguments are finetune.py's; change the lines above, or give sbatch its own flags first.
#     sbatch --nodes=8 scripts/launch/slurm.sh --model_name_or_path ... --resume_from_checkpoint
#
# One torchrun per machine, which meet on the first one. --resume_from_checkpoint begins at the last checkpoint of the
# run's folder, or anew where there is none: with it a job that was stopped or requeued goes on where it was.
# ENGINE, PYTHON as in multi_node.sh; PROJECT, the project's folder, default the one that sbatch was called in.
set -euo pipefail

PROJECT=${PROJECT:-${SLURM_SUBMIT_DIR:-$PWD}}
MAIN_MACHINE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MAIN_MACHINE MACHINES=$SLURM_JOB_NUM_NODES NUM_PROCESSES=${SLURM_GPUS_ON_NODE:-8} RUN_ID=$SLURM_JOB_ID
export PORT=$((20000 + SLURM_JOB_ID % 10000)) # jobs that share a machine must not meet each other
srun --kill-on-bad-exit=1 bash "$PROJECT/scripts/launch/multi_node.sh" "$@"
