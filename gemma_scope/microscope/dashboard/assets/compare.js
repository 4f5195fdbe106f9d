'use strict';
// Two SAEs of one site: features matched by their decoders.

function pairLink(id, data, j) {
  return [
    link(to('s', id, 'f', j), `#${j}`),
    ' ',
    chips(data.word[j].slice(0, 2)),
  ];
}

function matches(there, back, la, lb) {
  const rows = there.match
    .map((match, j) => ({ j, match, cosine: there.cosine[j] }))
    .filter((r) => la.density[r.j] > 0);
  const mutual = rows.filter(
    (r) => back.match[r.match[0]][0] === r.j && r.cosine[0] > 0.7,
  ).length;
  const split = {};
  back.match.forEach((match, j) => {
    const cosine = back.cosine[j][0];
    if (lb.density[j] > 0 && cosine > 0.6) {
      (split[match[0]] ||= []).push([j, cosine]);
    }
  });
  const several = Object.entries(split)
    .filter(([, v]) => v.length > 1)
    .sort((x, y) => y[1].length - x[1].length);
  const absorbed = rows.filter(
    (r) => r.cosine[1] > 0.5 && la.density[r.j] > 2 * lb.density[r.match[0]],
  );
  return { rows, mutual, several, absorbed };
}

function cosines(rows) {
  const bins = 20;
  const edges = Array.from({ length: bins + 1 }, (_, i) => (i || 0.5) / bins);
  const bin = (r) =>
    Math.min(bins - 1, Math.floor(bins * Math.max(r.cosine[0], 0)));
  const counts = Array.from(
    { length: bins },
    (_, i) => rows.filter((r) => bin(r) === i).length,
  );
  return histogram(counts, edges, { x: 'cosine', y: 'features' });
}

function matchTable(a, b, la, lb, rows) {
  const columns = [
    { name: 'feature', get: (r) => r.j, show: (r) => pairLink(a, la, r.j) },
    {
      name: 'nearest',
      get: (r) => r.match[0],
      show: (r) => pairLink(b, lb, r.match[0]),
    },
    {
      name: 'cosine',
      get: (r) => r.cosine[0],
      show: (r) => number(r.cosine[0], 2),
      number: true,
    },
    {
      name: 'density',
      get: (r) => la.density[r.j],
      show: (r) => percent(la.density[r.j], 2),
      number: true,
    },
  ];
  return table(`compare${a}-${b}`, columns, rows, { by: 2, down: true }, 150);
}

function splitTable(a, b, la, lb, several) {
  const line = ([j, parts]) =>
    h(
      'tr',
      {},
      h('td', {}, pairLink(a, la, Number(j))),
      h(
        'td',
        {},
        parts.map(([k]) => [pairLink(b, lb, k), ' ']),
      ),
    );
  return h('table', {}, h('tbody', {}, several.slice(0, 40).map(line)));
}

function absorbedTable(a, b, la, lb, absorbed) {
  const line = (r) =>
    h(
      'tr',
      {},
      h('td', {}, pairLink(a, la, r.j)),
      h(
        'td',
        {},
        r.match.slice(0, 2).map((k) => [pairLink(b, lb, k), ' ']),
      ),
    );
  return h('table', {}, h('tbody', {}, absorbed.slice(0, 40).map(line)));
}

async function comparison(a, b, stale) {
  const [A, B] = [all.members[a], all.members[b]];
  if (!B || !A.near.includes(b))
    throw new Error('These two SAEs were not compared.');
  const [there, back, la, lb] = await Promise.all([
    load(`m${a}/to${b}`),
    load(`m${b}/to${a}`),
    load(`m${a}/list`),
    load(`m${b}/list`),
  ]);
  if (stale()) return;
  const { rows, mutual, several, absorbed } = matches(there, back, la, lb);
  const none = note('None.');
  page(
    'Compare',
    [link(to(), all.title), 'compare'],
    h('h1', {}, 'Compare'),
    para(link(to('s', a), A.name), ' with ', link(to('s', b), B.name)),
    h(
      'div',
      { class: 'grid' },
      card(
        'third',
        'Matched',
        para(
          `${mutual} of ${rows.length} features that fire are each other\u2019s ` +
            'nearest decoder, with a cosine above 0.7.',
        ),
        cosines(rows),
      ),
      card(
        'two-thirds',
        'Features of the first, by their nearest in the second',
        matchTable(a, b, la, lb, rows),
      ),
      card(
        'half',
        'Split: one here, several there',
        several.length ? splitTable(a, b, la, lb, several) : none,
      ),
      card(
        'half',
        'Perhaps absorbed',
        note(
          'Twice as frequent here as their nearest there, which is close to ' +
            'a second one: candidates, not proof.',
        ),
        absorbed.length ? absorbedTable(a, b, la, lb, absorbed) : note('None.'),
      ),
    ),
  );
}
