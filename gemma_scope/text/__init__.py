"""Documents as tokens on disk, and as shuffled sequences.

Reading order; a module imports only from those above it:

  corpus            a text with a name; train or held out
  standard_library  code, docstrings and topics of the interpreter
  prose             English of the documentation of installed packages
  json_lines        one way of reading lines and JSON Lines
  text_files        documents of files: text, JSON Lines, parquet
  records           documents of ArrayRecord files and TFDS data sets
  hub_datasets      documents of Hugging Face data sets
  sources           a string names a source; a source is documents
  prompts           chat prompts from a file, each train or held out
  tokenizers        SentencePiece: Gemma's own, or one trained here
  sequences         fixed-length sequences from a token store, by index
  token_store       tokens on disk, checked
  splits            tokens -> the files of two splits, by document or by parts
  prepare           documents -> tokens on disk -> shuffled sequences
  rollouts          chat turns, and a store of the model's own replies
"""
