"""The microscope: find a feature, read it, act on it, know if to believe it.

Works on any (params, card) of `release.load` or `formats.published.load`.

  index        what every latent fires on: the form in which it is kept
  logits       what a latent writes, read through Gemma's unembedding
  statistics   counts, examples and samples, added up batch by batch
  build        members of a collection -> an index each, in one pass
  neuronpedia  an index -> Neuronpedia's files
  pages        indexes -> a folder of static pages
  python_labels  labels of Python source, from tokenize and ast
  probe        concepts from labelled rows, with controls and intervals
  rows         prompts or tokens -> the rows that a probe reads
  removal      spurious latents taken out: SCR, TPP
  absorption   latents silent where their concept is there
  fidelity     KL, cosine, norms: what an SAE keeps
  suite        SAEBench's scores, as far as offline labels go
  intervene    latents changed inside a pass
  effects      what a change does: losses, dose-response, steered text
  null         what a search finds where decoders are shuffled
  attribute    a logit traced to latents, the exact effects beside it
  replacement  a text's linear model over transcoders
  graph        what a logit was made of, through several layers
  ask          a language model that answers: endpoint, local Gemma, cache
  examples     windows where a latent fires; rules
  explain      labels for latents, and their scores
  questions    what can be asked about a text, answered in JSON
  live         the pages, served with these questions
  session      a run's folder, opened
  commands     what launch/microscope.py can be told

It imports what stands above it in the package, and never train or stack (but
session opens a run's text as training does, by collection).
"""
