'use strict';
// Plots as SVG: round ticks on linear and logarithmic axes.

function linearTicks(low, high, count = 5) {
  const step = 10 ** Math.floor(Math.log10((high - low) / count || 1));
  const factor = [1, 2, 5, 10].find((f) => (high - low) / (step * f) <= count);
  const size = step * (factor || 10);
  const ticks = [];
  for (
    let v = Math.ceil(low / size) * size;
    v <= high + size / 1e6;
    v += size
  ) {
    ticks.push(Math.abs(v) < size / 1e6 ? 0 : v);
  }
  return ticks;
}

function logTicks(low, high) {
  const decades = Math.log10(high / low);
  const factors = decades > 3 ? [1] : decades > 1.2 ? [1, 3] : [1, 2, 3, 5, 7];
  const ticks = [];
  for (let e = Math.floor(Math.log10(low)); 10 ** e <= high; e += 1) {
    ticks.push(...factors.map((f) => f * 10 ** e));
  }
  const inside = ticks.filter((v) => v >= low && v <= high);
  return inside.length > 1 ? inside : linearTicks(low, high, 4);
}

// An axis: its scale from values to pixels, and its ticks.
function axis(values, from, to, log) {
  const f = log ? Math.log10 : (v) => v;
  let [low, high] = [Math.min(...values.map(f)), Math.max(...values.map(f))];
  if (!(high > low)) [low, high] = [low - 0.5, low + 0.5];
  const pad = (high - low) * 0.07;
  [low, high] = [low - pad, high + pad];
  const scale = (v) => from + ((to - from) * (f(v) - low)) / (high - low);
  const ticks = log ? logTicks(10 ** low, 10 ** high) : linearTicks(low, high);
  return { scale, ticks };
}

const FRAME = { width: 420, height: 240, left: 56, right: 8, bottom: 40 };

function frame(xs, ys, { x, y, log }) {
  const { width, height, left, right, bottom } = FRAME;
  const across = axis(xs, left, width - right, log.includes('x'));
  const up = axis(ys, height - bottom, 8, log.includes('y'));
  const base = height - bottom;
  const middle = (base + 8) / 2;
  const centre = { 'text-anchor': 'middle' };
  const marks = [
    h('line', {
      class: 'axis',
      x1: left,
      x2: width - right,
      y1: base,
      y2: base,
    }),
    h('line', { class: 'axis', x1: left, x2: left, y1: 8, y2: base }),
    across.ticks.map((v) => [
      h('line', {
        class: 'grid',
        x1: across.scale(v),
        x2: across.scale(v),
        y1: 8,
        y2: base,
      }),
      h('text', { x: across.scale(v), y: base + 15, ...centre }, number(v)),
    ]),
    up.ticks.map((v) => [
      h('line', {
        class: 'grid',
        x1: left,
        x2: width - right,
        y1: up.scale(v),
        y2: up.scale(v),
      }),
      h(
        'text',
        { x: left - 6, y: up.scale(v) + 4, 'text-anchor': 'end' },
        number(v),
      ),
    ]),
    h('text', { x: (left + width) / 2, y: height - 6, ...centre }, x),
    h(
      'text',
      { x: 11, y: middle, transform: `rotate(-90 11 ${middle})`, ...centre },
      y,
    ),
  ];
  return { across: across.scale, up: up.scale, marks };
}

function dot(p, across, up, onpick) {
  const open = onpick && !p.control ? () => onpick(p) : null;
  return h(
    'circle',
    {
      class: (p.control ? 'control' : 'dot') + (open ? ' open' : ''),
      cx: across(p.x),
      cy: up(p.y),
      r: p.r || 3.5,
      onclick: open,
    },
    h('title', {}, p.title),
  );
}

// Points and lines; `labels` has the axes' names and which are logarithmic.
function plot(points, lines, labels, onpick) {
  const { across, up, marks } = frame(
    points.map((p) => p.x),
    points.map((p) => p.y),
    labels,
  );
  const path = (line) =>
    'M' + line.map((p) => `${across(p.x)},${up(p.y)}`).join('L');
  const name = `${labels.y} against ${labels.x}`;
  const svg = h(
    'svg',
    {
      viewBox: `0 0 ${FRAME.width} ${FRAME.height}`,
      role: 'img',
      'aria-label': name,
    },
    marks,
    lines.map((line) => h('path', { class: 'line', d: path(line) })),
    points.map((p) => dot(p, across, up, onpick)),
  );
  return figure(svg, name);
}

// Counts in bins, on a logarithmic axis of values; `mark` draws a line there.
function histogram(counts, edges, { x, y, mark }) {
  const used = counts.map((v, i) => [v, i]).filter(([v]) => v > 0);
  if (!used.length) return null;
  const [first, last] = [used[0][1], used[used.length - 1][1]];
  const ends = [edges[first], edges[last + 1]];
  if (mark > 0) ends.push(mark);
  const most = Math.max(...counts);
  const { across, up, marks } = frame(ends, [0, most], { x, y, log: 'x' });
  const bar = ([count, i]) =>
    h(
      'rect',
      {
        class: 'fill',
        x: across(edges[i]),
        width: Math.max(across(edges[i + 1]) - across(edges[i]) - 1, 1),
        y: up(count),
        height: up(0) - up(count),
      },
      h(
        'title',
        {},
        `${number(edges[i])} to ${number(edges[i + 1])}: ${whole(count)}`,
      ),
    );
  const line = { class: 'threshold', x1: across(mark), x2: across(mark) };
  const svg = h(
    'svg',
    {
      viewBox: `0 0 ${FRAME.width} ${FRAME.height}`,
      role: 'img',
      'aria-label': `${y} against ${x}`,
    },
    marks,
    used.map(bar),
    mark > 0
      ? h('line', { ...line, y1: 8, y2: FRAME.height - FRAME.bottom })
      : null,
  );
  return figure(svg, `${y} against ${x}`);
}
