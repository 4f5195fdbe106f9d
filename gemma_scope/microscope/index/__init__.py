"""The index: what each latent fires on in a text.

Reading order; a module imports only from those above it:

  store       the index on disk: what each latent fires on
  logit_lens  what a latent writes, read through Gemma's unembedding
  statistics  counts, examples and samples, added up batch by batch
  encode      the latents that fire on a batch; outlier tokens
  build       SAEs and a text -> an index for each SAE
"""
