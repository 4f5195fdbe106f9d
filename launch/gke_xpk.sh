#!/usr/bin/env bash
# Runs launch/train.py as a JobSet on a GKE cluster of TPUs, by xpk (pip install
# xpk). The run's folder is in a bucket: the hosts share nothing else. A slice
# that is taken away is replaced, and the run continues from its last checkpoint.
#   CLUSTER=pods PROJECT=me ZONE=us-east5-a TPU=v5p-32 \
#     bash launch/gke_xpk.sh sae-2b gs://me/2b --config=configs/gemma_scope_2b.py ...
#   bash launch/gke_xpk.sh ... --dry-run     # xpk's own: writes jobset.yaml
# Then: xpk workload list --cluster=pods, and xpk workload delete to stop it.
set -euo pipefail
usage='CLUSTER=, PROJECT= and ZONE= bash launch/gke_xpk.sh NAME WORKDIR FLAGS'
name="${1:?$usage}" workdir="${2:?$usage}"
shift 2
dry=()
flags=()
for flag in "$@"; do
  if [[ "$flag" == --dry-run ]]; then
    dry=(--dry-run --skip-validation --output-manifest-file=jobset.yaml)
  else
    flags+=("$(printf '%q' "$flag")")
  fi
done
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
command="bash launch/setup.sh && .venv/bin/python -m pip install -q \
-c requirements.txt 'jax[tpu]' && exec .venv/bin/python launch/train.py \
--workdir=$workdir ${flags[*]}"
# Exit code 1: another host fell. SIGTERM, which reaches Python because of the
# exec, saves within the grace.
image=(--base-docker-image=python:3.12 --script-dir=.)
[[ -z "${IMAGE:-}" ]] || image=(--docker-image="$IMAGE")
exec xpk workload create --workload="$name" \
  --cluster="${CLUSTER:?$usage}" --project="${PROJECT:?$usage}" \
  --zone="${ZONE:?$usage}" --tpu-type="${TPU:-v5p-32}" "${image[@]}" \
  --num-slices="${SLICES:-1}" --max-restarts=100 --restart-on-exit-codes=1 \
  --termination-grace-period-seconds=300 ${SPOT:+--spot} "${dry[@]}" \
  --command="$command"
