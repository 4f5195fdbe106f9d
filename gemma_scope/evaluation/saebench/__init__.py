"""Scores on labelled tokens, as SAEBench defines them.

Reading order; a module imports only from those above it:

  python_labels  labels of Python source, from tokenize and ast
  probe          sparse probing, with controls and intervals
  probe_report   what the probes of a concept show, for a reader
  probe_inputs   prompts or tokens -> the rows that a probe reads
  scr_tpp        spurious correlation removal; targeted perturbation
  absorption     latents silent where their concept is present
  suite          the scores of one SAE on offline labels
"""
