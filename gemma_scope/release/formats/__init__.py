"""SAEs in the formats of other tools, read and written.

  model_names      names of models in other tools
  hook_points      sites <-> the hook names of other tools
  tensors          safetensors and configs, checked before use
  gemma_scope_1    params.npz, the site in its path
  gemma_scope_2    params.safetensors, or one file a layer, and config.json
  saelens          cfg.json and sae_weights.safetensors
  sparsify         cfg.json and sae.safetensors
  dictionaries     dictionary_learning's config.json and ae.safetensors
  hub              files of a Hugging Face repository: listed, fetched, uploaded
  transcoder_sets  circuit-tracer's config.yaml and a file for each layer
  published        opens an SAE in any format, from a folder or the hub
  export           SAEs -> a folder in one of these layouts

A reader returns the card, which names the sites, and a function that reads the
parameters, for `sae.encode` and `sae.decode` on raw activations. What a format
computes beyond an affine encoder, a threshold or top-k and an affine decoder is
folded into the parameters where that is possible, else refused by name.
"""
