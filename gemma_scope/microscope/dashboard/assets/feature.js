'use strict';
// One feature: where it fires, how strongly, what it writes, its neighbours.

const reading = { wide: false, breaks: false, drawn: [] }; // of examples
const NARROW = 12; // tokens on either side of the peak

// A record's examples: where each is, the tokens and the activations there.
// Beyond the window that was kept, activations are unknown and not shaded.
async function unpackExamples(f) {
  const count = f.at.length / 2;
  const shares = halves(f.values);
  const width = count ? shares.length / count : 0;
  const all_ = [];
  for (let e = 0; e < count; e += 1) {
    const [sequence, position] = f.at.slice(2 * e, 2 * e + 2);
    const start = position - Math.floor(width / 2);
    const own = shares.slice(e * width, (e + 1) * width).map((v) => v * f.max);
    const document_ = (f.documents || [])[e];
    const value = (t) => own[t - start] ?? 0;
    all_.push({ sequence, position, document_, value });
  }
  const silent = f.silent.map((sequence) => ({
    sequence,
    position: null,
    value: () => 0,
  }));
  await Promise.all(
    [...all_, ...silent].map(async (e) => {
      const chunk = await load(`t${Math.floor(e.sequence / all.chunk)}`);
      e.ids = chunk[e.sequence % all.chunk];
    }),
  );
  const tenths = [];
  let first = f.top;
  f.tenths.forEach((n, i) => {
    if (n) tenths.push({ q: 10 - i, examples: all_.slice(first, first + n) });
    first += n;
  });
  return { top: all_.slice(0, f.top), tenths, silent };
}

function exampleTokens(f, e) {
  const middle = e.position ?? 0;
  const reach = reading.wide || e.position === null ? 64 : NARROW;
  const first = Math.max(middle - reach, 0);
  const ids = e.ids.slice(first, middle + reach + 1);
  const peak = e.position === null ? undefined : middle - first;
  const values = ids.map((_, i) => e.value(first + i));
  const spans = tokens(ids.map(piece), values, f.max, peak);
  const ends = (id) => reading.breaks && /\n|<0x0A>/.test(piece(id));
  return ids.map((id, i) => (ends(id) ? [spans[i], '\n'] : spans[i]));
}

function example(f, e) {
  const value = e.position === null ? 0 : e.value(e.position);
  const where =
    (missing(e.document_) ? '' : `document ${e.document_}, `) +
    `sequence ${e.sequence}` +
    (e.position === null ? '' : `, token ${e.position}`);
  const label = h('span', { class: 'value', tabindex: '0' }, number(value));
  return h('div', { class: 'tokens' }, hint(label, where), exampleTokens(f, e));
}

// Examples, drawn again when the reader changes how they are shown.
function examples(f, list_) {
  const node = h('div', {});
  const draw = () =>
    fill(
      node,
      list_.map((e) => example(f, e)),
    );
  draw();
  reading.drawn.push(draw);
  return node;
}

function readingBar() {
  const redraw = () => reading.drawn.forEach((draw) => draw());
  return h(
    'div',
    { class: 'bar' },
    check('wide context', reading, 'wide', redraw),
    check('line breaks', reading, 'breaks', redraw),
  );
}

function labelLine(f) {
  const label = f.label;
  if (!label)
    return note('No label yet: the title shows the tokens that it fires on.');
  const other = missing(label.control)
    ? ''
    : `; another feature\u2019s label ${percent(label.control, 2)}`;
  const score = missing(label.score)
    ? 'too few held-out examples to score it.'
    : `it tells firing from silent text in ${percent(label.score, 2)} of ` +
      `held-out examples (chance 50 %${other})` +
      (label.low
        ? ': not shown to be better than chance or another label.'
        : '.');
  return (label.low ? warning : note)(`Label by ${label.by}; `, score);
}

function state(f) {
  if (f.fired === 0) {
    return warning(
      'This feature is dead here: it fired on none of the ' +
        `${whole(f.tokens)} tokens. It has no examples; what its decoder ` +
        'writes is shown below.',
    );
  }
  if (f.density > DENSE) {
    return warning(
      `This feature is dense: it fires on ${percent(f.density, 2)} of all ` +
        'tokens. Such features rarely stand for one thing.',
    );
  }
  return null;
}

function facts(f) {
  const rows = [
    [
      'density',
      `${percent(f.density, 2)} (95 %: ${percent(f.low, 2)} to ${percent(f.high, 2)})`,
    ],
    ['tokens', `${whole(f.fired)} of ${whole(f.tokens)}`],
    ['largest', number(f.max)],
    ['mean where it fires', f.fired ? number(f.mean) : DASH],
    ['threshold', number(f.threshold)],
    ['norm of encoder', number(f.encoder)],
    ['norm of decoder', number(f.decoder)],
    ['their cosine', number(f.cosine)],
  ];
  if (f.outliers)
    rows.push(['outlier tokens', `fires on ${whole(f.outliers)}`]);
  return card(
    'third',
    'How often, how strongly',
    h(
      'dl',
      {},
      rows.map(([k, v]) => [h('dt', {}, k), h('dd', {}, v)]),
    ),
  );
}

function distribution(f) {
  const labels = { x: 'activation', y: 'tokens', mark: f.threshold };
  const drawn = histogram(f.histogram, all.edges, labels);
  if (!drawn) return null;
  const text = f.threshold > 0 ? 'The dashed line is the threshold.' : null;
  return card('third', 'Activations', drawn, text ? note(text) : null);
}

function logitTable(name, pairs, kind) {
  const line = ([t, v]) =>
    h('tr', {}, h('td', {}, chip(t)), h('td', { class: 'number' }, number(v)));
  return h(
    'div',
    { class: kind },
    h('h3', {}, name),
    h('table', {}, h('tbody', {}, pairs.map(line))),
  );
}

function logits(f) {
  if (!f.positive) {
    return card(
      'third',
      'Logits',
      note('It does not write to a residual stream.'),
    );
  }
  return card(
    'third',
    'Logits per unit of activation',
    h(
      'div',
      { class: 'columns' },
      logitTable('raises', f.positive, 'raises'),
      logitTable('lowers', f.negative, 'lowers'),
    ),
    note('Direct path through the final norm\u2019s gain (logit lens).'),
  );
}

function related(id, data, title, pairs, about) {
  if (!pairs.length) return null;
  const line = ([k, v]) =>
    h(
      'tr',
      {},
      h('td', {}, link(to('s', id, 'f', k), `#${k}`)),
      h('td', {}, soft(callNamed(data, k))),
      h('td', { class: 'number' }, aligned(v, 2)),
    );
  return [
    hint(h('h2', {}, title), about),
    h('table', {}, h('tbody', {}, pairs.slice(0, 8).map(line))),
  ];
}

function tenth(f, { q, examples: list_ }, open) {
  const range = `${number((f.max * (q - 1)) / 10)} to ${number((f.max * q) / 10)}`;
  return h(
    'details',
    open ? { open: '' } : {},
    h('summary', {}, range),
    examples(f, list_),
  );
}

function steps(id, j, m, rows) {
  const jump = h('input', {
    type: 'number',
    min: '0',
    max: String(m.width - 1),
    'aria-label': 'Feature number',
    size: '7',
  });
  const go = (event) => {
    event.preventDefault();
    if (jump.value !== '') goTo('s', id, 'f', Number(jump.value));
  };
  const step = (by) => () => {
    const k = j + by;
    if (k >= 0 && k < m.width) goTo('s', id, 'f', k);
  };
  const random = () => openRandom(id, rows);
  Object.assign(keys, { move: (by) => step(by)(), random });
  keys.up = () => goTo('s', id);
  keys.open = () => {};
  return h(
    'form',
    { class: 'bar', onsubmit: go },
    button('\u2190 previous', step(-1)),
    button('next \u2192', step(1)),
    button('random', random),
    jump,
    h('button', { class: 'plain', type: 'submit' }, 'go to'),
  );
}

function featureCards(id, f, data, shown_) {
  const m = all.members[id];
  const near = [
    related(
      id,
      data,
      'Nearest decoders (cosine)',
      f.near,
      'Features that write in a similar direction.',
    ),
    related(
      id,
      data,
      'Fires with (Jaccard)',
      f.with,
      'Share of their tokens on which both fire.',
    ),
  ].filter(Boolean);
  const aside = (kind) => near.length && h('section', { class: kind }, near);
  const firing = f.fired
    ? [exampleCards(f, shown_, aside('third card'))]
    : aside('two-thirds card');
  const effect = effectCard(f, m);
  const cards = [facts(f), distribution(f), logits(f), effect, firing];
  return h('div', { class: 'grid' }, cards.flat().filter(Boolean));
}

function exampleCards(f, { top, tenths, silent }, aside) {
  const quiet = h('summary', {}, `${silent.length} sequences without it`);
  return [
    card(
      'two-thirds',
      'Largest activations, one a document',
      readingBar(),
      examples(f, top),
    ),
    aside,
    card(
      '',
      'Samples from each tenth of its range, largest first',
      tenths.map((t, i) => tenth(f, t, i < 2)),
    ),
    silent.length
      ? card('', '', h('details', {}, quiet, examples(f, silent)))
      : null,
  ];
}

async function feature(id, j, stale) {
  const m = all.members[id];
  if (!(Number.isInteger(j) && j >= 0 && j < m.width)) {
    throw new Error(
      `${m.name} has ${whole(m.width)} features, from #0 on; there is no #${j}.`,
    );
  }
  const [chunk, data] = await Promise.all([
    load(`m${id}/c${Math.floor(j / all.chunk)}`),
    load(`m${id}/list`),
  ]);
  if (stale()) return;
  const f = { ...chunk[j % all.chunk], tokens: m.tokens };
  const shown_ = await unpackExamples(f);
  if (stale()) return;
  reading.drawn = [];
  page(
    `#${j} ${m.name}`,
    [link(to(), all.title), link(to('s', id), m.name), `#${j}`],
    h('h1', {}, `#${j} `, callNamed(data, j)),
    note(
      `${m.place}, ${m.widthName} ${m.architecture}, L0 ${number(m.meanL0)}`,
    ),
    labelLine(f),
    state(f),
    steps(id, j, m, listRows(data)),
    served && f.fired
      ? para(
          link(
            to('live', id, 'f', j),
            'Steer with it, or see it on your own text',
          ),
        )
      : null,
    featureCards(id, f, data, shown_),
  );
}
