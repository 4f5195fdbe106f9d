#!/usr/bin/env bash
# launch/benchmark.py in the project's environment. On a CPU the C library is
# told to keep freed memory, in huge pages: a step's temporaries are hundreds of
# megabytes, and handing them back after each step costs a quarter of it.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh
tunables=glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0
tunables+=:glibc.malloc.trim_threshold=68719476736
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-$tunables}"
exec "${GEMMA_SCOPE_VENV:-.venv}/bin/python" launch/benchmark.py "$@"
