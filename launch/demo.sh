#!/usr/bin/env bash
# The whole way on a CPU: set-up, then 36 SAEs on the embedded Gemma trained,
# evaluated and released into runs/tiny (or the folder given), and the microscope
# built on them. Again: continues.
set -euo pipefail
start="$PWD"
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
workdir="${1:-$PWD/runs/tiny}"
[[ "$workdir" == /* ]] || workdir="$start/$workdir"
bash launch/setup.sh
# Huge pages for the large buffers of a step: fewer page faults on a CPU.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
python="${GEMMA_SCOPE_VENV:-.venv}/bin/python"
"$python" launch/train.py --config=configs/tiny.py --workdir="$workdir"
"$python" launch/microscope.py build --workdir="$workdir" --sequences=256
echo "try it on your own text:  $python launch/microscope.py serve --workdir=$workdir"
