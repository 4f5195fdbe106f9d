'use strict';
// The live view: a text of one's own, its latents, changes and causes.

const liveStates = {}; // of each SAE, kept while its pages are looked at
const CODE =
  'def read(self, path):\n    with open(path) as f:\n        return f.';
const PROSE = 'The new version of the program is much faster';
const firstText = () => (/gemma/.test(all.title) ? PROSE : CODE);

function liveState(id, first) {
  const state = (liveStates[id] ||= {
    text: firstText(),
    changes: [],
    seed: 0,
    temperature: 0.5,
    tokens: 48,
    a: '',
    b: '',
    dense: false,
    more: false,
    pinned: null,
  });
  if (first !== null && !state.changes.some((c) => c.feature === first)) {
    state.changes.push({ feature: first, kind: 'add', strength: 1 });
  }
  return state;
}

// What all parts of the view share: the SAE, its list, names and questions.
function liveView(id, state, list_) {
  const view = { id, state, list: list_, add: () => {} };
  view.name = (j) => [
    link(to('s', id, 'f', j), `#${j}`),
    ' ',
    soft(callNamed(list_, j)),
  ];
  view.question = () => ({
    member: id,
    text: state.text,
    logit: state.a === '' ? null : [state.a, state.b === '' ? null : state.b],
  });
  return view;
}

// The latents of a text, by share of their largest activation.
function ranked(found, list_) {
  const best = new Map();
  found.latents.forEach((row, t) =>
    row.forEach(([j, v]) => {
      const one = best.get(j) || { j, most: 0, at: new Map() };
      one.most = Math.max(one.most, v);
      one.at.set(t, v);
      best.set(j, one);
    }),
  );
  for (const one of best.values()) {
    one.largest = list_.max[one.j] || one.most;
    one.share = one.most / one.largest;
  }
  return best;
}

// The text as tokens, and the notes beside them.
function reader(view, found, nodes) {
  const { state, list: list_ } = view;
  const best = ranked(found, list_);
  const dense = (j) => list_.density[j] > DENSE;
  const texts = decoded(found.pieces);
  const spans = texts.map((text, t) => {
    const name = `token ${t}: ${named(found.pieces[t])}`;
    const pressable = { tabindex: '0', role: 'button', 'aria-label': name };
    return h('span', { class: 'token', ...pressable }, text);
  });
  const paint_ = (one) =>
    spans.forEach((span, t) => {
      const value = one ? (one.at.get(t) || 0) / one.largest : 0;
      span.style.backgroundColor = heat(value).backgroundColor || '';
    });
  const row = (j, values) => {
    const line = h(
      'tr',
      {},
      h('td', {}, view.name(j)),
      values.map((v) => h('td', { class: 'number' }, v)),
      h(
        'td',
        {},
        button('change', () => view.add(j)),
      ),
    );
    const show_ = () => paint_(best.get(j));
    line.addEventListener('pointerenter', show_);
    line.addEventListener('focusin', show_);
    line.addEventListener('pointerleave', () => paint_(null));
    return line;
  };
  const shownToken = (t) => {
    const here_ = found.latents[t].filter(([j]) => state.dense || !dense(j));
    fill(nodes.token, tokenPanel(found, t, here_.slice(0, 12), row, state));
  };
  pinning(spans, state, shownToken);
  const every = [...best.values()].sort((x, y) => y.share - x.share);
  fill(nodes.latents, latentsPanel(view, every, dense, row, nodes.read));
  return h('div', { class: 'tokens', id: 'text' }, spans);
}

// A token is looked at by pointing, and pinned by a click until the next one.
function pinning(spans, state, look) {
  const last = spans.length - 1;
  if (state.pinned > last) state.pinned = null;
  const mark = () =>
    spans.forEach((span, t) => {
      span.classList.toggle('pinned', t === state.pinned);
      span.setAttribute('aria-pressed', String(t === state.pinned));
    });
  const point = (t) => () => {
    if (state.pinned === null) look(t);
  };
  const pin = (t) => () => {
    state.pinned = state.pinned === t ? null : t;
    mark();
    look(t);
  };
  spans.forEach((span, t) => {
    span.addEventListener('pointerenter', point(t));
    span.addEventListener('focus', point(t));
    span.addEventListener('click', pin(t));
    span.addEventListener('keydown', (event) => {
      if (event.key === 'Enter' || event.key === ' ') {
        event.preventDefault();
        event.stopPropagation();
        pin(t)();
      }
    });
  });
  mark();
  look(state.pinned ?? last);
}

function tokenPanel(found, t, latents, row, state) {
  const loss = found.loss[t];
  const facts_ = found.counts[t]
    ? `${found.l0[t]} features fire; ${percent(found.unexplained[t], 2)} of the ` +
      `activation is not explained` +
      (missing(loss) ? '.' : `; loss ${number(loss)} nats.`)
    : found.outliers[t]
      ? 'An outlier: its norm is above the bound of the SAE, which was not ' +
        'trained on such tokens. Its features are not shown.'
      : 'No SAE was trained on this token: its features are not shown.';
  const next = found.next[t].map(([p, q]) => [chipOf(p), ` ${percent(q, 2)} `]);
  return [
    h(
      'h2',
      {},
      'Token ',
      chipOf(found.pieces[t]),
      state.pinned === t ? ' pinned' : '',
    ),
    note(facts_),
    h(
      'table',
      {},
      h(
        'tbody',
        {},
        latents.map(([j, v]) => row(j, [number(v)])),
      ),
    ),
    note('Next: ', next),
  ];
}

function latentsPanel(view, every, dense, row, read) {
  const { state } = view;
  const hidden = every.filter((one) => dense(one.j)).length;
  const rows = every
    .filter((one) => state.dense || !dense(one.j))
    .slice(0, state.more ? 100 : 12);
  const head = ['feature', 'largest', 'share', 'tokens', ''].map((name, i) =>
    h('th', { class: i && i < 4 ? 'number' : null }, name),
  );
  const more = () => {
    state.more = true;
    read();
  };
  return [
    h('h2', {}, 'Features of the text'),
    note(
      'By share of their largest activation; point at one to see where ' +
        'it fires. ',
      check(`include ${hidden} dense`, state, 'dense', read),
    ),
    h(
      'div',
      { class: 'scroll', tabindex: '0' },
      h(
        'table',
        {},
        h('thead', {}, h('tr', {}, head)),
        h(
          'tbody',
          {},
          rows.map((one) =>
            row(one.j, [number(one.most), percent(one.share, 2), one.at.size]),
          ),
        ),
      ),
    ),
    state.more || every.length <= 12 ? null : button('more', more),
  ];
}

async function live(id, first, stale) {
  const m = all.members[id];
  if (!served) {
    throw new Error('The live view needs "gemma-scope microscope serve".');
  }
  if (
    first !== null &&
    !(Number.isInteger(first) && first >= 0 && first < m.width)
  ) {
    throw new Error(`${m.name} has no feature ${first}.`);
  }
  const list_ = await load(`m${id}/list`);
  if (stale()) return;
  const state = liveState(id, first);
  const view = liveView(id, state, list_);
  const nodes = {
    text: h('div', {}),
    token: h('div', {}),
    latents: h('div', {}),
  };
  const status = h('div', {});
  const reading_ = async () => {
    const found = await ask('read', { member: id, text: state.text });
    return () => reader(view, found, nodes);
  };
  const clear = () =>
    [nodes.token, nodes.latents].forEach((node) => fill(node));
  nodes.read = run(nodes.text, reading_, clear);
  const text = h('textarea', {
    rows: '5',
    'aria-label': 'Text',
    oninput: (e) => {
      state.text = e.target.value;
    },
  });
  text.value = state.text;
  page(
    `Live ${m.name}`,
    [link(to(), all.title), link(to('s', id), m.name), 'live'],
    h(
      'h1',
      {},
      'Your text ',
      soft(`${m.place} ${m.widthName}, L0 ${number(m.meanL0)}`),
    ),
    status,
    h(
      'div',
      { class: 'grid' },
      h(
        'div',
        { class: 'two-thirds stack' },
        card(
          '',
          'Text',
          text,
          h(
            'div',
            { class: 'bar' },
            button('Read', nodes.read),
            soft('BOS is added in front; click a token to pin it.'),
          ),
          nodes.text,
        ),
        changesCard(view),
        causesCard(view, m),
      ),
      h(
        'aside',
        { class: 'third sticky', tabindex: '0', 'aria-label': 'Features' },
        h('div', { class: 'card', id: 'token' }, nodes.token),
        h('div', { class: 'card', id: 'latents' }, nodes.latents),
      ),
    ),
  );
  keys.up = () => goTo('s', id);
  nodes.read();
  warm(id, status, stale);
}
