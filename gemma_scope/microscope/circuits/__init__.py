"""Interventions on latents, and attribution of logits to latents.

Reading order; a module imports only from those above it:

  budget             number of rows per pass that fit into memory
  intervene          edits of latents inside the forward pass
  effects            effects of edits: KL, losses, logits, steered text
  steering           several prompts at several strengths, next to controls
  readout            the tokens and logits to explain
  permutation_test   control: the same search with shuffled decoders
  attribution        attributes a logit to latents, next to exact effects
  replacement_model  linear model of one text, with transcoders for MLPs
  attention_heads    the attention heads that carry an edge of a graph
  attention_scores   why a head attends: pairs of query and key features
  graph_influence    influence of a graph's nodes, pruning, scores
  supernodes         features of a graph that are read and ablated as one
  attribution_graph  the paths that lead to a logit
  prompt_sets        many prompts under one edit: logits, losses, attributions
  graph_files        graphs as files of circuit-tracer and Neuronpedia
  packed_edits       many edits of single tokens in one partial pass
  card_statistics    p-values, false discovery rate and verdicts of cards
  card_plan          the edits of a causal card, and their controls
  causal_card        the exact effect of every feature, next to controls
  card_results       causal cards on disk: resumed, and summarised
"""
