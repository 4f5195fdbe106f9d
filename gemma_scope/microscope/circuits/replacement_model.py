"""A text's local replacement model: what each source adds to each target.

If the norms' scales and the attention weights are frozen at their values on a
text, the residual stream is linear in the embeddings and the MLP outputs. A
feature's pre-activation is then a sum over sources,

  z = b_enc + sum_j A_j,   A_j = (what j writes) . dz/d(where j writes)

  feature    f W_dec[i] at its token and the layers that it writes to
  error      y - y_hat at a layer and token; all of y at layers without an SAE;
             in Gemma 4 with what the layer's per-layer input adds (ple_out)
  embedding  the embedding of a token
  bias       all b_dec together

and so is a logit before the soft-cap. A transcoder's affine skip is part of the
linear path. Tokens that no SAE was trained on (BOS) have no features. Source:
Ameisen et al., Circuit Tracing (2025), for transcoders and CLTs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope import sae, sites
from gemma_scope.language_model import gemma as lm
from gemma_scope.language_model import splice
from gemma_scope.microscope.circuits import budget, effects, intervene
from gemma_scope.microscope.circuits.intervene import Subject
from gemma_scope.sae import released

KINDS = ('feature', 'error', 'embedding', 'bias')
_FIRST = sites.Site(0, 'resid_pre')
_TARGETS = 8  # maximum number of targets in one pass
_CHUNK = 2048  # features whose decoders are gathered at once

# Where a target reads: a site, a token, and its vector dz/dx there [D].
Target = tuple[sites.Site, int, np.ndarray]


class Sources(NamedTuple):
  """All sources of a text, features first; -1 where a field does not apply.

  Attributes:
    kind: index into `KINDS`.
    member: index of the subject.
    feature: index of the feature in its SAE.
    layer, position: layer and token position of the source.
    value: a feature's activation; 1 for other kinds.
  """

  kind: np.ndarray
  member: np.ndarray
  feature: np.ndarray
  layer: np.ndarray
  position: np.ndarray
  value: np.ndarray


class Replacement:
  """Sources of a text, and what they add to any target.

  Args:
    subjects: transcoders, at most one per layer, or one CLT; all of one model.
    tokens_T: ids, BOS first.

  Attributes:
    sources: the sources of the text.
    last_TD: the residual stream that is unembedded.

  Raises:
    ValueError: the SAEs are not transcoders or CLTs, two write to the same
      layer, or the text is too long.
  """

  def __init__(self, subjects: Sequence[Subject], tokens_T: Sequence[int]):
    check(subjects)
    self._subjects = subjects
    self._gemma, self._lm_params = subjects[0].gemma, subjects[0].lm_params
    self._tokens_1T = effects.padded([tokens_T])
    self._at_once = budget.rows(
      budget.gradient, self._gemma, self._tokens_1T.shape[1], _TARGETS
    )
    self._keep_NT = [
      intervene.counted(subject, self._tokens_1T)[0][0] for subject in subjects
    ]
    depth = self._gemma.config.num_layers
    self._last = splice.last(self._gemma)
    self._reads = sorted(
      {site for subject in subjects for site in subject.place.sites}
    )
    writes = [sites.Site(m, 'mlp_out') for m in range(depth)]
    ples = _per_layer_inputs(self._gemma)
    tapped = tuple({*writes, *ples, *self._reads, _FIRST, self._last})
    taps = splice.taps(self._gemma, self._lm_params, self._tokens_1T, tapped)
    self.last_TD = np.asarray(taps[self._last][0], np.float32)
    self._embedding_TD = np.asarray(taps[_FIRST][0], np.float32)
    self._error_MTD = np.stack(
      [np.asarray(taps[site][0], np.float32) for site in writes]
    )
    self._bias_MTD = np.zeros_like(self._error_MTD)
    features = [self._split(n, taps) for n in range(len(subjects))]
    for site in ples:
      self._error_MTD[site.layer] += np.asarray(taps[site][0], np.float32)
    features = np.concatenate(features, 1)
    length = len(tokens_T)
    other_sources = [
      [1, -1, -1, m, t, 1] for m in range(depth) for t in range(length)
    ]
    other_sources += [[2, -1, -1, 0, t, 1] for t in range(length)]
    other_sources += [[3, -1, -1, -1, -1, 1]]
    all_sources = np.concatenate([features, np.array(other_sources).T], 1)
    self.sources = Sources(*all_sources[:5].astype(np.int64), all_sources[5])
    self._length = length

  def _split(self, n: int, taps) -> np.ndarray:
    """A subject's active features; reduces the error to y - y_hat."""
    place, params = self._subjects[n].place, self._subjects[n].params
    x, y = (
      released.stacked([taps[site] for site in side], place.several)[0]
      for side in (place.sites, place.targets)
    )
    f, error = map(np.asarray, _encoded(params, x, y))
    b_dec = np.asarray(params['b_dec'])
    by_layer = lambda array: (
      np.moveaxis(array, -2, 0) if place.several else array[None]
    )
    error, b_dec = by_layer(error), b_dec.reshape(len(place.targets), 1, -1)
    kept_T1 = self._keep_NT[n][:, None]
    for m, target in enumerate(place.targets):
      layer_out = target.layer
      self._error_MTD[layer_out] = np.where(
        kept_T1, error[m], self._error_MTD[layer_out]
      )
      self._bias_MTD[layer_out] = kept_T1 * b_dec[m]
    f_TLF = f.reshape(len(f), len(place.sites), -1) * kept_T1[:, None]
    t, l, i = np.nonzero(f_TLF)
    layer = np.array([site.layer for site in place.sites])[l]
    return np.stack(
      [0 * t, 0 * t + n, l * f_TLF.shape[2] + i, layer, t, f_TLF[t, l, i]]
    )

  def target(self, node: int) -> Target:
    """The target of a feature in `sources`: its encoder, at its token."""
    sources = self.sources
    subject = self._subjects[sources.member[node]]
    l, i = divmod(
      int(sources.feature[node]), subject.width // len(subject.place.sites)
    )
    W_enc = subject.params['W_enc']
    W_enc = W_enc[l] if subject.place.several else W_enc
    return (
      subject.place.sites[l],
      int(sources.position[node]),
      np.asarray(W_enc[:, i]),
    )

  def read(self, target: Target) -> float:
    """The value of a target in the model."""
    site, position, vector_D = target
    taps = splice.taps(self._gemma, self._lm_params, self._tokens_1T, (site,))
    return float(np.asarray(taps[site][0, position], np.float32) @ vector_D)

  def rows(self, targets: Sequence[Target]) -> Iterator[np.ndarray]:
    """For each target, A of every source, float32 [n]."""
    outputs = tuple(
      sorted({*self._reads, self._last, *(target[0] for target in targets)})
    )
    count = self._at_once
    for start in range(0, len(targets), count):
      batch = list(targets[start : start + count])
      filled = batch + [batch[-1]] * (count - len(batch))
      ends = (
        np.array([outputs.index(site) for site, _, _ in filled]),
        np.array([position for _, position, _ in filled]),
        np.stack([vector for _, _, vector in filled]),
      )
      static = self._gemma, outputs
      g_nTD, g_nMTD = _slopes(
        static, self._lm_params, self._tokens_1T, self._skips, ends
      )
      features_nJ = [
        self._written(n, g_nMTD) for n in range(len(self._subjects))
      ]
      error, bias, embedding = _contracted(
        g_nTD, g_nMTD, self._embedding_TD, self._error_MTD, self._bias_MTD
      )
      keep = slice(0, self._length)
      rows = np.concatenate(
        [
          *features_nJ,
          np.asarray(error)[:, :, keep].reshape(count, -1),
          np.asarray(embedding)[:, keep],
          np.asarray(bias)[:, None],
        ],
        1,
      )
      yield from rows[: len(batch)]

  def written(self, chosen: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """What the sources write together: embeddings [T, D] and MLPs [M, T, D]."""
    sources, embedding_TD = self.sources, np.zeros_like(self._embedding_TD)
    mlp_MTD = np.zeros_like(self._error_MTD)
    for j in chosen:
      t, kind = sources.position[j], KINDS[sources.kind[j]]
      if kind == 'embedding':
        embedding_TD[t] += self._embedding_TD[t]
      elif kind == 'error':
        mlp_MTD[sources.layer[j], t] += self._error_MTD[sources.layer[j], t]
      elif kind == 'bias':
        mlp_MTD += self._bias_MTD
      else:
        subject = self._subjects[sources.member[j]]
        l, i = divmod(
          int(sources.feature[j]), subject.width // len(subject.place.sites)
        )
        W_dec = subject.params['W_dec']
        for m, target in enumerate(subject.place.targets):
          if not subject.place.several or l <= m:
            row_D = W_dec[l, i, m] if subject.place.several else W_dec[i]
            mlp_MTD[target.layer, t] += sources.value[j] * np.asarray(row_D)
    return embedding_TD, mlp_MTD

  @property
  def frozen(self):
    """Gemma, its parameters, the tokens [1, T] and the skips, for `linear`."""
    return self._gemma, self._lm_params, self._tokens_1T, self._skips

  @functools.cached_property
  def _skips(self) -> dict[str, tuple[jax.Array, np.ndarray]]:
    """W_skip of each site that has one, and the tokens it applies to."""
    skips = {}
    for subject, keep_T in zip(self._subjects, self._keep_NT, strict=True):
      W_skip = subject.params.get('W_skip')
      if W_skip is not None:
        skip_matrices = W_skip if subject.place.several else [W_skip]
        for site, matrix in zip(
          subject.place.sites, skip_matrices, strict=True
        ):
          skips[str(site)] = matrix, keep_T
    return skips

  def _written(self, n: int, g_nMTD) -> np.ndarray:
    """A of one subject's features, [n, J]."""
    subject, sources = self._subjects[n], self.sources
    own_J = np.flatnonzero((sources.kind == 0) & (sources.member == n))
    l, i = np.divmod(
      sources.feature[own_J], subject.width // len(subject.place.sites)
    )
    total = np.zeros((self._at_once, len(own_J)), np.float32)
    for start in range(0, len(own_J), _CHUNK):
      chunk = np.arange(start, min(start + _CHUNK, len(own_J)))
      j = np.resize(chunk, _CHUNK)
      for m, target in enumerate(subject.place.targets):
        at_J = (l[j], i[j], m) if subject.place.several else (i[j],)
        products = _decoded(
          subject.params['W_dec'],
          at_J,
          sources.position[own_J][j],
          sources.value[own_J][j].astype(np.float32),
          g_nMTD[:, target.layer],
        )
        reaches = l[chunk] <= m if subject.place.several else True
        total[:, chunk] += np.where(
          reaches, np.asarray(products)[:, : len(chunk)], 0
        )
    return total


def check(subjects: Sequence[Subject]) -> None:
  """Raises ValueError unless a graph can be built from these SAEs."""
  written = []
  for subject in subjects:
    reads, writes = subject.place.kind, subject.place.targets[0].kind
    if not reads.startswith('mlp_in') or writes != 'mlp_out':
      raise ValueError(
        'An attribution graph needs transcoders or CLTs, which read MLP inputs '
        f'and write MLP outputs; found {subject.place}.'
      )
    written += [site.layer for site in subject.place.targets]
  if not written:
    raise ValueError('An attribution graph needs at least one transcoder.')
  if len(set(written)) < len(written):
    repeated = next(layer for layer in written if written.count(layer) > 1)
    raise ValueError(
      f'Two transcoders write to layer {repeated}; give one per layer.'
    )


def _per_layer_inputs(gemma: lm.Gemma) -> list[sites.Site]:
  """Where layers add something to the residual stream beside MLPs."""
  return [
    sites.Site(m, 'ple_out')
    for m in range(gemma.config.num_layers)
    if 'ple_out' in gemma.config.site_widths(m)
  ]


@jax.jit
def _encoded(params, x, y):
  with jax.default_matmul_precision('highest'):
    f = sae.encode(params, x)
    return f, y - sae.decode(params, f, x)


def linear(
  static, lm_params, tokens_1T, skips: dict[str, Any], heads_LTE=None
) -> tuple[Callable[..., dict[sites.Site, jax.Array]], tuple[jax.Array, ...]]:
  """The frozen model as a function of its embeddings and MLP outputs.

  Args:
    static: Gemma, and the sites that are read.
    skips: W_skip and tokens of each site that has one (`Replacement.frozen`).
    heads_LTE: if given, it is added to each layer's heads (`attn_out`), through
      which nothing else flows then.

  Returns:
    (embedding [1, T, D], MLP outputs [M, 1, T, D]) -> taps, linear about zero,
    and zeros of these shapes.
  """
  gemma, outputs = static
  stop = jax.lax.stop_gradient

  def stream(embedding_1TD, added_M1TD):
    read = {}
    edits = {_FIRST: lambda x: x + embedding_1TD}

    def reader(key, x_BTD):
      read[key] = x_BTD
      return x_BTD

    def writer(m, key, y_BTD):
      y_BTD = stop(y_BTD) + added_M1TD[m]
      if key is None:
        return y_BTD
      W_skip, keep_T = skips[key]
      through = (read[key] - stop(read[key])) @ W_skip
      return y_BTD + keep_T[:, None] * through

    def heads(layer, y_BTE):
      return stop(y_BTE) + heads_LTE[layer]

    by_layer = {sites.parse(key).layer: key for key in skips}
    for key in by_layer.values():
      edits[sites.parse(key)] = functools.partial(reader, key)
    for m in range(gemma.config.num_layers):
      edits[sites.Site(m, 'mlp_out')] = functools.partial(
        writer, m, by_layer.get(m)
      )
      if heads_LTE is not None:
        edits[sites.Site(m, 'attn_out')] = functools.partial(heads, m)
    edits |= dict.fromkeys(_per_layer_inputs(gemma), stop)
    taps = gemma.forward(
      lm_params, tokens_1T, taps=outputs, edits=edits, logits=False, frozen=True
    ).taps
    return {site: taps[site][0].astype(jnp.float32) for site in outputs}

  shape = (*tokens_1T.shape, gemma.config.d_model)
  zeros = jnp.zeros(shape), jnp.zeros((gemma.config.num_layers, *shape))
  return stream, zeros


@functools.partial(jax.jit, static_argnums=0)
def _slopes(static, lm_params, tokens_1T, skips: dict[str, Any], ends):
  """Derivatives with respect to embeddings [n, T, D] and MLPs [n, M, T, D].

  Args:
    static: Gemma, and the sites that targets read.
    ends: of each target its site's number, its token and its vector.
  """
  stream, zeros = linear(static, lm_params, tokens_1T, skips)
  stacked = lambda *primals: jnp.stack(list(stream(*primals).values()))
  x_OTD, back = jax.vjp(stacked, *zeros)

  def pulled_back(output, position, vector_D):
    cotangent = jnp.zeros_like(x_OTD).at[output, position].set(vector_D)
    embedding_1TD, added_M1TD = back(cotangent)
    return embedding_1TD[0], added_M1TD[:, 0]

  return jax.vmap(pulled_back)(*ends)


@jax.jit
def _decoded(W_dec, at_J, t_J, value_J, g_nTD):
  return jnp.einsum('njd,jd->nj', g_nTD[:, t_J], W_dec[at_J]) * value_J


@jax.jit
def _contracted(g_nTD, g_nMTD, embedding_TD, error_MTD, bias_MTD):
  return (
    jnp.einsum('nmtd,mtd->nmt', g_nMTD, error_MTD),
    jnp.einsum('nmtd,mtd->n', g_nMTD, bias_MTD),
    jnp.einsum('ntd,td->nt', g_nTD, embedding_TD),
  )
