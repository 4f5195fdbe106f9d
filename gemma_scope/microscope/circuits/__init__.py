"""Latents changed inside the model, and effects traced back to latents.

Reading order; a module imports only from those above it:

  intervene          latents changed inside a pass
  effects            what a change does: losses, dose-response, steered text
  permutation_test   what a search finds where decoders are shuffled
  attribution        a logit traced to latents, the exact effects beside it
  replacement_model  a text's linear model over transcoders
  attribution_graph  what a logit was made of, through several layers
"""
