'use strict';
// Data come as scripts, since pages from a file may fetch nothing else: each
// calls scope(key, text), where text is gzipped JSON in base64.

const waiting = {};
const known = {};

function scope(key, text) {
  waiting[key](text);
}
window.scope = scope;

function bytesOf(text) {
  return Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
}

async function unpack(text) {
  const stream = new Blob([bytesOf(text)])
    .stream()
    .pipeThrough(new DecompressionStream('gzip'));
  return JSON.parse(await new Response(stream).text());
}

function load(key) {
  known[key] ||= new Promise((resolve, reject) => {
    waiting[key] = resolve;
    const script = h('script', { src: `data/${key}.js` });
    script.addEventListener('error', () => {
      delete known[key];
      reject(new Error(`The file data/${key}.js is missing.`));
    });
    document.head.append(script);
  }).then(unpack);
  return known[key];
}

// float16 shares of the largest value, in base64, as an example has them.
function halves(text) {
  const bytes = bytesOf(text);
  const view = new DataView(bytes.buffer);
  return Array.from({ length: bytes.length / 2 }, (_, i) => {
    const bits = view.getUint16(2 * i, true);
    const exponent = (bits >> 10) & 31;
    const rest = bits & 1023;
    return exponent
      ? 2 ** (exponent - 15) * (1 + rest / 1024)
      : 2 ** -24 * rest;
  });
}

let all; // data/collection.js
let vocabulary; // data/vocabulary.js
const served = location.protocol.startsWith('http');
const piece = (id) => vocabulary[id] ?? '\ufffd';
const to = (...parts) => '#/' + parts.join('/');
const chip = (id, title, query) =>
  chipOf(piece(id), title || `token ${id}`, query);
const chips = (ids, query) => ids.map((id) => chip(id, '', query));

// A label, with runs of spaces made visible.
function spaced(label) {
  return label.replace(/ {2,}/g, (s) => '\u2423\u00d7' + s.length);
}

// What a feature is called: its label, or the tokens that it fires on.
function callNamed(list, j) {
  if (list.label[j]) return spaced(list.label[j]);
  const words = list.word[j].map((t) => named(piece(t))).slice(0, 4);
  return words.length ? words.join(' ') : 'never fired';
}
