"""Interventions on latents, and attribution of logits to latents.

Reading order; a module imports only from those above it:

  budget             number of rows per pass that fit into memory
  intervene          edits of latents inside the forward pass
  effects            effects of edits: KL, losses, logits, steered text
  readout            the tokens and logits to explain
  permutation_test   control: the same search with shuffled decoders
  attribution        attributes a logit to latents, next to exact effects
  replacement_model  linear model of one text, with transcoders for MLPs
  attribution_graph  the paths that lead to a logit
"""
