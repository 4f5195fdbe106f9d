"""Gemma, with activations read and replaced inside the forward pass.

Reading order; a module imports only from those above it:

  hooks         taps and edits of one forward pass
  gemma         Gemma: forward(tokens, taps, edits), loss, a KV cache
  hugging_face  its shape and parameters, as Hugging Face publishes them
  gguf_file     a GGUF file's metadata and tensors
  gguf          the same of a GGUF file
  packages      GGUF files that the package index has
  weights       its parameters, from a checkpoint into their sharding
  generate      samples from it, with edits
  splice        clean and spliced forward passes, as sums
"""
