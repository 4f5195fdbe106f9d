"""Every text and path flag of every command, with values that cannot be."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pathlib
import random
import signal
import stat
import time
from collections.abc import Iterator

from tests.faults import kills
from tests.faults.registry import Trial, fault, is_sentence
from tests.helpers import processes

# Any text is a value of these.
FREE = {
  'text',
  'title',
  'creator',
  'model_id',
  'labeller',
  'license',
  'revision',
  'column',
  'push',
  'endpoint',
}
SECONDS = 8.0  # a command still at work then has accepted its flags


def bad_values(folder: pathlib.Path, kind: str) -> dict[str, str]:
  """Values that no path, and no list of names, can have."""
  found = {
    'missing': str(folder / 'no' / 'such' / 'place'),
    'a file': str(folder / 'a_file'),
    'empty folder': str(folder / 'an_empty_folder'),
    'too long': 'x' * 5000,
    'a null character': 'a\x00b',
    'a line break': 'a\nb',
    'an address': 'gs://bucket/x',
    'a device': str(folder / 'a_device'),
    'read only': '/proc/x',
  }
  if kind in ('paths', 'words'):
    found['commas'] = ',,'
  return found


def commands() -> dict[str, object]:
  """The flags of every command by its name."""
  import importlib

  import launch
  from launch import microscope

  found = {}
  for name in launch.COMMANDS:
    if name == 'microscope':
      for part in microscope.COMMANDS:
        found[f'microscope {part}'] = microscope.flags(part)
    else:
      module = importlib.import_module(f'launch.{name.replace("-", "_")}')
      found[name] = module.FLAGS
  return found


def right_values(folder: pathlib.Path, run: pathlib.Path) -> dict[str, str]:
  """A value that is right for each flag that a command may require."""
  (folder / 'prompts.jsonl').write_text(
    ''.join(
      json.dumps({'text': f'if x{i} is not', 'label': bool(i % 2)}) + '\n'
      for i in range(8)
    )
  )
  return {
    'config': 'tiny:layers=0;sites=resid_post',
    'workdir': str(run),
    'out': str(folder / 'out'),
    'source': f'files:{folder}/prompts.jsonl',
    'release': str(run / 'release'),
    'prompts': str(folder / 'prompts.jsonl'),
    'chunks': '1',
    'text': 'if x is not',
    'change': '1:ablate',
    'sae': '',
  }


def all_cases(folder: pathlib.Path, run: pathlib.Path):
  """(command, flag, what, words)."""
  right = right_values(folder, run)
  for name, flags in commands().items():
    needed = {
      f.name: right[f.name]
      for f in flags.declared
      if f.required and f.name in right
    }
    if name == 'evaluate':
      needed['config'] = right['config']
    for flag in flags.declared:
      if flag.kind not in ('text', 'path', 'paths', 'words', 'config'):
        continue
      if flag.name in FREE:
        continue
      for what, value in bad_values(folder, flag.kind).items():
        given = needed | {flag.name: value}
        words = [f'--{key}={text}' for key, text in given.items()]
        yield name, flag.name, what, [*name.split(), *words]


class _Late(BaseException):
  """The command is at work."""


def _try_all(folder: pathlib.Path, run: pathlib.Path, most: int):
  """Calls the commands one after the other; prints a line of JSON for each."""
  import launch

  def late(*unused):
    raise _Late

  signal.signal(signal.SIGALRM, late)
  os.chdir(folder)
  cases = list(all_cases(folder, run))
  random.Random(0).shuffle(cases)  # of every command, however few there are
  for name, flag, what, words in cases[:most]:
    said, code, started = io.StringIO(), None, time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
      with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        launch.main(words)
      code = 0
    except SystemExit as end:
      code = end.code
      if isinstance(code, str):
        said.write('\n' + code)
        code = 1
    except _Late:
      code = 'late'
    except BaseException as error:
      code = f'{type(error).__name__}: {error}'
    finally:
      signal.setitimer(signal.ITIMER_REAL, 0)
    lines = said.getvalue().strip().splitlines()
    seconds = time.monotonic() - started
    line = [name, flag, what, code, lines[-1] if lines else '', seconds]
    print(json.dumps(line), flush=True)


@fault(
  'flags',
  'text and path flags of every command with values that cannot be',
  full=1000,
  quick=0,
)
def flags(folder: pathlib.Path, times: int) -> Iterator[Trial]:
  """'survived' are values that a command can do with."""
  _, run = kills.trained_run(folder)
  (folder / 'a_file').write_text('x')
  (folder / 'an_empty_folder').mkdir()
  with contextlib.suppress(OSError):  # a copy of /dev/null, which needs root
    os.mknod(folder / 'a_device', stat.S_IFCHR | 0o666, os.makedev(1, 3))
  log = folder / 'flags.log'
  process = processes.start(log, _try_all, folder, run, times)
  process.join(1200)
  process.kill()
  process.join()
  for line in log.read_text().splitlines():
    if not line.startswith('["'):
      continue
    name, flag, what, code, said, seconds = json.loads(line)
    where = f'{name} --{flag}: {what}'
    if code == 0 or code == 'late':
      yield Trial('survived', where, seconds=seconds)
    elif code in (1, 2) and is_sentence(said):
      yield Trial('refused', where, said, seconds)
    else:
      yield Trial('broken', where, f'{code}: {said}', seconds)
