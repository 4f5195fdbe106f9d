'use strict';
// Outlier tokens of an SAE's site: what the card's rule leaves out.

const REACH = 16; // tokens on either side

async function outlierLine([sequence, position], norm) {
  const chunk = await load(`t${Math.floor(sequence / all.chunk)}`);
  const first = Math.max(position - REACH, 0);
  const ids = chunk[sequence % all.chunk].slice(first, position + REACH + 1);
  const peak = position - first;
  return h(
    'div',
    { class: 'tokens' },
    h('span', { class: 'value' }, number(norm)),
    decoded(ids.map(piece)).map((text, i) =>
      h('span', { class: 'token' + (i === peak ? ' peak' : '') }, text),
    ),
  );
}

async function outliers(id, stale) {
  const m = all.members[id];
  if (!m.outliers) throw new Error(`${m.name} left out no outlier tokens.`);
  const found = await load(`m${id}/outliers`);
  const lines = await Promise.all(
    found.shown.map((at, i) => outlierLine(at, found.norm[i])),
  );
  if (stale()) return;
  const bounds = Object.entries(found.bounds)
    .map(([site, bound]) => `${number(bound)} at ${site}`)
    .join(', ');
  const columns = [
    { name: 'token', get: ([t]) => piece(t), show: ([t]) => chip(t) },
    { name: 'outliers', get: ([, n]) => n, number: true },
  ];
  page(
    `Outliers ${m.name}`,
    [link(to(), all.title), link(to('s', id), m.name), 'outliers'],
    h('h1', {}, 'Outlier tokens ', soft(m.place)),
    para(
      `${whole(m.outliers)} tokens have an activation of norm above the bound ` +
        `of the SAE\u2019s card (${bounds}). Nearly every feature fires on them, ` +
        'far above anything else, so they are left out of examples, ' +
        'histograms and counts. Build with --outliers to see everything.',
    ),
    h(
      'div',
      { class: 'grid' },
      card(
        'third',
        'By token',
        table(`outliers${id}`, columns, found.tokens, { by: 1, down: true }),
      ),
      card('two-thirds', 'In context, largest norm first', lines),
    ),
  );
  keys.up = () => goTo('s', id);
}
