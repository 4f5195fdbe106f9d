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
import json

import numpy as np

from gemma_scope import files, sites
from gemma_scope.evaluation.saebench import probe, probe_inputs, suite
from gemma_scope.language_model import generate
from gemma_scope.microscope.autointerp import labels, llm
from gemma_scope.microscope.circuits import (
  attribution,
  attribution_graph,
  card_plan,
  card_results,
  effects,
  intervene,
  readout,
)
from gemma_scope.microscope.dashboard import api, neuronpedia, server
from gemma_scope.microscope.session import Session, spoken
from gemma_scope.release import Released
from gemma_scope.runtime import interrupt as interrupt_lib
from gemma_scope.runtime import progress


@dataclasses.dataclass(frozen=True)
class Options:
  """The flags of launch/microscope.py; each command reads some of them."""

  sae: str = ''
  sequences: int = 1024
  batch: int = 32
  labels: str = 'rule'
  outliers: bool = False
  port: int = 8642
  text: str = ''
  logit: str = ''
  change: tuple[str, ...] = ()
  tokens: int = 48
  temperature: float = 0.5
  seed: int = 0
  prompts: str = ''
  pooling: str = 'last'
  features: str = '200'
  endpoint: str = ''
  labeller: str = ''
  most_questions: int = 10_000
  model_id: str = ''
  title: str = 'gemma-scope'
  creator: str = ''
  json: bool = False
  all: bool = False
  effects: bool = False
  contexts: int = 4
  scored: int = 3
  alpha: float = card_results.ALPHA


def build(session: Session, options: Options) -> None:
  """Indexes all SAEs in one pass, writes the pages and prints their URL."""
  with interrupt_lib.Interrupt() as interrupt:
    first = session.build(
      options.sequences,
      options.batch,
      interrupt.check,
      options.labels == 'rule',
      options.outliers,
    )
  if options.effects:
    measure_effects(session, dataclasses.replace(options, all=True))
    return
  session.report(f'microscope  {first.resolve().as_uri()}')


def pages(session: Session, options: Options) -> None:
  """Rewrites the pages with the current labels."""
  del options
  session.report(f'microscope  {session.pages().resolve().as_uri()}')


def serve(session: Session, options: Options) -> None:
  """Serves the pages, with a live view, on this machine."""
  session.check_built()
  saes = [session.indexed(sae) for sae in session.saes]
  questions = api.Questions(
    session.model, session.tokenizer, saes, session.mesh
  )
  server.serve(questions, session.out / 'pages', options.port, session.report)


def _ids(session: Session, options: Options) -> list[int]:
  if not options.text:
    raise ValueError('--text is required: the prompt to explain.')
  return readout.with_bos(session.tokenizer, options.text)


def why(session: Session, options: Options) -> None:
  """Attributes a logit to latents; transcoders and CLTs also get a graph."""
  ids = _ids(session, options)
  sae, tokenizer = session.find(options.sae), session.tokenizer
  subject = session.subject(sae)
  logit = _logit(session, options, ids)
  pieces = readout.logit_pieces(tokenizer, logit)
  session.report(f'{sae.name}: {spoken(pieces)} after {options.text[-60:]!r}')
  found = attribution.attribute(subject, ids, logit)
  session.report(attribution.report(found, session.named(sae)))
  _keep(session, 'why', {'text': options.text, 'logit': pieces, **found})
  if sites.wiring_of(sae.card).type in ('transcoder', 'clt'):
    together = _together(session, sae)
    traced = attribution_graph.trace(
      [session.subject(one) for one in together], ids, logit
    )
    names = [session.named(one) for one in together]
    session.report(
      attribution_graph.report(
        traced, tokenizer.pieces(ids), lambda m, feature: names[m](feature)
      )
    )
    _keep(session, 'graph', attribution_graph.plain(traced))


def steer(session: Session, options: Options) -> None:
  """Generates text with and without changes.

  With a single change, also reports its effect at several strengths.
  """
  ids = _ids(session, options)
  if not options.change:
    raise ValueError(
      '--change is required: edits as LATENT:KIND:STRENGTH, such as 17:add:0.5 '
      'or 17:ablate, separated by commas. '
      f'The kinds are {", ".join(intervene.KINDS[1:])}.'
    )
  changes = [_change(text) for text in options.change]
  subject = session.subject(session.find(options.sae))
  sampling = generate.Sampling(
    options.tokens,
    temperature=options.temperature,
    seed=options.seed,
    stop=[session.tokenizer.eos_id],
    forbid=[session.tokenizer.bos_id],
  )
  found = effects.steer(subject, ids, changes, sampling)
  for name, one in found.items():
    kl = f', KL {one["kl"]:.3f} nats per token' if one.get('kl') else ''
    session.report(
      f'{name}: perplexity under the unchanged model '
      f'{one["perplexity"]:.2f}{kl}'
    )
    session.report(options.text + session.tokenizer.decode(one['ids']))
  if len(changes) > 1:
    return
  logit = _logit(session, options, ids)
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


def _change(text: str) -> intervene.Change:
  feature, _, rest = text.partition(':')
  kind, _, strength = rest.partition(':')
  try:
    return intervene.Change(
      int(feature), kind or 'ablate', float(strength or 1)
    )
  except ValueError:
    raise ValueError(
      f'--change={text!r} must be LATENT:KIND:STRENGTH, such as 17:add:0.5.'
    ) from None


def _logit(session: Session, options: Options, ids) -> readout.Logit:
  """The tokens of --logit=a,b; by default the two likeliest next tokens."""
  if not options.logit:
    return readout.likeliest(*session.model, ids)
  words = options.logit.split(',')  # spaces belong to the tokens
  if len(words) > 2:
    raise ValueError(
      '--logit must be one token, or two tokens separated by a comma.'
    )
  found = [readout.one_token(session.tokenizer, word) for word in words]
  return readout.different(found[0], found[1] if len(found) > 1 else None)


def _together(session: Session, sae: Released) -> list[Released]:
  """The SAEs of one graph: a CLT, or one transcoder for each layer."""
  every = [session.indexed(one) for one in session.saes]
  first = session.saes.index(sae)
  return [session.saes[i] for i in readout.together(every, first)]


def _keep(session: Session, name: str, found: dict) -> None:
  path = session.out / f'{name}.json'
  files.write_json(path, found, indent=1)
  session.report(f'written  {path}')


def find_concept(session: Session, options: Options) -> None:
  """Probes for a concept in labelled prompts, with controls."""
  if not options.prompts:
    raise ValueError(
      '--prompts is required: a JSONL file with "text" and "label" (true or '
      'false) on each line.'
    )
  sae = session.find(options.sae)
  prompts = probe_inputs.read_prompts(options.prompts)
  found_rows = probe_inputs.of_prompts(
    session.model, sae, prompts,
    session.tokenizer, options.pooling, options.batch,
  )  # fmt: skip
  found = probe.run(found_rows, prompts.label_N)
  session.report(probe.report(found))
  best = probe.best(found, 'latents', 5) or probe.best(found, 'latents', 1)
  if best:
    name = session.named(sae)
    for feature, weight in zip(best['latents'], best['weights'], strict=True):
      session.report(f'  latent {feature:>7}  {weight:+.3f}  {name(feature)}')
  session.out.mkdir(parents=True, exist_ok=True)
  _keep(session, 'probe', found)


def measure_effects(session: Session, options: Options) -> None:
  """Measures the exact effect of every latent, and rewrites the pages."""
  session.check_built()
  saes = session.saes if options.all else [session.find(options.sae)]
  settings = card_plan.Settings(options.contexts, options.scored)
  summaries = {}
  with interrupt_lib.Interrupt() as interrupt:
    for sae in saes:
      if options.all and sae.wiring.several:
        session.report(f'{sae.name}: skipped, as it covers several layers')
        continue
      session.report(sae.name)
      index, path = session.index(sae), session.effects_path(sae)
      measured = card_results.measure(
        session.subject(sae), index, path, settings,
        card_results.Watch(interrupt.check, session.report),
      )  # fmt: skip
      found = card_results.results(measured, index, options.alpha)
      summaries[sae.name] = found['summary']
      if not options.json:
        session.report(card_results.table(found['summary']))
      path = card_results.write(path, found, index, settings)
      session.report(f'written  {path}')
  if options.json:
    session.report(json.dumps(summaries))
  pages(session, options)


def label(session: Session, options: Options) -> None:
  """Labels latents by a language model or by rules and rewrites the pages."""
  session.check_built()
  sae = session.find(options.sae)
  one = session.index(sae)
  features = _features(options.features, one)
  model = None
  if options.endpoint:
    if not options.labeller:
      raise ValueError(
        "--labeller is required with --endpoint: the endpoint's model name."
      )
    model = llm.Kept(
      llm.Endpoint(options.labeller, options.endpoint),
      session.out / 'answers.jsonl', options.most_questions,
    )  # fmt: skip
  elif options.labeller == 'local':
    model = llm.Kept(
      llm.LocalGemma(
        session.config.lm.name, *session.model, session.tokenizer
      ),
      session.out / 'answers.jsonl', options.most_questions,
    )  # fmt: skip
  elif options.labeller:
    raise ValueError('--labeller must be "local" unless --endpoint is given.')
  found = labels.explain(one, features, session.tokenizer.pieces, model)
  path = session.keep_labels(sae, found)
  if options.json:
    session.report(json.dumps(labels.summary(found)))
  else:
    session.report(labels.table(found))
  session.report(f'written  {path}')
  pages(session, options)


def _features(given: str, one) -> list[int]:
  """Indices from 'all', '200' (the 200 most frequent) or '3,17' or '3,'."""
  alive = np.flatnonzero(one.fired_F)
  order = alive[np.argsort(-one.fired_F[alive], kind='stable')]
  if given == 'all':
    return sorted(map(int, alive))
  parts = [part for part in given.split(',') if part.strip()]
  if not parts or not all(part.strip().isdigit() for part in parts):
    raise ValueError(
      '--features must be all, a number N (the N most frequent), or indices '
      f'separated by commas, such as 3,17; found {given!r}.'
    )
  numbers = list(map(int, parts))
  if len(numbers) == 1 and not given.endswith(','):
    return sorted(map(int, order[: numbers[0]]))
  wrong = [i for i in numbers if i >= len(one.max_F)]
  if wrong:
    raise ValueError(
      f'--features: there is no latent {wrong[0]}; the SAE has '
      f'{len(one.max_F):,}.'
    )
  return numbers


def score(session: Session, options: Options) -> None:
  """Runs the SAEBench metrics, with labels derived from Python source code."""
  saes = [session.find(options.sae)] if options.sae else session.saes
  paths = suite.run(
    session.model, saes,
    session.tokenizer, session.out / 'suite', report=session.report,
  )  # fmt: skip
  session.report(suite.table(paths))


def export(session: Session, options: Options) -> None:
  """Writes Neuronpedia's bulk-import files from the indexes."""
  naming = neuronpedia.Naming(
    options.model_id or session.config.lm.name, options.title, options.creator
  )
  ids = {
    sae.name: neuronpedia.source_id(session.index(sae), naming.release)
    for sae in progress.track(session.saes, 'indexes')
  }
  neuronpedia.check_ids(ids)
  for sae in session.saes:
    folder = session.out / 'neuronpedia' / ids[sae.name]
    count = neuronpedia.write(
      folder,
      session.index(sae),
      session.tokenizer.pieces,
      naming,
      session.labels(sae),
    )
    session.report(f'{folder}: {count:,} features')


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
  COMMANDS[name](session, options)
