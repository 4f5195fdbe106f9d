"""compile-check --suites: the sets and pods that docstrings name."""

from __future__ import annotations

import pytest

from configs import suites
from launch import compile_check


def test_every_set_of_a_suite_that_names_a_pod():
  every = list(suites.published())
  assert len(set(every)) == len(every)
  names = {suite for suite, *_ in every}
  assert {'gemma_scope_2b', 'gemma_scope_2', 'gemma_4'} < names
  assert not names & {'tiny', 'gemma3_270m', 'recipe'}  # for one machine
  of_2b = [e for e in every if e[0] == 'gemma_scope_2b']
  assert [argument for _, argument, _ in of_2b] == [
    f'set={s}' for s in ('16k', '65k', '32k', '131k', '262k', '524k', '1m')
  ]
  of_4 = {
    (argument, topology) for s, argument, topology in every if s == 'gemma_4'
  }
  assert ('model=26b_a4b;set=own', 'v6e:4x8') in of_4
  assert ('model=31b;set=own', 'v6e:4x8') not in of_4  # it has neither


@pytest.mark.parametrize(
  'flags, words',
  [
    (
      ['--suites=gemma_scope_3b'],
      'There is no suite gemma_scope_3b that names',
    ),
    (['--suites=all', '--config=tiny', '--topology=v5e:2x2'], 'or --suites'),
    (['--topology=v5e:2x2'], 'Set --config and --topology'),
  ],
)
def test_what_cannot_be_compiled_is_one_sentence(flags, words, capsys):
  with pytest.raises(SystemExit) as end:
    compile_check.main(flags)
  assert end.value.code not in (0, None)
  shown = capsys.readouterr()
  text = f'{end.value.code}{shown.err}{shown.out}'
  assert words in text and 'Traceback' not in text
