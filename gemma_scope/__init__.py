"""gemma_scope: sparse autoencoders on the activations of Gemma.

Reading order; a module imports only from those above it:

  sites             where an activation is read: `Site`, its width, its name
  config            a run's settings: arguments, checks, the list of members

the language model and its text
  lm                Gemma: forward(tokens, taps, edits), loss
  weights           its parameters, from a checkpoint into their sharding
  sources           where documents come from; train or held out
  tokenizers        SentencePiece: Gemma's own, or one trained here
  token_store       tokens on disk, checked; sequences by index
  text              documents -> tokens, once -> shuffled sequences

activations
  mesh              devices -> mesh, multi-host start-up
  activations       sequences -> rows per site, in shuffled chunks
  activation_store  the same rows on disk, written once

sparse autoencoders
  sae               one SAE: activation functions, Flax modules, encode, decode
  objectives        its loss
  stack             many SAEs of one shape: state, vmapped step, sharding table

a run
  metrics           streaming means, intervals, the writer, the progress line
  runs              one run, one folder: lease, interrupts, refused changes
  checksums         every leaf of a tree by name, with its checksum
  checkpoints       orbax behind one thin module

a release
  npz               deterministic, distrustful reading and writing of arrays
  cards             the table and the model card
  plots             the sparsity-fidelity frontier
  manifest          a release's files: names, sizes, hashes
  member            one SAE's folder against its card
  release           parameters + card <-> a folder that others can use

evaluation
  splice            clean and spliced forward passes, as sums
  controls          a random-init SAE of the same shape and sparsity
  evaluate          L0, FVU, delta loss, frequencies, with intervals

the whole
  collection        a config -> text, rows, stacks; trained members
  train             the loop
  pipeline          train -> evaluate -> release

The alphabet of axes, in names and in einsums:

  B rows or batch   T position   D activation width   F latents
  S members         N sites      V vocabulary         K heads   H head size
"""

__version__ = '0.1.0'
