#!/usr/bin/env bash
# A page that recognises in the browser: launch/build_demo.sh CHECKPOINT OUT_DIR
# CHECKPOINT is the folder of a run. OUT_DIR then holds static files that any web server can serve,
# such as python3 -m http.server --directory OUT_DIR. Needs npm, for ONNX Runtime.
set -euo pipefail

# shellcheck source=environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
[[ $# == 2 ]] || fail 2 "usage: launch/build_demo.sh CHECKPOINT OUT_DIR"
command -v npm >/dev/null || fail 2 "npm was not found; install it (Debian and Ubuntu: apt install npm)"
runtime_version=1.30.0
prepare_environment export

mkdir -p -- "$2"
"$python" -m hccr_jax export --checkpoint="$1" --format=onnx --output="$2/model.onnx"
"$python" - "$1" "$2" <<'PYTHON'
import json, pathlib, shutil, sys
import onnx
from hccr_jax.demo.description import describe_for_browser
from hccr_jax.demo.server import PAGE
checkpoint, folder = sys.argv[1], pathlib.Path(sys.argv[2])
model = onnx.load(folder / "model.onnx")
# Warped images (test-time augmentation) have fractional grey levels.
model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
onnx.save(model, folder / "model.onnx")
text = json.dumps(describe_for_browser(checkpoint), ensure_ascii=False)
(folder / "model.json").write_text(text, "utf-8")
shutil.copy(PAGE, folder / "index.html")
(folder / "model.onnx.golden.npz").unlink()  # the page has no use for it
PYTHON

temporary="$(mktemp -d)"
trap 'rm -rf -- "$temporary"' EXIT
(cd -- "$temporary" && npm pack --silent "onnxruntime-web@$runtime_version" >/dev/null) ||
  fail 1 "fetching onnxruntime-web failed; npm's reason stands above"
tar -xzf "$temporary"/*.tgz -C "$temporary"
cp -- "$temporary"/package/dist/{ort.wasm.bundle.min.mjs,ort-wasm-simd-threaded.wasm} "$2/"
echo "$2: ready; try: python3 -m http.server --directory $2"
