'use strict';
// The '?' overlay: terms and keys.

const KEYS = [
  ['/', 'search features'],
  ['j, k', 'next and previous feature or row'],
  ['Enter', 'open the marked row'],
  ['r', 'a random feature'],
  ['Escape', 'one level up'],
  ['t', 'light or dark'],
  ['?', 'this help'],
];

const overlay = h('dialog', { class: 'help', 'aria-label': 'Help' });

function openHelp() {
  const lines = (pairs) =>
    h(
      'dl',
      {},
      pairs.map(([k, v]) => [h('dt', {}, k), h('dd', {}, v)]),
    );
  fill(
    overlay,
    h('h2', {}, 'Keys'),
    lines(KEYS),
    h('h2', {}, 'Terms'),
    lines(all.terms),
    button('Close', () => overlay.close()),
  );
  if (!overlay.open) overlay.showModal();
}
