"""Labels for features, by rule or by a language model, with scores.

Reading order; a module imports only from those above it:

  llm          language models that answer questions: endpoint, local, cache
  examples     windows where a latent fires or is silent; rules
  labels       labels for latents, and their scores
  label_store  labels on disk, and as they are shown
"""
