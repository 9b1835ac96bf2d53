#!/usr/bin/env bash
# Trains on a Cloud TPU slice of one or many hosts, asked for as a queued resource.
#
#   launch/tpu_vm.sh [--dry-run] create              ask for it and wait for it
#   launch/tpu_vm.sh [--dry-run] install             this commit, on all hosts
#   launch/tpu_vm.sh [--dry-run] train -- --config configs/X.yaml ...
#   launch/tpu_vm.sh [--dry-run] stop                save, then leave with 42
#   launch/tpu_vm.sh [--dry-run] delete
#
# What follows -- goes to `mgsr train`, in ~/mgsr_jax on every host. With BUCKET set,
# install mounts that Cloud Storage bucket beside it: --output ../bucket/run is on storage
# that all hosts share, as it must be. train has the exit status of the run: after 42 say train again; a
# spot slice that was taken away needs delete, create and install first. Keep the
# connection: where it breaks, gcloud starts its command again beside what still runs.

set -euo pipefail

NAME=${NAME:-mgsr}                  # of the queued resource and of its node
ZONE=${ZONE:-europe-west4-a}        # where the quota is
ACCELERATOR=${ACCELERATOR:-v6e-8}   # v5litepod-16, v5p-32, v6e-256, ...
RUNTIME=${RUNTIME:-v2-alpha-tpuv6e} # v5e: v2-alpha-tpuv5-lite; v5p: v2-alpha-tpuv5
SPOT=${SPOT:-true}                  # true: cheap, may be taken away; false: on demand
BUCKET=${BUCKET:-}                  # name of a bucket with hierarchical namespace
POLL=${POLL:-30}                    # seconds between looks while it is waited for

fail() { echo "$0: $1" >&2 && exit 2; }

dry_run=false command=
while (($#)); do
  case $1 in
    --dry-run) dry_run=true ;;
    -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$0" && exit ;;
    --) shift && break ;;
    create | install | train | stop | delete) command=$1 ;;
    *) fail "unknown option $1; what is meant for mgsr train follows --" ;;
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
      state="no answer" # a wait of hours outlives that
    if $dry_run; then echo "$state # until it says ACTIVE" && return; fi
    echo "$NAME: $state"
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPEND* | DELETING) fail "$NAME is $state; delete it and ask again" ;;
    esac
    sleep "$POLL"
  done
}

# The image's Python may be older than 3.11; uv brings one.
install='set -e
rm -rf mgsr_jax/mgsr_jax && mkdir -p mgsr_jax && tar -xzf mgsr_jax.tar.gz -C mgsr_jax
cd mgsr_jax && python3 -m pip install --quiet --user uv
test -d .venv || python3 -m uv venv --python 3.12
python3 -m uv pip install --editable ".[train]" "jax[tpu]"'

# Hosts must see at once what another one has written: nothing of the bucket is cached.
# shellcheck disable=SC2016  # it is the host that expands it
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
  stop) on_hosts 0 "pkill -TERM --oldest -f 'bin/[m]gsr train'" ;; # one host tells all
  delete) tpus queued-resources delete "$NAME" --force --quiet ;;
  *) fail "say create, install, train, stop or delete" ;;
esac
