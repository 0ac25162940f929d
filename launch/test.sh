#!/usr/bin/env bash
# Fresh machine → .venv → the test suite: launch/test.sh [pytest arguments]
# Paths among the arguments start at the repository root. What to run before a commit: -m unit. Slow
# tests run with -m slow, hundreds of kills and damaged files with -m faults, the figures in the docs
# of a trained network with -m figures.
set -euo pipefail

# shellcheck source=environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment test
cd -- "$root"

options=(-m "not slow and not faults and not figures")
for argument in "$@"; do
  [[ "$argument" != -m* ]] || options=()
done
# In two processes at once: most of the time goes into compiling on one core.
[[ -n "$*" && "$*" != "-m unit" ]] || options+=(-n 2 --dist loadfile)
# The odd expansion: before bash 4.4 an empty array counts as unset.
exec "$python" -m pytest ${options[@]+"${options[@]}"} "$@"
