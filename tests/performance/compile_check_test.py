"""Programs compiled for a pod that is not here."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import jax
import pytest
from flax import traverse_util

from gemma_scope.language_model import gemma as lm
from gemma_scope.performance import compile_check, topologies

_HLO = """
  %x = f32[4096,3584]{1,0} all-reduce(f32[4096,3584]{1,0} %y), replica_groups={}
  %s = (bf16[8,16]{1,0}, bf16[8,64]{1,0}) all-gather-start(bf16[8,16]{1,0} %z)
  %d = bf16[8,64]{1,0} all-gather-done((bf16[8,16], bf16[8,64]) %s)
  %t = (f32[3]{0}, s32[2]{0}) all-reduce(f32[3]{0} %a, s32[2]{0} %b), to=%r
  %n = f32[3]{0} add(f32[3]{0} %all-reduce.1, f32[3]{0} %c)
"""


def test_collectives_are_counted_by_kind():
  found = compile_check.collectives(_HLO)
  assert found['all-reduce'] == {
    'count': 2,
    'bytes': 4 * (4096 * 3584 + 3 + 2),
  }
  assert found['all-gather']['count'] == 1
  assert set(found) == {'all-reduce', 'all-gather'}


@pytest.mark.parametrize(
  'estimate, holds',
  [
    (1.0, True),
    (0.95, True),
    (0.5, False),
    (-3.0, False),
    (0.0, False),
    (float('nan'), False),
    (float('inf'), False),
  ],
)
def test_an_estimate_must_be_one_that_can_be(estimate, holds):
  assert compile_check.estimate_holds(estimate, 1.0) is holds


@pytest.mark.parametrize('name', ['v5p', 'v9:2x2', 'v5p:2x2x4; x', '', 'v5p:a'])
def test_what_is_no_topology_is_one_sentence(name):
  with pytest.raises(ValueError, match='looks like v5p:2x2x4'):
    topologies.chip_of(name)


def test_flops_of_a_pass_are_two_a_parameter():
  model = lm.SIZES['gemma2-2b']
  flat = traverse_util.flatten_dict(lm.Gemma(model).param_shapes, sep='/')
  of_blocks = sum(
    math.prod(p.shape)
    for name, p in flat.items()
    if name.startswith('layer_') and not name.endswith('scale')
  )
  flops = compile_check.forward_flops(model, model.num_layers)
  assert flops == 2 * of_blocks


libtpu = pytest.mark.skipif(
  not topologies.is_there(), reason='libtpu, the TPU compiler, is not installed'
)


def command(out, *flags):
  """In a process of its own: libtpu stays in the one that loads it."""
  script = [sys.executable, 'launch/compile_check.py', f'--out={out}']
  return subprocess.run(
    [*script, '--topology=v5e:2x2', *flags], capture_output=True, text=True
  )


@libtpu
def test_both_programs_of_a_config_compile_for_a_pod(tmp_path):
  out = tmp_path / 'out.jsonl'
  done = command(
    out,
    '--config=configs/tiny.py:layers=1;sites=resid_post;sparsity=8',
    '--config.mesh.latent=2',
    '--config.mesh.data=2',
  )
  assert done.returncode == 0, done.stderr
  harvest, step = map(json.loads, out.read_text().splitlines())
  assert (harvest['program'], step['program']) == ('harvest', 'step')
  for record in (harvest, step):
    assert record['fits'] and record['devices'] == record['chips'] == 4
    assert record['hbm_capacity_bytes'] == 16 * 2**30
    assert 0 < record['hbm_bytes'] < 2**30
    assert 0 < record['utilisation'] < 1.2
    assert record['roofline_s'] > 0
  # Sharded latents: one sum of what they write, and of what comes back.
  assert set(step['collectives']) == {'all-reduce'}
  assert 'estimate' in done.stdout and 'roofline' in done.stdout


@libtpu
def test_what_does_not_fit_says_so_and_what_to_change(tmp_path):
  out = tmp_path / 'out.jsonl'
  tiny = 'configs/tiny.py:layers=1;sites=resid_post;sparsity=8'
  done = command(
    out,
    f'--config={tiny};widths=8388608',
    '--programs=step',
    '--config.mesh.data=4',
  )
  assert done.returncode == 1
  record = json.loads(out.read_text())
  assert not record['fits'] and 'mesh.latent' in record['advice']
  assert 'DOES NOT FIT' in done.stdout


@libtpu
@pytest.mark.skipif(
  jax.__version_info__ < (0, 11), reason='before jax 0.11 the state is copied'
)
def test_a_step_needs_room_for_one_member_at_a_time(tmp_path):
  """Members share temporaries: a copy of all would be twice the state."""
  out = tmp_path / 'out.jsonl'
  done = command(
    out,
    '--config=configs/gemma_scope_2b.py:set=16k;layers=12;sites=resid_post;'
    'sparsity=10,20,30,40,50,60,70,80',
    '--programs=step',
    '--config.mesh.sae=2',
    '--config.mesh.latent=2',
  )
  assert done.returncode == 0, done.stderr
  record = json.loads(out.read_text())
  assert record['mesh'] == {'sae': 2, 'data': 1, 'latent': 2}
  assert record['temporaries'] < record['arguments'] / 2
