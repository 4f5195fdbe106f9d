"""A small random model, a text, SAEs on it, and their slow evaluation."""

from __future__ import annotations

import numpy as np

from gemma_scope import sites
from gemma_scope.evaluation import (
  batches,
  evaluate,
)
from gemma_scope.language_model import gemma as lm
from tests.helpers import forward, releases

CONFIG = lm.Config(
  name='random',
  vocab_size=48,
  d_model=16,
  num_layers=2,
  num_heads=2,
  num_kv_heads=1,
  head_dim=8,
  d_ff=32,
  window=4,
  pattern='LG',
  final_softcap=30.0,
)


SPECIAL = (0, 1, 2)  # padding, EOS, BOS


SITES = ('attn_out/1', 'resid_post/0')


BATCH, D = 4, 16


def text(count, length=12, seed=0):
  tokens_NT = np.random.default_rng(seed).integers(3, 48, (count, length))
  tokens_NT[:, 0] = 2
  tokens_NT[1::3, 5] = 1
  tokens_NT[2::3, -3:] = 0
  return tokens_NT.astype(np.int32)


def keep(tokens_NT):
  return ~np.isin(tokens_NT, SPECIAL)


def card(site, name):
  return {'type': 'sae', 'sites': [site], 'targets': [site], 'name': name}


def random_sae(site, seed=0, width=24, name=''):
  rng = np.random.default_rng(seed)
  W_dec = rng.normal(size=(width, D))
  W_dec /= np.linalg.norm(W_dec, axis=1, keepdims=True)
  params = {
    'W_enc': W_dec.T * 0.7,
    'b_enc': rng.normal(size=width) * 0.1,
    'W_dec': W_dec,
    'b_dec': rng.normal(size=D) * 0.1,
    'threshold': np.full(width, 0.5),
  }
  params['b_enc'][0] = -1e6  # a latent that never fires
  params = {key: value.astype(np.float32) for key, value in params.items()}
  return params, card(site, name or f'{site}/{seed}')


def identity_sae(site):
  eye = np.eye(D, dtype=np.float32)
  params = {
    'W_enc': np.concatenate([eye, -eye], 1),
    'b_enc': np.zeros(2 * D, np.float32),
    'W_dec': np.concatenate([eye, -eye]),
    'b_dec': np.zeros(D, np.float32),
    'threshold': np.zeros(2 * D, np.float32),
  }
  return params, card(site, f'{site}/identity')


WATCH = batches.Watch()


def measure(model, saes, tokens_NT, watch=WATCH, **fields):
  evaluation_text = batches.Text(tokens_NT, keep, BATCH, **fields)
  return evaluate.evaluate(
    *model, releases.saes(saes), evaluation_text, watch=watch
  )


class Reference:
  """Loops over sequences and tokens; splices by a plain full forward pass."""

  def __init__(self, model, sae, tokens_NT, keep_bos=True):
    (gemma, params), (arrays, card) = model, sae
    site = sites.parse(card['sites'][0])
    out = forward.forward(gemma, params, tokens_NT, (site,))
    x_NTD = np.asarray(out.taps[site], np.float64)
    keep_NT = keep(tokens_NT)
    sae_params = {
      key: value.astype(np.float64) for key, value in arrays.items()
    }
    mean_D = x_NTD[keep_NT].mean(0)
    x_hat_NTD, self.fired_F = x_NTD.copy(), np.zeros(len(sae_params['b_enc']))
    active = error = variance = flat = 0.0
    for n, t in np.argwhere(keep_NT):
      z_F = x_NTD[n, t] @ sae_params['W_enc'] + sae_params['b_enc']
      f_F = np.where(z_F > sae_params['threshold'], np.maximum(z_F, 0), 0)
      x_hat_NTD[n, t] = f_F @ sae_params['W_dec'] + sae_params['b_dec']
      self.fired_F += f_F > 0
      active += (f_F > 0).sum()
      error += ((x_NTD[n, t] - x_hat_NTD[n, t]) ** 2).sum()
      variance += ((x_NTD[n, t] - mean_D) ** 2).sum()
      flat += ((x_NTD[n, t] - x_NTD[keep_NT].mean()) ** 2).sum()
    if not keep_bos:
      z_NF = x_NTD[:, 0] @ sae_params['W_enc'] + sae_params['b_enc']
      f_NF = np.where(z_NF > sae_params['threshold'], np.maximum(z_NF, 0), 0)
      x_hat_NTD[:, 0] = f_NF @ sae_params['W_dec'] + sae_params['b_dec']
    self.tokens = keep_NT.sum()
    self.l0 = active / self.tokens
    self.fvu, self.fvu_elementwise = error / variance, error / flat

    losses = lambda logits_NTV: np.asarray(
      forward.losses(logits_NTV, tokens_NT), np.float64
    )

    def loss(x_NTD):
      edits = {site: forward.instead(x_NTD.astype(np.float32))}
      spliced = forward.forward(gemma, params, tokens_NT, edits=edits)
      return losses(spliced.logits_BTV)

    self.counts_NT = keep_NT[:, 1:] & keep_NT[:, :-1]
    clean_NT = losses(out.logits_BTV)
    self.delta_NT = np.where(self.counts_NT, loss(x_hat_NTD) - clean_NT, 0)
    self.delta = self.delta_NT.sum() / self.counts_NT.sum()
    self.clean = clean_NT[self.counts_NT].mean()
    keep_NT1 = keep_NT[..., None]
    ablated = [
      (loss(np.where(keep_NT1, value, x_NTD)) - clean_NT)[self.counts_NT].mean()
      for value in (0.0, mean_D)
    ]
    self.recovered = [
      (ablated_loss - self.delta) / ablated_loss for ablated_loss in ablated
    ]
    self.mean_D = mean_D
