"""The microscope: find a feature, read it, act on it, know if to believe it.

Works on any (params, card) of `release.load` or `formats.published.load`.

  index        what every latent fires on: the form in which it is kept
  logits       what a latent writes, read through Gemma's unembedding
  statistics   counts, examples and samples, added up batch by batch
  build        members of a collection -> an index each, in one pass
  neuronpedia  an index -> Neuronpedia's files
  pages        indexes -> a folder of static pages

It imports what stands above it in the package, and never train or stack.
"""
