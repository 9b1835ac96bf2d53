#!/usr/bin/env bash
# Train on the GPUs of this host: one process for all GPUs, or one process per GPU.
#
#   launch/local_gpus.sh [--dry-run] -- --config configs/pairs/X.yaml ...
#   PROCESSES=8 launch/local_gpus.sh -- --config configs/pairs/X.yaml ...
#   DEVICES=cpu PROCESSES=2 launch/local_gpus.sh -- ...      a trial without a GPU
#
# Everything after -- goes to `mgsr train`. TERM and Ctrl-C are passed on: the run saves
# and exits with 42. With several processes the exit status is the worst of theirs: one
# that a restart does not cure (1 to 126, except 42) before one that it may cure.

set -euo pipefail

PROCESSES=${PROCESSES:-1} # 1: one process uses all GPUs; n: n processes with one GPU each
DEVICES=${DEVICES:-gpu}   # gpu or cpu
PORT=${PORT:-12355}       # port where several processes meet; must be free
GRACE=${GRACE:-30}        # seconds for the other processes to exit after one failed

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
settings=()
if [[ $DEVICES == cpu ]]; then settings+=(JAX_PLATFORMS=cpu); fi

show() { printf -v line '%q ' "$@" && echo "${line% }"; }

if ((PROCESSES == 1)); then
  command=(mgsr train "$@")
  if ((${#settings[@]})); then command=(env "${settings[@]}" "${command[@]}"); fi
  if $dry_run; then show "${command[@]}" && exit; fi
  exec "${command[@]}"
fi

settings+=(JAX_COORDINATOR_ADDRESS="127.0.0.1:$PORT" JAX_NUM_PROCESSES="$PROCESSES")
IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES:-}"
pids=()
for ((i = 0; i < PROCESSES; i++)); do
  own=(JAX_PROCESS_ID="$i")
  if [[ $DEVICES == gpu ]]; then own+=(CUDA_VISIBLE_DEVICES="${gpus[i]:-$i}"); fi
  command=(env "${settings[@]}" "${own[@]}" mgsr train "$@")
  if $dry_run; then
    show "${command[@]}"
  else
    "${command[@]}" &
    pids+=($!)
  fi
done

restartable() { (($1 == 42 || $1 > 126)); }

trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT
worst=0
while ((${#pids[@]})); do
  sleep 0.2 || true
  for i in "${!pids[@]}"; do
    if kill -0 "${pids[i]}" 2>/dev/null; then continue; fi
    status=0
    wait "${pids[i]}" || status=$?
    unset "pids[i]"
    if ((status == 0)); then continue; fi
    deadline=${deadline:-$((SECONDS + GRACE))}
    if ((worst == 0)) || { restartable "$worst" && ! restartable "$status"; }; then
      worst=$status
    fi
  done
  # A process that waits in a collective for one that is gone does not react to TERM.
  if ((worst && SECONDS >= deadline)); then
    kill -KILL "${pids[@]}" 2>/dev/null || true
  fi
done
exit "$worst"
