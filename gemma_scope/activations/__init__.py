"""Rows of activations, from the model or from disk.

Reading order; a module imports only from those above it:

  chunk_memory  where chunks of rows stay, and how many
  harvest       sequences -> rows of activations for each site
  normalise     centre and scale of a site's rows in training
  outliers      rows with a very large norm, by a rule that the card keeps
  chunks        rows -> shuffled chunks -> the batch of a step
  store         activations on disk, written once
  statistics    statistics of the rows of a site, as a table
  synthetic     rows that are sums of known features
"""
