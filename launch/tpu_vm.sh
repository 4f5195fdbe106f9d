#!/usr/bin/env bash
# Runs launch/train.py on a TPU slice made with `gcloud compute tpus tpu-vm`.
# For slices that may be taken away, see tpu_queued.sh.
set -euo pipefail
here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
source "$here/tpu_flags.sh"
usage="usage: launch/tpu_vm.sh COMMAND --name=N --zone=Z [flags] [-- FLAGS]

  up        create, prepare and start, one after the other
  create    the TPU
  prepare   on all hosts: fetch the commit, set up, install jax for TPU
  start     on all hosts: start or continue the run, in the background
  log       the last lines of each host's log
  stop      save at the last whole step, then end; start continues
  delete    the TPU, with all that is on it
$flags_usage

for example
  launch/tpu_vm.sh up --name=sae --zone=us-east5-a --type=v5p-16 \\
    --share=10.0.0.2:/runs -- --config=configs/gemma_scope_2b.py \\
    --config.lm.checkpoint=gs://gemma-data/checkpoints/gemma2-2b"

# on_hosts ACTION: tpu_worker.sh, sent along, on every host at once. The script
# travels as an argument: on stdin, the commands in it could read it away.
on_hosts() {
  local remote
  remote="$(printf 'env %s bash -c %q tpu_worker %q </dev/null' \
    "$(worker_environment | tr '\n' ' ')" "$(<"$here/tpu_worker.sh")" "$1")"
  run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all \
    --command="$remote"
}

create() {
  run gcloud compute tpus tpu-vm create "$name" "${where[@]}" \
    --accelerator-type="$type" --version="$version" ${spot:+--spot}
}

command="${1:---help}"
[[ "$command" != --help && "$command" != -h ]] || { echo "$usage"; exit; }
shift
read_flags "$@"
case "$command" in
  up)
    need_type
    need_run
    create
    on_hosts prepare
    on_hosts start
    ;;
  create) need_type; create ;;
  prepare | start) need_run; on_hosts "$command" ;;
  log | stop) on_hosts "$command" ;;
  delete)
    run gcloud compute tpus tpu-vm delete "$name" "${where[@]}" --quiet
    ;;
  *) die "unknown command '$command'; see --help." ;;
esac
