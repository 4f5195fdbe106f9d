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
  with FLAGS.parse(arguments) as given:
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
    import tests.conftest  # noqa: F401 (the devices that the tests have)
    from tests.faults import catalogue

    chosen = [
      fault
      for name, fault in catalogue.FAULTS.items()
      if not given.only or name.startswith(tuple(given.only))
    ]
    if not chosen:
      raise ValueError(
        f'No fault begins with {", ".join(given.only)}; they are '
        f'{", ".join(catalogue.FAULTS)}.'
      )
    bad = 0
    for fault in chosen:
      if given.list:
        print(f'{fault.name:20} {fault.what}')
        continue
      times = given.times or (fault.quick if given.quick else fault.full)
      if not times:
        continue
      with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        where = pathlib.Path(folder) / fault.name
        result = fault.run(where, times, given.seconds or math.inf)
      print(json.dumps(result), flush=True)
      bad += 'bad' in result
    if bad:
      sys.exit(f'{bad} of {len(chosen)} faults did not end as they must')


if __name__ == '__main__':
  main()
