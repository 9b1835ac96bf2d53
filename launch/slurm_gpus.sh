#!/usr/bin/env bash
#SBATCH --job-name=mgsr
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --open-mode=append
# Train on the GPUs of a SLURM cluster, one task per GPU.
#
#   NODES=4 launch/slurm_gpus.sh [--dry-run] -- --config configs/pairs/X.yaml ...
#
# Outside a job this script submits itself; inside a job it starts the tasks. To submit
# it by hand: sbatch --nodes=4 launch/slurm_gpus.sh -- --config configs/pairs/X.yaml ...
# For partition, account and time limit, sbatch reads SBATCH_PARTITION, SBATCH_ACCOUNT
# and SBATCH_TIMELIMIT. Everything after -- goes to `mgsr train`. --output must be on
# storage that all nodes share. Two minutes before the time limit the tasks get TERM,
# save and exit with 42; the job is then queued again and resumes.

set -euo pipefail

NODES=${NODES:-1}                       # number of hosts
GPUS_PER_NODE=${GPUS_PER_NODE:-8}       # GPUs and tasks per host
SECONDS_TO_SAVE=${SECONDS_TO_SAVE:-120} # from TERM to the time limit
GRACE=${GRACE:-60}                      # seconds from the first task's exit to the last's

fail() { echo "$0: $1" >&2 && exit 2; }

dry_run=false
while (($#)); do
  case $1 in
    --dry-run) dry_run=true ;;
    -h | --help) sed -n '/^# /,/^$/s/^# \{0,1\}//p' "$0" && exit ;;
    --) shift && break ;;
    *) fail "unknown option $1; put options of mgsr train after --" ;;
  esac
  shift
done

run() {
  if $dry_run; then
    printf -v line '%q ' "$@" && echo "${line% }"
  else
    "$@"
  fi
}

if [[ -z ${SLURM_JOB_ID:-} ]]; then
  run sbatch --nodes="$NODES" --ntasks-per-node="$GPUS_PER_NODE" \
    --gpus-per-node="$GPUS_PER_NODE" --signal="TERM@$SECONDS_TO_SAVE" "$0" -- "$@"
  if ! $dry_run; then exit; fi
fi

# Every task sees all GPUs of its host and uses the one of its SLURM_LOCALID. Tasks exit
# one after the other, so the first exit with 42 must not kill the others.
status=0
run srun --gpu-bind=none --kill-on-bad-exit=0 --wait="$GRACE" \
  mgsr train --resume true "$@" || status=$?
if $dry_run; then echo "# and if that exits with 42:"; fi
if $dry_run || ((status == 42)); then
  run scontrol requeue "${SLURM_JOB_ID:-JOB}"
fi
exit "$status"
