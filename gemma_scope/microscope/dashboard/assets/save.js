'use strict';
// Any plot as SVG and any table as CSV, written by the browser itself.

const PAINT = [
  'fill',
  'stroke',
  'stroke-width',
  'stroke-opacity',
  'stroke-dasharray',
  'fill-opacity',
  'font-family',
  'font-size',
  'opacity',
  'text-anchor',
];

function download(name, type, text) {
  const href = URL.createObjectURL(new Blob([text], { type }));
  h('a', { href, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(href), 1000);
}

// A copy that looks the same without the page's style sheet.
function svgText(svg) {
  const copy = svg.cloneNode(true);
  const from = [svg, ...svg.querySelectorAll('*')];
  const to_ = [copy, ...copy.querySelectorAll('*')];
  from.forEach((node, i) => {
    const style = getComputedStyle(node);
    PAINT.forEach((key) =>
      to_[i].setAttribute(key, style.getPropertyValue(key)),
    );
    to_[i].removeAttribute('class');
  });
  copy.setAttribute('xmlns', 'http://www.w3.org/2000/svg');
  return new XMLSerializer().serializeToString(copy);
}

// Cells that begin like a formula get a quote in front: a spreadsheet would
// compute them otherwise.
function csvCell(value) {
  if (missing(value)) return '';
  const text = String(value);
  const safe = typeof value === 'string' && /^[=+\-@\t\r]/.test(text);
  return `"${(safe ? "'" : '') + text.replaceAll('"', '""')}"`;
}

function csvText(columns, rows) {
  const value = (column, row) =>
    column.text ? column.text(row) : column.get(row);
  const lines = [
    columns.map((c) => csvCell(c.name)),
    ...rows.map((row) => columns.map((c) => csvCell(value(c, row)))),
  ];
  return lines.map((line) => line.join(',') + '\n').join('');
}

const saver = (name, act) => button(name, act, { class: 'plain save' });

// A plot with a button that saves it.
function figure(svg, name = 'plot') {
  const file = name.replace(/[^\w]+/g, '_') + '.svg';
  const act = () => download(file, 'image/svg+xml', svgText(svg));
  return h('div', { class: 'figure' }, svg, saver('Save SVG', act));
}
