"""Latents changed inside the model, and effects traced back to latents.

Reading order; a module imports only from those above it:

  budget             rows of a pass that fit into memory
  intervene          latents changed inside the forward pass
  effects            what a change does: KL, losses, logits, steered text
  readout            what the model predicts at a position
  permutation_test   what the same search finds with shuffled decoders
  attribution        a logit attributed to latents, beside exact effects
  replacement_model  the linear model of one text over transcoders
  attribution_graph  the paths that lead to a logit
"""
