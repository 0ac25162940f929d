# Sourced by the launchers: makes or reuses .venv in the repository root.
# shellcheck shell=bash

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
venv="$root/.venv"
python="$venv/bin/python"

fail() { # STATUS MESSAGE
  printf '%s\n' "$2" >&2
  exit "$1"
}

is_recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

has_pip() { "$python" -m pip --version || "$python" -m ensurepip; }

find_python() { # prints the first Python that is new enough and can make an environment
  local name recent=""
  for name in python3 python3.12 python3.13 python3.11 python3.14; do
    is_recent "$name" || continue
    if "$name" -c 'import ensurepip, venv' 2>/dev/null; then
      command -v "$name"
      return
    fi
    recent="${recent:-$name}"
  done
  [[ -n "$recent" ]] || fail 2 "Python 3.11 or newer was not found; install python3.12 or so"
  recent="$("$recent" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')"
  fail 2 "$recent lacks the venv module; install it (Debian and Ubuntu: apt install $recent-venv)"
}

fingerprint() { # changes with whatever makes an install stale, the folder's place included
  "$python" - "$root" <<'PYTHON'
import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
files = [(root / name).read_text("utf-8") for name in ("pyproject.toml", "constraints.txt")]
print(hashlib.sha256("\0".join([*files, sys.version, sys.argv[1]]).encode()).hexdigest())
PYTHON
}

prepare_environment() { # EXTRA: one of pyproject.toml, or "" for none
  local extra="$1" wanted base stamp
  if ! { is_recent "$python" && has_pip; } &>/dev/null; then
    base="$(find_python)" || exit
    echo "making .venv with $("$base" --version)" >&2
    "$base" -m venv --clear "$venv" || fail 1 "making .venv failed; the reason stands above"
  fi
  wanted="$(fingerprint)"
  # An install with an extra holds everything that the plain one has: for "" any stamp will do.
  for stamp in "$venv"/installed-${extra:-*}; do
    [[ -f "$stamp" && "$(<"$stamp")" == "$wanted" ]] && return
  done
  echo "installing the package${extra:+ with its $extra tools} into .venv (1–2 minutes, once)" >&2
  rm -f -- "$venv"/installed-*
  "$python" -m pip install -qq --disable-pip-version-check --constraint "$root/constraints.txt" \
    --editable "$root${extra:+[$extra]}" ||
    fail 1 "installing failed; pip's reason stands above. Put it right and run this again"
  # Written last, so that an install broken off halfway is done again.
  printf '%s\n' "$wanted" >"$venv/installed-${extra:-base}"
}
