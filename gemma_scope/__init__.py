"""gemma_scope: sparse autoencoders on the activations of Gemma.

Reading order; a module imports only from those above it:

  sites        where an activation is read: `Site`, its width, its spelling
  config       a run's settings: arguments, checks, the list of members
  lm           Gemma: load, forward(tokens, taps, edits), loss
  text         documents -> token store -> sequences by index
  mesh         devices -> mesh, the sharding table, multi-host start-up
  activations  sequences -> chunks of rows per site, shuffled; the store on disk
  sae          one SAE: Flax modules, activation functions, encode and decode
  objectives   the loss of one SAE
  stack        many SAEs of one shape: state, vmapped step
  metrics      streaming means, intervals, the writer, the progress line
  checkpoints  orbax behind one thin module: integrity, lease, interrupts
  plots        the sparsity-fidelity frontier
  release      parameters + card <-> a folder that others can use
  evaluate     L0, FVU, delta loss by splicing, firing frequency, controls
  train        train(config, workdir): builds the objects, holds the loop

The alphabet of axes, in names and in einsums:

  B rows or batch   T position   D activation width   F latents
  S members         N sites      V vocabulary         K heads   H head size
"""

__version__ = '0.1.0'
