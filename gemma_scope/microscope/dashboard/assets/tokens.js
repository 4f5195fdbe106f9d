'use strict';
// Elements are made here alone. Text goes in as text: nothing is ever parsed.
function h(tag, attributes, ...children) {
  const svg = ['svg', 'g', 'path', 'rect', 'circle', 'line', 'text', 'title'];
  const node = svg.includes(tag) && (attributes || {}).svg !== false
    ? document.createElementNS('http://www.w3.org/2000/svg', tag)
    : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (key === 'svg' || value === undefined || value === null) continue;
    if (key.startsWith('on')) node.addEventListener(key.slice(2), value);
    else if (key === 'style') Object.assign(node.style, value);
    else node.setAttribute(key, value);
  }
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    node.append(child.nodeType ? child : document.createTextNode(child));
  }
  return node;
}

// A piece as a reader wants it: spaces, line breaks and bytes made visible.
function shown(piece) {
  const byte = /^<0x([0-9A-F]{2})>$/.exec(piece);
  if (byte && byte[1] === '0A') return '\u21b5';
  return piece.replace(/\u2581/g, ' ').replace(/\n/g, '\u21b5')
    .replace(/\t/g, '\u21e5')
    .replace(/[\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]/g,
      (c) => '\u27e8U+' + c.codePointAt(0).toString(16).toUpperCase() + '\u27e9');
}

// A piece of spaces alone, where nothing stands around it.
function named(piece) {
  const text = shown(piece), blank = /^ +$/.test(text);
  return blank ? '\u2423' + (text.length > 1 ? '\u00d7' + text.length : '') : text;
}

function number(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return '\u2013';
  if (value !== 0 && Math.abs(value) < 1e-3) return value.toExponential(1);
  return Math.abs(value) >= 1000 ? Math.round(value).toLocaleString('en')
    : Number(value.toPrecision(digits)).toString();
}

const tip = h('div', { class: 'tip', hidden: '', role: 'status' });
function hint(node, text) {
  node.addEventListener('pointerenter', () => {
    tip.textContent = text;
    tip.hidden = false;
    const box = node.getBoundingClientRect();
    tip.style.left = Math.min(box.left, innerWidth - tip.offsetWidth - 8) + 'px';
    tip.style.top = Math.max(box.top - tip.offsetHeight - 4, 4) + 'px';
  });
  node.addEventListener('pointerleave', () => { tip.hidden = true; });
  return node;
}

// Tokens with a latent's values as shading, each value on hover.
function tokens(pieces, values, most, peak) {
  return pieces.map((piece, i) => {
    const strength = most > 0 ? Math.min(values[i] / most, 1) : 0;
    const node = h('span', {
      class: 'token' + (i === peak ? ' peak' : ''),
      style: strength > 0
        ? { backgroundColor: `rgba(var(--heat), ${(0.1 + 0.6 * strength).toFixed(2)})` } : {},
    }, shown(piece));
    return hint(node, JSON.stringify(shown(piece)) + '  ' + number(values[i]));
  });
}
