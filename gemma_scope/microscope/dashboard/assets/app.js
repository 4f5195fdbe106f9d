'use strict';
// Routes, keyboard shortcuts and the theme.

const main = document.getElementById('main');
const keys = {};
const places = {}; // how far each page was scrolled
let shows = 0; // a page that was left while it loaded is not shown
let entry = ''; // of the browser's history

function page(title, crumbs, ...content) {
  document.title = title;
  const separated = crumbs.flatMap((c) => [' / ', c]).slice(1);
  fill(document.getElementById('crumbs'), separated);
  hideTip();
  fill(main, content);
  const corpus = all.corpus;
  document.getElementById('footer').textContent =
    `Read on ${whole(all.sequences)} sequences of ${corpus.name} ` +
    `(${corpus.split}, SHA-256 ${String(corpus.sha256).slice(0, 12)}). ` +
    `Model ${all.model}${weightsOf()}, gemma_scope ${all.code}.`;
}

// How the model's weights are quantised, in brackets.
function weightsOf() {
  return all.quantisation ? ` (quantised: ${all.quantisation})` : '';
}

async function route(parts, stale) {
  const [kind, a, what, b] = parts;
  const id = Number(a);
  if (kind === 'graph') return savedGraph();
  if (kind && !all.members[id]) throw new Error('There is no such SAE here.');
  if (!kind) return collection();
  if (kind === 'c') return comparison(id, Number(what), stale);
  const number_ = what === 'f' ? Number(b) : null;
  if (kind === 'live') return live(id, number_, stale);
  if (what === 'o') return outliers(id, stale);
  return what === 'f' ? feature(id, number_, stale) : list(id, stale);
}

async function show() {
  const mine = (shows += 1);
  const stale = () => mine !== shows;
  const top = enter();
  const next = location.hash.replace(/^#\/?/, '');
  for (const key of Object.keys(keys)) delete keys[key];
  try {
    await route(next.split('/').filter(Boolean), stale);
  } catch (error) {
    if (stale()) return;
    page(
      'Not found',
      [link(to(), all.title)],
      h('h1', {}, 'Page not found'),
      warning(error.message),
    );
  }
  if (!stale()) scrollTo(0, top);
}

// A page that is reached by Back or Forward has its entry in the history
// already: its place is kept. A new one begins at the top.
function enter() {
  places[entry] = scrollY;
  const state = history.state;
  const again = Boolean(state && state.entry);
  entry = again ? state.entry : `${Date.now()}-${Math.random()}`;
  if (!again) history.replaceState({ entry }, '');
  return again ? places[entry] || 0 : 0;
}

function actions(searching) {
  const move = (by) => keys.move && (() => keys.move(by));
  return {
    '/': keys.find,
    '?': openHelp,
    j: move(1),
    k: move(-1),
    r: keys.random,
    ArrowDown: searching && move(1),
    ArrowUp: searching && move(-1),
    Enter: keys.open,
    t: () => document.getElementById('theme').click(),
  };
}

addEventListener('keydown', (event) => {
  if (overlay.open || event.ctrlKey || event.metaKey || event.altKey) return;
  const focus = document.activeElement;
  const typing = ['INPUT', 'SELECT', 'TEXTAREA'].includes(focus.tagName);
  const searching = focus.type === 'search';
  if (event.key === 'Escape') {
    focus.blur();
    if (!typing && keys.up) keys.up();
    return;
  }
  const arrow = ['ArrowDown', 'ArrowUp'].includes(event.key);
  const enter = event.key === 'Enter';
  if (typing && !(searching && (arrow || enter))) return;
  if (enter && ['A', 'BUTTON', 'SUMMARY'].includes(focus.tagName)) return;
  const act = actions(searching)[event.key];
  if (!act) return;
  event.preventDefault();
  act();
});

const theme = document.getElementById('theme');

function paint(name) {
  document.documentElement.dataset.theme = name;
  theme.textContent = name === 'dark' ? 'Light' : 'Dark';
}

theme.addEventListener('click', () => {
  const dark = document.documentElement.dataset.theme === 'dark';
  paint(dark ? 'light' : 'dark');
  kept.set('theme', dark ? 'light' : 'dark');
});
document.getElementById('help').addEventListener('click', openHelp);

const dark = matchMedia('(prefers-color-scheme: dark)').matches;
paint(kept.get('theme') || (dark ? 'dark' : 'light'));
document.body.append(tip, overlay);
history.scrollRestoration = 'manual';
addEventListener('hashchange', show);
Promise.all([load('collection'), load('vocabulary')]).then(([c, v]) => {
  [all, vocabulary] = [c, v];
  show();
});
