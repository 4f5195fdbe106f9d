"""Sampling: the cache against the full pass, and the noise of each row."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from gemma_scope import mesh, sites
from gemma_scope.language_model import gemma as lm
from gemma_scope.language_model import generate, weights
from tests.helpers.random_models import GEMMA2, GEMMA3, model

RNG = np.random.default_rng(0)
PROMPTS = [np.append(2, RNG.integers(3, 40, n)) for n in (1, 9, 4, 6)]
NEW = 10
SITE = sites.Site(0, 'resid_post')


def sample(config=GEMMA2, prompts=PROMPTS, edits=None, passes=None, **more):
  # As many stops and bans in every test: one program serves most of them.
  more = {'max_new_tokens': NEW, 'stop': [39], 'forbid': [39], **more}
  sampling = generate.Sampling(**more)
  replies = generate.generate(*model(config), prompts, sampling, edits, passes)
  assert all(reply.dtype == np.int32 for reply in replies)
  return [reply.tolist() for reply in replies]


def recomputed(config, edits=None):
  """Greedy, each token by a full pass over all before it, one by one."""
  gemma, params = model(config)

  @jax.jit  # one shape: padding on the right changes nothing (lm_test)
  def logits(tokens_T, last):
    own = edits(tokens_T[None]) if callable(edits) else edits
    out = gemma.forward(params, tokens_T[None], edits=own)
    return out.logits_BTV[0, last].at[jnp.array([0, 39])].set(-jnp.inf)

  replies = []
  for prompt in PROMPTS:
    ids = [*map(int, prompt)]
    while len(ids) < len(prompt) + NEW:
      row_T = np.zeros(10 + NEW, np.int32)
      row_T[: len(ids)] = ids
      ids.append(int(np.argmax(logits(row_T, len(ids) - 1))))
    replies.append(ids[len(prompt) :])
  return replies


@functools.cache
def plain(config):
  return recomputed(config)


@pytest.mark.parametrize('config', [GEMMA2, GEMMA3], ids=lambda c: c.name)
def test_greedy_with_cache_is_greedy_by_full_passes(config):
  want = plain(config)
  assert len({tuple(r) for r in want}) > 1 and len(set(want[1])) > 3
  assert sample(config, temperature=0) == want
  if config is GEMMA2:  # in batches, filled up, with more padding than needed
    passes = generate.Passes(batch=3, prompt_len=23)
    assert sample(config, temperature=0, passes=passes) == want


def test_edits_act_on_prompt_and_generated_tokens():
  vector = 3 * jax.random.normal(jax.random.key(7), (16,))
  edits = {SITE: lambda x_BTD: x_BTD + vector}
  want = recomputed(GEMMA3, edits)
  assert want != plain(GEMMA3)
  assert sample(GEMMA3, temperature=0, edits=edits) == want


def test_an_edit_by_token_leaves_bos_alone():
  vector = 3 * jax.random.normal(jax.random.key(7), (16,))
  seen = []

  def edits(tokens_BT):
    seen.append(tokens_BT.shape)
    on_BT1 = (tokens_BT != 2)[..., None]
    return {SITE: lambda x_BTD: x_BTD + on_BT1 * vector}

  want = recomputed(GEMMA2, edits)
  assert want != plain(GEMMA2)
  seen.clear()
  assert sample(temperature=0, edits=edits) == want
  assert sample(temperature=0, edits=edits) == want
  assert seen == [(4, 16), (4, 1)]  # prefill and one step, traced once


def test_bound_numbers_are_arguments_and_compile_nothing():
  traced = []

  def add(vector, strength, x_BTD):
    traced.append(1)
    return x_BTD + strength * vector

  vector = jax.random.normal(jax.random.key(7), (16,))
  run = lambda s: sample(temperature=0, edits={SITE: Partial(add, vector, s)})
  assert run(0.0) == plain(GEMMA2) != run(9.0)
  assert len(traced) == 2


def test_an_impossible_edit_is_refused():
  with pytest.raises(ValueError, match='layers 0 to 1'):
    sample(edits={sites.Site(5, 'resid_post'): lambda x: x})


def test_a_reply_does_not_depend_on_its_batch():
  together = sample(GEMMA3, seed=3)
  passes = generate.Passes(prompt_len=16)
  alone = [
    sample(GEMMA3, [p], passes=passes, seed=3, streams=[i])[0]
    for i, p in enumerate(PROMPTS)
  ]
  assert together == alone
  backwards = sample(GEMMA3, PROMPTS[::-1], seed=3, streams=[3, 2, 1, 0])
  assert together == backwards[::-1]


def test_a_program_serves_all_shorter_replies():
  whole = sample(seed=3)
  passes = generate.Passes(reply_len=NEW)
  programs = generate._sample._cache_size()
  short = sample(seed=3, passes=passes, max_new_tokens=NEW - 2)
  assert [reply[: NEW - 2] for reply in whole] == short
  assert generate._sample._cache_size() == programs


def test_seeds():
  assert sample(seed=5) == sample(seed=5) != sample(seed=6)
  same = [PROMPTS[1]] * 4
  assert len({tuple(r) for r in sample(prompts=same)}) == 4  # each its noise
  assert len({tuple(r) for r in sample(prompts=same, temperature=0)}) == 1


@pytest.mark.parametrize('temperatures, top_k', [((1.0, 0.5), 0), ((1.0,), 3)])
def test_frequencies_are_the_softmax(temperatures, top_k):
  gemma, params = model(GEMMA2)
  count = 2048
  run = jax.jit(lambda p: gemma.forward(p, PROMPTS[0][None]).logits_BTV)
  logits_V = run(params)[0, -1]
  for temperature in temperatures:
    drawn = sample(
      prompts=[PROMPTS[0]] * count,
      passes=generate.Passes(prompt_len=2),
      max_new_tokens=1,
      temperature=temperature,
      top_k=top_k,
      forbid=[7],
    )
    z_V = np.array(logits_V, np.float64) / temperature
    z_V[[0, 7]] = -np.inf
    if top_k:
      z_V[np.argsort(z_V)[:-top_k]] = -np.inf
    p_V = np.exp(z_V - z_V.max())
    p_V /= p_V.sum()
    assert (p_V > 0.02).sum() > 2
    found_V = np.bincount(np.ravel(drawn), minlength=40) / count
    assert not found_V[p_V == 0].any()
    error_V = np.sqrt(p_V * (1 - p_V) / count)
    assert (np.abs(found_V - p_V) <= 5 * error_V + 1e-3).all()


def test_stop_tokens_stop():
  free = sample(seed=1)
  stop = free[0][2]
  stopped = sample(seed=1, stop=[stop])
  for reply, whole in zip(stopped, free, strict=True):
    end = whole.index(stop) + 1 if stop in whole else NEW
    assert reply == whole[:end]
  assert len(stopped[0]) < NEW


def test_padding_and_forbidden_tokens_are_never_sampled():
  free = np.concatenate(sample(temperature=50.0))
  assert len(set(free)) > 15 and not {0, 39} & set(free)
  favourite = np.bincount(free).argmax()
  without = sample(temperature=50.0, forbid=[favourite])
  assert favourite not in np.concatenate(without)


def test_sharded_equals_one_device():
  devices = mesh.make({'sae': 1, 'data': 4, 'latent': 2})
  flat, tree = jax.tree_util.tree_flatten_with_path(model(GEMMA2)[1])
  sharded = tree.unflatten(
    jax.device_put(
      x,
      weights.sharding(
        devices,
        jax.tree_util.keystr(path, simple=True, separator='/'),
        x.shape,
        transpose_gating=False,
      ),
    )
    for path, x in flat
  )
  pinned = lm.Gemma(GEMMA2, mesh.sharding(devices, 'data', None, None))
  sampling = generate.Sampling(NEW, stop=[39], forbid=[39])
  got = generate.generate(pinned, sharded, PROMPTS, sampling)
  assert [reply.tolist() for reply in got] == sample()


def test_refusals():
  for change in (
    {'max_new_tokens': 0},
    {'temperature': -1.0},
    {'seed': 2**32},
    {'top_k': -1},
    {'temperature': 'hot'},
  ):
    with pytest.raises(ValueError, match='must be positive'):
      sample(**change)
  for name in ('stop', 'forbid'):
    with pytest.raises(ValueError, match=f'{name} must be a list of token ids'):
      sample(**{name: ['<eos>']})
  with pytest.raises(ValueError, match='Prompt 1 has 0 tokens'):
    sample(prompts=[[2], []])
  with pytest.raises(ValueError, match='Prompt 0 has 10 tokens; .* 1 to 8'):
    sample(prompts=[PROMPTS[1]], passes=generate.Passes(prompt_len=8))
  for bad in (40, 0, -1):
    with pytest.raises(ValueError, match='the model knows 1 to 39'):
      sample(prompts=[[2, bad]])
  with pytest.raises(ValueError, match='4 prompts and 1 streams'):
    sample(streams=[0])
  for wrong in ([2, 5], ['a text'], [[2.5]], [[[2]]]):
    with pytest.raises(ValueError, match='Prompt 0 must be a list of token id'):
      sample(prompts=wrong)
  assert sample(prompts=[]) == []

  def stop():
    raise InterruptedError

  with pytest.raises(InterruptedError):
    sample(passes=generate.Passes(poll=stop))
