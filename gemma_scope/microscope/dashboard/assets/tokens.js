'use strict';
// Tokens for reading: spaces, line breaks and bytes made visible.

const BYTE = /^<0x([0-9A-F]{2})>$/;
const HIDDEN =
  /[\u0000-\u0008\u000b-\u001f\u007f\u2028\u2029\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff]/g;

function codePoint(character) {
  const code = character.codePointAt(0).toString(16).toUpperCase();
  return '\u27e8U+' + code.padStart(4, '0') + '\u27e9';
}

// A piece of the vocabulary as text; case is never changed.
function shown(piece) {
  const byte = BYTE.exec(piece);
  if (byte && byte[1] === '0A') return '\u21b5';
  return piece
    .replace(/\u2581/g, ' ')
    .replace(/\n/g, '\u21b5')
    .replace(/\t/g, '\u21e5')
    .replace(HIDDEN, codePoint);
}

// A piece alone: its leading spaces are marked.
function named(piece) {
  const text = shown(piece);
  const spaces = /^ +/.exec(text);
  if (!spaces) return text;
  const count = spaces[0].length;
  const mark = '\u2423' + (count > 1 ? '\u00d7' + count : '');
  return mark + text.slice(count);
}

// Pieces as text, where runs of bytes that are valid UTF-8 are decoded: the
// character stands at the first byte and the others are empty.
function decoded(pieces) {
  const texts = pieces.map(shown);
  const decoder = new TextDecoder('utf-8', { fatal: true });
  for (let first = 0; first < pieces.length;) {
    let end = first;
    while (end < pieces.length && BYTE.test(pieces[end])) end += 1;
    if (end > first) decodeRun(pieces, texts, first, end, decoder);
    first = Math.max(end, first + 1);
  }
  return texts;
}

function decodeRun(pieces, texts, first, end, decoder) {
  const bytes = pieces
    .slice(first, end)
    .map((p) => parseInt(BYTE.exec(p)[1], 16));
  for (let i = 0; i < bytes.length;) {
    const size = bytes[i] >= 240 ? 4 : bytes[i] >= 224 ? 3 : 2;
    const part = bytes.slice(i, i + size);
    const text = bytes[i] < 194 || part.length < size ? '' : tryDecode(part);
    if (text) {
      texts[first + i] = shown(text);
      for (let k = 1; k < size; k += 1) texts[first + i + k] = '';
    }
    i += text ? size : 1;
  }

  function tryDecode(part) {
    try {
      return decoder.decode(Uint8Array.from(part));
    } catch {
      return '';
    }
  }
}

function heat(strength, hue = 'heat') {
  if (!(strength > 0)) return {};
  const alpha = (0.1 + 0.4 * Math.min(strength, 1)).toFixed(2);
  return { backgroundColor: `rgba(var(--${hue}), ${alpha})` };
}

function said(piece, text) {
  const own = JSON.stringify(shown(piece));
  return BYTE.test(piece) && text !== shown(piece) ? `${own} (byte)` : own;
}

// Tokens with a value each, shaded as a share of `most`; values on hover.
function tokens(pieces, values, most, peak) {
  const texts = decoded(pieces);
  return pieces.map((piece, i) => {
    const node = h(
      'span',
      {
        class: 'token' + (i === peak ? ' peak' : ''),
        style: most > 0 ? heat(values[i] / most) : {},
      },
      texts[i],
    );
    if (BYTE.test(piece)) node.classList.add('byte');
    return hint(node, said(piece, texts[i]) + '  ' + number(values[i]));
  });
}

// `text` with every occurrence of `query` marked, whatever its case.
function marked(text, query) {
  const low = text.toLowerCase();
  if (!query || low.length !== text.length) return text;
  const parts = [];
  let start = 0;
  for (;;) {
    const at = low.indexOf(query, start);
    if (at < 0) break;
    const end = at + query.length;
    parts.push(text.slice(start, at), h('mark', {}, text.slice(at, end)));
    start = end;
  }
  return [...parts, text.slice(start)];
}

function chipOf(piece, title, query = '') {
  const node = h('span', { class: 'chip' }, marked(named(piece), query));
  return title ? hint(node, title) : node;
}
