'use strict';
// The live view's changes: steer, ablate, and what that costs.

const CHANGES = [
  ['add', 'add'],
  ['clamp', 'set to'],
  ['ablate', 'ablate'],
  ['project_out', 'project out'],
];
const SIZED = ['add', 'clamp'];
const CONTROL =
  'Control: eight vectors of the same norm along the decoders of other ' +
  'features.';

function strengthSlider(c) {
  const text = h('span', { class: 'mono' }, number(c.strength));
  const slider = h('input', {
    type: 'range',
    min: '-4',
    max: '4',
    step: '0.25',
    'aria-label': `strength of ${c.feature}`,
    oninput: (e) => {
      c.strength = Number(e.target.value);
      text.textContent = number(c.strength);
    },
  });
  slider.value = c.strength;
  return [slider, text, soft('\u00d7 its largest activation')];
}

function changeLine(view, c, draw, result) {
  const kind = h(
    'select',
    {
      'aria-label': `change of ${c.feature}`,
      onchange: (e) => {
        c.kind = e.target.value;
        draw();
      },
    },
    CHANGES.map(([value, name]) => h('option', { value }, name)),
  );
  kind.value = c.kind;
  const remove = () => {
    view.state.changes.splice(view.state.changes.indexOf(c), 1);
    draw();
  };
  return h(
    'div',
    { class: 'bar' },
    kind,
    SIZED.includes(c.kind) ? strengthSlider(c) : null,
    view.name(c.feature),
    button(
      'dose',
      run(result, () => dose(view, c)),
    ),
    button('remove', remove),
  );
}

function numericBox(state_, key) {
  const box = h('input', {
    size: '4',
    'aria-label': key,
    inputmode: 'decimal',
    oninput: (e) => {
      state_[key] = Number(e.target.value);
    },
  });
  box.value = state_[key];
  return field(key, box);
}

function changesCard(view) {
  const lines = h('div', {});
  const result = h('div', { id: 'result' });
  const { state: state_ } = view;
  const empty = () => note('None yet: press "change" next to a feature.');
  const draw = () =>
    fill(
      lines,
      state_.changes.length
        ? state_.changes.map((c) => changeLine(view, c, draw, result))
        : empty(),
    );
  view.add = (j) => {
    if (!state_.changes.some((c) => c.feature === j)) {
      state_.changes.push({ feature: j, kind: 'add', strength: 1 });
    }
    draw();
  };
  draw();
  return card(
    '',
    'Change features',
    lines,
    h(
      'div',
      { class: 'bar' },
      button(
        'Steer',
        run(result, () => steer(view)),
      ),
      button(
        'Effects',
        run(result, () => effects(view)),
      ),
      ['tokens', 'temperature', 'seed'].map((key) => numericBox(state_, key)),
    ),
    result,
  );
}

async function steer(view) {
  const { changes, seed, temperature, tokens: count } = view.state;
  const found = await ask('steer', {
    ...view.question(),
    changes,
    seed,
    temperature,
    tokens: count,
  });
  const column = (one, title, cost) =>
    card(
      'half',
      title,
      h('div', { class: 'tokens' }, one.text),
      note(
        `perplexity under the unchanged model ${number(one.perplexity)}${cost}`,
      ),
    );
  const kl = `, KL ${number(found.steered.kl)} nats per token`;
  return h(
    'div',
    { class: 'grid' },
    column(found.default, 'Default', ''),
    column(found.steered, 'Steered, same seed', kl),
  );
}

// A token is painted only where the effect is outside the controls' range.
function effectLine(found, title, key, unit) {
  const values = found[key].map((v) => v ?? 0);
  const range = found.control[key].map((v) => Math.abs(v ?? 0));
  const most = Math.max(...values.map(Math.abs), ...range, 1e-9);
  const texts = decoded(found.pieces);
  const span = (text, t) => {
    const noise = Math.abs(values[t]) <= range[t];
    const hue = values[t] >= 0 ? 'heat' : 'cold';
    const style = noise ? {} : heat(Math.abs(values[t]) / most, hue);
    const node = h(
      'span',
      { class: 'token' + (noise ? ' noise' : ''), style },
      text,
    );
    const control = `largest control ${number(found.control[key][t])}`;
    return hint(node, `${number(found[key][t])} ${unit}; ${control}`);
  };
  return [h('h3', {}, title), h('div', { class: 'tokens' }, texts.map(span))];
}

function difference(logit) {
  return logit.map(named).join(' \u2212 ');
}

async function effects(view) {
  const found = await ask('change', {
    ...view.question(),
    changes: view.state.changes,
  });
  const mean = (key) =>
    `${number(found.mean[key])} (control ${number(found.control_mean[key])})`;
  const logit = `\u0394 logit ${difference(found.logit)}`;
  return [
    para(
      `Over the text: KL ${mean('kl')}, \u0394 loss ${mean('delta_loss')} nats; `,
      `${logit} at the end ${mean('delta_logit')}.`,
    ),
    effectLine(found, 'KL of what comes next', 'kl', 'nats'),
    effectLine(found, '\u0394 loss of each token', 'delta_loss', 'nats'),
    effectLine(found, logit, 'delta_logit', ''),
    note(CONTROL + ' Effects no larger than the largest of these are grey.'),
  ];
}

function dosePlot(curve, key, title) {
  const own = curve.map((p) => ({
    x: p.strength,
    y: p[key],
    title: `${p.strength}: ${number(p[key])}`,
  }));
  const controls = curve.map((p) => {
    const [average, least, most] = p.control[key].map((v) => number(v));
    return {
      x: p.strength,
      y: p.control[key][0],
      control: true,
      title: `control ${average} (${least} to ${most})`,
    };
  });
  const labels = { x: '\u00d7 largest activation', y: title, log: '' };
  return card('third', title, plot([...own, ...controls], [own], labels));
}

async function dose(view, c) {
  const found = await ask('dose', { ...view.question(), change: c });
  return [
    para(
      'Dose-response of ',
      view.name(c.feature),
      `, ${c.kind}. Rings: controls.`,
    ),
    h(
      'div',
      { class: 'grid' },
      dosePlot(
        found.curve,
        'delta_logit',
        `\u0394 logit ${difference(found.logit)}`,
      ),
      dosePlot(found.curve, 'kl', 'KL, nats'),
      dosePlot(found.curve, 'delta_loss', '\u0394 loss, nats'),
    ),
    note(CONTROL),
  ];
}
