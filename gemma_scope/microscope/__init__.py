"""The microscope: find a feature, read it, change it, and check it.

Works on any SAE that `release` or `release.formats.published` reads.
Reading order; a folder or module imports only from those above it:

  index       what every latent fires on, collected in one pass
  circuits    interventions, attribution and graphs, with controls
  autointerp  labels by rule or by a language model, with scores
  dashboard   static pages and the live view
  session     the SAEs, indexes and labels that a command works on
  notebook    features, tokens and curves displayed in a notebook
  inputs      the flags of the commands, and what their text means
  graphs      the graph of `why`: traced, measured, kept as files
  commands    one function for each subcommand
"""
