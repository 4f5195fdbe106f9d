"""Rows of activations, from the model or from disk.

Reading order; a module imports only from those above it:

  harvest    sequences -> rows of activations for each site
  chunks     rows -> shuffled chunks -> the batch of a step
  store      activations on disk, written once
  synthetic  rows that are sums of known features
"""
