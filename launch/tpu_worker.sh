#!/usr/bin/env bash
# What one TPU host does, as sent by tpu_vm.sh and tpu_queued.sh. It runs on all
# hosts of a slice at once, and again after each reboot, with this environment:
#   REPO, REF       the project's git address and the commit or branch to run
#   WORKDIR         the run's folder, the same for every host
#   SHARE           '' or HOST:/DIR, an NFS share to mount at /mnt/gemma_scope
#   TRAIN_FLAGS     flags of launch/train.py, each quoted for the shell
# Argument: prepare | start | run | queued (prepare, then run) | stop | log
set -euo pipefail
export HOME="${HOME:-/root}" # start-up scripts run as root and have none
home="${GEMMA_SCOPE_HOME:-$HOME/gemma_scope}"
log="$home/run.log"
pid_file="$home/run.pid"
metadata='http://metadata.google.internal/computeMetadata/v1/instance'

# The process of `run`, with the boot that it belongs to: after a reboot its
# number may be another's.
boot_id() { cat /proc/sys/kernel/random/boot_id 2>/dev/null || echo none; }
alive() {
  local pid boot
  [[ -f "$pid_file" ]] && read -r pid boot <"$pid_file" || return 1
  [[ "$boot" == "$(boot_id)" ]] && kill -0 "$pid" 2>/dev/null
}

prepare() {
  if alive; then
    echo 'tpu_worker: a run uses this code; stop it first' >&2
    return 1
  fi
  # The images of Cloud TPU carry Python 3.10.
  local python=''
  for python in python3.12 python3.11 ''; do
    "${python:-false}" -c 'import ensurepip, venv' 2>/dev/null && break
  done
  if [[ -z "$python" ]]; then
    export DEBIAN_FRONTEND=noninteractive
    # The images' own start-up holds apt's lock for a while.
    local apt=(sudo -E apt-get -y -o DPkg::Lock::Timeout=600)
    "${apt[@]}" update
    "${apt[@]}" install python3.12 python3.12-venv || {
      "${apt[@]}" install software-properties-common
      sudo -E add-apt-repository -y ppa:deadsnakes/ppa
      "${apt[@]}" install python3.12 python3.12-venv
    }
    python=python3.12
  fi
  if [[ -n "${SHARE:-}" ]] && ! mountpoint -q /mnt/gemma_scope; then
    command -v mount.nfs >/dev/null \
      || sudo apt-get -y -o DPkg::Lock::Timeout=600 install nfs-common
    sudo mkdir -p /mnt/gemma_scope
    sudo mount -t nfs "$SHARE" /mnt/gemma_scope
  fi
  mkdir -p "$home"
  [[ -d "$home/code/.git" ]] || git init -q "$home/code"
  cd -- "$home/code"
  git fetch -q --depth 1 "$REPO" "$REF"
  git checkout -q --force FETCH_HEAD
  PYTHON="$python" bash launch/setup.sh
  # The lock is for every machine; the TPU's library is for this one, at the
  # version that the installed jax asks for.
  local jax
  jax="$(.venv/bin/python -c 'from importlib.metadata import version
print(version("jax"))')"
  .venv/bin/python -m pip install -q -c requirements.txt "jax[tpu]==$jax"
}

# The slice's hosts, from the machine's metadata: outside Kubernetes no variable
# tells a process that it is one of several.
join_cluster() {
  local hosts number
  hosts="$(attribute worker-network-endpoints)"
  number="$(attribute agent-worker-number)"
  local -a endpoints
  IFS=, read -r -a endpoints <<<"$hosts"
  ((${#endpoints[@]} > 1)) || return 0
  # An endpoint is a host, or name:id:host.
  export COORDINATOR_ADDRESS="${endpoints[0]##*:}:8476"
  export NUM_PROCESSES="${#endpoints[@]}" PROCESS_ID="$number"
}
attribute() {
  curl -sSf --retry 5 --retry-connrefused -H 'Metadata-Flavor: Google' \
    "$metadata/attributes/$1"
}

# Trains until it is done or told to stop (exit code 0 for both). Any other end
# is tried again: when one host falls the others leave too, and all continue
# from the last checkpoint.
run() {
  mkdir -p -- "$home"
  echo "$$ $(boot_id)" >"$pid_file"
  join_cluster
  cd -- "$home/code"
  local child='' code tries=0 interrupted stopped=''
  local -a train_flags
  eval "train_flags=($TRAIN_FLAGS)"
  trap 'interrupted=1 stopped=1; kill -TERM "$child" || true' TERM INT
  while :; do
    .venv/bin/python launch/train.py --workdir="$WORKDIR" "${train_flags[@]}" &
    child=$!
    # A signal ends a wait early; the exit code is that of the save after it.
    while :; do
      interrupted='' code=0
      wait "$child" || code=$?
      [[ -n "$interrupted" ]] || break
    done
    [[ "$code" != 0 && -z "$stopped" ]] || break
    ((++tries <= ${RESTARTS:-20})) || break
    echo "tpu_worker: train.py left with $code, again in ${PAUSE:-30} s" >&2
    sleep "${PAUSE:-30}"
  done
  rm -f -- "$pid_file"
  echo "tpu_worker: over, exit code $code"
  return "$code"
}

case "${1:?prepare, start, run, queued, stop or log}" in
  prepare) prepare ;;
  run) run ;;
  queued)
    mkdir -p -- "$home"
    exec >>"$log" 2>&1
    prepare
    run
    ;;
  start)
    if alive; then
      echo "tpu_worker: already running (see the log: $log)"
    else
      mkdir -p "$home"
      nohup bash "$home/code/launch/tpu_worker.sh" run \
        </dev/null >>"$log" 2>&1 &
      echo "tpu_worker: started, log in $log"
    fi
    ;;
  stop)
    if alive; then
      kill -TERM "$(cut -d' ' -f1 "$pid_file")"
      echo 'tpu_worker: asked to save and stop'
    else
      echo 'tpu_worker: not running'
    fi
    ;;
  log) tail -n "${LINES_OF_LOG:-40}" -- "$log" ;;
  *) echo "tpu_worker: unknown argument '$1'" >&2; exit 2 ;;
esac
