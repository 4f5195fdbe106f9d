"""The subcommands of launch/microscope.py, one function each.

  build    writes the indexes and dashboards
  pages    rewrites the dashboards with the current labels
  serve    serves the dashboards with a live view
  why      attributes a logit to latents
  steer    generates text with latents changed
  probe    finds the latents that detect a concept
  effects  measures the exact effect of every latent, with controls
  explain  labels latents and scores the labels
  suite    runs the SAEBench metrics
  export   writes files for Neuronpedia

Each function takes a session and the flags, and raises a ValueError with one
sentence if an input is wrong.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import pathlib
from typing import Any

import numpy as np

from gemma_scope import files
from gemma_scope.evaluation.saebench import (
  probe,
  probe_inputs,
  probe_report,
  suite,
)
from gemma_scope.language_model import generate, weights
from gemma_scope.microscope import graphs, inputs
from gemma_scope.microscope.autointerp import labels, llm
from gemma_scope.microscope.circuits import (
  attribution,
  budget,
  card_plan,
  card_results,
  effects,
  graph_files,
  intervene,
  readout,
  steering,
)
from gemma_scope.microscope.dashboard import api, neuronpedia, server
from gemma_scope.microscope.inputs import Options
from gemma_scope.microscope.session import Session, spoken
from gemma_scope.runtime import interrupt as interrupt_lib
from gemma_scope.runtime import progress

Result = dict[str, Any]  # plain JSON, printed with --json


def build(session: Session, options: Options) -> Result:
  """Indexes all SAEs in one pass, writes the pages and prints their URL."""
  with interrupt_lib.Interrupt() as interrupt:
    first_page = session.build(
      options.sequences,
      options.batch,
      interrupt.check,
      options.labels == 'rule',
      options.outliers,
    )
  if options.effects:
    return measure_effects(session, dataclasses.replace(options, all=True))
  return _address(session, first_page)


def pages(session: Session, options: Options) -> Result:
  """Rewrites the pages with the current labels."""
  del options
  return _address(session, session.pages())


def _address(session: Session, first_page: pathlib.Path) -> Result:
  address = first_page.resolve().as_uri()
  session.report(f'microscope  {address}')
  return {'pages': address}


def serve(session: Session, options: Options) -> None:
  """Serves the pages, with a live view, on this machine."""
  session.check_built()
  saes = [session.indexed(sae) for sae in session.saes]
  questions = api.Questions(
    session.model, session.tokenizer, saes, session.mesh
  )
  server.serve(questions, session.out / 'pages', options.port, session.report)


def why(session: Session, options: Options) -> Result:
  """Attributes a logit to latents; transcoders and CLTs also get a graph."""
  ids = inputs.ids(session, options)
  sae, tokenizer = session.find(options.sae), session.tokenizer
  traced = sae.wiring.type in ('transcoder', 'clt')
  for flag in ('head', 'target', 'supernodes'):
    if getattr(options, flag) and not traced:
      raise ValueError(
        f'--{flag} needs transcoders or a CLT; {sae.name} is neither.'
      )
  score_position = inputs.head(options.head, len(ids)) if options.head else None
  if traced:
    wanted = graphs.Wanted(score_position, options.target, options.supernodes)
    through = graphs.opened(session, sae, wanted)
  subject = session.subject(sae)
  # Refuses a text that is too long before the first forward pass.
  budget.rows(budget.gradient, subject.gemma, len(ids), 1)
  logit = inputs.logit(session, options, ids)
  pieces = readout.logit_pieces(tokenizer, logit)
  session.report(f'{sae.name}: {spoken(pieces)} after {options.text[-60:]!r}')
  attributed = attribution.attribute(subject, ids, logit)
  session.report(attribution.report(attributed, session.named(sae)))
  result = {'why': {'text': options.text, 'logit': pieces, **attributed}}
  if traced:
    prompt = graph_files.Prompt(options.text, ids, tokenizer.pieces(ids), logit)
    result |= graphs.trace(session, through, prompt)
  for name, content in result.items():
    _keep(session, name, content)
  return result


def steer(session: Session, options: Options) -> Result:
  """Generates text with and without changes.

  With a single change, also reports its effect at several strengths.
  """
  if not options.change:
    raise ValueError(
      '--change is required: edits as LATENT:KIND:STRENGTH, such as 17:add:0.5 '
      'or 17:ablate, separated by commas. '
      f'The kinds are {", ".join(intervene.KINDS[1:])}.'
    )
  changes = [inputs.change(text) for text in options.change]
  subject = session.subject(session.find(options.sae))
  sampling = generate.Sampling(
    options.tokens,
    temperature=options.temperature,
    seed=options.seed,
    stop=[session.tokenizer.eos_id],
    forbid=[session.tokenizer.bos_id],
  )
  if options.prompts:
    return _steer_many(session, options, changes, subject, sampling)
  ids = inputs.ids(session, options)
  continuations = effects.steer(subject, ids, changes, sampling)
  for name, continuation in continuations.items():
    kl = (
      f', KL {continuation["kl"]:.3f} nats per token'
      if continuation.get('kl')
      else ''
    )
    session.report(
      f'{name}: perplexity under the unchanged model '
      f'{continuation["perplexity"]:.2f}{kl}'
    )
    continuation['text'] = session.tokenizer.decode(continuation['ids'])
    session.report(options.text + continuation['text'])
  if len(changes) > 1:
    return continuations
  logit = inputs.logit(session, options, ids)
  pieces = readout.logit_pieces(session.tokenizer, logit)
  strengths = (1.0,)
  if changes[0].kind in ('add', 'clamp'):
    strengths = effects.STRENGTHS
  curve = effects.dose_response(
    subject, ids, changes[0], strengths=strengths, logit=logit
  )
  session.report(
    f'Effect on the logit {spoken(pieces)} after the last token, next to '
    'controls of equal norm'
  )
  session.report(effects.curve_table(curve))
  return {**continuations, 'curve': curve}


def _steer_many(session, options: Options, changes, subject, sampling):
  """Steers the prompts of a file at several strengths; writes a table."""
  if len(changes) > 1:
    raise ValueError('--prompts steers with one change; found several.')
  texts = probe_inputs.read_texts(options.prompts)
  prompts = [readout.with_bos(session.tokenizer, text) for text in texts]
  lines = steering.sweep(subject, prompts, changes[0], sampling)
  rows = steering.summary(lines)
  session.report(steering.table(rows))
  decode = session.tokenizer.decode
  lines = [
    {**line, 'prompt': texts[line['prompt']], 'reply': decode(line['ids'])}
    for line in lines
  ]
  result = {'summary': rows, 'replies': lines}
  _keep(session, 'steer', result)
  path = session.out / 'steer.csv'
  files.write_text(path, steering.as_csv(rows))
  session.report(f'written  {path}')
  return result


def _keep(session: Session, name: str, result: dict) -> None:
  path = session.out / f'{name}.json'
  files.write_json(path, result, indent=1)
  session.report(f'written  {path}')


def find_concept(session: Session, options: Options) -> Result:
  """Probes for a concept in labelled prompts, with controls."""
  if not options.prompts:
    raise ValueError(
      '--prompts is required: a JSONL or CSV file with "text" and "label" '
      '(true or false) on each line.'
    )
  sae = session.find(options.sae)
  prompts = probe_inputs.read_prompts(options.prompts)
  probe_rows = probe_inputs.of_prompts(
    session.model,
    sae,
    prompts,
    session.tokenizer,
    options.pooling,
    options.batch,
  )
  probed = probe.run(probe_rows, prompts.label_N)
  session.report(probe_report.report(probed))
  best = probe.best(probed, 'latents', 5) or probe.best(probed, 'latents', 1)
  if best:
    name = session.named(sae)
    for feature, weight in zip(best['latents'], best['weights'], strict=True):
      session.report(f'  latent {feature:>7}  {weight:+.3f}  {name(feature)}')
  session.out.mkdir(parents=True, exist_ok=True)
  _keep(session, 'probe', probed)
  _keep_direction(session, sae, probe_rows, prompts.label_N)
  return probed | {'conclusion': probe_report.conclusion(probed)}


def _keep_direction(session: Session, sae, rows: probe.Rows, label_N) -> None:
  """Writes the difference of means, as --target and other tools read it."""
  if sae.wiring.several:
    return
  train = ~rows.test_B
  direction = probe.difference_of_means(rows.x_BD[train], label_N[train])
  path = session.out / 'probe_direction.npy'
  with files.whole_file(path) as file:
    np.save(file, direction.w_D.astype(np.float32))
  session.report(f'written  {path}, a direction at {sae.wiring.sites[0]}')


def measure_effects(session: Session, options: Options) -> Result:
  """Measures the exact effect of every latent, and rewrites the pages."""
  session.check_built()
  saes = session.saes if options.all else [session.find(options.sae)]
  settings = card_plan.Settings(
    options.contexts, options.scored, sample=options.sample
  )
  summaries = {}
  with interrupt_lib.Interrupt() as interrupt:
    watch = card_results.Watch(interrupt.check, session.report)
    for sae in saes:
      if options.all and sae.wiring.several:
        session.report(f'{sae.name}: skipped, as it covers several layers')
        continue
      session.report(sae.name)
      index, path = session.index(sae), session.effects_path(sae)
      subject = session.subject(sae)
      measured = card_results.measure(subject, index, path, settings, watch)
      results = card_results.results(measured, index, options.alpha)
      summaries[sae.name] = results['summary']
      session.report(card_results.table(results['summary']))
      path = card_results.write(path, results, index, settings)
      session.report(f'written  {path}')
  return {'effects': summaries} | pages(session, options)


def label(session: Session, options: Options) -> Result:
  """Labels latents by a language model or by rules and rewrites the pages."""
  session.check_built()
  sae = session.find(options.sae)
  index = session.index(sae)
  features = inputs.features(options.features, index)
  model = _labeller(session, options)
  rows = labels.explain(index, features, session.tokenizer.pieces, model)
  path = session.keep_labels(sae, rows)
  session.report(labels.table(rows))
  session.report(f'written  {path}')
  return labels.summary(rows) | pages(session, options)


def _labeller(session: Session, options: Options) -> llm.Kept | None:
  """The language model that labels; None for rules."""
  if options.endpoint:
    if not options.labeller:
      raise ValueError(
        "--labeller is required with --endpoint: the endpoint's model name."
      )
    model = llm.Endpoint(options.labeller, options.endpoint)
  elif options.labeller == 'local':
    name = session.config.lm.name
    model = llm.LocalGemma(name, *session.model, session.tokenizer)
  elif options.labeller:
    raise ValueError('--labeller must be "local" unless --endpoint is given.')
  else:
    return None
  answers = session.out / 'answers.jsonl'
  return llm.Kept(model, answers, options.most_questions)


def score(session: Session, options: Options) -> Result:
  """Runs the SAEBench metrics, with labels derived from Python source code."""
  saes = [session.find(options.sae)] if options.sae else session.saes
  out = session.out / 'suite'
  paths = suite.run(
    session.model, saes, session.tokenizer, out, report=session.report
  )
  session.report(suite.table(paths))
  return {
    str(path): json.loads(pathlib.Path(path).read_text()) for path in paths
  }


def export(session: Session, options: Options) -> Result:
  """Writes Neuronpedia's bulk-import files from the indexes."""
  c = session.config.lm
  size = weights.read_config(c.name, c.checkpoint)
  naming = neuronpedia.Naming(
    options.model_id or session.config.lm.name,
    options.title,
    options.creator,
    size.num_layers,
    size.d_ff,
    datetime.date.today().isoformat(),
  )
  ids = {
    sae.name: neuronpedia.source_id(session.index(sae), naming.release)
    for sae in progress.track(session.saes, 'indexes')
  }
  neuronpedia.check_ids(ids)
  result = {}
  for sae in session.saes:
    folder = session.out / 'neuronpedia' / ids[sae.name]
    index, named = session.index(sae), session.labels(sae)
    count = neuronpedia.write(
      folder, index, session.tokenizer.pieces, naming, named
    )
    session.report(f'{folder}: {count:,} features')
    result[str(folder)] = {'features': count}
  return result


COMMANDS = {
  'build': build,
  'pages': pages,
  'serve': serve,
  'why': why,
  'steer': steer,
  'probe': find_concept,
  'effects': measure_effects,
  'explain': label,
  'suite': score,
  'export': export,
}


def run(name: str, session: Session, options: Options) -> None:
  """Runs one command.

  Raises:
    ValueError: an input is missing or wrong.
    interrupt.Interrupted: build was stopped and saved its progress.
  """
  if name not in COMMANDS:
    raise ValueError(
      f'Unknown command {name!r}; the commands are {", ".join(COMMANDS)}.'
    )
  if not options.json:
    COMMANDS[name](session, options)
    return
  report, session.report = session.report, lambda line: None
  try:
    result = COMMANDS[name](session, options)
  finally:
    session.report = report
  report(json.dumps(result))
