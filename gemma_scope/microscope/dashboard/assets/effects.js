'use strict';
// The causal card of a feature: what it does to the model, beside controls.

const NO_EFFECT = 'no measurable effect';
const EDIT_NAMES = { ablate: 'ablation', add: 'addition' };

const range = ([value, low, high], digits = 2) =>
  missing(low)
    ? number(value, digits)
    : `${number(value, digits)} (${number(low, digits)} to ${number(high, digits)})`;

function promoted(part, name) {
  const line = ([t, n]) =>
    hint(
      chip(t),
      `among the ten that change most in ${n} of ${part.contexts} contexts`,
    );
  return [
    h('h3', {}, name === 'ablate' ? 'lowers' : 'raises'),
    h('p', {}, part.tokens.map(line)),
  ];
}

function edit(part, name) {
  if (!part) return null;
  const rows = [
    ['KL, nats', range(part.kl)],
    ['change in loss, nats', range(part.loss)],
    ['times other decoders', range(part.times_shuffled)],
    ['times random directions', range(part.times_random)],
    ['p', number(part.p, 2)],
    ['contexts', whole(part.contexts)],
  ];
  const quiet = part.p > 0.05;
  return h(
    'div',
    { class: quiet ? 'soft' : null },
    h('h3', {}, EDIT_NAMES[name]),
    h(
      'dl',
      {},
      rows.map(([k, v]) => [h('dt', {}, k), h('dd', {}, v)]),
    ),
    promoted(part, name),
  );
}

// At its examples it is ablated; where it is silent it is added.
function effectCard(f, m) {
  const c = f.effects;
  if (!c) return null;
  const { alpha } = m.effects;
  const sentence =
    c.verdict === NO_EFFECT
      ? 'No effect beyond that of its controls was measured'
      : `It ${c.verdict}`;
  return card(
    '',
    'Effect on the model, exact',
    h(
      'p',
      { class: c.verdict === NO_EFFECT ? 'warn' : null, id: 'effect' },
      `${sentence} (adjusted p ${number(c.q, 2)}; false discovery rate ` +
        `${number(alpha)} over ${whole(m.effects.tested)} features).`,
    ),
    h('div', { class: 'columns' }, [
      edit(c.ablate, 'ablate'),
      edit(c.add, 'add'),
    ]),
    note(
      'One token is edited and the model is run again. Controls have the ' +
        'same norm at the same token: decoders of other features, and random ' +
        'directions. Intervals are 95 % over contexts. An edit that does not ' +
        'exceed its controls is grey.',
    ),
  );
}

const VERDICT_NAMES = {
  'moves what its logit lens says': 'as its logits',
  'moves something else': 'otherwise',
  [NO_EFFECT]: 'none',
};

// Columns of the list, where effects were measured.
function effectColumns(data) {
  if (!data.verdict) return [];
  return [
    {
      name: 'effect',
      hint:
        'Exact effect on the model beyond its controls: it moves what its ' +
        'logits say, something else, or nothing.',
      get: (r) => r.q,
      text: (r) => r.verdict,
      show: (r) => {
        const name = VERDICT_NAMES[r.verdict];
        if (!name) return soft(DASH);
        return r.verdict === NO_EFFECT ? soft(name) : name;
      },
    },
    {
      name: 'KL of ablation',
      hint: 'Mean divergence in nats when it is ablated at one token.',
      get: (r) => r.kl,
      show: (r) =>
        (r.verdict === NO_EFFECT ? soft : (x) => x)(aligned(r.kl, 2)),
      number: true,
    },
  ];
}

// A filter by verdict; `state.verdict` is '' for all.
function effectFilter(data, state, draw) {
  if (!data.verdict) return null;
  const options = [
    ['', 'any effect or none'],
    ['some', 'a measurable effect'],
    ...Object.keys(VERDICT_NAMES).map((name) => [name, name]),
  ];
  const select = h(
    'select',
    {
      'aria-label': 'Effect',
      onchange: (e) => {
        state.verdict = e.target.value;
        draw();
      },
    },
    options.map(([value, name]) => h('option', { value }, name)),
  );
  select.value = state.verdict || '';
  return select;
}

function hasVerdict(state) {
  const wanted = state.verdict;
  if (!wanted) return () => true;
  if (wanted === 'some') return (r) => r.verdict && r.verdict !== NO_EFFECT;
  return (r) => r.verdict === wanted;
}

// The summary of an SAE's cards, beside its list.
function effectSummary(m) {
  if (!m.effects) return null;
  const { tested, verdicts, alpha } = m.effects;
  const line = ([name, n]) =>
    h(
      'tr',
      {},
      h('td', {}, name),
      h('td', { class: 'number' }, whole(n)),
      h('td', { class: 'number' }, percent(n / Math.max(tested, 1), 2)),
    );
  return [
    h('h2', {}, 'Effects on the model'),
    h('table', {}, h('tbody', {}, Object.entries(verdicts).map(line))),
    note(
      `${whole(tested)} features, false discovery rate ${number(alpha)}; ` +
        'beyond other decoders and random directions of the same norm.',
    ),
  ];
}
