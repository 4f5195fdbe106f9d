'use strict';
// The features of one SAE: a search over tokens, labels and numbers.

const searches = {}; // by SAE, kept while its pages are looked at
const DENSE = 0.1;
const SEP = '\u0000';

function listRows(data) {
  return data.density.map((density, j) => {
    const ids = [...data.word[j], ...data.logit[j]];
    const texts = ids.map((t) => shown(piece(t)));
    const bare = texts.map((t) => t.trim().toLowerCase());
    return {
      j,
      density,
      max: data.max[j],
      words: data.word[j],
      logits: data.logit[j],
      label: data.label[j],
      score: data.score[j],
      verdict: data.verdict && data.verdict[j],
      q: data.q && data.q[j],
      kl: data.kl && data.kl[j],
      exact: texts.join(SEP),
      tokens: bare.join(SEP),
      text: data.label[j].toLowerCase(),
    };
  });
}

// 'the' and ' the' are one question; `exact` asks for the piece as it is.
function matcher(state, rows) {
  const query = state.query;
  if (!query) return () => true;
  if (state.exact) {
    const wanted = query.replace(/\u2423/g, ' ');
    return (r) => r.exact.split(SEP).includes(wanted);
  }
  const bare = query.trim().toLowerCase();
  const has = (r) => r.tokens.split(SEP).includes(bare);
  const some = rows.some(has);
  return (r) =>
    String(r.j) === bare ||
    r.text.includes(bare) ||
    (some ? has(r) : r.tokens.includes(bare));
}

function listColumns(query, { id, data }) {
  return [
    {
      name: 'feature',
      get: (r) => r.j,
      show: (r) => link(to('s', id, 'f', r.j), `#${r.j}`),
    },
    {
      name: 'fires on',
      get: (r) => r.tokens,
      show: (r) => chips(r.words, query),
      text: (r) => JSON.stringify(r.words.map(piece)),
    },
    {
      name: 'makes likelier',
      hint: 'The tokens whose logits it raises most, read off its decoder.',
      get: (r) => r.logits.map(piece).join(),
      text: (r) => JSON.stringify(r.logits.map(piece)),
      show: (r) => chips(r.logits.slice(0, 4), query),
    },
    {
      name: 'label',
      get: (r) => r.label || null,
      show: (r) => (r.label ? marked(spaced(r.label), query) : soft(DASH)),
    },
    {
      name: 'score',
      hint: 'How well the label tells firing from silent text; chance is 50 %.',
      get: (r) => r.score,
      show: (r) => percent(r.score, 2),
      number: true,
    },
    {
      name: 'density',
      hint: 'Share of tokens on which it fires.',
      get: (r) => r.density,
      show: (r) => percent(r.density, 2),
      number: true,
    },
    {
      name: 'largest',
      get: (r) => r.max,
      show: (r) => aligned(r.max),
      number: true,
    },
    ...effectColumns(data),
  ];
}

const MOST_ROWS = 200;

// The results below the search: {draw, move, open}.
function results({ id, data, rows }, state, status, result) {
  let [chosen, hits] = [0, []];
  const asked = (r) => String(r.j) === state.query.trim();
  const rare = (r) => r.density > 0 && r.density <= DENSE;
  const draw = () => {
    const matches = rows.filter(matcher(state, rows)).filter(hasVerdict(state));
    const query = state.exact ? '' : state.query.trim().toLowerCase();
    const kept_ = matches.filter((r) => state.all || asked(r) || rare(r));
    const made = sortable(
      `list${id}`,
      listColumns(query, { id, data }),
      { by: 5, down: true },
      MOST_ROWS,
    );
    hits = made.draw(kept_, chosen);
    const dead = matches.filter((r) => r.density === 0).length;
    const dense = matches.filter((r) => r.density > DENSE).length;
    const left = state.all
      ? ''
      : `; left out: ${dead} that never fired, ${dense} dense`;
    const cut = hits.length > MOST_ROWS ? `; the first ${MOST_ROWS} shown` : '';
    status.textContent = `${whole(hits.length)} features${left}${cut}`;
    fill(result, made.node);
  };
  const move = (by) => {
    chosen = Math.max(0, Math.min(hits.length - 1, chosen + by));
    draw();
    const here = result.querySelector('tr.here');
    if (here) here.scrollIntoView({ block: 'nearest' });
  };
  const open = () => {
    const number_ = rows.find(asked);
    const hit = number_ || hits[chosen];
    if (hit) goTo('s', id, 'f', hit.j);
  };
  const first = () => {
    chosen = 0;
    draw();
  };
  return { draw: first, move, open };
}

function check(name, state, key, draw) {
  const box = h('input', {
    type: 'checkbox',
    onchange: (e) => {
      state[key] = e.target.checked;
      draw();
    },
  });
  box.checked = state[key];
  return h('label', { class: 'soft' }, box, ' ' + name);
}

function densityPlot(id, rows) {
  const alive = rows.filter((r) => r.density > 0 && r.max > 0);
  if (!alive.length) return null;
  const points = alive.map((r) => ({
    x: r.density,
    y: r.max,
    r: 1.8,
    j: r.j,
    title: `#${r.j}`,
  }));
  const labels = { x: 'density', y: 'largest activation', log: 'xy' };
  return plot(points, [], labels, (p) => goTo('s', id, 'f', p.j));
}

function sidebar(id, m, rows) {
  const near = m.near.map((n) =>
    h('li', {}, link(to('c', id, n), all.members[n].name)),
  );
  return card(
    'third',
    'Density and largest activation',
    densityPlot(id, rows),
    near.length ? [h('h2', {}, 'Compare with'), h('ul', {}, near)] : null,
    m.outliers
      ? para(
          link(to('s', id, 'o'), `${whole(m.outliers)} outlier tokens`),
          ' were left out.',
        )
      : null,
    effectSummary(m),
  );
}

async function list(id, stale) {
  const m = all.members[id];
  const data = await load(`m${id}/list`);
  const rows = listRows(data);
  if (stale()) return;
  const state = (searches[id] ||= { query: '', exact: false, all: false });
  const result = h('div', {});
  const status = h('p', { class: 'soft', role: 'status' });
  const made = results({ id, data, rows }, state, status, result);
  const search = h('input', {
    type: 'search',
    placeholder: 'a token, a word of a label, a number',
    'aria-label': 'Search features',
    oninput: (e) => {
      state.query = e.target.value;
      made.draw();
    },
  });
  search.value = state.query;
  const bar = h(
    'div',
    { class: 'bar' },
    search,
    check('exact piece (type a space for \u2423)', state, 'exact', made.draw),
    check('include dead and dense', state, 'all', made.draw),
    effectFilter(data, state, made.draw),
  );
  page(
    m.name,
    [link(to(), all.title), m.name],
    h(
      'h1',
      {},
      m.place,
      soft(` ${m.widthName} ${m.architecture}, L0 ${number(m.meanL0)}`),
    ),
    served ? para(link(to('live', id), 'Try it on your own text')) : null,
    h(
      'div',
      { class: 'grid' },
      card('two-thirds', '', bar, status, result),
      sidebar(id, m, rows),
    ),
  );
  made.draw();
  keys.move = made.move;
  keys.open = made.open;
  keys.find = () => search.focus();
  keys.random = () => openRandom(id, rows);
}

function openRandom(id, rows) {
  const alive = rows.filter((r) => r.density > 0);
  if (!alive.length) return;
  const pick = alive[Math.floor(Math.random() * alive.length)];
  goTo('s', id, 'f', pick.j);
}
