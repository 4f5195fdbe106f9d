"""The SAEs of docs/comparison.py in the language model: losses and probes.

  .venv/bin/python docs/comparison_model.py --stage=losses
  .venv/bin/python docs/comparison_model.py --stage=probing

  losses   delta loss, KL, FVU and L0 on documents that no SAE has seen
  probing  AUC of sparse probes for 12 labels of Python code

After `--stage=score`; a second call measures what is not measured yet. One
line for each trainer and target L0: mean over seeds, least and most.
"""

from __future__ import annotations

import collections
import json

import comparison as comparison_lib
import numpy as np


class Kept:
  """Figures by SAE, in a file that grows."""

  def __init__(self, comparison, stage: str, trainers: str):
    self._path = comparison.folder / f'{stage}.json'
    self.figures = self._read()
    self.saes = {}  # name -> facts and parameters, of what is missing
    for facts, params in comparison_lib.chosen(comparison, trainers):
      name = comparison_lib.name_of(facts)
      if name not in self.figures:
        self.saes[name] = facts, params

  def _read(self) -> dict:
    return json.loads(self._path.read_text()) if self._path.exists() else {}

  def add(self, name: str, figures: dict) -> None:
    # Read again: two processes may measure different trainers.
    self.figures = self._read() | {name: self.saes[name][0] | figures}
    self._path.write_text(json.dumps(self.figures, indent=1) + '\n')

  def table(self, keys) -> None:
    """Prints a line for each trainer and target L0."""
    table = collections.defaultdict(list)
    for of_sae in self.figures.values():
      line = of_sae['target'], of_sae['trainer'], of_sae['variant']
      table[line].append(of_sae)
    for line, seeds in sorted(table.items()):
      cells = [
        comparison_lib.spread([seed[key]['value'] for seed in seeds])
        for key in keys
      ]
      print(f'| {line[0]} | {line[1]} {line[2]} | {len(seeds)} | '
            f'{" | ".join(cells)} |')  # fmt: skip


def losses(comparison, trainers: str, sequences: int) -> None:
  """By the passes of gemma_scope.evaluation, without its controls."""
  from gemma_scope import sites
  from gemma_scope.evaluation import centres, estimates, replacements
  from gemma_scope.language_model import weights
  from gemma_scope.sae import released

  kept = Kept(comparison, 'losses', trainers)
  if kept.saes:
    batches, watch = held_out(comparison, sequences)
    gemma, params = weights.load('gemma3-270m')
    model = centres.Model(gemma, params, None, watch)
    cards = {name: comparison.card(name) for name in kept.saes}
    wirings = {name: sites.wiring_of(card) for name, card in cards.items()}
    references = centres.measure(model, wirings, cards, batches)
    loads = released.on_demand([p for _, p in kept.saes.values()], None)
    queue = []
    for name, load in zip(kept.saes, loads, strict=True):
      rule, spares = references.rule_of[name]
      queue.append(
        replacements.Replacement(
          wirings[name], name, load, rule=rule, spares=spares
        )
      )
    replacements.measure(model, batches, references, queue)
    for replacement in queue:
      kept.add(replacement.name, estimates.fidelity(replacement.tally))
    print(
      f'{batches.clusters} {batches.clustered_by}, {batches.size} sequences'
    )
  kept.table(('l0', 'fvu_inliers', 'delta_loss', 'kl'))


def held_out(comparison, sequences: int):
  """The batches of held-out documents, and a watch that shows progress."""
  from gemma_scope.evaluation import batches as batches_lib
  from gemma_scope.runtime import progress as progress_lib
  from gemma_scope.text import prepare
  from gemma_scope.training import setup

  config = comparison.config({})
  tokenizer, store = prepare.open_text(config, comparison.out, print)
  text_NT = store.sequences(config.text.seq_len, 'eval')
  order = prepare.shuffled(range(len(text_NT)), config.seed)
  index = [order[i] for i in range(min(sequences, len(text_NT)))]
  text = batches_lib.Text(
    np.stack([text_NT[i] for i in index]),
    setup.special(tokenizer, store).keep,
    batch=8,
    documents_NT=text_NT.documents(index, tokenizer.eos_id),
    loss_every=4,
  )
  progress = progress_lib.Progress(
    len(index), config.text.seq_len, label='loss'
  )
  watch = batches_lib.Watch(lambda done, _: progress.update(round(done, 1), {}))
  return batches_lib.Batches(text, None), watch


def probing(comparison, trainers: str) -> None:
  """Sparse probes on the latents, on the same tokens of Python's library.

  Labels, ranking of latents and fits are those of the SAEBench suite; beside
  the SAEs, the coordinates of the activation itself.
  """
  from gemma_scope import sites
  from gemma_scope.evaluation.saebench import probe_inputs, suite
  from gemma_scope.language_model import weights
  from gemma_scope.text import tokenizers

  kept = Kept(comparison, 'probing', trainers)
  if kept.saes:
    settings = suite.Settings(train_modules=40, test_windows=8)
    tokenizer = tokenizers.Tokenizer(weights.tokenizer('gemma3-270m'))
    code = suite.read_code(tokenizer, settings)
    gemma, params = weights.load(
      'gemma3-270m', num_layers=comparison.site.layer + 1
    )
    wiring = sites.wiring_of(comparison.card('probed'))
    x_by_site = probe_inputs.activations(
      gemma, params, code.tokens_NT, wiring, settings.batch
    )
    x_BD = x_by_site[comparison.site][code.keep_NT]
    if 'activations' not in kept.figures:
      facts = {'trainer': 'activations', 'variant': '', 'target': 0}
      kept.saes['activations'] = facts, None
    for name, (_, params) in kept.saes.items():
      f_BF = x_BD if params is None else probe_inputs.latents(params, x_BD)
      kept.add(name, probes(f_BF, code))
      print(name, flush=True)
    count = int(code.keep_NT[code.test_N].sum())
    print(f'{len(x_BD) - count} tokens to fit, {count} held out')
  kept.table(('auc_1', 'auc_5'))


def probes(f_BF, code) -> dict:
  """Mean AUC over the labels of probes on the best 1 and 5 columns."""
  from gemma_scope.evaluation.saebench import probe

  keep_NT = code.keep_NT
  test_B = np.broadcast_to(code.test_N[:, None], keep_NT.shape)[keep_NT]
  group_B = np.broadcast_to(code.group_N[:, None], keep_NT.shape)[keep_NT]
  auc = {}
  fit_BF, test_BF = f_BF[~test_B], f_BF[test_B]
  for k in (1, 5):
    of_label = {}
    for label, y_NT in code.labels.items():
      y_B = y_NT[keep_NT]
      order = probe.ranked(fit_BF, y_B[~test_B])[:k]
      fitted = probe.logistic(fit_BF[:, order], y_B[~test_B])
      score_B = fitted(test_BF[:, order])
      scores = probe.scores(score_B, y_B[test_B], group_B[test_B])
      of_label[label] = scores['auc']['value']
    mean = float(np.mean(list(of_label.values())))
    auc[f'auc_{k}'] = {'value': mean, 'by_label': of_label}
  return auc


def main() -> None:
  flags = comparison_lib.parser(__doc__, ('losses', 'probing'))
  flags.add_argument('--sequences', type=int, default=32, help='of losses')
  flags.add_argument('--trainers', default='', help='empty: all')
  given = flags.parse_args()
  comparison = comparison_lib.Comparison(given.out, given.site, given.source)
  if given.stage == 'losses':
    losses(comparison, given.trainers, given.sequences)
  else:
    probing(comparison, given.trainers)


if __name__ == '__main__':
  main()
