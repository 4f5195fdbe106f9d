"""Labels for features, by rule or by a language model, with scores.

Reading order; a module imports only from those above it:

  llm       a language model that answers: endpoint, local, cache
  examples  windows where a latent fires; rules
  labels    labels for latents, and their scores
"""
