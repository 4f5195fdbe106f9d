"""How good an SAE is, beside a control.

Reading order; a module imports only from those above it:

  estimates  sums -> estimates with intervals
  controls   a random SAE of the same type, shape and sparsity
  passes     compiled sums: losses, squared errors, firing counts
  evaluate   L0, FVU, delta loss, frequencies, with intervals
  recovery   an SAE against known features
  saebench   sparse probing, SCR, TPP, absorption
"""
