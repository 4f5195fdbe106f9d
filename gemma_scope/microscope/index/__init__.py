"""What every latent fires on, collected in one pass over a text.

Reading order; a module imports only from those above it:

  store       what every latent fires on: the form in which it is kept
  logit_lens  what a latent writes, read through Gemma's unembedding
  statistics  counts, examples and samples, added up batch by batch
  build       members of a collection -> an index each, in one pass
"""
