"""Benchmarks, and memory and time on TPU pods from compilation alone.

Reading order; a module imports only from those above it:

  benchmark      tokens/s, relative to matmuls of the same shapes
  topologies     descriptions of TPU pods, to compile for without having them
  compile_check  a run's programs compiled for a pod: memory, time, collectives
"""
