#!/usr/bin/env bash
# Every architecture on data with known answers, then on the tiny Gemma: the
# runs behind docs/architectures.md. Run again to continue; about an
# hour on two cores. Run folders go to runs/architectures.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" PYTHONPATH=.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
python="${GEMMA_SCOPE_VENV:-.venv}/bin/python"
out=runs/architectures
all=jumprelu,topk,batch_topk,gated,relu
all+=,matryoshka_jumprelu,matryoshka_batch_topk

train() { # folder, rest of the config's argument, flags
  local folder=$1 argument=$2
  shift 2
  "$python" launch/train.py --workdir="$out/$folder" \
    --config="configs/tiny.py:$argument" \
    --config.objective.auxk=0.03125 --config.train.dead_after=20000 \
    --config.metrics.every=100 "$@"
}

synthetic() { # folder, rest of the config's argument, flags
  train "$1" "$2" --config.lm.name=synthetic "${@:3}"
}

# Known features in one layer, three seeds.
"$python" launch/synthetic.py --out=$out/known --chunks=8
synthetic known_sae "layers=0;sites=resid_post;widths=512;sparsity=8;seeds=0,1,2;architectures=$all" \
  --config.activations.store=$out/known --config.train.steps=1500

# The ladder on the tiny Gemma: all at one rate, and where it helps at another.
ladder() { # rate, architectures
  train "ladder_$1" "layers=2;sites=resid_post;widths=1024;sparsity=4,8,16,32,64;architectures=$2" \
    --config.train.steps=1200 --config.train.decay=500 \
    --config.train.learning_rate="$1" --config.evaluation.sequences=64
}
ladder 4e-3 $all
ladder 1.2e-2 jumprelu,gated,relu,matryoshka_jumprelu

# Features over three layers, and from an MLP's input to its output.
"$python" launch/synthetic.py --out=$out/known_layers --chunks=4 \
  --sites="$(printf '%s/%d,' mlp_in 0 mlp_out 0 resid_post 0 mlp_in 1 mlp_out 1 resid_post 1 mlp_in 2 mlp_out 2)resid_post/2"
for type in transcoder:mlp_in:512 crosscoder:resid_post:768 clt:mlp_in:768; do
  IFS=: read -r name site width <<<"$type"
  layers=0,1,2
  [ "$name" = transcoder ] && layers=0
  synthetic "known_$name" "type=$name;layers=$layers;sites=$site;widths=$width;sparsity=8;architectures=jumprelu,topk,batch_topk" \
    --config.activations.store=$out/known_layers --config.train.steps=600
done
"$python" docs/architectures.py $out
