"""gemma_scope: sparse autoencoders on the activations of Gemma.

Reading order; a module imports only from those above it:

  sites             where an activation is read: `Site`, its width, its name
  places            what a member reads and writes: type, sites, targets
  cluster           several processes as one job: join, watch, one goes first
  config            a run's settings: arguments, checks, the list of members

the language model and its text
  hooks             taps and edits of one forward pass
  lm                Gemma: forward(tokens, taps, edits), loss, a KV cache
  hugging_face      its shape and parameters, as Hugging Face publishes them
  weights           its parameters, from a checkpoint into their sharding
  generate          samples from it, with edits
  sources           where documents come from; train or held out
  prompts           those of conversations, from a file; held out or not
  tokenizers        SentencePiece: Gemma's own, or one trained here
  token_store       tokens on disk, checked; sequences by index
  text              documents -> tokens, once -> shuffled sequences
  chat              turns, and a store of the model's own replies

activations
  mesh              devices -> mesh, and how arrays lie on it
  activations       sequences -> rows per site, in the order of the text
  batches           rows -> shuffled chunks -> the batch of a step
  activation_store  the same rows on disk, written once
  synthetic         rows that are sums of known features, to test with

sparse autoencoders
  activation_functions  JumpReLU and its estimators, TopK, BatchTopK
  kernels           Pallas kernels for its sums, on TPU and GPU
  sparse            the few latents of a row that matter, and sums over them
  sae               one SAE: the Flax module, released encode and decode
  architectures     JumpReLU, TopK, BatchTopK, Gated, ReLU
  objectives        the loss of one SAE
  resampling        dead latents begun anew
  optimizer         Adam with beta1 = 0, the schedules of a run
  stack             many SAEs of one shape: state, step, sharding table

a run
  metrics           streaming means, intervals, the writer, the progress line
  runs              one run, one folder: lease, interrupts, refused changes
  checksums         every leaf of a tree by name, with its checksum
  checkpoints       orbax behind one thin module

a release
  fold              scales and decoder norms, into the parameters and back
  npz               deterministic, distrustful reading and writing of arrays
  cards             the table and the model card
  plots             the sparsity-fidelity frontier
  manifest          a release's files: names, sizes, hashes
  member            one member's folder against its card
  release           parameters + card <-> a folder that others can use
  formats           SAEs as others publish them, read and written; the hub

evaluation
  splice            clean and spliced forward passes, as sums
  controls          a random-init member of the same type, shape and sparsity
  figures           sums -> figures with intervals
  evaluate          L0, FVU, delta loss, frequencies, with intervals
  recovery          an SAE against known features, beside PCA and a random SAE

the whole
  end_to_end        fine-tuning by KL, through the language model
  collection        a config -> text, rows, stacks; trained members
  initialise        members that start from a release's
  train             the loop
  pipeline          train -> evaluate -> release
  benchmark         tokens/s beside the matmul rate of the same shapes
  topologies        TPU pods that are not here, to compile for
  compile_check     a run's programs compiled for one: memory, time, collectives
  microscope        features of any SAE: found, read, acted on, checked

The alphabet of axes, in names and in einsums:

  B rows or batch   T position   D activation width   F latents
  S members         N sites      V vocabulary         K heads   H head size
"""

__version__ = '0.3.0'
