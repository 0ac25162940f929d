#!/usr/bin/env bash
# What there is to measure on one GPU, the most valuable first: launch/gpu.sh [FLAG...], see --help.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/gpu.sh [--parts=a,b,c,d] [--output=DIR] [--data_dir=DIR] [--python=PYTHON] [--dry_run]

Measures this library on one GPU with the Python it is given; installs nothing and needs no network.
Each measurement has a time limit and a result file of its own; one that fails does not hold up the
others. DIR/summary.txt says what came of each.

  a  training step of V2 and V1, bfloat16, 3,755 characters, batch 1,024 and 256; V2 without fused
     blocks
  b  the same in turn with PyTorch: eager, torch.compile, CUDA graph
  c  every kernel against float64; a training run twice has the same bits
  d  the whole training loop, data on the device and augmented there; evaluation
  e  hwdb100 and v2_best for accuracy and time (--data_dir: prepared by hccr prepare)
  f  all systems of the paper, at full length (--data_dir)
  g  3,755 characters by simulated writers

  --parts     which; a to d, in nine minutes, where not given
  --output    folder of the results (default: runs/gpu in the repository)
  --data_dir  folder of prepared data, for e and f
  --python    an interpreter that has the packages (default: .venv's, else python3)
  --dry_run   all parts, or those given, on the CPU with tiny sizes: tries the commands, measures
              nothing

Afterwards:  hccr benchmark --render=FILE,... prints DIR's *.json as tables.
TEXT
}

fail() {
  printf '%s\n' "$1" >&2
  exit 2
}

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
parts="" output="$root/runs/gpu" data_dir="" python="" dry_run=""
for flag in "$@"; do
  case "$flag" in
    -h | --help) usage && exit 0 ;;
    --parts=*) parts="${flag#*=}" ;;
    --output=*) output="${flag#*=}" ;;
    --data_dir=*) data_dir="$(realpath -- "${flag#*=}")" ;;
    --python=*) python="${flag#*=}" ;;
    --dry_run) dry_run=1 ;;
    *) fail "$flag: see launch/gpu.sh --help" ;;
  esac
done
parts="${parts:-a,b,c,d${dry_run:+,e,f,g}}"
[[ "$parts" =~ ^[a-g](,[a-g])*$ ]] || fail "--parts=$parts: letters from a to g, such as a,c"
if [[ -z "$python" ]]; then
  python="$root/.venv/bin/python"
  [[ -x "$python" ]] || python=python3
fi
command -v "$python" >/dev/null || fail "--python=$python: there is no such program"
[[ -n "$data_dir$dry_run" || ! "$parts" =~ [ef] ]] ||
  fail "parts e and f need --data_dir, the folder that hccr prepare has filled"
mkdir -p -- "$output"
output="$(cd -- "$output" && pwd -P)"
cd -- "$root"

# The package need not be installed: this folder has it as a wheel would.
site="$(mktemp -d)"
trap 'rm -rf -- "$site"' EXIT
mkdir "$site/hccr_jax"
ln -s "$root"/hccr_jax/* "$root/configs" "$site/hccr_jax/"
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# Parts share programs; seconds of compiling are those of the first.
export JAX_COMPILATION_CACHE_DIR="$output/compiled"
classes=3755 batches=1024,256 seconds=0.3 repeats=5 tiny=() short=()
if [[ -n "$dry_run" ]]; then
  export JAX_PLATFORMS=cpu
  classes=5 batches=8 seconds=0.01 repeats=1
  tiny=(--config.data.image_px=32 --config.data.margin_px=2 --config.model.width=0.1)
  short=(
    "${tiny[@]}" "--config.data.data_dir=$output/data" --config.data.name=synthetic
    --config.data.synthetic.num_characters=5
    --config.data.synthetic.num_train_writers=12 --config.data.synthetic.num_test_writers=3
    --config.num_steps=2 --config.num_epochs=0 --config.batch_size=8 --config.eval.batch_size=8
    --config.eval.every_steps=2
  )
fi

measure() { # NAME SECONDS COMMAND...: at most SECONDS; the log is DIR/NAME.log
  local name="$1" limit="$2" start code=0
  shift 2
  [[ -z "$dry_run" ]] || limit=1200
  start="$SECONDS"
  timeout --kill-after=10 "$limit" "$@" >"$output/$name.log" 2>&1 || code=$?
  local state="done"
  ((code == 0)) || state="failed with code $code, see $name.log"
  ((code != 124)) || state="stopped after $limit s"
  printf '%-20s %4d s  %s\n' "$name" "$((SECONDS - start))" "$state" | tee -a "$output/summary.txt"
  ((code == 0)) || failed=1
}

benchmark() { # NAME SECONDS FLAG...
  local name="$1" limit="$2"
  shift 2
  measure "$name" "$limit" "$python" -m hccr_jax benchmark "--num_classes=$classes" \
    "--seconds=$seconds" "--repeats=$repeats" "--output=$output/$name.json" "$@" \
    ${tiny[@]+"${tiny[@]}"}
}

train() { # NAME SECONDS FLAG...
  local name="$1" limit="$2"
  shift 2
  measure "$name" "$limit" "$python" -m hccr_jax train "--workdir=$output/$name" "$@" \
    ${short[@]+"${short[@]}"}
}

sweep() { # NAME SECONDS FILE ONLY
  local extra=("--only=$4")
  [[ -n "$4" ]] || extra=()
  if [[ -n "$dry_run" ]]; then
    measure "$1" "$2" "$python" -m hccr_jax sweep "--config=$3" --list
    return
  fi
  measure "$1" "$2" "$python" -m hccr_jax sweep "--config=$3" "--data_dir=$data_dir" \
    "--workdir=$output/$1" "--output=$output/$1.jsonl" ${extra[@]+"${extra[@]}"}
}

part_a() {
  benchmark a_v2 120 --config=configs/v2.py --rows=train_step_augmented,forward \
    "--batch_size=$batches"
  benchmark a_v1 60 --config=configs/v1.py --rows=train_step_augmented "--batch_size=$batches"
  HCCR_BLOCK_KERNELS=0 benchmark a_v2_plain 70 --config=configs/v2.py --rows=train_step_augmented \
    "--batch_size=${batches%%,*}"
}

part_b() {
  benchmark b_v2 110 --config=configs/v2.py --rows=train_step_augmented,forward --baseline=torch \
    "--batch_size=$batches"
}

part_c() {
  JAX_DEFAULT_MATMUL_PRECISION=highest JAX_PLATFORMS="${JAX_PLATFORMS:-cuda}" \
    measure c_kernels 90 "$python" -m pytest -q -W default -p no:cacheprovider -x \
    tests/ops/test_pallas.py tests/ops/test_blocks.py
  local flags=" --xla_gpu_exclude_nondeterministic_ops=true" run
  [[ -z "$dry_run" ]] || flags=""
  for run in c_once c_twice; do
    XLA_FLAGS="${XLA_FLAGS-}$flags" train "$run" 45 --config=configs/quickstart.py \
      --config.num_steps=100 --config.num_epochs=0 --config.eval.every_steps=100 \
      "--config.data.data_dir=$output/data"
  done
  measure c_same_bits 20 "$python" - "$output/c_once" "$output/c_twice" <<'PYTHON'
import json, pathlib, sys

def losses(folder):
    rows = map(json.loads, (pathlib.Path(folder) / "metrics.jsonl").read_text().splitlines())
    return [row["train/loss"] for row in rows if "train/loss" in row]

once, twice = map(losses, sys.argv[1:])
print(once, twice)
sys.exit(not once or once != twice)
PYTHON
}

part_d() {
  benchmark d_v2 60 --config=configs/v2.py --rows=train_loop,evaluation,augment \
    "--batch_size=${batches%%,*}"
  benchmark d_v1 40 --config=configs/v1.py --rows=train_loop "--batch_size=${batches%%,*}"
}

part_e() {
  train e_hwdb100 180 --config=configs/hwdb100.py ${data_dir:+"--config.data.data_dir=$data_dir"}
  sweep e_best 420 configs/experiments/best.py v2_best
}

part_f() { sweep f_systems 3600 configs/experiments/systems.py ""; }

part_g() {
  train g_simulated 600 --config=configs/v2.py --config.data.name=synthetic \
    "--config.data.synthetic.num_characters=$classes" \
    --config.data.synthetic.num_train_writers=100 \
    --config.num_steps=10000 --config.num_epochs=0 --config.batch_size=1024 \
    "--config.data.data_dir=$output/data"
}

failed=0
for part in ${parts//,/ }; do "part_$part"; done
exit "$failed"
