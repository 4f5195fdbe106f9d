"""The SAEBench metrics that can be computed with free labels.

  sparse probing   token classes and places in the code      (probe)
  core             L0, loss and KL recovered, explained variance, cosine, norms,
                   dead and dense latents                    (evaluate)
  absorption       token classes; the first letters of words (absorption)
  SCR, TPP         pairs of labels; all token classes        (scr_tpp); both are
                   disputed as measures of SAEs (arXiv 2605.18229)

Every score is reported with the same score of a random SAE of equal L0; core
with the strongest of three controls, and probes with probes on raw activations.
SAEBench uses labelled English texts. Here the labels come from the source code
of Python's standard library (python_labels), which works for any model and
tokenizer. Probes are trained on modules that the language model and the SAEs
may have been trained on, and scored on held-out modules.

Each SAE gets a JSON file with SAEBench's outline (eval_config and
eval_result_metrics). Existing files are not measured again; a file with other
settings raises an error.
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

# Target and spurious label; all four combinations are common in code.
PAIRS = (
  ('string', 'call_argument'),
  ('operator', 'call_argument'),
  ('name', 'in_class'),
)
_WORD = re.compile('▁([A-Za-z])[A-Za-z]+')
_FEWEST_WORDS = 12  # different held-out words that begin with a letter


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of the suite; they are written into every result."""

  length: int = 128  # tokens in a sequence, BOS included
  train_modules: int = 60
  train_windows: int = 4  # sequences per module
  test_windows: int = 16
  core_sequences: int = 64
  batch: int = 16
  seed: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Code:
  """Labelled sequences of the standard library; test_N are held out."""

  tokens_NT: np.ndarray
  keep_NT: np.ndarray
  labels: dict[str, np.ndarray]
  group_N: np.ndarray
  test_N: np.ndarray
  tokenizer: tokenizers.Tokenizer


def read_code(tokenizer: tokenizers.Tokenizer, settings: Settings) -> Code:
  """Reads modules of the running Python, some of them held out."""
  # The source gives the code of all modules first, then prose.
  modules = list(
    itertools.takewhile(
      lambda document: document.name.endswith('.py'),
      sources.documents('python'),
    )
  )
  train_modules, held_out = (
    [m for m in modules if m.split == split] for split in ('train', 'eval')
  )
  rng = np.random.default_rng(settings.seed)
  chosen = sorted(rng.permutation(len(train_modules))[: settings.train_modules])
  windows = functools.partial(
    python_labels.windows, tokenizer=tokenizer, length=settings.length
  )
  documents = [train_modules[i] for i in chosen]
  train = windows(documents, most=settings.train_windows)
  test = windows(held_out, most=settings.test_windows)
  joined = lambda *arrays: np.concatenate(arrays)
  return Code(
    joined(train.tokens_NT, test.tokens_NT),
    joined(train.keep_NT, test.keep_NT),
    {key: joined(train.labels[key], test.labels[key]) for key in train.labels},
    joined(train.group_N, test.group_N + train.group_N.max() + 1),
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
  """Measures every SAE that has no file in `out` yet.

  Args:
    model: the language model and its parameters.
    saes: the SAEs.
    tokenizer: the language model's tokenizer.
    out: the folder for the files.
    settings: what to measure.
    report: called with one line per SAE; progress goes to stderr.

  Returns:
    The path of each SAE's file.

  Raises:
    ValueError: a file in `out` has other settings or is of another SAE with the
      same name; or an SAE does not fit the model.
  """
  out = pathlib.Path(out)
  out.mkdir(parents=True, exist_ok=True)
  code, paths = None, []
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
      if files.read_json(path).get('eval_config') != config:
        raise ValueError(
          f'{path} has other settings or is of another SAE of this name; '
          'choose another folder.'
        )
      report(f'{sae.name}: already measured')
    else:
      report(f'{sae.name}: measuring')
      code = code or read_code(tokenizer, settings)
      wiring = {key: sae.card[key] for key in ('type', 'sites', 'targets')}
      result = {
        'eval_type_id': 'gemma_scope_suite',
        'eval_config': config,
        'sae': {'name': sae.name} | wiring,
        'eval_result_metrics': of_one(model, sae, code, settings),
      }
      files.write_json(path, result, indent=1)
    paths.append(path)
  return paths


DISPUTED = (
  'TPP and SCR are disputed as measures of SAE quality (arXiv 2605.18229); '
  'read sparse probing first.'
)


def table(paths: Sequence[str | os.PathLike[str]]) -> str:
  """A Markdown table with one row per SAE: score (score of the random SAE).

  AUCs are means over all labels. `above random` counts the labels for which the
  interval of 5 latents lies above that of the random SAE's 5 latents. Explained
  variance and KL score are followed by those of the strongest control.
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
    metrics = result['eval_result_metrics']
    core, probes = metrics['core'], metrics['sparse_probing'].values()
    fitted = core['control']
    sae, control = metrics.get('sae'), metrics.get('random_sae')

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
      f'{_cell(core["kl_score"])} ({_cell(_kl_score(fitted, core))})',
      f'{core["explained_variance"]:.3f} ({1 - fitted["fvu"]["value"]:.3f})',
      *(
        f'{_cell(sae and score(sae))} ({_cell(control and score(control))})'
        for score in _OF_DECODER
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


def _at(removed, count: int = 10) -> float | None:
  key = 'latents', count
  (score,) = (r['score'] for r in removed if (r['on'], r['count']) == key)
  return score


def _regained(scores) -> float | None:
  """SCR: the mean over pairs of labels with a score."""
  scored = [_at(pair['removed']) for pair in scores['scr'].values()]
  scored = [score for score in scored if score is not None]
  return float(np.mean(scored)) if scored else None


# The last columns of the table.
_OF_DECODER = (
  lambda scores: scores['absorption']['fraction'],
  lambda scores: scores['absorption']['full'],
  lambda scores: _at(scores['tpp']['removed']),
  _regained,
)


class _Steps:
  """Progress over the parts of one SAE's suite."""

  def __init__(self, name: str, total: int):
    self._bar = progress_lib.Progress(total, label=f'suite {name}')
    self._done = 0

  def next(self, name: str) -> None:
    """Marks the previous part as done and shows the name of the next."""
    self._bar.update(self._done, {'now': name})
    self._done += 1

  def close(self) -> None:
    self._bar.close()


def of_one(
  model: tuple[lm.Gemma, lm.Params],
  sae: release.Released,
  code: Code,
  settings: Settings,
) -> dict[str, Any]:
  """All scores of one SAE, as a dictionary for JSON."""
  # The other scores compare decoders with probes on the SAE's input.
  reads_decoder = not sae.wiring.several and sae.card['type'] == 'sae'
  steps = _Steps(sae.name, 3 + len(code.labels) + 8 * reads_decoder)
  try:
    steps.next('activations')
    params, wiring = sae.load(), sae.wiring
    x_by_site = probe_inputs.activations(
      *model, code.tokens_NT, wiring, settings.batch
    )
    steps.next('control')
    random_sae = probe_inputs.control(
      x_by_site, code.keep_NT, wiring, params, settings.seed
    )
    pair = probe_inputs.Pair(wiring, params, random_sae)
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
      for name, decoder_params in (('sae', params), ('random_sae', random_sae)):
        scores[name] = _of_decoder(
          decoder_params, name, (tokens, labels), words, steps, settings.seed
        )
  finally:
    steps.close()
  return scores


def _of_decoder(params, name: str, tokens, words, steps: _Steps, seed: int):
  """Absorption, TPP and SCR of an SAE or of its control."""
  (rows, labels), (word_rows, letters) = tokens, words
  if name == 'random_sae':
    rows, word_rows = (
      dataclasses.replace(r, f_BF=r.control_BF) for r in (rows, word_rows)
    )
  classes = {label: labels[label] for label in python_labels.CLASSES}
  scores = {}
  steps.next(f'absorption of {name}')
  scores['absorption'] = _absorption(rows, params, classes)
  steps.next(f'absorption of first letters of {name}')
  scores['absorption_first_letter'] = _absorption(word_rows, params, letters)
  steps.next(f'TPP of {name}')
  scores['tpp'] = scr_tpp.tpp(rows, params, classes, seed=seed)
  steps.next(f'SCR of {name}')
  scores['scr'] = {
    f'{target}|{spurious}': scr_tpp.scr(
      rows, params, labels[target], labels[spurious], seed=seed
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
  """Rows of words, split by word, and the labels of frequent first letters."""
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
  """First letters of words that begin with a space, and each token's word.

  Train and test rows are of different words, so that a probe cannot score by
  memorising words.
  """
  ids, word_NT = np.unique(code.tokens_NT, return_inverse=True)
  word_NT = word_NT.reshape(code.tokens_NT.shape)
  words = [_WORD.fullmatch(piece) for piece in code.tokenizer.pieces(ids)]
  letter_V = np.array([word[1].lower() if word else '' for word in words])
  letter_NT = np.where(code.keep_NT, letter_V[word_NT], '')
  where_NT = letter_NT != ''
  labels = {
    letter: letter_NT[where_NT] == letter
    for letter in sorted(set(letter_V) - {''})
  }
  return labels, where_NT, word_NT


def _different(rows: probe.Rows, y_B) -> int:
  """The number of different held-out words with the label."""
  return len(np.unique(rows.group_B[y_B & rows.test_B]))


def _core(model, sae: release.Released, code: Code, settings: Settings):
  """The metrics of `evaluate`, on held-out modules."""
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
