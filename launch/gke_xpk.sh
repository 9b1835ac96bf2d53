#!/usr/bin/env bash
# Train on TPU slices of a GKE cluster, through xpk.
#
#   PROJECT=p ZONE=z CLUSTER=c IMAGE=i launch/gke_xpk.sh [--dry-run] -- \
#     --config configs/pairs/X.yaml ...
#
# `xpk cluster create` makes the cluster; the image must contain mgsr and jax[tpu].
# Everything after -- goes to `mgsr train`. --output must be on storage that all pods
# mount (STORAGE). xpk restarts the workload after exit status 42 and 127 to 255, never
# after 1, 2 or 65, which a restart does not cure. To end it: xpk workload delete.

set -euo pipefail

PROJECT=${PROJECT:-}         # Google Cloud project
ZONE=${ZONE:-}               # zone of the cluster
CLUSTER=${CLUSTER:-}         # name of the cluster
IMAGE=${IMAGE:-}             # container image
WORKLOAD=${WORKLOAD:-mgsr}   # name of the workload; use a new one for every run
TPU_TYPE=${TPU_TYPE:-v6e-16} # xpk's name: v5litepod-16, v5p-32, v6e-256, ...
SLICES=${SLICES:-1}          # number of slices; mesh.data must be a multiple of it
RESTARTS=${RESTARTS:-20}     # most restarts
GRACE=${GRACE:-120}          # seconds between TERM and KILL; a spot node has about 30
STORAGE=${STORAGE:-}         # name of an `xpk storage`, mounted into the pods

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
for name in PROJECT ZONE CLUSTER IMAGE; do
  if [[ -z ${!name} ]]; then fail "$name is not set; see --help"; fi
done

run() {
  if $dry_run; then
    printf -v line '%q ' "$@" && echo "${line% }"
  else
    "$@"
  fi
}

storage=()
if [[ $STORAGE ]]; then storage=(--storage="$STORAGE"); fi
# exec: xpk sends TERM to the shell that runs this command, and a shell may not pass it
# on.
printf -v line ' %q' mgsr train --resume true "$@"
run xpk workload create --project="$PROJECT" --zone="$ZONE" --cluster="$CLUSTER" \
  --workload="$WORKLOAD" --tpu-type="$TPU_TYPE" --num-slices="$SLICES" \
  --docker-image="$IMAGE" ${storage[@]+"${storage[@]}"} \
  --max-restarts="$RESTARTS" --restart-on-exit-codes=42 \
  --termination-grace-period-seconds="$GRACE" --command="exec$line"
