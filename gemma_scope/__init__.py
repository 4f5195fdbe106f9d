"""gemma_scope: sparse autoencoders (SAEs) on the activations of Gemma.

Reading order; a folder or module imports only from those above it:

  uploads         subscribers to the files and folders that were written
  files           files and folders written whole, files opened warily
  path_values     paths that a user gives, and what is published of them
  sites           where an activation is read, and what an SAE reads and writes
  mesh            devices -> mesh, and how arrays lie on it
  runtime         several processes, one run folder, checkpoints, metrics
  sae             the mathematics of one SAE, and its kernels
  release         parameters + card <-> a folder that other tools can read
  language_model  Gemma: forward pass with taps and edits, weights, sampling
  specs           the list of SAEs that a config asks for
  config_fields   every field of a run's config: type, bounds, choices
  config_checks   what fits together in a config
  config          loads, changes and checks a config, without JAX
  command_line    flags of the commands, and their errors
  activations     rows of activations: harvested, shuffled, stored, synthetic
  text            documents -> tokens on disk -> shuffled sequences
  evaluation      L0, FVU, delta loss and the SAEBench metrics, with controls
  training        many SAEs trained from one pass of the model
  pipeline        train -> evaluate -> release
  scaling         predicts errors of wide SAEs from narrow ones; compares
  diffing         two models compared by crosscoders
  performance     benchmarks, and programs compiled for absent TPU pods
  microscope      features found, read, changed and checked

The alphabet of axes, in names and in einsums:

  B rows or batch   T position   D activation width   F latents
  S members         N sites      V vocabulary         K heads   H head size
"""

import importlib

__version__ = '0.4.0'


def __getattr__(name: str):
  """`gemma_scope.sae` and `.release` without an import of their own.

  They are imported when they are first used: `import gemma_scope` alone takes
  no time.
  """
  if name in ('sae', 'release'):
    return importlib.import_module(f'{__name__}.{name}')
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
