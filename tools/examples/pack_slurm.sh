#!/usr/bin/env bash
# Packs a corpus with a Slurm array, and makes one data set of the parts when all tasks have ended well:
#
#   TASKS=16 tools/examples/pack_slurm.sh CORPUS OUT [OPTIONS OF clipmill pack]
#
# CORPUS and OUT lie on a file system that all machines share and that has locks. Tasks that failed or ran out of time
# are started again by their numbers, each continues; then the last step, or a plain `clipmill pack`, ends it:
#
#   TASKS=16 STEP=task sbatch --array=3,7 tools/examples/pack_slurm.sh CORPUS OUT [OPTIONS]
#   STEP=finish sbatch --cpus-per-task=1 tools/examples/pack_slurm.sh CORPUS OUT [OPTIONS]
#
#SBATCH --job-name=clipmill-pack
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --mem-per-cpu=2G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --output=clipmill-pack-%A-%a.log
set -euo pipefail

case "${STEP:-submit}" in
submit)
    job=$(STEP=task sbatch --parsable --array="1-${TASKS:?how many tasks?}" "$0" "$@")
    STEP=finish sbatch --dependency="afterok:${job%%;*}" --cpus-per-task=1 "$0" "$@"
    ;;
task)
    count=${TASKS:-$SLURM_ARRAY_TASK_COUNT} # the array may be a part of them
    exec clipmill pack "$@" --workers "${SLURM_CPUS_PER_TASK:-0}" --task "$SLURM_ARRAY_TASK_ID/$count"
    ;;
finish)
    exec clipmill pack "$@" --finish
    ;;
esac
