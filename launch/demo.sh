#!/usr/bin/env bash
# The whole way on a CPU: set-up, then 24 SAEs on the embedded Gemma trained,
# evaluated and released into runs/tiny (or the folder given). Again: continues.
set -euo pipefail
start="$PWD"
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
workdir="${1:-$PWD/runs/tiny}"
[[ "$workdir" == /* ]] || workdir="$start/$workdir"
bash launch/setup.sh
exec "${GEMMA_SCOPE_VENV:-.venv}/bin/python" launch/train.py \
  --config=configs/tiny.py --workdir="$workdir"
