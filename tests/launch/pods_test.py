"""The scripts of TPU pods, with a stand-in `gcloud`: no network is asked."""

from __future__ import annotations

import os
import shlex
import subprocess

import pytest

from tests.helpers.shell import LAUNCH, run, script

TPU = (
  '--name=sae',
  '--zone=z1',
  '--type=v5p-16',
  '--repo=https://r',
  '--ref=c0',
)


CONFIG = '--config=configs/gemma_scope_2b.py:layers=12,20;widths=16k'


@pytest.fixture
def gcloud(tmp_path):
  """A `gcloud` that writes its arguments down, one a line, NUL at the end."""
  calls = tmp_path / 'gcloud_calls'
  script(
    tmp_path / 'bin' / 'gcloud',
    f"""#!/bin/bash
printf '%s\\0' "$@" END >> "{calls}"
for argument; do
  case "$argument" in
    --metadata-from-file=startup-script=*)
      cp "${{argument#*=*=}}" "{tmp_path}/startup" ;;
    describe) cat "{tmp_path}/state" 2>/dev/null || exit 1 ;;
  esac
done
""",
  )

  def read():
    if not calls.exists():
      return []
    text = calls.read_text().split('END\0')[:-1]
    return [call.split('\0')[:-1] for call in text]

  return tmp_path, read


def test_tpu_vm_up(gcloud):
  folder, calls = gcloud
  done = run(
    [
      'bash',
      LAUNCH / 'tpu_vm.sh',
      'up',
      *TPU,
      '--spot',
      '--project=p',
      '--share=10.0.0.2:/runs',
      '--',
      CONFIG,
      '--config.text.source=files:/a b',
    ],
    path=folder / 'bin',
  )
  assert done.returncode == 0, done.stderr
  create, prepare, start = calls()
  where = ['--zone=z1', '--project=p']
  assert create == [
    *'compute tpus tpu-vm create sae'.split(),
    *where,
    '--accelerator-type=v5p-16',
    '--version=v2-alpha-tpuv5',
    '--spot',
  ]
  for call, action in ((prepare, 'prepare'), (start, 'start')):
    assert call[:-1] == [
      *'compute tpus tpu-vm ssh sae'.split(),
      *where,
      '--worker=all',
    ]
    remote = shlex.split(
      call[-1].removeprefix('--command=').split(' bash -c ')[0]
    )
    assert remote[:5] == [
      'env',
      'REPO=https://r',
      'REF=c0',
      'WORKDIR=/mnt/gemma_scope/runs/sae',
      'SHARE=10.0.0.2:/runs',
    ]
    flags = shlex.split(remote[5].removeprefix('TRAIN_FLAGS='))
    assert flags == [CONFIG, '--config.text.source=files:/a b']
    assert call[-1].endswith(f'tpu_worker {action} </dev/null')
    # What the far shell would see is a program that parses.
    assert run(['bash', '-n', '-c', call[-1].partition('=')[2]]).returncode == 0


def test_dry_runs_print_and_run_nothing(gcloud):
  folder, calls = gcloud
  for name, command in (('tpu_vm', 'up'), ('tpu_queued', 'watch')):
    done = run(
      [
        'bash',
        LAUNCH / f'{name}.sh',
        command,
        *TPU,
        '--workdir=/w',
        '--dry-run',
        '--',
        CONFIG,
      ],
      path=folder / 'bin',
    )
    assert done.returncode == 0, done.stderr
    assert '+ gcloud compute tpus' in done.stderr
  assert calls() == []


def test_tpu_queued_submit(gcloud):
  folder, calls = gcloud
  done = run(
    [
      'bash',
      LAUNCH / 'tpu_queued.sh',
      'submit',
      *TPU,
      '--spot',
      '--workdir=/w',
      '--',
      CONFIG,
    ],
    path=folder / 'bin',
  )
  assert done.returncode == 0, done.stderr
  (create,) = calls()
  assert create[:-1] == [
    *'compute tpus queued-resources create sae --node-id=sae --zone=z1'.split(),
    '--accelerator-type=v5p-16',
    '--runtime-version=v2-alpha-tpuv5',
    '--spot',
  ]
  startup = folder / 'startup'
  assert run(['bash', '-n', startup]).returncode == 0
  assert len(startup.read_bytes()) < 256_000  # the limit of metadata
  text = startup.read_text()
  assert 'export WORKDIR=/w\n' in text
  assert text.index('set -- queued') < text.index('case "${1:?')


def test_watch_replaces_a_slice_that_was_taken_away(gcloud):
  folder, calls = gcloud
  (folder / 'state').write_text('SUSPENDED\n')
  script(  # the second look finds the request failed, and that ends the watch
    folder / 'bin' / 'sleep', f'#!/bin/bash\necho FAILED > "{folder}/state"\n'
  )
  done = run(
    [
      'bash',
      LAUNCH / 'tpu_queued.sh',
      'watch',
      *TPU,
      '--workdir=/w',
      '--',
      CONFIG,
    ],
    path=folder / 'bin',
  )
  assert done.returncode == 1
  assert 'the request failed' in done.stderr
  verbs = [call[3] for call in calls()]
  assert verbs == ['describe', 'delete', 'create', 'describe']
  assert {'--force', '--quiet'} <= set(calls()[1])


@pytest.mark.parametrize(
  ('flags', 'said'),
  [
    (['up', '--zone=z'], '--name is missing'),
    (['up', '--name=n'], '--zone is missing'),
    (['up', '--name=n', '--zone=z'], '--type is missing'),
    (['up', '--name=n', '--zone=z', '--type=x9'], 'no image is known'),
    (['up', *TPU], '--workdir is missing'),
    (['up', *TPU, '--workdir=/w'], 'no --config'),
    (['up', *TPU, '--workdri=/w'], "unexpected argument '--workdri=/w'"),
    (['fly', *TPU], "unknown command 'fly'"),
  ],
)
def test_pod_flags_are_checked(gcloud, flags, said):
  folder, calls = gcloud
  done = run(['bash', LAUNCH / 'tpu_vm.sh', *flags], path=folder / 'bin')
  assert done.returncode == 1
  assert said in done.stderr
  assert done.stderr.count('\n') == 1
  assert calls() == []


def test_worker_joins_the_slice_and_tries_again(tmp_path):
  """Metadata become the cluster's variables; a fall is followed by a retry."""
  home = tmp_path / 'home'
  script(
    tmp_path / 'bin' / 'curl',
    """#!/bin/bash
case "$*" in
  *worker-network-endpoints) echo a:1:10.0.0.1,b:2:10.0.0.2 ;;
  *agent-worker-number) echo 1 ;;
  *) exit 22 ;;
esac
""",
  )
  script(
    home / 'code' / '.venv' / 'bin' / 'python',
    f"""#!/bin/bash
echo "$COORDINATOR_ADDRESS $NUM_PROCESSES $PROCESS_ID"
printf '<%s>' "$@"; echo
[[ -f "{tmp_path}/fell" ]] || {{ touch "{tmp_path}/fell"; exit 3; }}
""",
  )
  done = run(
    ['bash', LAUNCH / 'tpu_worker.sh', 'run'],
    path=tmp_path / 'bin',
    GEMMA_SCOPE_HOME=home,
    WORKDIR='/w',
    TRAIN_FLAGS=f' {shlex.quote(CONFIG)} --config.x=a\\ b',
    PAUSE=0,
  )
  assert done.returncode == 0, done.stderr
  flags = f'<launch/train.py><--workdir=/w><{CONFIG}><--config.x=a b>'
  assert done.stdout.splitlines() == [
    '10.0.0.1:8476 2 1',
    flags,
    '10.0.0.1:8476 2 1',
    flags,
    'tpu_worker: over, exit code 0',
  ]
  assert 'left with 3' in done.stderr
  assert not (home / 'run.pid').exists()


def test_worker_stop_waits_for_the_save(tmp_path):
  home = tmp_path / 'home'
  script(tmp_path / 'bin' / 'curl', '#!/bin/bash\necho one\n')
  script(
    home / 'code' / '.venv' / 'bin' / 'python',
    """#!/bin/bash
trap 'sleep 0.3; echo saved; exit 0' TERM
echo training
while :; do sleep 0.05; done
""",
  )
  environment = os.environ | {
    'PATH': f'{tmp_path}/bin:{os.environ["PATH"]}',
    'GEMMA_SCOPE_HOME': str(home),
    'WORKDIR': '/w',
    'TRAIN_FLAGS': '',
  }
  worker = subprocess.Popen(
    ['bash', LAUNCH / 'tpu_worker.sh', 'run'],
    env=environment,
    stdout=subprocess.PIPE,
    text=True,
  )
  try:
    assert worker.stdout.readline() == 'training\n'
    again = run(
      ['bash', LAUNCH / 'tpu_worker.sh', 'prepare'], GEMMA_SCOPE_HOME=home
    )
    assert again.returncode == 1 and 'stop it first' in again.stderr
    stop = run(
      ['bash', LAUNCH / 'tpu_worker.sh', 'stop'], GEMMA_SCOPE_HOME=home
    )
    assert 'asked to save' in stop.stdout
    rest, _ = worker.communicate(timeout=30)
  finally:
    worker.kill()
  assert rest.splitlines() == ['saved', 'tpu_worker: over, exit code 0']
  assert worker.returncode == 0
