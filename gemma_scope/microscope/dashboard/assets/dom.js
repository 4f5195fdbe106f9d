'use strict';
// Elements, numbers and hints. Text goes in as text: nothing is ever parsed.

const SVG = ['svg', 'g', 'path', 'rect', 'circle', 'line', 'text', 'title'];

function h(tag, attributes, ...children) {
  const node = SVG.includes(tag)
    ? document.createElementNS('http://www.w3.org/2000/svg', tag)
    : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value === undefined || value === null) continue;
    if (key.startsWith('on')) node.addEventListener(key.slice(2), value);
    else if (key === 'style') Object.assign(node.style, value);
    else node.setAttribute(key, value);
  }
  node.append(...nodesOf(children));
  return node;
}

// A nested list of nodes and texts as a flat one; null and false are left out.
function nodesOf(children) {
  return [children]
    .flat(Infinity)
    .filter((c) => c !== null && c !== undefined && c !== false)
    .map((c) => (c.nodeType ? c : document.createTextNode(c)));
}

function fill(node, ...children) {
  node.replaceChildren(...nodesOf(children));
}

const soft = (...children) => h('span', { class: 'soft' }, children);
const para = (...children) => h('p', {}, children);
const note = (...children) => h('p', { class: 'soft' }, children);
const warning = (...children) => h('p', { class: 'warn' }, children);

function button(name, act, attributes = {}) {
  return h(
    'button',
    { class: 'plain', type: 'button', onclick: act, ...attributes },
    name,
  );
}

// Numbers.

const DASH = '\u2013';
const missing = (x) => x === null || x === undefined || Number.isNaN(x);
const whole = (x) => x.toLocaleString('en');

function number(value, digits = 3) {
  if (missing(value)) return DASH;
  const size = Math.abs(value);
  if (value !== 0 && (size < 1e-3 || size >= 1e7)) {
    return value.toExponential(1);
  }
  return size >= 1000
    ? whole(Math.round(value))
    : Number(value.toPrecision(digits)).toString();
}

const percent = (x, digits = 3) =>
  missing(x) ? DASH : number(100 * x, digits) + ' %';

// Three digits, zeros kept, so that a column is aligned.
function aligned(value, digits = 3) {
  if (missing(value)) return DASH;
  const size = Math.abs(value);
  return size >= 1e-3 && size < 10 ** digits
    ? value.toPrecision(digits)
    : number(value, digits);
}

// Two digits of a figure whose interval is wider than 1 % of it, else three.
function measured(figure) {
  if (!figure || missing(figure.value)) return DASH;
  const { value, low, high } = figure;
  const wide = !missing(low) && high - low > 0.01 * Math.abs(value);
  const size = Math.abs(value);
  if (!wide || size < 1e-3 || size >= 100) return number(value);
  return value.toPrecision(2);
}

// Hints: what an element says when it is pointed at or focused.

const tip = h('div', { class: 'tip', hidden: '', role: 'status' });

function showTip(node, text) {
  tip.textContent = text;
  tip.hidden = false;
  const box = node.getBoundingClientRect();
  const left = Math.min(box.left, innerWidth - tip.offsetWidth - 8);
  tip.style.left = Math.max(left, 0) + 'px';
  tip.style.top = Math.max(box.top - tip.offsetHeight - 4, 4) + 'px';
}

function hideTip() {
  tip.hidden = true;
}

function hint(node, text) {
  node.addEventListener('pointerenter', () => showTip(node, text));
  node.addEventListener('focus', () => showTip(node, text));
  node.addEventListener('pointerleave', hideTip);
  node.addEventListener('blur', hideTip);
  return node;
}

function link(href, ...children) {
  return h('a', { href }, children);
}

function card(kind, title, ...content) {
  return h(
    'section',
    { class: 'card ' + kind },
    title ? h('h2', {}, title) : null,
    content,
  );
}

// Choices that a browser keeps between visits, where it allows that.
const kept = {
  get(key) {
    try {
      return localStorage.getItem('microscope.' + key);
    } catch {
      return null;
    }
  },
  set(key, value) {
    try {
      localStorage.setItem('microscope.' + key, value);
    } catch {
      // Private windows keep nothing.
    }
  },
};
