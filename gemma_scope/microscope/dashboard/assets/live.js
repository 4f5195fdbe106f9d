'use strict';
// The live view: a text of one's own, its latents both ways, changes, causes.
// Only where launch/microscope.py serve answers; text goes in as text (h).

const liveState = {}; // of each SAE, kept while one looks at its pages

async function ask(name, question) {
  const reply = await fetch(`api/${name}`, { method: 'POST', body: JSON.stringify(question) });
  const found = await reply.json().catch(() => ({ error: `no answer (${reply.status})` }));
  if (!reply.ok) throw new Error(found.error);
  return found;
}

function field(name, node) { return h('label', { class: 'soft' }, name, ' ', node); }
function button(name, act) { return h('button', { class: 'plain', onclick: act }, name); }

// Runs a question behind a button; what goes wrong is said where its answer would be.
// Of several the last one asked is shown, whichever is answered last.
function run(target, work, clear = () => {}) {
  return async () => {
    const mine = target.asked = (target.asked || 0) + 1, late = () => target.asked !== mine;
    target.replaceChildren(h('p', { class: 'soft', role: 'status' }, 'Working \u2026'));
    try {
      const found = await work();
      if (!late()) target.replaceChildren(...[typeof found === 'function' ? found() : found].flat(Infinity).filter(Boolean));
    } catch (error) {
      if (late()) return;
      clear();
      target.replaceChildren(h('p', { class: 'warn', role: 'status' }, error.message));
    }
  };
}

async function live(id, first, stale) {
  const m = all.members[id];
  if (!served) throw new Error('the live view needs launch/microscope.py serve');
  if (first !== null && !(Number.isInteger(first) && first >= 0 && first < m.width)) throw new Error(`${m.name} has no feature ${first}`);
  const list = await load(`m${id}/list`);
  if (stale()) return;
  const state = liveState[id] ||= { text: 'def read(self, path):\n    with open(path) as f:\n        return f.',
    changes: [], seed: 0, temperature: 0.5, tokens: 48, a: '', b: '', dense: false };
  if (first !== null && !state.changes.some((c) => c.feature === first)) {
    state.changes.push({ feature: first, kind: 'add', strength: 1 });
  }
  const about = (j) => list.label[j] || list.word[j].map((t) => named(piece(t))).slice(0, 4).join(' ');
  const name = (j) => [h('a', { href: to('s', id, 'f', j) }, `#${j}`), ' ', h('span', { class: 'soft' }, about(j))];
  const question = () => ({ member: id, text: state.text,
    logit: state.a === '' ? null : [state.a, state.b === '' ? null : state.b] });

  // The text, hovered both ways.
  const shownText = h('div', {}), side = h('div', {}), below = h('div', {});
  const reading = async () => {
    const found = await ask('read', { member: id, text: state.text });
    return () => showReading(found);
  };
  const showReading = (found) => {
    const spans = [], best = new Map();
    found.latents.forEach((row, t) => row.forEach(([j, v]) => {
      const one = best.get(j) || { j, most: 0, at: new Map() };
      one.most = Math.max(one.most, v); one.at.set(t, v); best.set(j, one);
    }));
    const dense = (j) => list.density[j] > 0.1;
    const ranked = [...best.values()].map((one) => ({ ...one, share: one.most / (list.max[one.j] || one.most) }))
      .sort((x, y) => y.share - x.share);
    const left = ranked.filter((one) => dense(one.j)).length;
    const rows = ranked.filter((one) => state.dense || !dense(one.j)).slice(0, state.more ? 100 : 12);
    const paint = (one) => spans.forEach((span, t) => {
      const v = one ? (one.at.get(t) || 0) / (list.max[one.j] || one.most) : 0;
      span.style.backgroundColor = v > 0 ? `rgba(var(--heat), ${(0.12 + 0.6 * Math.min(v, 1)).toFixed(2)})` : '';
    });
    const row = (j, values) => {
      const line = h('tr', {}, h('td', {}, name(j)), values.map((v) => h('td', { class: 'number' }, v)),
        h('td', {}, button('change', () => { add(j); })));
      line.addEventListener('pointerenter', () => paint(best.get(j)));
      line.addEventListener('pointerleave', () => paint(null));
      return line;
    };
    const showToken = (t) => {
      const here = found.latents[t].filter(([j]) => state.dense || !dense(j)).slice(0, 12);
      side.replaceChildren(h('h2', {}, 'Token ', chipOf(found.pieces[t])),
        h('p', { class: 'soft' }, found.counts[t]
          ? `${found.l0[t]} latents fire; ${percent(found.unexplained[t])} of it is not explained` +
            (found.loss[t] === null ? '.' : `; loss ${number(found.loss[t])} nats.`)
          : 'No SAE was trained on this token: its latents are not shown.'),
        h('table', {}, h('tbody', {}, here.map(([j, v]) => row(j, [number(v)])))),
        h('p', { class: 'soft' }, 'Next: ', found.next[t].map(([p, q]) => [chipOf(p), ` ${percent(q)} `])));
    };
    found.pieces.forEach((text, t) => {
      const span = h('span', { class: 'token', tabindex: '0' }, shown(text));
      span.addEventListener('pointerenter', () => showToken(t));
      span.addEventListener('focus', () => showToken(t));
      span.addEventListener('click', () => showToken(t));
      spans.push(span);
    });
    showToken(found.pieces.length - 1);
    const check = h('input', { type: 'checkbox', onchange: (e) => { state.dense = e.target.checked; read(); } });
    check.checked = state.dense;
    below.replaceChildren(h('h2', {}, 'Latents of the text, by share of their largest value'),
      h('p', { class: 'soft' }, `${best.size} among the 64 strongest of a token. `, h('label', {}, check, ` with those that fire on more than 10 % of tokens (${left})`)),
      h('div', { class: 'scroll' }, h('table', {}, h('thead', {}, h('tr', {}, ['latent', 'largest', 'share', 'tokens', ''].map((n, i) =>
        h('th', { class: i && i < 4 ? 'number' : '' }, n)))),
        h('tbody', {}, rows.map((one) => row(one.j, [number(one.most), percent(one.share), one.at.size]))))),
      state.more ? null : button('more', () => { state.more = true; read(); }));
    return h('div', { class: 'tokens', id: 'text' }, spans);
  };
  const read = run(shownText, reading, () => { side.replaceChildren(); below.replaceChildren(); });
  const chipOf = (text) => h('span', { class: 'chip' }, named(text));

  // Changes.
  const changes = h('div', {}), result = h('div', { id: 'result' });
  const add = (j) => {
    if (!state.changes.some((c) => c.feature === j)) state.changes.push({ feature: j, kind: 'add', strength: 1 });
    drawChanges();
  };
  const drawChanges = () => changes.replaceChildren(
    ...(state.changes.length ? state.changes.map((c, n) => {
      const said = h('span', { class: 'mono' }, number(c.strength));
      const slider = h('input', { type: 'range', min: '-4', max: '4', step: '0.25', 'aria-label': `strength of ${c.feature}`,
        oninput: (e) => { c.strength = Number(e.target.value); said.textContent = number(c.strength); } });
      slider.value = c.strength;
      const needs = c.kind === 'add' || c.kind === 'clamp';
      const kind = h('select', { 'aria-label': `change of ${c.feature}`, onchange: (e) => { c.kind = e.target.value; drawChanges(); } },
        [['add', 'add'], ['clamp', 'set to'], ['ablate', 'ablate'], ['project_out', 'project out']].map(([v, t]) => h('option', { value: v }, t)));
      kind.value = c.kind;
      return h('div', { class: 'bar' }, kind, needs ? [slider, said, h('span', { class: 'soft' }, '\u00d7 its largest value')] : null,
        name(c.feature), button('dose', run(result, () => dose(c))),
        button('remove', () => { state.changes.splice(n, 1); drawChanges(); }));
    }) : [h('p', { class: 'soft' }, 'None yet: press change beside a latent.')]));
  const box = (key, width) => { const node = h('input', { size: width, 'aria-label': key,
    oninput: (e) => { state[key] = e.target.value; } }); node.value = state[key]; return node; };
  const numeric = (key, width) => { const node = box(key, width);
    node.addEventListener('input', () => { state[key] = Number(node.value); }); return node; };

  const steer = async () => {
    const found = await ask('steer', { ...question(), changes: state.changes, seed: state.seed,
      temperature: state.temperature, tokens: state.tokens });
    const column = (one, title, cost) => card('half', title, h('div', { class: 'tokens' }, one.text),
      h('p', { class: 'soft' }, `perplexity to the unchanged model ${number(one.perplexity)}${cost}`));
    return h('div', { class: 'grid' }, column(found.default, 'Default', ''),
      column(found.steered, 'Steered, same seed', `, KL ${number(found.steered.kl)} nats a token`));
  };
  const effect = async () => {
    const found = await ask('change', { ...question(), changes: state.changes });
    const line = (title, key, unit) => {
      const values = found[key].map((v) => v ?? 0), most = Math.max(...values.map(Math.abs), ...found.control[key].map((v) => Math.abs(v ?? 0)), 1e-9);
      return [h('h2', {}, title), h('div', { class: 'tokens' }, found.pieces.map((p, t) => hint(h('span', { class: 'token',
        style: { backgroundColor: values[t] >= 0 ? `rgba(var(--heat), ${(0.7 * values[t] / most).toFixed(2)})` : `rgba(var(--cold), ${(-0.7 * values[t] / most).toFixed(2)})` } }, shown(p)),
        `${number(found[key][t])} ${unit}; control ${number(found.control[key][t])}`)))];
    };
    const mean = (key) => `${number(found.mean[key])} (control ${number(found.control_mean[key])})`;
    return [h('p', {}, `Over the text: KL ${mean('kl')}, \u0394 loss ${mean('delta_loss')} nats; `,
      `\u0394 logit ${found.logit.map(named).join(' less ')} at the end ${mean('delta_logit')}.`),
    line('KL of what comes next', 'kl', 'nats'), line('\u0394 loss of each token', 'delta_loss', 'nats'),
    line(`\u0394 logit ${found.logit.map(named).join(' less ')}`, 'delta_logit', ''),
    h('p', { class: 'soft' }, 'Control: eight as long vectors along other latents\u2019 decoders; the mean size of what they do, of a token\u2019s logit the largest.')];
  };
  const dose = async (c) => {
    const found = await ask('dose', { ...question(), change: c });
    const curve = found.curve;
    const picture = (key, title) => card('third', title, plot(
      [...curve.map((p) => ({ x: p.strength, y: p[key], title: `${p.strength}: ${number(p[key])}` })),
        ...curve.map((p) => ({ x: p.strength, y: p.control[key][0], control: true,
          title: `control ${number(p.control[key][0])} (${number(p.control[key][1])} to ${number(p.control[key][2])})` }))],
      [curve.map((p) => ({ x: p.strength, y: p[key] }))], { x: '\u00d7 largest value', y: title, log: '' }));
    return [h('p', {}, 'Dose-response of ', name(c.feature), `, ${c.kind}. Rings: as long vectors along other latents\u2019 decoders.`),
      h('div', { class: 'grid' }, picture('delta_logit', `\u0394 logit ${found.logit.map(named).join(' less ')}`),
        picture('kl', 'KL, nats'), picture('delta_loss', '\u0394 loss, nats'))];
  };

  // Causes.
  const cause = h('div', { id: 'cause' });
  const share = (v, f) => Math.abs(f.value - f.without) > (Math.abs(f.latents) + Math.abs(f.error)) / 10 // of parts that cancel, shares say nothing
    ? `${number(v)} (${percent(v / (f.value - f.without))})` : number(v);
  const why = async () => {
    const f = await ask('why', question());
    const shade = (line) => f.pieces.map((p, t) => hint(h('span', { class: 'token',
      style: { backgroundColor: `rgba(var(--${line.by_token[t] >= 0 ? 'heat' : 'cold'}), ${Math.min(0.7, Math.abs(line.by_token[t] / (line.gradient || 1))).toFixed(2)})` } }, shown(p)), number(line.by_token[t])));
    const chosen = f.features.filter((line) => line.chosen);
    const points = (way) => f.features.map((line) => ({ x: line[way], y: line.exact, title: `#${line.feature}` }));
    return [h('p', { class: f.passing.length ? '' : 'warn', id: 'verdict' }, f.verdict),
      h('p', {}, `${f.logit.map(named).join(' less ')}: ${number(f.value)}, without latents and error ${number(f.without)}. `,
        `Integrated: latents ${share(f.latents, f)}, error ${share(f.error, f)}. Removed at once: latents ${number(f.exact_latents)}, error ${number(f.exact_error)}.`),
      h('div', { class: 'grid' }, card('two-thirds', 'Latents, by their exact effect', h('div', { class: 'scroll' }, h('table', {}, h('thead', {}, h('tr', {},
        ['latent', 'gradient', 'integrated', 'exact', 'control', 'p', ''].map((n, i) => h('th', { class: i && i < 6 ? 'number' : '' }, n)))),
        h('tbody', {}, chosen.map((line) => h('tr', {}, h('td', {}, name(line.feature), h('div', { class: 'tokens small' }, shade(line))),
          ['gradient', 'integrated', 'exact', 'control', 'p'].map((k) => h('td', { class: 'number' }, number(line[k]))),
          h('td', {}, line.passes ? 'passes' : '', ' ', button('change', () => add(line.feature))))))))),
      card('third', 'Exact against gradient', plot(points('gradient'), [], { x: 'gradient', y: 'exact', log: '' }),
        ['gradient', 'integrated'].map((way) => h('p', { class: 'soft' },
          `${way}: rank correlation ${number(f.agreement[way].spearman)}, slope ${number(f.agreement[way].slope)}`)),
        h('p', { class: 'soft' }, `Largest effects with decoders shuffled, by the same search: ${f.shuffled.slice(0, 3).map((v) => number(v)).join(', ')}.`)))];
  };
  const trace = async () => {
    const g = await ask('graph', question());
    const lists = await Promise.all(g.members.map((i) => load(`m${i}/list`)));
    return drawGraph(g, (n) => lists[n.member].label[n.feature] || lists[n.member].word[n.feature].map((t) => named(piece(t))).slice(0, 4).join(' '));
  };
  const graphed = /^(transcoder|clt)/.test(m.place);

  const text = h('textarea', { rows: '5', 'aria-label': 'Text', oninput: (e) => { state.text = e.target.value; } });
  text.value = state.text;
  page(`Live ${m.name}`, [h('a', { href: to() }, all.title), h('a', { href: to('s', id) }, m.name), 'live'],
    h('h1', {}, 'Your text ', h('span', { class: 'soft' }, `${m.place} ${m.widthName}, L0 ${number(m.meanL0)}`)),
    h('div', { class: 'grid' },
      card('two-thirds', 'Text', text, h('div', { class: 'bar' }, button('Read', read),
        h('span', { class: 'soft' }, 'BOS stands before it; a line break is shown as \u21b5.')), shownText),
      h('div', { class: 'third card', id: 'token' }, side),
      card('', 'Change latents', changes, h('div', { class: 'bar' }, button('Steer', run(result, steer)), button('Effects', run(result, effect)),
        field('tokens', numeric('tokens', 4)), field('temperature', numeric('temperature', 4)), field('seed', numeric('seed', 4))), result),
      card('', 'Why does it say that', h('div', { class: 'bar' }, field('token', box('a', 10)), field('less', box('b', 10)),
        h('span', { class: 'soft' }, 'empty: the two likeliest'), button('Why', run(cause, why)), graphed ? button('Graph', run(cause, trace)) : null), cause),
      card('', '', below)));
  drawChanges();
  read();
}

// A graph: tokens from left to right, layers upwards, the logit on top.
function drawGraph(g, words) {
  const features = g.nodes.filter((n) => n.kind !== 'logit');
  const columns = [...new Set(features.map((n) => n.position))].sort((a, b) => a - b);
  const depth = Math.max(...features.map((n) => n.layer)) + 1, W = Math.max(640, columns.length * 90), H = 90 + 84 * (depth + 1);
  const used = {};
  const place = g.nodes.map((n) => {
    if (n.kind === 'logit') return [W / 2, 24];
    const level = n.kind === 'embedding' ? 0 : n.kind === 'bias' ? 0 : n.layer + 1;
    const column = columns.indexOf(n.position), key = `${column}/${level}`, k = used[key] = (used[key] || 0) + 1;
    return [(column + 0.5) * W / columns.length + ((k - 1) % 6 - 2.5) * 12, H - 40 - level * 84 - Math.floor((k - 1) / 6) * 11];
  });
  const most = Math.max(...g.edges.map((e) => Math.abs(e[2])), 1e-9);
  const about = (n) => n.kind === 'feature'
    ? `layer ${n.layer} #${n.feature} ${words(n)}: predicted ${number(n.predicted)}, exact ${number(n.exact)}, p ${number(n.p)}`
    : `${n.kind}${n.layer >= 0 && n.kind === 'error' ? ' of layer ' + n.layer : ''}`;
  const dot = (n, i) => {
    const [x, y] = place[i];
    const node = h('circle', { class: n.kind === 'feature' ? 'dot' : n.kind === 'logit' ? 'fill' : 'control', cx: x, cy: y,
      r: n.kind === 'logit' ? 7 : 2.5 + 9 * Math.sqrt(n.influence) }, h('title', {}, about(n)));
    if (n.kind === 'feature') {
      node.style.cursor = 'pointer';
      node.addEventListener('click', () => { location.hash = to('s', g.members[n.member], 'f', n.feature); });
    }
    return node;
  };
  const lines = features.filter((n) => n.kind === 'feature').sort((a, b) => b.influence - a.influence).slice(0, 30);
  return [h('p', { class: features.some((n) => n.passes) ? '' : 'warn' }, g.verdict),
  h('p', {}, `Predicted against exact: rank correlation ${number(g.agreement.spearman)}, slope ${number(g.agreement.slope)}. Influence ends in `,
    Object.entries(g.ends).map(([kind, v]) => `${kind} ${percent(v)}`).join(', '), '; rings are no features.'),
  h('div', { class: 'scroll' }, h('svg', { viewBox: `0 0 ${W} ${H}`, role: 'img', 'aria-label': 'attribution graph' },
    g.edges.map(([a, b, w]) => h('line', { class: w > 0 ? 'edge' : 'edge less', x1: place[a][0], y1: place[a][1], x2: place[b][0], y2: place[b][1],
      'stroke-opacity': (0.08 + 0.8 * Math.abs(w) / most).toFixed(2) })),
    g.nodes.map(dot), columns.map((t, c) => h('text', { x: (c + 0.5) * W / columns.length, y: H - 8, 'text-anchor': 'middle' }, t < 0 ? 'biases' : named(g.pieces[t]))),
    h('text', { x: W / 2 + 14, y: 28 }, g.logit.map(named).join(' less ')))),
  table([{ name: 'layer', get: (n) => n.layer, number: true }, { name: 'token', get: (n) => n.position, show: (n) => named(g.pieces[n.position]) },
    { name: 'feature', get: (n) => n.feature, show: (n) => `#${n.feature}`, link: (n) => to('s', g.members[n.member], 'f', n.feature) },
    { name: 'fires on', get: words },
    ...['influence', 'predicted', 'exact', 'p'].map((k) => ({ name: k, get: (n) => n[k], show: (n) => number(n[k]), number: true })),
    { name: '', get: (n) => n.passes, show: (n) => n.passes ? 'passes' : '' }], lines, [4, true])];
}
