'use strict';
// Data come as scripts, since pages from a file may fetch nothing else: each
// calls scope(key, text), text being gzipped JSON in base64.
const waiting = {}, known = {};
function scope(key, text) { waiting[key](text); }
window.scope = scope;

function load(key) {
  known[key] = known[key] || new Promise((resolve, reject) => {
    waiting[key] = resolve;
    const script = h('script', { src: `data/${key}.js` });
    script.addEventListener('error', () => reject(new Error(`data/${key}.js is missing`)));
    document.head.append(script);
  }).then(async (text) => {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('gzip'));
    return JSON.parse(await new Response(stream).text());
  });
  return known[key];
}

// float16 shares of the largest value in base64, as an example has them.
function halves(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0)), view = new DataView(bytes.buffer);
  return Array.from({ length: bytes.length / 2 }, (_, i) => {
    const bits = view.getUint16(2 * i, true), exponent = (bits >> 10) & 31, rest = bits & 1023;
    const size = exponent ? 2 ** (exponent - 15) * (1 + rest / 1024) : 2 ** -24 * rest;
    return bits >> 15 ? -size : size;
  });
}

let all, vocabulary;
const served = location.protocol.startsWith('http'); // by launch/microscope.py serve
const main = document.getElementById('main');
const piece = (id) => vocabulary[id] ?? '\ufffd';
const percent = (x) => x === null || x === undefined ? '\u2013' : number(100 * x) + ' %';
const chip = (id, title) => hint(h('span', { class: 'chip' }, named(piece(id))), title || `token ${id}`);
const chips = (ids) => ids.map((id) => chip(id));
const to = (...parts) => '#/' + parts.join('/');

function page(title, crumbs, ...content) {
  document.title = title;
  document.getElementById('crumbs').replaceChildren(...crumbs.flatMap((c) => [' / ', c]).slice(1));
  tip.hidden = true;
  main.replaceChildren(...content.flat(Infinity).filter(Boolean));
  const corpus = all.corpus;
  document.getElementById('footer').textContent =
    `Read on ${all.tokens.toLocaleString('en')} tokens that count, ${all.sequences.toLocaleString('en')} ` +
    `sequences of ${corpus.name} (${corpus.split}, SHA-256 ${String(corpus.sha256).slice(0, 12)}). ` +
    `Model ${all.model}, gemma_scope ${all.code}.`;
}
const card = (kind, title, ...content) => h('section', { class: 'card ' + kind }, title ? h('h2', {}, title) : null, content);

// Plots.

function plot(points, lines, { x, y, log, onpick }) {
  const [W, H, L, B] = [420, 230, 52, 34];
  const scale = (values, low, high, islog) => {
    const f = islog ? Math.log10 : (v) => v;
    let [a, b] = [Math.min(...values.map(f)), Math.max(...values.map(f))];
    if (a === b) { a -= 0.5; b += 0.5; }
    const pad = (b - a) * 0.06;
    return (v) => low + (high - low) * (f(v) - a + pad) / (b - a + 2 * pad);
  };
  const xs = points.map((p) => p.x), ys = points.map((p) => p.y);
  const sx = scale(xs, L, W - 8, log.includes('x')), sy = scale(ys, H - B, 8, log.includes('y'));
  const ends = (values) => [Math.min(...values), Math.max(...values)];
  return h('svg', { viewBox: `0 0 ${W} ${H}`, role: 'img', 'aria-label': `${y} against ${x}` },
    h('line', { class: 'axis', x1: L, x2: W - 8, y1: H - B, y2: H - B }),
    h('line', { class: 'axis', x1: L, x2: L, y1: 8, y2: H - B }),
    ends(xs).map((v) => h('text', { x: sx(v), y: H - B + 14, 'text-anchor': 'middle' }, number(v))),
    ends(ys).map((v) => h('text', { x: L - 6, y: sy(v) + 4, 'text-anchor': 'end' }, number(v))),
    h('text', { x: (L + W) / 2, y: H - 4, 'text-anchor': 'middle' }, x),
    h('text', { x: 10, y: H / 2 - 8, transform: `rotate(-90 10 ${H / 2 - 8})`, 'text-anchor': 'middle' }, y),
    lines.map((line) => h('path', { class: 'line', d: 'M' + line.map((p) => `${sx(p.x)},${sy(p.y)}`).join('L') })),
    points.map((p) => {
      const dot = h('circle', { class: p.control ? 'control' : 'dot', cx: sx(p.x), cy: sy(p.y), r: p.r || 3.5 },
        h('title', {}, p.title));
      if (onpick && !p.control) { dot.addEventListener('click', () => onpick(p)); dot.style.cursor = 'pointer'; }
      return dot;
    }));
}

function bars(heights, edges, note = ' (log scale)') {
  const [W, H] = [420, 130], used = heights.map((v, i) => [v, i]).filter(([v]) => v > 0);
  if (!used.length) return h('p', { class: 'soft' }, 'It never fired.');
  const [first, last] = [used[0][1], used[used.length - 1][1]];
  const most = Math.max(...heights), wide = W / (last - first + 1);
  return h('svg', { viewBox: `0 0 ${W} ${H + 18}`, role: 'img', 'aria-label': 'histogram of values' },
    used.map(([v, i]) => h('rect', { class: 'fill', x: (i - first) * wide, width: Math.max(wide - 1, 1),
      y: H - H * v / most, height: H * v / most },
      h('title', {}, `${number(edges[i])} to ${number(edges[i + 1])}: ${v.toLocaleString('en')} tokens`))),
    h('text', { x: 0, y: H + 14 }, number(edges[first])),
    h('text', { x: W, y: H + 14, 'text-anchor': 'end' }, number(edges[last + 1]) + note));
}

// Tables that sort.

function table(columns, rows, order, pick) {
  let [by, down] = order;
  const body = h('tbody', {});
  const fill = () => {
    const get = columns[by].sort || columns[by].get;
    rows.sort((a, b) => { const [x, y] = [get(a), get(b)]; return (x > y ? 1 : x < y ? -1 : 0) * (down ? -1 : 1); });
    body.replaceChildren(...rows.map((row) => h('tr', {}, columns.map((c) => {
      const value = (c.show || c.get)(row);
      return h('td', { class: c.number ? 'number' : '' }, c.link ? h('a', { href: c.link(row) }, value) : value);
    }))));
  };
  fill();
  return h('div', { class: 'scroll' }, h('table', {}, h('thead', {}, h('tr', {}, columns.map((c, i) =>
    h('th', { class: c.number ? 'number' : '' }, h('button', { onclick: () => {
      down = by === i ? !down : Boolean(c.number); by = i; fill();
    } }, c.name))))), body));
}

// Pages.

function collection() {
  const figure = (m, key) => m.metrics && m.metrics[key] ? m.metrics[key].value : null;
  const control = (m, key) => m.metrics && m.metrics.control && m.metrics.control[key] ? m.metrics.control[key].value : null;
  const columns = [
    { name: 'site', get: (m) => m.place, link: (m) => to('s', m.id) },
    { name: 'width', get: (m) => m.width, number: true },
    { name: 'architecture', get: (m) => m.architecture },
    { name: 'L0', get: (m) => figure(m, 'l0'), show: (m) => number(figure(m, 'l0')), number: true },
    { name: 'FVU', get: (m) => figure(m, 'fvu'), show: (m) => number(figure(m, 'fvu')), number: true },
    { name: 'control', get: (m) => control(m, 'fvu'), show: (m) => number(control(m, 'fvu')), number: true },
    { name: '\u0394 loss', get: (m) => figure(m, 'delta_loss'), show: (m) => number(figure(m, 'delta_loss')), number: true },
    { name: 'control', get: (m) => control(m, 'delta_loss'), show: (m) => number(control(m, 'delta_loss')), number: true },
    { name: 'never fired', get: (m) => m.dead, number: true },
    { name: 'above 10 %', get: (m) => m.dense, number: true },
  ];
  const measured = all.members.filter((m) => figure(m, 'fvu') !== null);
  const frontier = (key, name) => {
    const points = measured.map((m) => ({ x: figure(m, 'l0'), y: figure(m, key), m,
      title: `${m.name}: ${name} ${number(figure(m, key))}` })).filter((p) => p.x > 0 && p.y > 0);
    const controls = measured.map((m) => ({ x: figure(m, 'l0'), y: control(m, key), control: true,
      title: `control of ${m.name}` })).filter((p) => p.x > 0 && p.y > 0);
    const groups = {};
    for (const p of points) (groups[`${p.m.place} ${p.m.width} ${p.m.architecture}`] ||= []).push(p);
    const lines = Object.values(groups).map((g) => g.sort((a, b) => a.x - b.x));
    return plot([...points, ...controls], lines, { x: 'L0', y: name, log: 'xy', onpick: (p) => { location.hash = to('s', p.m.id); } });
  };
  const kinds = [...new Set(all.members.map((m) => m.kind))];
  const layers = [...new Set(all.members.map((m) => m.layer))].sort((a, b) => a - b);
  page('Microscope', [all.title],
    h('h1', {}, all.title),
    h('p', { class: 'soft' }, `${all.members.length} sparse autoencoders, read in one pass. Pick one, or press / in it to search its features.`),
    h('div', { class: 'grid' },
      measured.length ? [card('half', 'Variance lost at a sparsity', frontier('fvu', 'FVU')),
        card('half', 'Loss added at a sparsity', frontier('delta_loss', '\u0394 loss, nats'))] : null,
      measured.length ? h('p', { class: 'soft card' }, 'Rings: the control of each, a random SAE of its shape and sparsity.') : null,
      card('', 'Layers and sites', h('div', { class: 'scroll' }, h('table', {},
        h('thead', {}, h('tr', {}, h('th', {}, 'layer'), kinds.map((k) => h('th', {}, k)))),
        h('tbody', {}, layers.map((layer) => h('tr', {}, h('td', {}, String(layer)), kinds.map((kind) => h('td', {},
          all.members.filter((m) => m.layer === layer && m.kind === kind).map((m) => [
            h('a', { href: to('s', m.id) }, `${m.widthName} L0 ${number(figure(m, 'l0') ?? m.meanL0, 2)}`), ' '])))))))) ),
      card('', 'All', table(columns, [...all.members], [0, false]))));
}

const shownSearch = {};
async function list(id, stale) {
  const m = all.members[id], data = await load(`m${id}/list`);
  if (stale()) return;
  const state = shownSearch[id] ||= { query: '', by: 'density', rare: false };
  const rows = data.density.map((density, j) => ({ j, density, max: data.max[j], words: data.word[j],
    logits: data.logit[j], label: data.label[j],
    text: [...data.word[j], ...data.logit[j]].map((t) => shown(piece(t))).join('\u0000').toLowerCase() + '\u0000' + (data.label[j] || '').toLowerCase() }));
  const result = h('div', {}), said = h('p', { class: 'soft' });
  let chosen = 0, hits = [];
  const orders = { density: (r) => -r.density, max: (r) => -r.max, index: (r) => r.j, rare: (r) => r.density };
  const draw = () => {
    const query = state.query.toLowerCase();
    const exact = query && rows.some((r) => r.text.split('\u0000').includes(query));
    const matches = rows.filter((r) => !query || String(r.j) === query || (exact ? r.text.split('\u0000').includes(query) : r.text.includes(query)));
    const dead = matches.filter((r) => r.density === 0).length, dense = matches.filter((r) => r.density > 0.1).length;
    const asked = (r) => String(r.j) === query;
    hits = matches.filter((r) => state.rare || asked(r) || (r.density > 0 && r.density <= 0.1));
    hits.sort((a, b) => asked(b) - asked(a) || orders[state.by](a) - orders[state.by](b) || a.j - b.j);
    said.textContent = `${hits.length.toLocaleString('en')} features` + (state.rare ? '' :
      `; left out: ${dead} that never fired, ${dense} that fire on more than 10 % of tokens`);
    result.replaceChildren(h('div', { class: 'scroll' }, h('table', {},
      h('thead', {}, h('tr', {}, ['feature', 'fires on', 'raises', 'label'].map((n) => h('th', {}, n)),
        h('th', { class: 'number' }, 'density'), h('th', { class: 'number' }, 'max'))),
      h('tbody', {}, hits.slice(0, 200).map((r, n) => h('tr', { class: n === chosen ? 'here' : '' },
        h('td', {}, h('a', { href: to('s', id, 'f', r.j) }, `#${r.j}`)),
        h('td', {}, chips(r.words)), h('td', {}, chips(r.logits.slice(0, 4))),
        h('td', {}, r.label || h('span', { class: 'soft' }, 'unlabelled')),
        h('td', { class: 'number' }, percent(r.density)), h('td', { class: 'number' }, number(r.max))))))),
    hits.length > 200 ? h('p', { class: 'soft' }, 'The first 200 are shown.') : null);
  };
  const search = h('input', { type: 'search', placeholder: 'a token, a word of a label, a number', 'aria-label': 'Search features',
    oninput: (e) => { state.query = e.target.value; chosen = 0; draw(); } });
  search.value = state.query;
  const by = h('select', { 'aria-label': 'Order', onchange: (e) => { state.by = e.target.value; draw(); } },
    [['density', 'most frequent'], ['rare', 'rarest'], ['max', 'largest value'], ['index', 'number']].map(([v, t]) =>
      h('option', { value: v }, t)));
  by.value = state.by;
  const rare = h('input', { type: 'checkbox', onchange: (e) => { state.rare = e.target.checked; draw(); } });
  rare.checked = state.rare;
  draw();
  const alive = rows.filter((r) => r.density > 0);
  page(m.name, [h('a', { href: to() }, all.title), m.name],
    h('h1', {}, m.place, h('span', { class: 'soft' }, ` ${m.widthName} ${m.architecture}, L0 ${number(m.meanL0)}`)),
    served ? h('p', {}, h('a', { href: to('live', id) }, 'Try it on your own text')) : null,
    h('div', { class: 'grid' },
      card('two-thirds', '', h('div', { class: 'bar' }, search, by, h('label', { class: 'soft' }, rare, ' with dead and dense')), said, result),
      card('third', 'Density and largest value',
        alive.length ? plot(alive.map((r) => ({ x: r.density, y: r.max, r: 1.6, j: r.j, title: `#${r.j}` })), [],
          { x: 'density', y: 'max', log: 'xy', onpick: (p) => { location.hash = to('s', id, 'f', p.j); } }) : null,
        m.near.length ? [h('h2', {}, 'Compare with'), h('ul', {}, m.near.map((n) =>
          h('li', {}, h('a', { href: to('c', id, n) }, all.members[n].name))))] : null)));
  keys.move = (by) => { chosen = Math.max(0, Math.min(hits.length - 1, chosen + by)); draw();
    const here = main.querySelector('tr.here'); if (here) here.scrollIntoView({ block: 'nearest' }); };
  keys.open = () => { if (hits[chosen]) location.hash = to('s', id, 'f', hits[chosen].j); };
  keys.find = () => search.focus();
}

async function feature(id, j, stale) {
  const m = all.members[id];
  if (!(j >= 0 && j < m.width)) throw new Error(`${m.name} has no feature ${j}`);
  const chunk = await load(`m${id}/c${Math.floor(j / all.chunk)}`), f = chunk[j % all.chunk];
  if (stale()) return;
  const other = (k) => h('a', { href: to('s', id, 'f', k) }, `#${k}`);
  const example = (e) => {
    const values = halves(e.values).map((v) => v * f.max);
    return h('div', { class: 'tokens' },
      h('span', { class: 'value' }, number(e.peak === null ? 0 : values[e.peak])),
      tokens(e.ids.map(piece), values, f.max, e.peak));
  };
  const moved = (pairs) => h('div', {}, pairs.map(([t, v]) => chip(t, `${number(v)} per unit of activation`)));
  const related = (pairs, name) => pairs.length ? h('table', {}, h('tbody', {}, pairs.map(([k, v]) =>
    h('tr', {}, h('td', {}, other(k)), h('td', { class: 'number' }, hint(h('span', {}, number(v)), name))))))
    : h('p', { class: 'soft' }, 'None.');
  page(`#${j} ${m.name}`, [h('a', { href: to() }, all.title), h('a', { href: to('s', id) }, m.name), `#${j}`],
    h('h1', {}, `#${j} `, f.label ? f.label.text : h('span', { class: 'soft' }, 'unlabelled')),
    f.label ? h('p', { class: f.label.low ? 'warn' : 'soft' }, `Label by ${f.label.by}; `, f.label.score === null
      ? 'too few held-out examples to score it.'
      : `it tells firing from silent text in ${percent(f.label.score)} of held-out examples (chance 50 %${f.label.control === null ? '' : `; another feature\u2019s label ${percent(f.label.control)}`})` +
        (f.label.low ? ': not shown to be better.' : '.')) : null,
    served && f.fired ? h('p', {}, h('a', { href: to('live', id, 'f', j) }, 'Steer with it, or see it on your own text')) : null,
    f.fired === 0 ? h('p', { class: 'warn' }, 'It never fired on this text.') : null,
    f.density > 0.1 ? h('p', { class: 'warn' }, 'It fires on more than a tenth of all tokens: such features rarely mean one thing.') : null,
    h('div', { class: 'grid' },
      card('third', 'How often, how much', h('dl', {},
        h('dt', {}, 'density'), h('dd', {}, `${percent(f.density)} (${percent(f.low)} to ${percent(f.high)})`),
        h('dt', {}, 'tokens'), h('dd', {}, `${f.fired.toLocaleString('en')} of ${all.tokens.toLocaleString('en')}`),
        h('dt', {}, 'largest value'), h('dd', {}, number(f.max)),
        h('dt', {}, 'mean where it fires'), h('dd', {}, number(f.mean)),
        h('dt', {}, 'threshold'), h('dd', {}, number(f.threshold)),
        h('dt', {}, '|encoder|, |decoder|'), h('dd', {}, `${number(f.encoder)}, ${number(f.decoder)}`),
        h('dt', {}, 'their cosine'), h('dd', {}, number(f.cosine)))),
      card('third', 'Values', bars(f.histogram, all.edges)),
      f.positive ? card('third', 'Logits it raises, and lowers', moved(f.positive), h('p', {}), moved(f.negative),
        h('p', { class: 'soft' }, 'Direct path, with the final norm\u2019s gain.')) :
        card('third', 'Logits', h('p', { class: 'soft' }, 'It writes to no residual stream that is read directly.')),
      card('two-thirds', 'Largest values, one a document', f.top.length ? f.top.map(example) : h('p', { class: 'soft' }, 'None.')),
      h('div', { class: 'third card' }, h('h2', {}, 'Nearest decoders (cosine)'), related(f.near, 'cosine of decoders'),
        h('p', {}), h('h2', {}, 'Fires with (Jaccard)'), related(f.with, 'share of their tokens that are both\u2019s')),
      card('', 'A sample of each tenth of its range, largest first', f.tenths.length ? f.tenths.map((q) => h('details', q.open ? { open: '' } : {},
        h('summary', {}, `${number(q.from)} to ${number(q.to)}`), q.examples.map(example))) : h('p', { class: 'soft' }, 'None.')),
      card('', 'Text on which it is silent', h('details', {}, h('summary', {}, `${f.silent.length} sequences`), f.silent.map(example)))));
  keys.move = (by) => { const k = j + by; if (k >= 0 && k < m.width) location.hash = to('s', id, 'f', k); };
  keys.open = () => {}; keys.up = () => { location.hash = to('s', id); };
}

async function compare(a, b, stale) {
  const [A, B] = [all.members[a], all.members[b]], names = (i) => load(`m${i}/list`);
  const [there, back, la, lb] = await Promise.all([load(`m${a}/to${b}`), load(`m${b}/to${a}`), names(a), names(b)]);
  if (stale()) return;
  const link = (id, j) => h('a', { href: to('s', id, 'f', j) }, `#${j}`);
  const rows = there.match.map((match, j) => ({ j, match, cosine: there.cosine[j] })).filter((r) => la.density[r.j] > 0);
  const mutual = rows.filter((r) => back.match[r.match[0]][0] === r.j && r.cosine[0] > 0.7).length;
  const split = {};
  back.match.forEach((match, j) => { if (lb.density[j] > 0 && back.cosine[j][0] > 0.6) (split[match[0]] ||= []).push([j, back.cosine[j][0]]); });
  const several = Object.entries(split).filter(([, v]) => v.length > 1).sort((x, y) => y[1].length - x[1].length);
  const absorbed = rows.filter((r) => r.cosine[1] > 0.5 && la.density[r.j] > 2 * lb.density[r.match[0]]);
  page('Compare', [h('a', { href: to() }, all.title), 'compare'],
    h('h1', {}, 'Compare'), h('p', {}, h('a', { href: to('s', a) }, A.name), ' with ', h('a', { href: to('s', b) }, B.name)),
    h('div', { class: 'grid' },
      card('third', 'Matched', h('p', {}, `${mutual} of ${rows.length} features that fire are each other\u2019s nearest decoder, with a cosine above 0.7.`),
        bars(Array.from({ length: 20 }, (_, i) => rows.filter((r) => Math.min(19, Math.floor(20 * Math.max(r.cosine[0], 0))) === i).length),
          Array.from({ length: 21 }, (_, i) => i / 20), ' cosine')),
      card('two-thirds', 'Features of the first, by their nearest in the second', table([
        { name: 'feature', get: (r) => r.j, show: (r) => [link(a, r.j), ' ', chips(la.word[r.j].slice(0, 2))], number: false },
        { name: 'nearest', get: (r) => r.match[0], show: (r) => [link(b, r.match[0]), ' ', chips(lb.word[r.match[0]].slice(0, 2))] },
        { name: 'cosine', get: (r) => r.cosine[0], show: (r) => number(r.cosine[0]), number: true },
        { name: 'density', get: (r) => la.density[r.j], show: (r) => percent(la.density[r.j]), number: true },
      ], rows.slice().sort((x, y) => y.cosine[0] - x.cosine[0]).slice(0, 150), [2, true])),
      card('half', 'Split: one here, several there', several.length ? h('table', {}, h('tbody', {}, several.slice(0, 40).map(([j, parts]) =>
        h('tr', {}, h('td', {}, link(a, j), ' ', chips(la.word[j].slice(0, 2))),
          h('td', {}, parts.map(([k, c]) => [hint(link(b, k), `cosine ${number(c)}`), ' ', chips(lb.word[k].slice(0, 1)), ' ']))))))
        : h('p', { class: 'soft' }, 'None.')),
      card('half', 'Perhaps absorbed', h('p', { class: 'soft' }, 'Twice as frequent here as their nearest there, which shares them with another: candidates, not proof.'),
        absorbed.length ? h('table', {}, h('tbody', {}, absorbed.slice(0, 40).map((r) => h('tr', {},
          h('td', {}, link(a, r.j), ' ', chips(la.word[r.j].slice(0, 2))), h('td', {}, r.match.slice(0, 2).map((k) => [link(b, k), ' ', chips(lb.word[k].slice(0, 1)), ' ']))))))
          : h('p', { class: 'soft' }, 'None.'))));
}

// Where we are, keys, theme.

const keys = {};
let shows = 0; // a page that was left while it loaded is not shown
async function show() {
  const mine = ++shows, stale = () => mine !== shows;
  const parts = location.hash.replace(/^#\/?/, '').split('/').filter(Boolean);
  for (const key of Object.keys(keys)) delete keys[key];
  try {
    const [kind, a, what, b] = parts, id = Number(a);
    if (kind && !all.members[id]) throw new Error('there is no such SAE here');
    if (!kind) collection();
    else if (kind === 'c') await compare(id, Number(what), stale);
    else if (kind === 'live') await live(id, what === 'f' ? Number(b) : null, stale);
    else if (what === 'f') await feature(id, Number(b), stale);
    else await list(id, stale);
    if (!stale()) scrollTo(0, 0);
  } catch (error) {
    if (stale()) return;
    page('Not found', [h('a', { href: to() }, all.title)], h('h1', {}, 'Nothing here'), h('p', { class: 'warn' }, error.message));
  }
}

addEventListener('keydown', (event) => {
  const at = document.activeElement.tagName, typing = ['INPUT', 'SELECT', 'TEXTAREA'].includes(at);
  const searching = at === 'INPUT' && document.activeElement.type === 'search';
  if (event.key === 'Escape') { document.activeElement.blur(); if (!typing && keys.up) keys.up(); return; }
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const arrow = ['ArrowDown', 'ArrowUp'].includes(event.key), enter = event.key === 'Enter';
  if (typing && !(searching && (arrow || enter))) return;
  if (enter && ['A', 'BUTTON', 'SUMMARY'].includes(at)) return; // it opens what it is on
  const act = { '/': keys.find, j: () => keys.move && keys.move(1), ArrowDown: searching && keys.move && (() => keys.move(1)),
    k: () => keys.move && keys.move(-1), ArrowUp: searching && keys.move && (() => keys.move(-1)), Enter: keys.open,
    t: () => document.getElementById('theme').click() }[event.key];
  if (act) { event.preventDefault(); act(); }
});

const theme = document.getElementById('theme');
function paint(name) {
  document.documentElement.dataset.theme = name;
  theme.textContent = name === 'dark' ? 'Light' : 'Dark';
}
theme.addEventListener('click', () => paint(document.documentElement.dataset.theme === 'dark' ? 'light' : 'dark'));
paint(matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light');

document.body.append(tip);
addEventListener('hashchange', show);
Promise.all([load('collection'), load('vocabulary')]).then(([c, v]) => { all = c; vocabulary = v; show(); });
