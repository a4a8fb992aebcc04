#!/usr/bin/env bash
# Pretrains on several machines, one process per GPU:
#
#   sbatch --nodes=4 tools/examples/pretrain_slurm.sh METHOD RECIPE --data SHARDS --out RUN [OPTIONS]
#
# SHARDS and RUN lie on a file system that all machines share. A job that is pre-empted, runs out of time or loses a
# machine leaves a checkpoint; submitted again, with as many machines as there are then, it continues.
# PROCESSES: per machine, default one per GPU. PORT: for the rendezvous, default from the job's number.
#
#SBATCH --job-name=clipmill-pretrain
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --output=clipmill-pretrain-%j.log
set -euo pipefail

hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
exec srun --kill-on-bad-exit=1 torchrun \
    --nnodes="$SLURM_JOB_NUM_NODES" \
    --nproc-per-node="${PROCESSES:-gpu}" \
    --rdzv-id="$SLURM_JOB_ID" \
    --rdzv-backend=c10d \
    --rdzv-endpoint="${hosts%%[[:space:]]*}:${PORT:-$((20000 + SLURM_JOB_ID % 10000))}" \
    -m clipmill.tools.cli pretrain "$@" --resume
