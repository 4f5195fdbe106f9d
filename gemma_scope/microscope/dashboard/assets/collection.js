'use strict';
// The first page: what the SAEs are, how good they are, where to begin.

const figureOf = (m, key) => m.metrics[key] || null;
const valueOf = (m, key) => (m.metrics[key] || {}).value ?? null;
const controlOf = (m, key) => (m.metrics.control[key] || {}).value ?? null;
const goTo = (...parts) => {
  location.hash = to(...parts);
};

const FIGURES = {
  fvu: ['FVU', 'Fraction of variance unexplained: lower is better.'],
  delta_loss: [
    '\u0394 loss',
    'Loss added, in nats a token, when the SAE takes the place of the ' +
      'activation.',
  ],
};

function figureColumns() {
  return Object.entries(FIGURES).flatMap(([key, [name, text]]) => [
    {
      name,
      hint: text,
      get: (m) => valueOf(m, key),
      show: (m) => measured(figureOf(m, key)),
      number: true,
    },
    {
      name: name + ' of control',
      hint: 'The same for a random SAE of this shape and sparsity.',
      get: (m) => controlOf(m, key),
      show: (m) => soft(measured(m.metrics.control[key])),
      number: true,
    },
  ]);
}

function collectionColumns() {
  const l0 = (m) => valueOf(m, 'l0') ?? m.meanL0;
  return [
    { name: 'site', get: (m) => m.place, link: (m) => to('s', m.id) },
    {
      name: 'width',
      get: (m) => m.width,
      show: (m) => m.widthName,
      number: true,
    },
    { name: 'type', get: (m) => m.architecture },
    {
      name: 'L0',
      hint: 'Features that fire on a token, on average.',
      get: l0,
      show: (m) => measured(figureOf(m, 'l0') || { value: m.meanL0 }),
      number: true,
    },
    ...figureColumns(),
    {
      name: 'dead',
      hint: 'Features that never fired here.',
      get: (m) => m.dead,
      number: true,
    },
    {
      name: 'dense',
      hint: 'Features that fire on more than 10 % of tokens.',
      get: (m) => m.dense,
      number: true,
    },
    { name: 'labelled', get: (m) => m.labelled, number: true },
  ];
}

// One facet a layer and kind of site, as in the release's frontier figure.
function frontier(members, key) {
  const text = (m, v) => `${m.name}: ${FIGURES[key][0]} ${number(v)}`;
  const points = members.map((m) => ({
    x: valueOf(m, 'l0'),
    y: valueOf(m, key),
    m,
    title: text(m, valueOf(m, key)),
  }));
  const controls = members.map((m) => ({
    x: valueOf(m, 'l0'),
    y: controlOf(m, key),
    control: true,
    title: 'control of ' + text(m, controlOf(m, key)),
  }));
  const drawn = [...points, ...controls].filter((p) => p.x > 0 && p.y > 0);
  if (!drawn.length) return null;
  const groups = {};
  for (const p of points.filter((q) => q.x > 0 && q.y > 0)) {
    (groups[`${p.m.width} ${p.m.architecture}`] ||= []).push(p);
  }
  const lines = Object.values(groups).map((g) => g.sort((a, b) => a.x - b.x));
  const labels = { x: 'L0', y: FIGURES[key][0], log: 'xy' };
  return plot(drawn, lines, labels, (p) => goTo('s', p.m.id));
}

function facets() {
  const sites = [...new Set(all.members.map((m) => m.place))];
  const facet = (place) => {
    const here = all.members.filter((m) => m.place === place);
    const plots = Object.keys(FIGURES).map((key) => frontier(here, key));
    if (!plots.some(Boolean)) return null;
    return card('third', place, plots);
  };
  const drawn = sites.map(facet).filter(Boolean);
  if (!drawn.length) return null;
  const legend = note(
    h('span', { class: 'key dot' }),
    ' an SAE (a click opens it); a line joins the same width and type at ' +
      'several sparsities. ',
    h('span', { class: 'key control' }),
    ' its control: a random SAE of the same shape and sparsity. Down and to ' +
      'the left is better.',
  );
  const details = h(
    'details',
    drawn.length > 6 ? {} : { open: '' },
    h('summary', {}, `Sparsity against error, ${drawn.length} sites`),
    legend,
    h('div', { class: 'grid' }, drawn),
  );
  return card('', 'Frontier', details);
}

function matrix() {
  const values = (get) => [...new Set(all.members.map(get))];
  const layers = values((m) => m.layer).sort((a, b) => a - b);
  const columns = values((m) => `${m.kind} ${m.widthName}`);
  const cellOf = (layer, column) =>
    all.members
      .filter((m) => m.layer === layer && `${m.kind} ${m.widthName}` === column)
      .sort((a, b) => a.meanL0 - b.meanL0)
      .map((m) => [
        hint(
          link(to('s', m.id), number(valueOf(m, 'l0') ?? m.meanL0, 2)),
          m.name,
        ),
        ' ',
      ]);
  const head = columns.map((c) => h('th', { scope: 'col' }, c));
  const row = (layer) =>
    h(
      'tr',
      {},
      h('th', { scope: 'row' }, `layer ${layer}`),
      columns.map((c) => h('td', { class: 'number' }, cellOf(layer, c))),
    );
  return card(
    '',
    'Layer, site and width; each number is an SAE by its L0',
    h(
      'div',
      { class: 'scroll', tabindex: '0' },
      h(
        'table',
        { class: 'matrix' },
        h('thead', {}, h('tr', {}, h('td', {}), head)),
        h('tbody', {}, layers.map(row)),
      ),
    ),
  );
}

function begin() {
  if (!all.start.length) return null;
  const one = (s) => {
    const m = all.members[s.member];
    return h(
      'div',
      { class: 'third card' },
      h('h2', {}, soft(m.place)),
      para(link(to('s', s.member, 'f', s.feature), spaced(s.text))),
      note(s.why),
    );
  };
  return [
    h('h2', { class: 'section' }, 'Three features to start with'),
    h('div', { class: 'grid' }, all.start.map(one)),
  ];
}

function collection() {
  const count = all.members.length;
  page(
    'Microscope',
    [all.title],
    h('h1', {}, all.title),
    note(
      `${all.model}${weightsOf()}, read on ${whole(all.sequences)} sequences of ` +
        `${all.corpus.name} (${all.corpus.split})${all.date ? ', ' + all.date : ''}`,
    ),
    para(
      'A sparse autoencoder (SAE) writes an activation of the language model ' +
        'as a sum of a few features out of many. These pages show, for ' +
        `${count === 1 ? 'one SAE' : `${count} SAEs`}, the text on which each ` +
        'feature fires and the tokens that it makes likelier. Every figure ' +
        'stands beside a control; press ? for the terms and the keys.',
    ),
    begin(),
    h(
      'div',
      { class: 'grid' },
      facets(),
      matrix(),
      card(
        '',
        'All SAEs',
        table('all', collectionColumns(), all.members, { by: 0 }),
      ),
    ),
    all.members.some(graphed)
      ? para(link(to('graph'), 'Open a saved attribution graph'))
      : null,
  );
}
