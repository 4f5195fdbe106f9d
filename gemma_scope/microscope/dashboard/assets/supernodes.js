'use strict';
// Supernodes of a graph: features that are read, and ablated, as one. `view` is
// what the parts of a graph share: the graph g, words(node), the chosen nodes,
// draw(), and measure(nodes), which asks the server for the exact effect.

// How much the logit falls in the linear model without these nodes: what they
// add along the paths of the graph that do not go through another of them.
function predictedEffect(g, nodes) {
  const ablated = new Set(nodes);
  const effect = g.nodes.map(() => 0);
  const into = g.nodes.map(() => []);
  for (const [a, b, weight] of g.edges) into[b].push([a, weight]);
  const logit = g.nodes.findIndex((n) => n.kind === 'logit');
  // Features read only from earlier layers: go from the last to the first.
  const readers = g.nodes
    .map((n, i) => i)
    .filter((i) => g.nodes[i].kind === 'feature' && !ablated.has(i))
    .sort((i, j) => g.nodes[j].layer - g.nodes[i].layer);
  for (const target of [logit, ...readers]) {
    const { value } = g.nodes[target];
    const share = target === logit ? 1 : value ? effect[target] / value : 0;
    for (const [a, weight] of into[target]) effect[a] += share * weight;
  }
  return [...ablated].reduce((sum, i) => sum + effect[i], 0);
}

const influenceOf = (g, nodes) =>
  nodes.reduce((sum, i) => sum + g.nodes[i].influence, 0);

// Named after its most influential feature, unless a name is given.
function supernode(view, nodes, name = '') {
  const { g, words } = view;
  const most = nodes.reduce((i, j) =>
    g.nodes[j].influence > g.nodes[i].influence ? j : i,
  );
  return { name: name || words(g.nodes[most]), nodes };
}

// A node is in one supernode at most.
function groupChosen(view, name) {
  const { g, chosen } = view;
  if (!chosen.size) return;
  for (const s of g.supernodes) {
    const left = s.nodes.filter((i) => !chosen.has(i));
    if (left.length < s.nodes.length) {
      for (const key of ['predicted', 'exact', 'controls']) delete s[key];
    }
    s.nodes = left;
  }
  g.supernodes = g.supernodes.filter((s) => s.nodes.length);
  g.supernodes.push(supernode(view, [...chosen], name));
  chosen.clear();
  view.draw();
}

// A thick line through its nodes, with its name, behind the nodes.
function supernodeShape(s, place) {
  const points = s.nodes
    .map((i) => place[i])
    .sort(([x1, y1], [x2, y2]) => x1 - x2 || y1 - y2);
  const [x, y] = points[0];
  const d = `M${[...points, points[0]].map((p) => p.join(' ')).join('L')}`;
  return h(
    'g',
    {},
    h('path', { class: 'supernode', d }, h('title', {}, s.name)),
    h('text', { x: x - 10, y: y - 14 }, s.name.slice(0, 40)),
  );
}

const largestControl = (s) => Math.max(...s.controls.map(Math.abs));

function supernodeColumns(view, status) {
  const { g } = view;
  const noise = (s) => Math.abs(s.exact) <= largestControl(s);
  const exact = (s) => (noise(s) ? soft(number(s.exact)) : number(s.exact));
  const remove = (s) => {
    g.supernodes = g.supernodes.filter((other) => other !== s);
    view.draw();
  };
  const ablate = (s) =>
    run(status, async () => {
      Object.assign(s, await view.measure(s.nodes));
      return () => view.draw();
    });
  return [
    { name: 'supernode', get: (s) => s.name },
    { name: 'features', get: (s) => s.nodes.length, number: true },
    {
      name: 'influence',
      get: (s) => influenceOf(g, s.nodes),
      show: (s) => number(influenceOf(g, s.nodes)),
      number: true,
    },
    {
      name: 'predicted',
      hint: 'How much the logit falls without them, along the paths drawn.',
      get: (s) => predictedEffect(g, s.nodes),
      show: (s) => number(predictedEffect(g, s.nodes)),
      number: true,
    },
    {
      name: 'exact',
      hint:
        'The same in the whole model, ablated together; grey where a control ' +
        'does as much.',
      get: (s) => s.exact,
      show: (s) => (missing(s.exact) ? DASH : exact(s)),
      number: true,
    },
    {
      name: 'control',
      hint: 'The largest effect of vectors of the same norms.',
      get: (s) => (s.controls ? largestControl(s) : null),
      show: (s) => (s.controls ? number(largestControl(s)) : DASH),
      number: true,
    },
    {
      name: '',
      get: () => null,
      show: (s) => [
        view.measure ? button('ablate', ablate(s)) : null,
        ' ',
        button('ungroup', () => remove(s)),
      ],
    },
  ];
}

// What is predicted, and measured, of the nodes that are chosen.
function chosenLine(view) {
  const { g, chosen } = view;
  if (!chosen.size) {
    return note(
      'Choose features by a click on their dots or in the list below; then ' +
        'group them, or see what the logit loses without them.',
    );
  }
  const result = h('span', { role: 'status' });
  const measured_ = async () => {
    const found = await view.measure([...chosen]);
    return `exact ${number(found.exact)}, largest control ${number(largestControl(found))}`;
  };
  const effect = predictedEffect(g, [...chosen]);
  return h(
    'div',
    { class: 'bar' },
    `${chosen.size} chosen: predicted ${number(effect)}`,
    view.measure ? button('Ablate chosen', run(result, measured_)) : null,
    result,
  );
}

function supernodeCard(view) {
  const { g, chosen } = view;
  const status = h('div', {});
  const name = h('input', { size: '16', 'aria-label': 'name' });
  const all_ = (nodes) => nodes.map((one) => supernode(view, one));
  const set = (groups) => {
    g.supernodes = groups;
    chosen.clear();
    view.draw();
  };
  return [
    h('h3', {}, 'Supernodes'),
    chosenLine(view),
    h(
      'div',
      { class: 'bar' },
      field('name', name),
      button('Group chosen', () => groupChosen(view, name.value)),
      button('Group similar', () => set(all_(g.similar || []))),
      button('Ungroup all', () => set([])),
      button('Save graph', () =>
        download('graph.json', 'application/json', graphText(view)),
      ),
      g.neuronpedia
        ? button('Save for Neuronpedia', () =>
            download(
              'graph_neuronpedia.json',
              'application/json',
              neuronpediaText(view),
            ),
          )
        : null,
    ),
    g.supernodes.length
      ? table('supernodes', supernodeColumns(view, status), g.supernodes, {
          by: 2,
          down: true,
        })
      : null,
    status,
  ];
}

// The graph with its supernodes and labels, as `why` writes it.
function graphText({ g, words }) {
  const own = { ...g };
  delete own.neuronpedia;
  delete own.members;
  own.nodes = g.nodes.map((n) =>
    n.kind === 'feature' ? { ...n, label: words(n) } : n,
  );
  return JSON.stringify(own);
}

// The file of circuit-tracer and Neuronpedia, which has no nodes of biases.
function neuronpediaText({ g, words }) {
  const content = JSON.parse(JSON.stringify(g.neuronpedia));
  const ids = {};
  g.nodes
    .map((n, i) => i)
    .filter((i) => g.nodes[i].kind !== 'bias')
    .forEach((i, k) => {
      ids[i] = content.nodes[k].node_id;
      if (g.nodes[i].kind === 'feature') {
        content.nodes[k].clerp = words(g.nodes[i]);
      }
    });
  content.qParams.supernodes = g.supernodes.map((s) => [
    s.name,
    ...s.nodes.map((i) => ids[i]),
  ]);
  return JSON.stringify(content);
}
