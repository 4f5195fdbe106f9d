"""The microscope: find a feature, read it, act on it, know if to believe it.

Works on any (params, card) of `release.load` or `formats.published.load`.

  index       what every latent fires on, in one pass over a text
  logits      what a latent writes, read through Gemma's unembedding
  intervene   steer, clamp, ablate; what it does to losses and logits
  attribute   which latents made a logit, beside the measured effect
  graph       latents of transcoders and CLTs, layer by layer
  probe       concepts from labelled prompts, with controls
  suite       SAEBench's scores, as far as offline labels go
  explain     labels for latents, and their scores
  pages       an index -> a folder of static pages
  live        the same on one's own text, by a loopback server
  neuronpedia an index -> Neuronpedia's bulk files

It imports what stands above it in the package, and never train or stack.
"""
