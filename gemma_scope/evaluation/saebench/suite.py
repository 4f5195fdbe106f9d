"""SAEBench's scores of SAEs, as far as labels that cost nothing go.

  core             loss and KL recovered, explained variance, cosine, norms,
                   L0, L1, dead and dense latents            (evaluate, here)
  sparse probing   token classes and places in the code      (probe)
  absorption       token classes; the first letters of words (absorption)
  SCR, TPP         pairs of labels; all token classes        (removal)

Each beside the same score of a random SAE with as many latents on, and probes
beside those on raw activations. SAEBench probes labelled English texts with a
large model; here labels are those of Python's own source (python_labels), for
any model and any tokenizer. Probes are trained on modules that the language
model and the SAEs saw too, and scored on modules that none of them saw.

One JSON file an SAE, in SAEBench's outline (eval_config, eval_result_metrics):
what is there already is not measured again, and a file of other settings is
refused.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import pathlib
import platform
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import gemma_scope
from gemma_scope import files, release, sites
from gemma_scope.evaluation import evaluate
from gemma_scope.evaluation.saebench import (
  absorption,
  fidelity,
  probe,
  probe_inputs,
  python_labels,
  scr_tpp,
)
from gemma_scope.language_model import gemma as lm
from gemma_scope.release import sae_folder
from gemma_scope.text import sources, tokenizers

# Target and spurious label: all four combinations are common in code.
PAIRS = (
  ('string', 'call_argument'),
  ('operator', 'call_argument'),
  ('name', 'in_class'),
)
_WORD = re.compile('▁([A-Za-z])[A-Za-z]+')
_FEWEST_WORDS = 12  # of one letter, different ones, in the held-out part


@dataclasses.dataclass(frozen=True)
class Settings:
  """What is measured; written into every result."""

  length: int = 128  # tokens of a sequence, BOS included
  train_modules: int = 60
  train_windows: int = 4  # sequences of a module
  test_windows: int = 16
  core_sequences: int = 64
  batch: int = 16
  seed: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Code:
  """Labelled sequences of the standard library, and which are held out."""

  tokens_NT: np.ndarray
  keep_NT: np.ndarray
  labels: dict[str, np.ndarray]
  group_N: np.ndarray
  test_N: np.ndarray


def read_code(tokenizer: tokenizers.Tokenizer, settings: Settings) -> Code:
  """Modules of the running Python: some to train on, the held-out to test."""
  # The source's first pass is the code of all modules; prose follows.
  modules = list(
    itertools.takewhile(
      lambda document: document.name.endswith('.py'),
      sources.documents('python'),
    )
  )
  seen, held_out = (
    [d for d in modules if d.split == split] for split in ('train', 'eval')
  )
  rng = np.random.default_rng(settings.seed)
  chosen = sorted(rng.permutation(len(seen))[: settings.train_modules])
  windows = functools.partial(
    python_labels.windows, tokenizer=tokenizer, length=settings.length
  )
  train = windows([seen[i] for i in chosen], most=settings.train_windows)
  test = windows(held_out, most=settings.test_windows)
  both = lambda a, b: np.concatenate([a, b])
  return Code(
    both(train.tokens_NT, test.tokens_NT),
    both(train.keep_NT, test.keep_NT),
    {k: both(v, test.labels[k]) for k, v in train.labels.items()},
    both(train.group_N, test.group_N + train.group_N.max() + 1),
    np.arange(len(train.group_N) + len(test.group_N)) >= len(train.group_N),
  )


def run(
  gemma: lm.Gemma,
  params: lm.Params,
  saes: Sequence[release.Released],
  tokenizer: tokenizers.Tokenizer,
  out: str | os.PathLike[str],
  settings: Settings = Settings(),  # noqa: B008  frozen
  report: Callable[[str], None] = print,
) -> list[pathlib.Path]:
  """Measures each SAE that `out` does not hold yet.

  Returns:
    The files, one an SAE, in order.

  Raises:
    ValueError: a file of `out` is of other settings, or of another SAE of that
      name; an SAE does not fit the model.
  """
  out = pathlib.Path(out)
  out.mkdir(parents=True, exist_ok=True)
  code, done = None, []
  for sae in saes:
    sae_params, card = sae.load(), sae.card | {'name': sae.name}
    path = out / f'{sae.name.replace("/", "_")}_eval_results.json'
    config = {
      **dataclasses.asdict(settings),
      'code': gemma_scope.__version__,
      'python': platform.python_version(),  # whose modules are the text
      'model': card.get('model'),
      'tokenizer_sha256': tokenizer.sha256,
      'sae_sha256': sae_folder.digest(sae_params),
    }
    if path.exists():
      if json.loads(path.read_text())['eval_config'] != config:
        raise ValueError(
          f'{path} is of other settings or of another SAE of this name; name '
          'another folder.'
        )
      report(f'{card["name"]}: measured already')
    else:
      report(f'{card["name"]}: measuring')
      code = code or read_code(tokenizer, settings)
      found = of_one(gemma, params, sae_params, card, code, tokenizer, settings)
      result = {
        'eval_type_id': 'gemma_scope_suite',
        'eval_config': config,
        'sae': {k: card[k] for k in ('name', 'type', 'sites', 'targets')},
        'eval_result_metrics': found,
      }
      files.write_json(path, result, indent=1)
    done.append(path)
  return done


def table(paths: Sequence[str | os.PathLike[str]]) -> str:
  """Markdown, a row an SAE: score (the random SAE's score).

  AUCs are means over all labels; `above random` counts the labels on which the
  interval of 5 latents lies above that of the random SAE's 5.
  """
  lines = [
    '| SAE | L0 | explained variance | loss recovered | KL score '
    '| AUC, 1 latent | AUC, 5 latents | AUC, 5 coordinates | AUC, all of x '
    '| above random | absorbed | fully | TPP, 10 | SCR, 10 |',
    '|---|' + '--:|' * 13,
  ]
  for path in paths:
    result = json.loads(pathlib.Path(path).read_text())
    found = result['eval_result_metrics']
    core, probes = found['core'], found['sparse_probing'].values()
    twin = core['control']

    def auc(on, k, probes=probes):
      return np.mean([probe.best(p, on, k)['auc']['value'] for p in probes])

    above = sum(
      probe.best(p, 'latents', 5)['auc']['low']
      > probe.best(p, 'random_sae', 5)['auc']['high']
      for p in probes
    )
    cells = [
      result['sae']['name'],
      f'{core["l0"]["value"]:.1f}',
      f'{core["explained_variance"]:.3f} ({1 - twin["fvu"]["value"]:.3f})',
      f'{core["loss_recovered_zero"]["value"]:.3f}',
      f'{_cell(core.get("kl_score"))} ({_cell(twin.get("kl_score"))})',
      *(
        f'{auc("latents", k):.3f} ({auc("random_sae", k):.3f})' for k in (1, 5)
      ),
      f'{auc("coordinates", 5):.3f}',
      f'{auc("activations", None):.3f}',
      f'{above} of {len(probes)}',
      *(
        f'{_cell(score(found.get("sae")))} '
        f'({_cell(score(found.get("random_sae")))})'
        for score in (_absorbed, _fully, _perturbed, _regained)
      ),
    ]
    lines.append('| ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines) + '\n'


def _cell(value) -> str:
  value = value['value'] if isinstance(value, dict) else value
  return '-' if value is None else f'{value:.3f}'


def _absorbed(found) -> float | None:
  return found and found['absorption']['fraction']


def _fully(found) -> float | None:
  return found and found['absorption']['full']


def _at(removed, count: int = 10) -> float | None:
  (one,) = (r for r in removed if (r['on'], r['count']) == ('latents', count))
  return one['score']


def _perturbed(found) -> float | None:
  return found and _at(found['tpp']['removed'])


def _regained(found) -> float | None:
  """The mean over pairs whose bias cost something."""
  each = (
    [_at(pair['removed']) for pair in found['scr'].values()] if found else []
  )
  told = [score for score in each if score is not None]
  return float(np.mean(told)) if told else None


def of_one(
  gemma, params, sae_params, card, code: Code, tokenizer, settings: Settings
) -> dict[str, Any]:
  """All scores of one SAE, plain for JSON; see the module."""
  place = sites.wiring_of(card)
  x_by_site = probe_inputs.activations(
    gemma, params, code.tokens_NT, place, settings.batch
  )
  twin = probe_inputs.control(
    x_by_site, code.keep_NT, place, sae_params, settings.seed
  )
  group_NT = np.broadcast_to(code.group_N[:, None], code.tokens_NT.shape)
  those = functools.partial(
    probe_inputs.of_tokens, x_by_site, place, sae_params, twin
  )
  tokens = those(code.keep_NT, code.test_N, group_NT)
  labels = {k: v[code.keep_NT] for k, v in code.labels.items()}
  found = {
    'core': _core(gemma, params, sae_params, card, twin, code, settings),
    'sparse_probing': {
      name: probe.run(tokens, y_B, seed=settings.seed)
      for name, y_B in labels.items()
    },
  }
  if place.several or place.sites != place.targets:
    return found  # the others read an SAE's decoder in the space that it reads
  classes = {name: labels[name] for name in python_labels.CLASSES}
  letters, where_NT, word_NT = _letters(code, tokenizer)
  words = those(
    where_NT, np.zeros(len(code.test_N), bool), np.zeros_like(group_NT)
  )
  words = dataclasses.replace(
    words,
    group_B=word_NT[where_NT],
    test_B=probe.split(word_NT[where_NT], seed=settings.seed),
  )
  letters = {
    name: y_B
    for name, y_B in letters.items()
    if _different(words, y_B) >= _FEWEST_WORDS
  }
  for name, made in (('sae', sae_params), ('random_sae', twin)):
    tokens_of, words_of = (
      r if name == 'sae' else dataclasses.replace(r, f_BF=r.control_BF)
      for r in (tokens, words)
    )
    found[name] = {
      'absorption': _absorption(tokens_of, made, classes),
      'absorption_first_letter': _absorption(words_of, made, letters),
      'tpp': scr_tpp.tpp(tokens_of, made, classes, seed=settings.seed),
      'scr': {
        f'{target}|{spurious}': scr_tpp.scr(
          tokens_of, made, labels[target], labels[spurious], seed=settings.seed
        )
        for target, spurious in PAIRS
      },
    }
  return found


def _absorption(found: probe.Rows, params, labels) -> dict[str, Any]:
  of_each = {
    name: absorption.of_concept(found, params, y_B)
    for name, y_B in labels.items()
  }
  return {**absorption.mean_of(of_each), 'by_concept': of_each}


def _letters(code: Code, tokenizer):
  """First letters of words that begin with a space, and which word is where.

  Train and test are different words, so that a probe that knows each word by
  heart finds no letter.
  """
  ids, word_NT = np.unique(code.tokens_NT, return_inverse=True)
  word_NT = word_NT.reshape(code.tokens_NT.shape)
  found = [_WORD.fullmatch(piece) for piece in tokenizer.pieces(ids)]
  letter_V = np.array([m[1].lower() if m else '' for m in found])
  letter_NT = np.where(code.keep_NT, letter_V[word_NT], '')
  where_NT = letter_NT != ''
  labels = {
    letter: letter_NT[where_NT] == letter
    for letter in sorted(set(letter_V) - {''})
  }
  return labels, where_NT, word_NT


def _different(found: probe.Rows, y_B) -> int:
  return len(np.unique(found.group_B[y_B & found.test_B]))


def _core(gemma, params, sae_params, card, twin, code, settings):
  """`evaluate.evaluate`'s figures and the rest of SAEBench's, held out."""
  tokens_NT = code.tokens_NT[code.test_N]
  keep_NT = code.keep_NT[code.test_N]
  count = min(settings.core_sequences, len(tokens_NT))
  chosen = np.linspace(0, len(tokens_NT) - 1, count).round().astype(int)
  tokens_NT, keep_NT = tokens_NT[chosen], keep_NT[chosen]
  found = evaluate.evaluate(
    gemma,
    params,
    [release.in_memory(sae_params, card)],
    tokens_NT,
    batch=settings.batch,
    keep=lambda _: keep_NT,
    seed=settings.seed,
  )[card['name']]
  found['explained_variance'] = 1 - found['fvu']['value']
  place = sites.wiring_of(card)
  if not place.several:
    batches = [
      (tokens_NT[i : i + settings.batch], keep_NT[i : i + settings.batch])
      for i in range(0, count, settings.batch)
    ]
    found |= fidelity.of(gemma, params, sae_params, place, batches)
    found['control'] |= fidelity.of(gemma, params, twin, place, batches)
  return found
