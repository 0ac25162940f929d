#!/usr/bin/env bash
# Fresh machine → .venv → the main job on the embedded data set → a report.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/quickstart.sh [WORKDIR] [FLAG...]

Trains a recogniser on the embedded data set and writes WORKDIR/report.html.
Makes .venv and installs the package on the first run; needs bash and Python 3.11 or newer.

  WORKDIR   folder of the run (default: runs/quickstart in the repository);
            a run that was stopped resumes from its last checkpoint
  FLAG      passed on to hccr train, such as --config.seed=1
TEXT
}

workdir=""
case "${1-}" in
  -h | --help) usage && exit 0 ;;
  "" | -*) ;;
  /*) workdir="$1" && shift ;;
  *) workdir="$PWD/$1" && shift ;;
esac
for flag in "$@"; do
  [[ "$flag" != --workdir* && "$flag" != -workdir* ]] || {
    echo "$flag: give the folder as the first argument instead: launch/quickstart.sh WORKDIR" >&2
    exit 2
  }
done

# shellcheck source=environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment ""
workdir="${workdir:-$root/runs/quickstart}"
cd -- "$root"
"$python" -m hccr_jax.main --config=configs/quickstart.py --workdir="$workdir" "$@"

cat <<TEXT

Done. Open the report:  $workdir/report.html
Next: draw a character  .venv/bin/hccr serve --checkpoint=$workdir
      another seed      launch/quickstart.sh runs/seed1 --config.seed=1
      the test suite    launch/test.sh
      real handwriting  README.md, from the CASIA archives to a model
TEXT
