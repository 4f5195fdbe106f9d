"""What every latent fires on, collected in one pass over a text.

Reading order; a module imports only from those above it:

  store       the index of an SAE on disk
  logit_lens  a latent's decoder read through the unembedding
  statistics  counts, examples and samples, batch by batch
  build       SAEs -> an index each, in one pass over a text
"""
