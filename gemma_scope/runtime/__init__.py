"""One run on one or many processes: start-up, folder, checkpoints, metrics.

Reading order; a module imports only from those above it:

  cluster      several processes as one job: join, watch, one goes first
  metrics      streaming means, intervals, the writer, the progress line
  runs         one run, one folder: lease, interrupts, refused changes
  checksums    every leaf of a tree by name, with its checksum
  checkpoints  orbax behind one thin module
"""
