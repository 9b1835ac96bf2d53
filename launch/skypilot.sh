#!/usr/bin/env bash
# Train on TPUs or GPUs of any cloud that has them, as a managed job of SkyPilot.
#
#   BUCKET=b launch/skypilot.sh [--dry-run] -- \
#     --config configs/pairs/X.yaml --output /bucket/run ...
#   BUCKET=b ACCELERATOR=H100:8 launch/skypilot.sh -- ...
#
# Everything after -- goes to `mgsr train`. skypilot.yaml in this folder has the rest.
# Hosts do not see what other hosts write in /bucket. For several hosts, add a shared
# volume to skypilot.yaml and put --output there.
# `sky jobs queue`, `sky jobs logs` and `sky jobs cancel` manage the job.

set -euo pipefail

BUCKET=${BUCKET:-}                    # Cloud Storage bucket, mounted as /bucket
ACCELERATOR=${ACCELERATOR:-tpu-v6e-8} # per node: H100:8, tpu-v6e-32 (all its hosts), ...
NODES=${NODES:-1}                     # number of nodes; 1 for TPUs
SPOT=${SPOT:-true}                    # true: cheap, may be preempted; false: on demand
NAME=${NAME:-mgsr}                    # name of the job

fail() { echo "$0: $1" >&2 && exit 2; }

dry_run=false
while (($#)); do
  case $1 in
    --dry-run) dry_run=true ;;
    -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$0" && exit ;;
    --) shift && break ;;
    *) fail "unknown option $1; put options of mgsr train after --" ;;
  esac
  shift
done
if [[ -z $BUCKET ]]; then fail "BUCKET is not set; see --help"; fi
hosts=$NODES
if [[ $ACCELERATOR =~ ^tpu-.*-([0-9]+)$ ]] && ((BASH_REMATCH[1] > 8)); then hosts=several; fi
if [[ $hosts != 1 && " $*" == *[\ =]/bucket* ]]; then
  fail "$ACCELERATOR x $NODES has several hosts, which do not share /bucket; see --help"
fi

run() {
  if $dry_run; then
    printf -v line '%q ' "$@" && echo "${line% }"
  else
    "$@"
  fi
}

spot=--use-spot
if ! $SPOT; then spot=--no-use-spot; fi
printf -v arguments '%q ' "$@"
run cd "$(dirname "$0")/.." # the workdir of skypilot.yaml
run sky jobs launch launch/skypilot.yaml --name="$NAME" --gpus="$ACCELERATOR" \
  --num-nodes="$NODES" "$spot" --env="BUCKET=$BUCKET" \
  --env="ACCELERATOR=$ACCELERATOR" --env="ARGUMENTS=${arguments% }" --yes
