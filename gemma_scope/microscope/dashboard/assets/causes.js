'use strict';
// The live view's causes: features behind a logit, and the graph over layers.

function causesCard(view, m) {
  const cause = h('div', { id: 'cause' });
  const { state: state_ } = view;
  const set = (key) => (text) => {
    state_[key] = text;
  };
  return card(
    '',
    'Why does it say that?',
    h(
      'div',
      { class: 'bar' },
      field('token', tokenBox('a', state_.a, set('a'))),
      field('\u2212', tokenBox('b', state_.b, set('b'))),
      soft('empty: the two likeliest'),
      button(
        'Why',
        run(cause, () => why(view)),
      ),
      graphed(m)
        ? button(
            'Graph',
            run(cause, () => trace(view)),
          )
        : null,
    ),
    cause,
  );
}

// Shares mean nothing where the parts cancel.
function share(v, f) {
  const sum = f.value - f.without;
  const clear = Math.abs(sum) > (Math.abs(f.latents) + Math.abs(f.error)) / 10;
  return number(v) + (clear ? ` (${percent(v / sum, 2)})` : '');
}

function byToken(f, line) {
  const texts = decoded(f.pieces);
  const span = (text, t) => {
    const value = line.by_token[t];
    const hue = value >= 0 ? 'heat' : 'cold';
    const style = heat(Math.abs(value / (line.gradient || 1)) - 0.1, hue);
    return hint(h('span', { class: 'token', style }, text), number(value));
  };
  return h('div', { class: 'tokens small' }, texts.map(span));
}

function causeColumns(view, f) {
  const figure = (key, text) => ({
    name: key,
    hint: text,
    get: (line) => line[key],
    show: (line) => (line.passes ? number(line[key]) : soft(number(line[key]))),
    number: true,
  });
  return [
    {
      name: 'feature',
      get: (line) => line.feature,
      show: (line) => [view.name(line.feature), byToken(f, line)],
    },
    figure('gradient', 'Predicted by the gradient.'),
    figure('integrated', 'Predicted along a path to zero.'),
    figure('exact', 'How much the logit falls when it is ablated.'),
    figure('control', 'The largest effect along other decoders.'),
    figure('p', 'Share of shuffles whose largest effect is as large.'),
    {
      name: '',
      get: (line) => line.passes,
      show: (line) => [
        line.passes ? 'passes ' : '',
        button('change', () => view.add(line.feature)),
      ],
    },
  ];
}

async function why(view) {
  const f = await ask('why', view.question());
  const chosen = f.features.filter((line) => line.chosen);
  const points = f.features.map((line) => ({
    x: line.gradient,
    y: line.exact,
    title: `#${line.feature}`,
  }));
  const agree = (way) => {
    const { spearman, slope } = f.agreement[way];
    return note(
      `${way}: rank correlation ${number(spearman, 2)}, slope ${number(slope, 2)}`,
    );
  };
  return [
    h('p', { class: f.passing.length ? '' : 'warn', id: 'verdict' }, f.verdict),
    para(
      `${difference(f.logit)}: ${number(f.value)}, without features and error ` +
        `${number(f.without)}. Integrated: features ${share(f.latents, f)}, ` +
        `error ${share(f.error, f)}. Ablated together: features ` +
        `${number(f.exact_latents)}, error ${number(f.exact_error)}.`,
    ),
    table(`why${view.id}`, causeColumns(view, f), chosen, {
      by: 3,
      down: true,
    }),
    points.length
      ? h(
          'div',
          { class: 'half' },
          plot(points, [], { x: 'gradient', y: 'exact', log: '' }),
        )
      : null,
    ['gradient', 'integrated'].map(agree),
    note(
      'Largest effects of the same search with shuffled decoders: ' +
        `${f.shuffled
          .slice(0, 3)
          .map((v) => number(v))
          .join(', ')}. ` +
        'Features that do not pass are grey.',
    ),
  ];
}

async function trace(view) {
  const question = view.question();
  const g = await ask('graph', question);
  const lists = await Promise.all(g.members.map((i) => load(`m${i}/list`)));
  const node = (i) => {
    const n = g.nodes[i];
    return [n.member, n.feature, n.position];
  };
  return graph({
    g,
    words: (n) => callNamed(lists[n.member], n.feature),
    measure: (nodes) => ask('ablate', { ...question, nodes: nodes.map(node) }),
  });
}
