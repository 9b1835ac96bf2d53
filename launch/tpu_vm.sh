#!/usr/bin/env bash
# Train on a Cloud TPU slice of one or many hosts, requested as a queued resource.
#
#   launch/tpu_vm.sh [--dry-run] create              request the slice, wait for it
#   launch/tpu_vm.sh [--dry-run] install             install this commit on all hosts
#   launch/tpu_vm.sh [--dry-run] train -- --config configs/pairs/X.yaml ...
#   launch/tpu_vm.sh [--dry-run] stop                save, then exit with 42
#   launch/tpu_vm.sh [--dry-run] delete
#
# Everything after -- goes to `mgsr train`, which runs in ~/mgsr_jax on every host. All
# hosts must share --output: set BUCKET, and install mounts that Cloud Storage bucket as
# ~/bucket; then use --output ../bucket/run. train returns the exit status of the run.
# After 42, run train again; if a spot slice was preempted, run delete, create and install
# first. Keep the connection: if it breaks, gcloud starts the command a second time while
# the first one still runs.

set -euo pipefail

NAME=${NAME:-mgsr}                  # name of the queued resource and its node
ZONE=${ZONE:-europe-west4-a}        # where you have quota
ACCELERATOR=${ACCELERATOR:-v6e-8}   # v5litepod-16, v5p-32, v6e-256, ...
RUNTIME=${RUNTIME:-v2-alpha-tpuv6e} # v5e: v2-alpha-tpuv5-lite; v5p: v2-alpha-tpuv5
SPOT=${SPOT:-true}                  # true: cheap, may be preempted; false: on demand
BUCKET=${BUCKET:-}                  # name of a bucket with hierarchical namespace
POLL=${POLL:-30}                    # seconds between checks while waiting

fail() { echo "$0: $1" >&2 && exit 2; }

dry_run=false command=
while (($#)); do
  case $1 in
    --dry-run) dry_run=true ;;
    -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$0" && exit ;;
    --) shift && break ;;
    create | install | train | stop | delete) command=$1 ;;
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

tpus() { run gcloud compute tpus "$1" "$2" "$3" --zone="$ZONE" "${@:4}"; }

on_hosts() { tpus tpu-vm ssh "$NAME" --worker="$1" --command="$2"; }

create() {
  local spot=()
  if $SPOT; then spot=(--spot); fi
  tpus queued-resources create "$NAME" --node-id="$NAME" \
    --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" ${spot[@]+"${spot[@]}"}
  while true; do
    state=$(tpus queued-resources describe "$NAME" --format="value(state.state)") ||
      state="no answer" # one failed check must not end a wait of hours
    if $dry_run; then echo "$state # repeated until it prints ACTIVE" && return; fi
    echo "$NAME: $state"
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPEND* | DELETING) fail "$NAME is $state; delete and create it again" ;;
    esac
    sleep "$POLL"
  done
}

# The image's Python may be older than 3.11; uv installs a newer one.
install='set -e
rm -rf mgsr_jax/mgsr_jax && mkdir -p mgsr_jax && tar -xzf mgsr_jax.tar.gz -C mgsr_jax
cd mgsr_jax && python3 -m pip install --quiet --user uv
test -d .venv || python3 -m uv venv --python 3.12
python3 -m uv pip install --editable ".[train]" "jax[tpu]"'

# Hosts must see at once what another host wrote, so nothing of the bucket is cached.
# shellcheck disable=SC2016  # the host expands it
mount='set -e
command -v gcsfuse || { echo "install Cloud Storage FUSE on the hosts first" >&2; exit 1; }
mkdir -p ~/bucket && { mountpoint -q ~/bucket || gcsfuse --implicit-dirs \
  --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 BUCKET ~/bucket; }'

case $command in
  create) create ;;
  install)
    archive=${TMPDIR:-/tmp}/mgsr_jax.tar.gz
    run git -C "$(dirname "$0")/.." archive --format=tar.gz --output="$archive" HEAD
    tpus tpu-vm scp "$archive" "$NAME:" --worker=all
    on_hosts all "$install"
    if [[ $BUCKET ]]; then on_hosts all "${mount//BUCKET/$BUCKET}"; fi
    ;;
  train)
    printf -v line ' %q' .venv/bin/mgsr train --resume true "$@"
    on_hosts all "cd mgsr_jax && exec$line"
    ;;
  # The signal to one host stops the run on all hosts.
  stop) on_hosts 0 "pkill -TERM --oldest -f 'bin/[m]gsr train'" ;;
  delete) tpus queued-resources delete "$NAME" --force --quiet ;;
  *) fail "no command; expected create, install, train, stop or delete" ;;
esac
