# Flags and helpers that tpu_vm.sh and tpu_queued.sh share; sourced by both.

flags_usage='
  --name=NAME         of the TPU (required)
  --zone=ZONE         for example us-east5-a (required)
  --project=PROJECT   default: the one gcloud is set to
  --type=TYPE         v4-32, v5litepod-16, v5p-16, v6e-16, ... (to create)
  --version=VERSION   runtime image; default: the usual one for TYPE
  --spot              cheaper, can be taken away at any time
  --repo=URL          default: the remote "origin" of this clone
  --ref=REF           commit or branch, pushed; default: this commit
  --share=HOST:/DIR   NFS share (Filestore) to mount at /mnt/gemma_scope
  --workdir=DIR       folder of the run: gs://BUCKET/RUN, or seen by all hosts;
                      default with --share: /mnt/gemma_scope/runs/NAME
  --dry-run           print the commands, run none
  -- FLAGS            flags of launch/train.py: --config=... --config.lm....'

die() {
  printf '%s: %s\n' "$(basename -- "$0" .sh)" "$*" >&2
  exit 1
}

# Prints the command, quoted for a shell, and runs it unless this is a dry run.
run() {
  printf '+'; printf ' %q' "$@"; printf '\n'
  [[ -n "$dry_run" ]] || "$@"
} >&2

# Sets the variables named below from "$@"; each has its flag above.
read_flags() {
  name='' zone='' project='' type='' version='' spot='' repo='' ref='' share=''
  workdir='' dry_run='' train_flags=''
  local value
  while (($#)); do
    value="${1#*=}"
    case "$1" in
      --name=?*) name="$value" ;;
      --zone=?*) zone="$value" ;;
      --project=?*) project="$value" ;;
      --type=?*) type="$value" ;;
      --version=?*) version="$value" ;;
      --repo=?*) repo="$value" ;;
      --ref=?*) ref="$value" ;;
      --share=?*) share="$value" ;;
      --workdir=?*) workdir="$value" ;;
      --spot) spot=1 ;;
      --dry-run) dry_run=1 ;;
      --) shift; (($# == 0)) || train_flags="$(printf ' %q' "$@")"; break ;;
      *) die "unexpected argument '$1'; write --flag=value, see --help." ;;
    esac
    shift
  done
  [[ -n "$name" ]] || die '--name is missing: the name of the TPU.'
  [[ -n "$zone" ]] || die '--zone is missing: for example --zone=us-east5-a.'
  [[ -n "$dry_run" ]] || command -v gcloud >/dev/null \
    || die 'gcloud is not on PATH: install the Google Cloud CLI.'
  where=("--zone=$zone")
  [[ -z "$project" ]] || where+=("--project=$project")
}

# What a new TPU needs: its type and image.
need_type() {
  [[ -n "$type" ]] || die '--type is missing: for example --type=v5litepod-16.'
  [[ -z "$version" ]] || return 0
  case "$type" in
    v2-* | v3-* | v4-*) version=tpu-ubuntu2204-base ;;
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    *) die "no image is known for --type=$type: give it with --version." ;;
  esac
}

# What the hosts need: a commit that they can fetch, and what to run.
need_run() {
  local project_root
  project_root="$(dirname -- "${BASH_SOURCE[0]}")/.."
  [[ -n "$repo" ]] || repo="$(git -C "$project_root" remote get-url origin \
    2>/dev/null)" || die '--repo is missing: this clone has no remote "origin".'
  [[ -n "$ref" ]] || ref="$(git -C "$project_root" rev-parse -q --verify \
    HEAD)" || die '--ref is missing: this folder has no commit.'
  if [[ -z "$workdir" ]]; then
    [[ -n "$share" ]] || die '--workdir is missing: a folder that all hosts' \
      'see, or give --share and it is made there.'
    workdir="/mnt/gemma_scope/runs/$name"
  fi
  [[ "$train_flags" == *' --config='* ]] || die 'no --config=... after --:' \
    'for example -- --config=configs/gemma_scope_2b.py'
}

# The environment of tpu_worker.sh, one VARIABLE=value a line, for a shell.
worker_environment() {
  printf '%s=%q\n' REPO "$repo" REF "$ref" WORKDIR "$workdir" SHARE "$share" \
    TRAIN_FLAGS "$train_flags"
}
