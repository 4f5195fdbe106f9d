"""How good an SAE is, beside a control.

Reading order; a module imports only from those above it:

  controls   a random-init member of the same type, shape and sparsity
  estimates  sums -> figures with intervals
  evaluate   L0, FVU, delta loss, frequencies, with intervals
  recovery   an SAE against known features, beside PCA and a random SAE
  saebench   SAEBench metrics: sparse probing, SCR, TPP, absorption, unlearning
"""
