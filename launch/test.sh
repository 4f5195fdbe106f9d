#!/usr/bin/env bash
# Set-up, lint, format check, tests. Arguments go to pytest; paths count from
# the project's root. The exit code is pytest's, or a linter's if only linters
# complain.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh
# Huge pages for the large buffers of a step: fewer page faults on a CPU.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
python="${GEMMA_SCOPE_VENV:-.venv}/bin/python"
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
lint=0
"$python" -m ruff check . || lint=$?
"$python" -m ruff format --check . || lint=$?
# The pages' JavaScript, where node is there and `npm ci` has been run.
if command -v npm >/dev/null && [[ -d node_modules ]]; then
  npm run --silent check || lint=$?
else
  echo 'JavaScript is not checked: install node and run npm ci' >&2
fi
# Two at a time: most of the suite is tracing, on one thread. Each takes a half
# of the files, so that few fixtures are made twice, and then helps the other.
"$python" -m pytest --numprocesses=2 --dist=worksteal "$@"
exit "$lint"
