"""One run on one or many processes: start-up, folder, checkpoints, metrics.

Reading order; a module imports only from those above it:

  cluster      several processes as one job: start-up, watchdog
  objects      objects of a bucket: read, written whole, or on a condition
  remote       a run's folder in a bucket, with a copy on each host
  host_cache   stores in a bucket, read into a cache of the host
  metrics      streaming means, the metrics writer
  progress     progress on a terminal or in a log
  lease        one process at a time writes to a run folder
  bucket_lease  the same in a bucket
  preemption   the cloud's notice that a machine will be taken away
  interrupt    a signal or a notice ends a run at a whole step
  changes      a resumed run must have the config it began with
  checksums    a checksum for every leaf of a tree
  checkpoints  Orbax behind one thin module
  bucket_checkpoints  the same in a bucket
  opened       the lease and the checkpoints of a folder, wherever it is
"""
