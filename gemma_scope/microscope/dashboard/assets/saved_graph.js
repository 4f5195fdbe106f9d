'use strict';
// A graph.json, of `why` or saved by the live view, opened from a file.

const NO_GRAPH = 'This is no graph.json of "gemma-scope microscope why".';

function isGraph(g) {
  const lists = ['nodes', 'edges', 'pieces', 'logit', 'saes', 'supernodes'];
  const figures = ['layer', 'position', 'influence', 'member'];
  const isNode = (i) => Number.isInteger(i) && i >= 0 && i < g.nodes.length;
  return (
    lists.every((key) => Array.isArray(g[key])) &&
    ['ends', 'agreement', 'scores'].every((key) => g[key]) &&
    g.nodes.filter((n) => n.kind === 'logit').length === 1 &&
    g.nodes.every(
      (n) => n.kind === 'logit' || figures.every((k) => Number.isFinite(n[k])),
    ) &&
    g.edges.every(
      ([a, b, w]) => isNode(a) && isNode(b) && Number.isFinite(w),
    ) &&
    g.supernodes.every((s) => s.nodes.length && s.nodes.every(isNode))
  );
}

function checkedGraph(text) {
  try {
    const g = JSON.parse(text);
    if (isGraph(g)) return g;
  } catch {
    // Said below.
  }
  throw new Error(NO_GRAPH);
}

function savedGraph() {
  const result = h('div', { id: 'saved' });
  const box = h('input', {
    type: 'file',
    accept: '.json,application/json',
    'aria-label': 'graph.json',
  });
  const open = run(result, async () => {
    const [file] = box.files;
    if (!file) return null;
    const g = checkedGraph(await file.text());
    const at = (name) => all.members.findIndex((m) => m.name === name);
    g.members = g.saes.map(at);
    const view = { g, words: (n) => n.label || '', measure: null };
    return () => [h('p', { class: 'tokens' }, g.text || ''), graph(view)];
  });
  box.addEventListener('change', open);
  page(
    'Graph',
    [link(to(), all.title), 'graph'],
    h('h1', {}, 'A saved attribution graph'),
    note(
      '"gemma-scope microscope why" writes graph.json beside the indexes, ' +
        'and the live view saves one. Effects are predicted here; ' +
        'the live view and "why --supernodes" measure them.',
    ),
    h('div', { class: 'bar' }, field('graph.json', box)),
    result,
  );
  keys.up = () => goTo();
}
