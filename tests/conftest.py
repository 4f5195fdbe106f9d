"""Every test runs on the CPU, as 8 devices, with no network."""

import collections
import gc
import os
import pathlib

import pytest

os.environ['JAX_PLATFORMS'] = 'cpu'
# All compiled programs are kept, for the other processes of this run and for
# the next run: to read one takes 3 ms, to compile the smallest 20. (JAX warns
# of a program that another process has not written to its end, and compiles.)
# In the repository and not in a folder that others may write to: what is in it
# is executed.
os.environ.setdefault(
  'JAX_COMPILATION_CACHE_DIR',
  str(pathlib.Path(__file__).parents[1] / '.jax_cache'),
)
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
# Most of the suite's time is compilation: ask for less of it.
os.environ['XLA_FLAGS'] = ' '.join(
  [
    os.environ.get('XLA_FLAGS', ''),
    '--xla_force_host_platform_device_count=8',
    '--xla_backend_optimization_level=0',
    '--xla_llvm_disable_expensive_passes=true',
    '--xla_cpu_parallel_codegen_split_count=1',
  ]
)
# One program at a time: 8 devices on 2 cores, each waiting for a collective of
# another program in flight, can starve each other until XLA aborts.
os.environ['JAX_CPU_ENABLE_ASYNC_DISPATCH'] = 'false'
os.environ['HF_HUB_OFFLINE'] = '1'
# numpy's and scipy's own threads, in two processes on two cores, wait for each
# other: a fit of a probe took six times as long.
os.environ['OPENBLAS_NUM_THREADS'] = '1'
# Tracing makes many objects that live: the collector looked through them again
# and again, for a twentieth of the time.
gc.set_threshold(100_000, 20, 50)


def pytest_terminal_summary(terminalreporter):
  """Tests that were skipped, by reason: what this run says nothing about."""
  reasons = collections.Counter(
    report.longrepr[2].removeprefix('Skipped: ')
    for report in terminalreporter.stats.get('skipped', ())
  )
  if reasons:
    terminalreporter.section('NOT TESTED', red=True, bold=True)
    for reason, count in sorted(reasons.items()):
      terminalreporter.line(f'{count} skipped: {reason}', yellow=True)


@pytest.fixture
def short_loops(monkeypatch):
  """Sums over few latents take two in a turn of their loops, not sixteen.

  A program with many such sums then compiles in half of the time. The sums
  themselves are tested as they are in tests/sae/sparse_test.py.
  """
  from gemma_scope.sae.kernels import plain

  monkeypatch.setattr(plain, '_UNROLL', 2)
  monkeypatch.setattr(plain, '_PAIRS', 2)


@pytest.fixture(scope='module', autouse=True)
def _few_programs():
  """Drops the compiled programs of earlier modules before they are too many.

  Each compiled program is several mappings of memory. A process may have 65,530
  (vm.max_map_count); XLA aborts at the next one.
  """
  yield
  try:
    with open('/proc/self/maps') as maps:
      mappings = sum(1 for _ in maps)
  except OSError:  # not Linux
    return
  if mappings > 20_000:
    import jax

    jax.clear_caches()
