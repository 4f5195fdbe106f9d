"""Scores on labelled tokens, as SAEBench defines them.

Reading order; a module imports only from those above it:

  python_labels  labels of Python source, from tokenize and ast
  probe          concepts from labelled rows, with controls and intervals
  probe_inputs   prompts or tokens -> the rows that a probe reads
  scr_tpp        spurious latents taken out: SCR, TPP
  absorption     latents silent where their concept is there
  fidelity       KL, cosine, norms: what an SAE keeps
  suite          SAEBench's scores, as far as offline labels go
"""
