"""How good an SAE is, beside controls that are hard to beat.

Reading order; a module imports only from those above it:

  estimates       values of tokens -> figures with intervals over documents
  batches         held-out text, what counts in it, and whose it is
  ridge           least squares on sparse latents
  scaling_law     error against width, L0 and tokens, and its predictions
  latent_scaling  latents of two models: shared, specific, or artefacts
  controls        untrained dictionaries of the same type and L0
  passes          compiled steps: reconstructions, losses, KL
  latent_ablation  one latent taken out of either of two models
  centres         means, outlier rules and largest dimensions of a text
  replacements    what is put in the place of an activation, measured
  evaluate        L0, delta loss, KL, FVU, beside three controls
  recovery        an SAE against known features
  saebench        sparse probing, SCR, TPP, absorption
"""
