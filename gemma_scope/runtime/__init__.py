"""One run on one or many processes: start-up, folder, checkpoints, metrics.

Reading order; a module imports only from those above it:

  cluster      several processes as one job: start-up, watchdog
  metrics      streaming means, the metrics writer
  progress     progress on a terminal or in a log
  lease        one process at a time writes to a run folder
  interrupt    SIGTERM and Ctrl-C end a run at a whole step
  changes      a resumed run must have the config it began with
  checksums    a checksum for every leaf of a tree
  checkpoints  Orbax behind one thin module
"""
