"""Benchmarks, and memory and time on TPU pods from compilation alone.

Reading order; a module imports only from those above it:

  benchmark      tokens/s beside the matmul rate of the same shapes
  topologies     TPU pods that are not here, to compile for
  compile_check  a run's programs compiled for one: memory, time, collectives
"""
