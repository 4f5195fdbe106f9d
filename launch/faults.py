"""Injects faults on purpose and counts what comes of them, a line of JSON each.

  python launch/faults.py --list
  python launch/faults.py --quick
  python launch/faults.py --only=flip,kill-train --times=50 >> faults.jsonl

Processes are killed, bits flipped, disks filled; docs/reliability.md has the
results. Run it from a checkout: the faults are those of tests/faults.
"""

from __future__ import annotations

import json
import math
import pathlib
import sys
import tempfile

from gemma_scope import command_line

FLAGS = command_line.Flags(
  __doc__,
  command_line.words(
    'only', (), 'The faults to inject, by their names or how these begin.'
  ),
  command_line.switch('list', False, 'Print the names, and inject nothing.'),
  command_line.switch('quick', False, 'A few trials of each, as the tests do.'),
  command_line.whole(
    'times', None, 'Trials of each fault, in place of its own number.', low=1
  ),
  command_line.number(
    'seconds', None, 'Begin no trial of a fault after this time.', low=0.0
  ),
  command_line.path('folder', 'Where to work; by default a temporary folder.'),
  name='faults',
  needs_flags=False,
)


def main(arguments: list[str] | None = None) -> None:
  with FLAGS.parse(arguments) as parsed:
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
    import tests.conftest  # noqa: F401 (the devices that the tests have)
    from tests.faults import catalogue

    faults = [
      fault
      for name, fault in catalogue.FAULTS.items()
      if not parsed.only or name.startswith(tuple(parsed.only))
    ]
    if not faults:
      raise ValueError(
        f'No fault begins with {", ".join(parsed.only)}; they are '
        f'{", ".join(catalogue.FAULTS)}.'
      )
    failed = 0
    for fault in faults:
      if parsed.list:
        print(f'{fault.name:20} {fault.what}')
        continue
      times = parsed.times or (fault.quick if parsed.quick else fault.full)
      if not times:
        continue
      with tempfile.TemporaryDirectory(dir=parsed.folder) as folder:
        trial_folder = pathlib.Path(folder) / fault.name
        result = fault.run(trial_folder, times, parsed.seconds or math.inf)
      print(json.dumps(result), flush=True)
      failed += 'bad' in result
    if failed:
      sys.exit(f'{failed} of {len(faults)} faults did not end as they must')


if __name__ == '__main__':
  main()
