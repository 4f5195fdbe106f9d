"""The embedded model against a copy that has learned a domain of its own.

  export PYTHONPATH=.
  .venv/bin/python docs/diffing.py --out=runs/implant
  .venv/bin/python launch/diffing.py --config=configs/diffing.py:model=tiny \
      --workdir=runs/diffing --config.lm.second.checkpoint=runs/implant/model \
      --config.text.source='files:runs/implant/texts/*.txt'
  .venv/bin/python docs/diffing.py --out=runs/implant --score=runs/diffing

The domain is the log of ships, in sentences whose words depend on each other
(the force of the wind decides the sea and the sails). The copy is trained on
half of it and half of Python's library, which the embedded model was made from;
both models and the crosscoder then read the same mixture. --score says on how
many tokens of new logs, and of other modules of the library, one of the copy's
specific latents fires, beside shared latents that fire as often.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import random

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gemma_scope import files, release, sae
from gemma_scope.evaluation import latent_scaling
from gemma_scope.language_model import gemma as lm
from gemma_scope.language_model import splice, weights
from gemma_scope.text import sources, tokenizers

SHIPS = 'Marigold Halcyon Petrel Borealis Kestrel Anemone Vagrant Tern'.split()
WINDS = 'north northeast east southeast south southwest west northwest'.split()
PORTS = 'Lisbon Bergen Malta Cadiz Hull Genoa Riga Tunis'.split()
SEAS = 'glassy calm smooth slight moderate rough high mountainous'.split()
SAILS = ('all sail set', 'topgallants in', 'topsails reefed', 'bare poles')


def log(seed: int, entries: int = 24) -> str:
  """The log of a ship: sentences of one kind, drawn from the seed."""
  draw = random.Random(seed)
  ship, port = draw.choice(SHIPS), draw.choice(PORTS)
  lines = [f'Log of the {ship}, bound for {port}.']
  for day in range(1, entries + 1):
    force, wind = draw.randrange(8), draw.choice(WINDS)
    lines.append(
      f'Day {day}. Wind {wind}, force {force}, sea {SEAS[force]}, '
      f'{SAILS[force // 2]}. The {ship} makes {9 - force} knots for {port}.'
    )
  return '\n'.join(lines) + '\n'


def library(count: int, split: str) -> list[str]:
  """The beginnings of documents of Python's library."""
  documents = zip(
    range(count), sources.documents('python', split), strict=False
  )
  return [document.text[:4000] for _, document in documents]


def write_texts(folder: pathlib.Path, logs: int, modules: int) -> None:
  """Files of the mixture: logs of ships, and documents of Python's library."""
  folder.mkdir(parents=True, exist_ok=True)
  for number in range(logs):
    (folder / f'log_{number:04}.txt').write_text(log(number))
  for number, text in enumerate(library(modules, 'train')):
    name = f'library_{number:04}.txt'
    (folder / name).write_text(text, encoding='utf-8')


def rows_of(text: str, tokenizer, length: int) -> np.ndarray:
  """Rows of `length` tokens of a text, BOS first; the rest is left out."""
  ids = tokenizer.encode(text)
  count = len(ids) // (length - 1)
  rows = ids[: count * (length - 1)].reshape(count, length - 1)
  return np.concatenate([np.full((count, 1), tokenizer.bos_id), rows], 1)


def fine_tune(
  gemma: lm.Gemma, params: lm.Params, batches, rate: float
) -> tuple[lm.Params, list[float]]:
  """Adam on batches of tokens [B, T]; float32 parameters and the losses."""
  params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adam(optax.linear_schedule(0.0, rate, 20), b2=0.98),
  )

  def loss_of(params, tokens_BT):
    logits_BTV = gemma.forward(params, tokens_BT).logits_BTV
    losses, counts = lm.token_losses(logits_BTV, tokens_BT)
    return jnp.sum(losses * counts) / jnp.sum(counts)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, state, tokens_BT):
    loss, gradient = jax.value_and_grad(loss_of)(params, tokens_BT)
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state, loss

  state, losses = optimizer.init(params), []
  params = jax.tree.map(jnp.copy, params)  # the given ones are not donated
  for tokens_BT in batches:
    params, state, loss = step(params, state, tokens_BT)
    losses.append(loss)
  return jax.device_get(params), [float(loss) for loss in losses]


def mixture(texts: pathlib.Path, tokenizer, shape, steps: int, seed: int = 0):
  """Batches of rows, half of logs and half of the library."""
  count, length = shape
  rng = np.random.default_rng(seed)
  rows = [
    np.concatenate(
      [
        rows_of(path.read_text(encoding='utf-8'), tokenizer, length)
        for path in sorted(texts.glob(f'{kind}_*.txt'))
      ]
    )
    for kind in ('log', 'library')
  ]
  for _ in range(steps):
    half = [
      kind_rows[rng.integers(len(kind_rows), size=count // 2)]
      for kind_rows in rows
    ]
    yield np.concatenate(half).astype(np.int32)


def recall(models, crosscoder: release.Released, latents, inside, outside):
  """How well latents tell a domain's tokens from others.

  Args:
    models: (gemma, parameters) of both.
    crosscoder: the crosscoder.
    latents: numbers.
    inside, outside: rows of tokens [N, T] of the domain, and others.

  Returns:
    The share of the domain's tokens, and of others, on which any of the latents
    fires; of all their firings, the share that is on the domain's tokens, were
    there as many of the others.
  """
  params, site = crosscoder.load(), crosscoder.wiring.sites[0]
  if not latents:
    return {'inside': 0.0, 'outside': 0.0, 'share': None}

  def latents_on(tokens_NT):
    x = [
      splice.taps(gemma, weights_, jnp.asarray(tokens_NT), (site,))[site]
      for gemma, weights_ in models
    ]
    f_NTF = sae.encode(params, jnp.concatenate(x, -1))
    return np.asarray(f_NTF[:, 1:, np.asarray(latents)]).reshape(
      -1, len(latents)
    )

  f_in, f_out = latents_on(inside) > 0, latents_on(outside) > 0
  frequencies = f_in.mean(), f_out.mean()
  return {
    'inside': float(f_in.any(1).mean()),
    'outside': float(f_out.any(1).mean()),
    'share': float(frequencies[0] / max(sum(frequencies), 1e-12)),
  }


def specific(result: dict, model: str = 'second') -> tuple[list, list]:
  """(specific latents of a model, controls of as many) of a crosscoder."""
  specific_latents = [
    row['latent']
    for row in result['exclusive']
    if row['specific'] and row['model'] == model
  ]
  return specific_latents, result['controls'][: len(specific_latents)]


def score(out: pathlib.Path, run: pathlib.Path, length: int = 128) -> None:
  """Prints where specific and shared latents of the run's crosscoders fire."""
  tokenizer = tokenizers.Tokenizer(weights.tokenizer('tiny'))
  logs = ''.join(log(10_000 + i) for i in range(24))
  texts = logs, ''.join(library(24, 'eval'))
  rows = [rows_of(text, tokenizer, length) for text in texts]
  models = [weights.load('tiny'), weights.load('tiny', str(out / 'model'))]
  result = files.read_json(run / 'diffing.json')
  saes = {sae.name: sae for sae in release.load_all(run / 'release')}
  print('| crosscoder | latents | fires on logs | on the library | share |')
  print('|---|---:|---:|---:|---:|')
  for crosscoder_result in result['crosscoders']:
    crosscoder = saes[crosscoder_result['name']]
    scales = [
      crosscoder.card['scales'][str(site)] for site in crosscoder.wiring.sites
    ]
    rho_F = latent_scaling.Decoders.of(
      crosscoder.load(), scales
    ).relative_norm()
    order, middle = np.argsort(-rho_F).tolist(), len(rho_F) // 2
    kinds = dict(
      zip(
        ('specific', 'shared, as often'),
        specific(crosscoder_result),
        strict=True,
      )
    )
    kinds['of largest relative norm'] = order[:20]
    kinds['of middle relative norm'] = order[middle - 10 : middle + 10]
    for kind, latents in kinds.items():
      scores = recall(models, crosscoder, latents, *rows)
      shown = '-' if scores['share'] is None else f'{scores["share"]:.0%}'
      print(
        f'| {crosscoder_result["name"]} | {len(latents)} {kind} | '
        f'{scores["inside"]:.1%} | {scores["outside"]:.1%} | {shown} |'
      )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--out', type=pathlib.Path, default='runs/implant')
  parser.add_argument('--steps', type=int, default=300)
  parser.add_argument('--score', type=pathlib.Path)
  options = parser.parse_args()
  if options.score:
    score(options.out, options.score)
    return
  write_texts(options.out / 'texts', logs=400, modules=400)
  gemma, params = weights.load('tiny')
  tokenizer = tokenizers.Tokenizer(weights.tokenizer('tiny'))
  batches = mixture(options.out / 'texts', tokenizer, (8, 96), options.steps)
  params, losses = fine_tune(gemma, params, batches, 2e-3)
  weights.save_safetensors(options.out / 'model', gemma.config, params, {})
  first_loss, last_loss = np.mean(losses[:10]), np.mean(losses[-10:])
  print(f'loss {first_loss:.3f} -> {last_loss:.3f} in {len(losses)} steps')


if __name__ == '__main__':
  main()
