"""Rows of activations, from the model or from disk.

Reading order; a module imports only from those above it:

  harvest     sequences -> rows of activations for each site
  normalise   the centre and scale by which training sees a site's rows
  outliers    rows of abnormal norm, by one rule that a card carries
  chunks      rows -> shuffled chunks -> the batch of a step
  store       activations on disk, written once
  statistics  what the rows of a site are like, as a table
  synthetic   rows that are sums of known features
"""
