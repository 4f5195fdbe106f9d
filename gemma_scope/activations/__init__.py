"""Rows of activations, from the model or from disk.

Reading order; a module imports only from those above it:

  harvest    sequences -> rows per site, in the order of the text
  chunks     rows -> shuffled chunks -> the batch of a step
  store      the same rows on disk, written once
  synthetic  rows that are sums of known features, to test with
"""
