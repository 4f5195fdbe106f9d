"""SAEBench's scores, as far as labels that cost nothing go.

  sparse probing   token classes and places in the code      (probe)
  core             L0, loss and KL recovered, explained variance, cosine, norms,
                   dead and dense latents                    (evaluate)
  absorption       token classes; the first letters of words (absorption)
  SCR, TPP         pairs of labels; all token classes        (scr_tpp); both are
                   disputed as measures of SAEs (arXiv 2605.18229)

Each stands beside the same score of a random SAE with as many latents on, core
beside the strongest of three controls, and probes beside those on raw
activations. SAEBench probes labelled English texts with a large model; here
labels are those of Python's own source (python_labels), for any model and any
tokenizer. Probes are trained on modules that the language model and the SAEs
saw too, and scored on modules that none of them saw.

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
from gemma_scope import files, release
from gemma_scope.evaluation import batches, evaluate
from gemma_scope.evaluation.saebench import (
  absorption,
  probe,
  probe_inputs,
  python_labels,
  scr_tpp,
)
from gemma_scope.language_model import gemma as lm
from gemma_scope.release import sae_folder
from gemma_scope.runtime import progress as progress_lib
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
  tokenizer: tokenizers.Tokenizer


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
    tokenizer,
  )


def run(
  model: tuple[lm.Gemma, lm.Params],
  saes: Sequence[release.Released],
  tokenizer: tokenizers.Tokenizer,
  out: str | os.PathLike[str],
  settings: Settings = Settings(),  # noqa: B008  frozen
  report: Callable[[str], None] = print,
) -> list[pathlib.Path]:
  """Measures each SAE that `out` does not hold yet, with progress on stderr.

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
    path = out / f'{sae.name.replace("/", "_")}_eval_results.json'
    config = {
      **dataclasses.asdict(settings),
      'code': gemma_scope.__version__,
      'python': platform.python_version(),  # whose modules are the text
      'model': sae.card.get('model'),
      'tokenizer_sha256': tokenizer.sha256,
      'sae_sha256': sae_folder.digest(sae.load()),
    }
    if path.exists():
      if json.loads(path.read_text())['eval_config'] != config:
        raise ValueError(
          f'{path} has other settings or another SAE of this name; choose '
          'another folder.'
        )
      report(f'{sae.name}: measured already')
    else:
      report(f'{sae.name}: measuring')
      code = code or read_code(tokenizer, settings)
      files.write_json(
        path,
        {
          'eval_type_id': 'gemma_scope_suite',
          'eval_config': config,
          'sae': {
            'name': sae.name,
            **{k: sae.card[k] for k in ('type', 'sites', 'targets')},
          },
          'eval_result_metrics': of_one(model, sae, code, settings),
        },
        indent=1,
      )
    done.append(path)
  return done


DISPUTED = (
  'TPP and SCR are disputed as measures of SAE quality (arXiv 2605.18229); '
  'read sparse probing first.'
)


def table(paths: Sequence[str | os.PathLike[str]]) -> str:
  """Markdown, a row an SAE: score (the random SAE's score).

  Sparse probing comes first: AUCs are means over all labels, and `above random`
  counts the labels on which the interval of 5 latents lies above that of the
  random SAE's 5. Explained variance and KL score stand beside those of the
  strongest control.
  """
  lines = [
    '| SAE | AUC, 1 latent | AUC, 5 latents | AUC, 5 coordinates '
    '| AUC, all of x | above random | L0 | loss recovered | KL score '
    '| explained variance | absorption fraction | full absorption '
    '| TPP, 10 (disputed) | SCR, 10 (disputed) |',
    '|---|' + '--:|' * 13,
  ]
  for path in paths:
    result = json.loads(pathlib.Path(path).read_text())
    found = result['eval_result_metrics']
    core, probes = found['core'], found['sparse_probing'].values()
    control = core['control']

    def auc(on, k, probes=probes):
      return np.mean([probe.best(p, on, k)['auc']['value'] for p in probes])

    above = sum(
      probe.best(p, 'latents', 5)['auc']['low']
      > probe.best(p, 'random_sae', 5)['auc']['high']
      for p in probes
    )
    cells = [
      result['sae']['name'],
      *(
        f'{auc("latents", k):.3f} ({auc("random_sae", k):.3f})' for k in (1, 5)
      ),
      f'{auc("coordinates", 5):.3f}',
      f'{auc("activations", None):.3f}',
      f'{above} of {len(probes)}',
      f'{core["l0"]["value"]:.1f}',
      f'{core["loss_recovered_zero"]["value"]:.3f}',
      f'{_cell(core["kl_score"])} ({_cell(_kl_score(control, core))})',
      f'{core["explained_variance"]:.3f} ({1 - control["fvu"]["value"]:.3f})',
      *(
        f'{_cell(score(found.get("sae")))} '
        f'({_cell(score(found.get("random_sae")))})'
        for score in (_absorbed, _fully, _perturbed, _regained)
      ),
    ]
    lines.append('| ' + ' | '.join(cells) + ' |')
  return '\n'.join([*lines, '', DISPUTED]) + '\n'


def _cell(value) -> str:
  value = value['value'] if isinstance(value, dict) else value
  return '-' if value is None else f'{value:.3f}'


def _kl_score(control, core) -> float | None:
  zero = core['kl_zero']['value']
  return 1 - control['kl']['value'] / zero if zero else None


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


class _Steps:
  """Progress over the parts of one SAE's suite."""

  def __init__(self, name: str, total: int):
    self._bar = progress_lib.Progress(total, label=f'suite {name}')
    self._done = 0

  def next(self, part: str) -> None:
    """The part before is done, and `part` begins."""
    self._bar.update(self._done, {'now': part})
    self._done += 1

  def close(self) -> None:
    self._bar.close()


def of_one(
  model: tuple[lm.Gemma, lm.Params],
  sae: release.Released,
  code: Code,
  settings: Settings,
) -> dict[str, Any]:
  """All scores of one SAE, plain for JSON; see the module."""
  # The other scores read an SAE's decoder in the space that it reads.
  reads_decoder = not sae.wiring.several and sae.card['type'] == 'sae'
  steps = _Steps(sae.name, 3 + len(code.labels) + 8 * reads_decoder)
  try:
    steps.next('activations')
    params, wiring = sae.load(), sae.wiring
    x_by_site = probe_inputs.activations(
      *model, code.tokens_NT, wiring, settings.batch
    )
    steps.next('control')
    twin = probe_inputs.control(
      x_by_site, code.keep_NT, wiring, params, settings.seed
    )
    pair = probe_inputs.Pair(wiring, params, twin)
    rows_at = functools.partial(probe_inputs.of_tokens, x_by_site, pair)
    group_NT = np.broadcast_to(code.group_N[:, None], code.tokens_NT.shape)
    tokens = rows_at(code.keep_NT, code.test_N, group_NT)
    labels = {k: v[code.keep_NT] for k, v in code.labels.items()}
    scores: dict[str, Any] = {'sparse_probing': {}}
    for name, y_B in labels.items():
      steps.next(f'probes of {name}')
      scores['sparse_probing'][name] = probe.run(
        tokens, y_B, seed=settings.seed
      )
    steps.next('core')
    scores['core'] = _core(model, sae, code, settings)
    if reads_decoder:
      words = _words(code, rows_at, settings.seed)
      for name, made in (('sae', params), ('random_sae', twin)):
        scores[name] = _of_decoder(
          made, name, (tokens, labels), words, steps, settings.seed
        )
  finally:
    steps.close()
  return scores


def _of_decoder(made, name: str, tokens, words, steps: _Steps, seed: int):
  """Absorption, TPP and SCR of an SAE, or of the random one beside it."""
  (rows, labels), (word_rows, letters) = tokens, words
  if name == 'random_sae':
    rows, word_rows = (
      dataclasses.replace(r, f_BF=r.control_BF) for r in (rows, word_rows)
    )
  classes = {label: labels[label] for label in python_labels.CLASSES}
  scores = {}
  steps.next(f'absorption of {name}')
  scores['absorption'] = _absorption(rows, made, classes)
  steps.next(f'absorption of first letters of {name}')
  scores['absorption_first_letter'] = _absorption(word_rows, made, letters)
  steps.next(f'TPP of {name}')
  scores['tpp'] = scr_tpp.tpp(rows, made, classes, seed=seed)
  steps.next(f'SCR of {name}')
  scores['scr'] = {
    f'{target}|{spurious}': scr_tpp.scr(
      rows, made, labels[target], labels[spurious], seed=seed
    )
    for target, spurious in PAIRS
  }
  return scores


def _absorption(rows: probe.Rows, params, labels) -> dict[str, Any]:
  by_concept = {
    name: absorption.of_concept(rows, params, y_B)
    for name, y_B in labels.items()
  }
  return {**absorption.mean_of(by_concept), 'by_concept': by_concept}


def _words(code: Code, rows_at, seed: int):
  """Rows of words, held out by word, and first letters of enough of them."""
  letters, where_NT, word_NT = _letters(code)
  everywhere_N = np.zeros(len(code.test_N), bool)
  rows = rows_at(where_NT, everywhere_N, np.zeros_like(word_NT))
  rows = dataclasses.replace(
    rows,
    group_B=word_NT[where_NT],
    test_B=probe.split(word_NT[where_NT], seed=seed),
  )
  return rows, {
    name: y_B
    for name, y_B in letters.items()
    if _different(rows, y_B) >= _FEWEST_WORDS
  }


def _letters(code: Code):
  """First letters of words that begin with a space, and which word is where.

  Train and test are different words, so that a probe that knows each word by
  heart finds no letter.
  """
  ids, word_NT = np.unique(code.tokens_NT, return_inverse=True)
  word_NT = word_NT.reshape(code.tokens_NT.shape)
  found = [_WORD.fullmatch(piece) for piece in code.tokenizer.pieces(ids)]
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


def _core(model, sae: release.Released, code: Code, settings: Settings):
  """The figures of `evaluate`, on held-out modules."""
  count = min(settings.core_sequences, int(code.test_N.sum()))
  held_out = np.flatnonzero(code.test_N)
  chosen = np.linspace(0, len(held_out) - 1, count).round().astype(int)
  chosen = held_out[chosen]
  keep_by_row = {
    row.tobytes(): keep
    for row, keep in zip(code.tokens_NT, code.keep_NT, strict=True)
  }
  text = batches.Text(
    code.tokens_NT[chosen],
    lambda tokens_NT: np.stack([keep_by_row[t.tobytes()] for t in tokens_NT]),
    settings.batch,
    np.broadcast_to(code.group_N[chosen, None], code.tokens_NT[chosen].shape),
    code.tokens_NT[~code.test_N],
  )
  scores = evaluate.evaluate(*model, [sae], text, settings.seed)[sae.name]
  scores['explained_variance'] = 1 - scores['fvu']['value']
  return scores
