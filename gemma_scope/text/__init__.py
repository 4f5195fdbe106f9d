"""Documents as tokens on disk, and as shuffled sequences.

Reading order; a module imports only from those above it:

  sources      where documents come from; train or held out
  prompts      those of conversations, from a file; held out or not
  tokenizers   SentencePiece: Gemma's own, or one trained here
  token_store  tokens on disk, checked; sequences by index
  prepare      documents -> tokens, once -> shuffled sequences
  rollouts     turns, and a store of the model's own replies
"""
