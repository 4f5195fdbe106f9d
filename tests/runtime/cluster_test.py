"""How a process finds out that it is one of several."""

from __future__ import annotations

import pytest

from gemma_scope.runtime import cluster

VARIABLES = (
  'COORDINATOR_ADDRESS',
  'NUM_PROCESSES',
  'PROCESS_ID',
  'SLURM_NTASKS',
  'SLURM_PROCID',
  'TPU_WORKER_HOSTNAMES',
  'MEGASCALE_NUM_SLICES',
)


@pytest.fixture
def lone(monkeypatch):
  for name in VARIABLES:
    monkeypatch.delenv(name, raising=False)
  return monkeypatch


def test_a_cluster_is_given_by_hand(lone):
  assert cluster.find() is None
  lone.setenv('COORDINATOR_ADDRESS', 'host:1')
  with pytest.raises(cluster.ClusterError, match='NUM_PROCESSES'):
    cluster.find()
  lone.setenv('NUM_PROCESSES', '4')
  lone.setenv('PROCESS_ID', '2')
  assert cluster.find() == {
    'coordinator_address': 'host:1',
    'num_processes': 4,
    'process_id': 2,
  }
  lone.setenv('NUM_PROCESSES', '1')
  assert cluster.find() is None


@pytest.mark.parametrize(
  'variables, several',
  [
    ({'SLURM_NTASKS': '8'}, False),  # salloc's shell: not a task
    ({'SLURM_NTASKS': '8', 'SLURM_PROCID': '3'}, True),
    ({'SLURM_NTASKS': '1', 'SLURM_PROCID': '0'}, False),
    ({'TPU_WORKER_HOSTNAMES': 'localhost'}, False),
    ({'TPU_WORKER_HOSTNAMES': 't0,t1'}, True),
    ({'TPU_WORKER_HOSTNAMES': 't0', 'MEGASCALE_NUM_SLICES': '2'}, True),
  ],
)
def test_jax_is_asked_where_there_are_several_processes(
  variables, several, lone
):
  for name, value in variables.items():
    lone.setenv(name, value)
  assert cluster.find() == ({} if several else None)


def test_a_pods_metadata_is_asked_only_where_there_are_chips(lone):
  said = {'worker-network-endpoints': 'a:1:10.0.0.2,b:2:10.0.0.3'}
  lone.setattr(cluster, '_metadata', said.get)
  assert cluster.find() is None
  lone.setattr(cluster, '_has_tpu', lambda: True)
  assert cluster.find() == {}
  said['worker-network-endpoints'] = 'unknown:unknown:10.0.0.2'
  assert cluster.find() is None
