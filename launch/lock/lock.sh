#!/usr/bin/env bash
# Rewrites requirements.txt, constraints.txt and ci.txt. For maintainers:
#   UV=/path/to/uv bash launch/lock/lock.sh      (uv is no dependency of ours)
# Two resolutions, one set of versions. The full one is what a plain
# `pip install -r requirements.txt` installs; the lean one leaves out
# overrides.txt and is written first in every set-up. What only the full one has
# goes to constraints.txt, so that pip need not search (inert under --no-deps).
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."
here=launch/lock
full="$(mktemp)"
lean="$(mktemp)"
trap 'rm -f -- "$full" "$lean"' EXIT
compile() {
  "${UV:-uv}" pip compile --quiet --universal --python-version 3.11 \
    --no-header --no-emit-index-url --no-emit-find-links "$@"
}
compile --no-annotate "$here/full.in" -o "$full"
compile --constraint "$full" --override "$here/overrides.txt" \
  --annotation-style line "$here/requirements.in" -o "$lean"
{
  echo '# Made by launch/lock/lock.sh from launch/lock/requirements.in: exact'
  echo '# versions for Python 3.11, 3.12 and 3.13. launch/setup.sh installs it'
  echo '# with --no-deps (about 80 packages, no TensorFlow). Without --no-deps'
  echo '# pip adds some 130 packages that are declared but not used; the next'
  echo '# line pins them.'
  echo '-c launch/lock/constraints.txt'
  # uv's notes name the constraint's temporary file: not for readers.
  sed -E "s# *-c [^ ,]*,?##; s#-r $here/#-r #; s#, *\$##; s# +\# via *\$##" "$lean"
} > requirements.txt
{
  echo '# Made by launch/lock/lock.sh: versions of what a plain'
  echo '# `pip install -r requirements.txt` adds to the lock.'
  grep -vxF -f <(sed -E 's/ +#.*//' "$lean") "$full"
} > "$here/constraints.txt"
# What CI adds, at the lock's versions of all else.
grep -v "python_version < '3'" "$lean" | sed -E 's/ +#.*//' > "$full"
{
  echo '# Made by launch/lock/lock.sh from launch/lock/ci.in; .ci/run installs it.'
  compile --no-annotate --constraint "$full" "$here/ci.in" \
    | grep -vxF -f "$full"
} > "$here/ci.txt"
grep -c '==' requirements.txt "$here/constraints.txt" "$here/ci.txt"
