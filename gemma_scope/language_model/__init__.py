"""Gemma, with activations read and replaced inside the forward pass.

Reading order; a module imports only from those above it:

  arguments     what callers pass to a forward pass, checked
  attention     causal attention in blocks of queries
  hooks         taps and edits of one forward pass
  gemma_package  the `gemma` package, imported without its side effects
  gemma_shape   the shape that all generations have in common
  gemma3        what is particular to Gemma 2 and 3: shapes, blocks, attention
  experts       a mixture of experts
  gemma4        what is particular to Gemma 4
  gemma         the model: forward(tokens, taps, edits), loss, KV cache
  hugging_face_gemma4  shape from that of Gemma 4
  hugging_face  shape from a Hugging Face config.json
  hugging_face_tensors  parameters from tensors in Hugging Face's layout
  gguf_file     metadata and tensors of a GGUF file
  gguf_gemma4   what is particular to Gemma 4 in it
  gguf          shape, parameters and tokenizer from a GGUF file
  packages      GGUF files that the package index carries
  orbax_checkpoints  parameters from Orbax's folders
  weights       parameters from a checkpoint into their sharding
  generate      sampling, with edits
  splice        the forward pass cut at a site: residual, taps, slices
"""
