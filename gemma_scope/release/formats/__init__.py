"""SAEs as others publish them, read into this project's form and written back.

  hook_points    where an activation is read, in the words of others
  tensors        safetensors, read warily
  gemma_scope_1  params.npz, the site in its path
  gemma_scope_2  params.safetensors, or one file a layer, and config.json
  saelens        cfg.json and sae_weights.safetensors
  sparsify       cfg.json and sae.safetensors
  dictionaries   dictionary_learning's config.json and ae.safetensors
  hub            files of a Hugging Face repository, chosen from its list
  published      load(path or repository) -> params, card; lists; canonical
  export         members -> a folder in one of these layouts, with its card

A reader returns (params, card) as `release.load` does: parameters of
`sae.encode` and `sae.decode` on raw activations, and a card that knows its
site. What a format computes beyond an affine encoder, a threshold or top-k and
an affine decoder is folded in where it can be, and refused by name where not.
"""
