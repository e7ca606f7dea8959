#!/usr/bin/env bash
# Makes .venv with recfast built into it. Needs python3, a C++ compiler and Python's headers; on Debian, what is missing
# is installed when this user may do so, and named otherwise.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
venv=${VENV:-.venv}

missing=()
command -v g++ >/dev/null || command -v c++ >/dev/null || missing+=(g++)
"$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
"$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' || missing+=(python3-dev)

if ((${#missing[@]})); then
  if ! command -v apt-get >/dev/null; then
    echo "setup: install ${missing[*]} (names of Debian packages) with this system's package manager, then try again" >&2
    exit 1
  fi
  as_root=()
  if [ "$(id -u)" -ne 0 ]; then
    if ! sudo -n true 2>/dev/null; then
      echo "setup: run 'sudo apt-get install ${missing[*]}', then try again" >&2
      exit 1
    fi
    as_root=(sudo)
  fi
  echo "setup: installing ${missing[*]}" >&2
  "${as_root[@]}" apt-get update -q
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}"
fi

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
install=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt)
# Build tools of .venv's own, so that a build finds the objects of the last one: an isolated build starts from nothing.
"${install[@]}" scikit-build-core pybind11 cmake ninja
"${install[@]}" --no-build-isolation --editable ".[dev]"
touch "$venv/.ready"
