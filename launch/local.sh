#!/usr/bin/env bash
# Several training processes on this machine: one for each GPU, or several on the CPU to try it.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/local.sh [-n PROCESSES] FLAG...

Runs hccr_jax.main in several processes that train one network together: one for each NVIDIA GPU,
or as many as -n says, on the CPU where there is no GPU. One process alone uses all GPUs as well;
several are how a run on several machines works, tried on one.

  launch/local.sh --config=configs/v2.py --config.data.data_dir=/data
  launch/local.sh -n 2 --config=configs/quickstart.py

Ctrl-C and SIGTERM are passed on: the run saves and ends with code 143. The exit code is that of the
first process to fail.
TEXT
}

count=""
case "${1-}" in
  "" | -h | --help) usage && exit 0 ;;
  -n) count="${2-}" && shift && shift ;;
  -n*) count="${1#-n}" && shift ;;
esac

# shellcheck source=environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

gpus=0
if command -v nvidia-smi >/dev/null; then gpus="$(nvidia-smi --list-gpus 2>/dev/null | wc -l)"; fi
count="${count:-$gpus}"
[[ "$count" =~ ^[1-9][0-9]*$ ]] || fail 2 "no GPU was found: give their number with -n PROCESSES"
((gpus == 0 || count <= gpus)) || fail 2 "-n $count: there are $gpus GPUs"

prepare_environment ""
cd -- "$root"
port="$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')"
export JAX_COORDINATOR_ADDRESS="localhost:$port" JAX_NUM_PROCESSES="$count"

pids=()
pass_on() { kill -s "$1" "${pids[@]}" 2>/dev/null || true; }
trap 'pass_on TERM' TERM INT # what bash starts with & ignores SIGINT
for ((index = 0; index < count; index++)); do
  export JAX_PROCESS_ID="$index"
  ((gpus == 0)) || export JAX_LOCAL_DEVICE_IDS="$index"
  "$python" -m hccr_jax.main "$@" </dev/null &
  pids+=("$!")
done

code=0
for pid in "${pids[@]}"; do
  while kill -0 "$pid" 2>/dev/null; do # a trapped signal ends `wait` before the process ends
    wait "$pid" && status=0 || status=$?
  done
  wait "$pid" && status=0 || status=$?
  ((code != 0)) || code="$status"
done
exit "$code"
