"""A whole run in one folder: train -> evaluate -> release -> table, picture.

Each stage leaves its result in the run's folder and is skipped if the result is
there. The same command therefore continues a run that was stopped anywhere:

  checkpoints/      the training state
  evaluation.json   metrics of every SAE, with intervals and controls; `diffing`
                    has those of crosscoders of two models
  release/          the SAEs, for other tools
  frontier.png      sparsity against fidelity
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

import gemma_scope
from gemma_scope import config as config_lib
from gemma_scope import files, release, specs
from gemma_scope import mesh as mesh_lib
from gemma_scope.activations import synthetic
from gemma_scope.evaluation import batches, evaluate, recovery
from gemma_scope.language_model import weights
from gemma_scope.release import frontier, table
from gemma_scope.release.formats import model_names
from gemma_scope.runtime import checksums, cluster, opened, remote
from gemma_scope.runtime import interrupt as interrupt_lib
from gemma_scope.runtime import progress as progress_lib
from gemma_scope.text import prepare
from gemma_scope.training import auto_mesh, loop, setup


def run(
  config: ConfigDict,
  workdir: str | pathlib.Path,
  report: Callable[[str], None] = print,
) -> bool:
  """Runs the remaining stages; returns whether all are done.

  Args:
    config: a complete config, see configs/tiny.py.
    workdir: the run's folder, or its address in a bucket (gs://, s3://); it is
      made if it does not exist.
    report: called with lines of text.
  """
  if not cluster.first():
    report = _silent
  with remote.folder(workdir) as local:
    local.mkdir(parents=True, exist_ok=True)
    return _run(config, local, report)


def _run(
  config: ConfigDict, workdir: pathlib.Path, report: Callable[[str], None]
) -> bool:
  """`run`, in the folder itself or in the copy of a bucket's."""
  started = time.time()
  with (
    opened.exclusive(workdir, report) as lease,
    interrupt_lib.Interrupt() as interrupt,
  ):
    with cluster.first_goes_ahead():  # it holds the lease by now
      remote.fetch(workdir)
    loop.check_config(config, workdir)
    report(_where(workdir))
    if _exists(workdir / 'release'):
      report(f'{remote.shown(workdir)} is done; delete it to train again')
    else:
      if not _exists(workdir / 'config.json'):
        _check_memory(config)
        _check_disk(config, workdir)
      _check_text(config, workdir, report)
      # Last: a command that is refused leaves the folder free for another.
      loop.keep_config(config, workdir)
      result = loop.train(config, workdir, lease, interrupt, report)
      if not result.done:
        return False
      saes = result.saes(config)
      del result  # frees the optimiser's memory
      try:
        scores = {}
        if specs.second_model(config):
          report(
            'crosscoders of two models are measured by gemma-scope diffing'
          )
        elif config.evaluation.sequences:
          scores = evaluate_saes(
            config,
            workdir,
            saes,
            interrupt,
            workdir / 'evaluation.json',
            report,
          )
      except interrupt_lib.Interrupted:
        report('stopped in the evaluation; the same command continues')
        return False
      with cluster.first_goes_ahead():
        if cluster.first():
          write_release(workdir, saes, scores)
  if not cluster.first():
    return True
  rows = [
    (sae.card, sae.metrics) for sae in release.load_all(workdir / 'release')
  ]
  report(table.table(rows))
  if table.note(rows):
    report(table.note(rows))
  report(
    f'{len(rows)} SAEs, {rows[0][0]["tokens"]:,} tokens each, in '
    f'{progress_lib.duration(time.time() - started)}\n'
    f'release  {remote.shown(workdir / "release")}'
  )
  if (workdir / 'frontier.png').exists():
    report(f'picture  {remote.shown(workdir / "frontier.png")}')
  return True


def _where(workdir: pathlib.Path) -> str:
  """One line: version, processes, devices and folder, for a log."""
  devices = jax.devices()
  return (
    f'gemma_scope {gemma_scope.__version__}, {jax.process_count()} processes '
    f'with {len(devices)} devices ({devices[0].device_kind}), '
    f'{remote.shown(workdir)}'
  )


def _check_memory(config: ConfigDict) -> None:
  """Refuses SAEs whose training state does not fit on the devices."""
  mesh = auto_mesh.make(config)
  shards = mesh.shape['sae'] * mesh.shape['latent']
  device = mesh.local_devices[0]
  memory = (device.memory_stats() or {}).get('bytes_limit')
  if memory is None and device.platform == 'cpu':
    shards = 1  # all of this host's devices share one memory
    memory = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
  needed = _state_bytes(config)[0] // shards
  if memory is not None and needed > memory:
    raise config_lib.ConfigError(
      f'The training state of the {len(specs.members(config))} SAEs needs '
      f'{_size(needed)} on a device, and it has {_size(memory)}: train fewer '
      'or narrower SAEs, or spread them over more devices (mesh.sae, '
      'mesh.latent).'
    )


def _check_disk(config: ConfigDict, workdir: pathlib.Path) -> None:
  """Refuses a run whose checkpoints and release do not fit on the disk."""
  state, params = _state_bytes(config)
  # One more than are kept: the new one is written before the oldest goes.
  needed = (config.checkpoint.keep + 1) * state + params
  if remote.address(workdir):
    return  # the bucket is as large as it is paid for
  free_bytes = shutil.disk_usage(workdir).free
  if needed > free_bytes:
    raise config_lib.ConfigError(
      f'The run needs {_size(needed)} of disk ({config.checkpoint.keep + 1} '
      f'checkpoints of {_size(state)}, a release of {_size(params)}), and '
      f'{str(workdir)!r} has {_size(free_bytes)} free: make room, lower '
      'checkpoint.keep, or choose another folder.'
    )


def _state_bytes(config: ConfigDict) -> tuple[int, int]:
  """Bytes of the training state of all SAEs, and of their parameters."""
  stacks, _ = setup.make_stacks(config, setup.dimensions(config))
  states = [jax.eval_shape(stack.init, jax.random.key(0)) for stack in stacks]
  params = [state.params for state in states]
  state_bytes, params_bytes = (
    sum(
      math.prod(leaf.shape) * leaf.dtype.itemsize
      for leaf in jax.tree.leaves(tree)
    )
    for tree in (states, params)
  )
  return state_bytes, params_bytes


def _size(num_bytes: int) -> str:
  return f'{progress_lib.quantity(num_bytes)}B'


def _check_text(config: ConfigDict, workdir: pathlib.Path, report) -> None:
  """Refuses a text with too little held out, before days of training."""
  if not config.evaluation.sequences or _known(config):
    return
  tokens = workdir / 'tokens'
  remote.fetch(tokens)
  had_tokens = _exists(tokens)
  try:
    _, store = prepare.open_text(config, workdir, report)
    store.sequences(config.text.seq_len, 'eval')
  except ValueError:
    if cluster.first() and not had_tokens:
      remote.delete(tokens)  # of a text that is refused
    raise


def write_release(
  workdir: pathlib.Path,
  saes: Sequence[release.Released],
  scores: Mapping[str, Any],
) -> None:
  """Writes the run's release, and the plot of its frontier."""
  saes = [sae.measured(scores.get(sae.name)) for sae in saes]
  rows = [(sae.card, sae.metrics) for sae in saes if sae.metrics]
  if rows:
    frontier.frontier(workdir / 'frontier.png', rows)
  release.save(workdir / 'release', saes)


def evaluate_saes(
  config: ConfigDict,
  workdir: pathlib.Path,
  saes: Sequence[release.Released],
  interrupt: interrupt_lib.Interrupt,
  out: pathlib.Path,
  report: Callable[[str], None] = print,
) -> dict[str, Any]:
  """Evaluates SAEs on held-out text in one pass; writes metrics to `out`."""
  if _exists(out):
    return read_scores(out)
  cards = [sae.card for sae in saes]
  if note := model_names.note_of_others(cards, config.lm.name):
    report(note)
  if _known(config):
    report('scoring against the known features')
    scores = recovery.score(saes, config.activations.store, interrupt.check)
  else:
    scores = _on_held_out_text(config, workdir, saes, interrupt, report)
  if cluster.first():
    try:
      body = {'members': scores}
      files.write_json(out, body | {_SEAL: files.json_sha256(body)}, indent=1)
    except (
      OSError
    ) as error:  # hours of work: print the metrics if they cannot be written
      report(json.dumps({'members': scores}))
      raise OSError(
        f'{out} could not be written ({error}); the metrics are printed above.'
      ) from error
  return scores


_SEAL = 'members_sha256'  # version 0.3.0 wrote none


def read_scores(path: pathlib.Path) -> dict[str, Any]:
  """The metrics by SAE that `evaluate_saes` wrote.

  Raises:
    files.Refused: the file is damaged.
  """
  body = files.read_json(path)
  seal = body.pop(_SEAL, None)
  if set(body) != {'members'} or seal not in (None, files.json_sha256(body)):
    raise files.Refused(
      f'{files.show(path)} is damaged: delete it, and evaluate again.'
    )
  return body['members']


def _exists(path: pathlib.Path) -> bool:
  """Whether the path exists, as seen by the first process."""
  return checksums.from_all(path.exists())[0]


def _silent(line: str) -> None:
  """The `report` of all processes but the first: prints nothing."""


def _known(config: ConfigDict) -> bool:
  """Whether the run's activations are synthetic."""
  return config.lm.name == synthetic.MODEL


def _on_held_out_text(config, workdir, saes, interrupt, report):
  report('evaluating on held-out text')
  tokenizer, store = prepare.open_text(config, workdir, report)
  gemma, params = weights.load(
    config.lm.name,
    config.lm.checkpoint,
    dtype=config.lm.dtype,
    mesh=mesh_lib.make(config.mesh),
  )
  special = setup.special(tokenizer, store)
  text = held_out(config, store, tokenizer.eos_id, special.keep)
  count = len(text.sequences_NT)
  progress = progress_lib.Progress(count, config.text.seq_len, label='evaluate')
  progress.say('measuring means and variances of the held-out text')
  watch = batches.Watch(poll=interrupt.check, says=progress.say)
  if cluster.first():
    watch = dataclasses.replace(
      watch, progress=lambda done, _: progress.update(round(done, 1))
    )
  try:
    return evaluate.evaluate(gemma, params, saes, text, config.seed, watch)
  finally:
    progress.close()


def held_out(config, store, eos_id: int, keep) -> batches.Text:
  """Held-out sequences with their documents, and some to fit controls on."""

  def rows(split, count):
    sequences = store.sequences(config.text.seq_len, split)
    order = prepare.shuffled(range(len(sequences)), config.seed)
    index = [order[i] for i in range(min(count, len(sequences)))]
    return sequences, index, np.stack([sequences[i] for i in index])

  sequences, index, tokens_NT = rows('eval', config.evaluation.sequences)
  # A conversation is a row of its own.
  documents_NT = None if store.is_chat else sequences.documents(index, eos_id)
  *_, fit_NT = rows('train', batches.fit_sequences(config.text.seq_len))
  settings = config.evaluation
  return batches.Text(
    tokens_NT, keep, settings.batch, documents_NT, fit_NT, settings.loss_every
  )
