#!/usr/bin/env bash
# Runs launch/train.py on a TPU slice from the queue (`queued-resources`). All
# that a host does is in its start-up script: it runs at every boot, also on a
# slice that comes in place of one taken away, and the run continues from its
# last checkpoint. A request whose slice was taken away is over, though
# (SUSPENDED): `watch` puts a new one in its place.
set -euo pipefail
here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
source "$here/tpu_flags.sh"
usage="usage: launch/tpu_queued.sh COMMAND --name=N --zone=Z [flags] [-- FLAGS]

  submit    the request
  watch     submit it if there is none, and again whenever the slice is taken
            away; leave it running, and end it with Ctrl-C (the TPU stays)
  state     of the request
  log       the last lines of each host's log
  stop      save at the last whole step, then end
  delete    the request and its TPU, with all that is on it
$flags_usage

for example
  launch/tpu_queued.sh watch --name=sae --zone=us-east5-a --type=v5p-16 \\
    --spot --share=10.0.0.2:/runs -- --config=configs/gemma_scope_9b.py"
requests=(gcloud compute tpus queued-resources)

# The hosts run it as root: one place for the code, the log and the environment.
startup_script() {
  echo '#!/usr/bin/env bash'
  echo 'export GEMMA_SCOPE_HOME=/root/gemma_scope'
  worker_environment | sed 's/^/export /'
  echo 'set -- queued'
  cat -- "$here/tpu_worker.sh"
}

submit() {
  if [[ -z "${startup:-}" ]]; then
    startup="$(mktemp)"
    trap 'rm -f -- "$startup"' EXIT
  fi
  startup_script >"$startup"
  [[ -z "$dry_run" ]] || cat -- "$startup"
  run "${requests[@]}" create "$name" --node-id="$name" "${where[@]}" \
    --accelerator-type="$type" --runtime-version="$version" ${spot:+--spot} \
    --metadata-from-file=startup-script="$startup"
}

state() {
  "${requests[@]}" describe "$name" "${where[@]}" --format='value(state.state)'
}

delete() { run "${requests[@]}" delete "$name" "${where[@]}" --force --quiet; }

watch() {
  local now before=''
  while :; do
    # Without an answer (the network, or no request) look at the list, which
    # tells the two apart.
    if ! now="$(state 2>/dev/null)"; then
      now="$("${requests[@]}" list "${where[@]}" --filter="name~/$name\$" \
        --format='value(name)' 2>/dev/null)" && [[ -z "$now" ]] \
        && now=NONE || now='no answer'
    fi
    [[ "$now" == "$before" ]] || echo "$(date +%T) $name: $now"
    before="$now"
    case "$now" in
      NONE) submit ;;
      SUSPENDED) delete; submit ;;
      FAILED)
        die 'the request failed: the console says why; delete it before you' \
          'submit it again.'
        ;;
    esac
    sleep "${WATCH_SECONDS:-60}"
  done
}

on_hosts() {
  local remote
  remote="$(printf 'sudo env GEMMA_SCOPE_HOME=%q bash -c %q tpu_worker %q' \
    /root/gemma_scope "$(<"$here/tpu_worker.sh")" "$1")"
  run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all \
    --command="$remote"
}

command="${1:---help}"
[[ "$command" != --help && "$command" != -h ]] || { echo "$usage"; exit; }
shift
read_flags "$@"
case "$command" in
  submit) need_type; need_run; submit ;;
  watch)
    need_type
    need_run
    [[ -z "$dry_run" ]] || { submit; exit; }
    watch
    ;;
  state) state ;;
  log | stop) on_hosts "$command" ;;
  delete) delete ;;
  *) die "unknown command '$command'; see --help." ;;
esac
