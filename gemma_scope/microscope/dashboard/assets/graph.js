'use strict';
// An attribution graph: tokens from left to right, layers upwards, the logit on
// top. Pointing at a node marks all that leads to it and all that it leads to.

const LEVEL = 84;
const graphed = (m) => /^(transcoder|clt)/.test(m.place);

function graphPlaces(g) {
  const features = g.nodes.filter((n) => n.kind !== 'logit');
  const columns = [...new Set(features.map((n) => n.position))].sort(
    (a, b) => a - b,
  );
  const depth = Math.max(...features.map((n) => n.layer)) + 1;
  const width = Math.max(640, columns.length * 90);
  const height = 90 + LEVEL * (depth + 1);
  const used = {};
  const place = g.nodes.map((n) => {
    if (n.kind === 'logit') return [width / 2, 24];
    const level = n.kind === 'embedding' || n.kind === 'bias' ? 0 : n.layer + 1;
    const column = columns.indexOf(n.position);
    const key = `${column}/${level}`;
    const k = used[key] || 0;
    used[key] = k + 1;
    const x = ((column + 0.5) * width) / columns.length + ((k % 6) - 2.5) * 12;
    return [x, height - 40 - level * LEVEL - Math.floor(k / 6) * 11];
  });
  return { columns, width, height, place };
}

// The edges on a path to or from a node.
function connected(g, node) {
  const found = new Set();
  const walk = (at, from, to_) => {
    const open = [at];
    const seen = new Set(open);
    while (open.length) {
      const next = open.pop();
      g.edges.forEach((edge, e) => {
        if (edge[from] !== next) return;
        found.add(e);
        if (!seen.has(edge[to_])) open.push(edge[to_]);
        seen.add(edge[to_]);
      });
    }
  };
  walk(node, 0, 1);
  walk(node, 1, 0);
  return found;
}

function nodeTitle(n, words) {
  if (n.kind !== 'feature') {
    return n.kind + (n.kind === 'error' ? ` of layer ${n.layer}` : '');
  }
  const exact = missing(n.exact)
    ? ''
    : `, exact ${number(n.exact)}, p ${number(n.p)}`;
  return `layer ${n.layer} #${n.feature} ${words(n)}: influence ${number(n.influence)}${exact}`;
}

function graphNode(view, i, [x, y]) {
  const { g, words, chosen } = view;
  const n = g.nodes[i];
  const kinds = { feature: 'dot open', logit: 'fill' };
  const mark = chosen.has(i) ? ' chosen' : '';
  return h(
    'circle',
    {
      class: (kinds[n.kind] || 'control') + mark,
      cx: x,
      cy: y,
      r: n.kind === 'logit' ? 7 : 2.5 + 9 * Math.sqrt(n.influence),
      onclick: n.kind === 'feature' ? () => view.choose(i) : null,
    },
    h('title', {}, nodeTitle(n, words)),
  );
}

function graphPicture(view) {
  const { g } = view;
  const { columns, width, height, place } = graphPlaces(g);
  const most = Math.max(...g.edges.map((e) => Math.abs(e[2])), 1e-9);
  const edges = g.edges.map(([a, b, w]) =>
    h('line', {
      class: w > 0 ? 'edge' : 'edge less',
      x1: place[a][0],
      y1: place[a][1],
      x2: place[b][0],
      y2: place[b][1],
      'stroke-width': (0.5 + (2.5 * Math.abs(w)) / most).toFixed(2),
      'stroke-opacity': (0.1 + (0.7 * Math.abs(w)) / most).toFixed(2),
    }),
  );
  const nodes = g.nodes.map((n, i) => graphNode(view, i, place[i]));
  const groups = g.supernodes.map((s) => supernodeShape(s, place));
  nodes.forEach((node, i) => {
    const on = connected(g, i);
    node.addEventListener('pointerenter', () =>
      edges.forEach((edge, e) => edge.classList.toggle('dim', !on.has(e))),
    );
    node.addEventListener('pointerleave', () =>
      edges.forEach((edge) => edge.classList.remove('dim')),
    );
  });
  const name = (t, c) => {
    const x = ((c + 0.5) * width) / columns.length;
    const text = t < 0 ? 'biases' : named(g.pieces[t]);
    return h('text', { x, y: height - 8, 'text-anchor': 'middle' }, text);
  };
  const top = h('text', { x: width / 2 + 14, y: 28 }, difference(g.logit));
  const box = { viewBox: `0 0 ${width} ${height}`, role: 'img' };
  const svg = h(
    'svg',
    { ...box, 'aria-label': 'attribution graph' },
    groups,
    edges,
    nodes,
    columns.map(name),
    top,
  );
  const scroll = { class: 'scroll', tabindex: '0' };
  return h('div', scroll, figure(svg, 'attribution graph'));
}

// Edges between two tokens, by size, with the heads that carry them.
function headTable(g, words) {
  const name = (n) =>
    n.kind === 'feature'
      ? `${n.layer} #${n.feature} ${words(n)}`
      : n.kind + (n.kind === 'error' ? ` of layer ${n.layer}` : '');
  const end = (i) => {
    const n = g.nodes[i];
    const at = missing(n.position) ? '' : ` at ${named(g.pieces[n.position])}`;
    return name(n) + at;
  };
  const listed = g.edges
    .map(([a, b, w], e) => ({ a, b, w, heads: (g.heads || [])[e] || [] }))
    .filter((line) => line.heads.length)
    .sort((x, y) => Math.abs(y.w) - Math.abs(x.w))
    .slice(0, 60);
  if (!listed.length) return null;
  const head = (one) => `${one.layer}.${one.head} ${percent(one.share, 2)}`;
  const columns = [
    { name: 'from', get: (line) => end(line.a) },
    { name: 'to', get: (line) => end(line.b) },
    {
      name: 'adds',
      get: (line) => line.w,
      show: (line) => number(line.w),
      number: true,
    },
    {
      name: 'through heads',
      hint:
        'Layer and head, and the share of the edge whose last step through ' +
        'attention is that head.',
      get: (line) => line.heads.map(head).join(', '),
    },
  ];
  return [
    h('h3', {}, 'Edges through attention'),
    table('heads', columns, listed, { by: 2, down: true }),
  ];
}

function graphTable(view) {
  const { g, words, chosen } = view;
  const lines = g.nodes
    .map((n, i) => ({ ...n, i }))
    .filter((n) => n.kind === 'feature')
    .sort((a, b) => b.influence - a.influence)
    .slice(0, 40);
  const box = (n) => {
    const node = h('input', {
      type: 'checkbox',
      'aria-label': `choose #${n.feature} of layer ${n.layer}`,
      onchange: () => view.choose(n.i, true),
    });
    node.checked = chosen.has(n.i);
    return node;
  };
  const known_ = g.members.every((id) => id >= 0);
  const figures = ['influence', 'predicted', 'exact', 'p'].map((key) => ({
    name: key,
    get: (n) => n[key],
    show: (n) => number(n[key]),
    number: true,
  }));
  const columns = [
    { name: '', get: (n) => chosen.has(n.i), show: box },
    { name: 'layer', get: (n) => n.layer, number: true },
    {
      name: 'token',
      get: (n) => n.position,
      show: (n) => chipOf(g.pieces[n.position]),
    },
    {
      name: 'feature',
      get: (n) => n.feature,
      show: (n) => `#${n.feature}`,
      link: known_ && ((n) => to('s', g.members[n.member], 'f', n.feature)),
    },
    { name: 'is called', get: words },
    ...figures,
    { name: '', get: (n) => n.passes, show: (n) => (n.passes ? 'passes' : '') },
  ];
  return table('graph', columns, lines, { by: 5, down: true });
}

// `given` has g, words, and measure where there is a server.
function graph(given) {
  const { g, words } = given;
  const view = { ...given, chosen: new Set() };
  const nodes = ['groups', 'picture', 'lines'].map(() => h('div', {}));
  const drawn = (lines) => {
    fill(nodes[0], supernodeCard(view));
    fill(nodes[1], graphPicture(view));
    if (lines) fill(nodes[2], graphTable(view));
  };
  view.draw = () => drawn(true);
  view.choose = (i, listed) => {
    if (!view.chosen.delete(i)) view.chosen.add(i);
    drawn(!listed);
  };
  view.draw();
  const ends = Object.entries(g.ends).map(
    ([kind, v]) => `${kind} ${percent(v, 2)}`,
  );
  const passing = g.nodes.some((n) => n.passes);
  return [
    h('p', { class: passing ? '' : 'warn' }, g.verdict),
    para(
      'Predicted against exact: rank correlation ' +
        `${number(g.agreement.spearman, 2)}, slope ${number(g.agreement.slope, 2)}. ` +
        `The influence ends in ${ends.join(', ')}; rings are not features. ` +
        `circuit-tracer\u2019s scores: replacement ` +
        `${number(g.scores.replacement, 2)}, completeness ` +
        `${number(g.scores.completeness, 2)}.`,
    ),
    nodes[1],
    nodes[0],
    nodes[2],
    headTable(g, words),
  ];
}
