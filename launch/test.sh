#!/usr/bin/env bash
# Fresh machine → .venv → the test suite: launch/test.sh [pytest arguments]
# Paths among the arguments start at the repository root. Slow tests run with -m slow, hundreds of
# kills and damaged files with -m faults, what README.md says of a trained network with -m figures.
set -euo pipefail

# shellcheck source=environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment test
cd -- "$root"

options=(-m "not slow and not faults and not figures")
for argument in "$@"; do
  [[ "$argument" != -m* ]] || options=()
done
# All of it in two processes at once: most of its time goes into compiling on one core.
(($#)) || options+=(-n 2 --dist loadfile)
# The odd expansion: before bash 4.4 an empty array counts as unset.
exec "$python" -m pytest ${options[@]+"${options[@]}"} "$@"
