'use strict';
// Tables that sort by any column and remember the order.
//
// A column: {name, get, show?, text?, number?, link?, hint?}. `get` returns
// the value to sort by, `show` what the cell shows, `text` what a CSV file has.

const tableOrders = {}; // by the table's key

function ordered(x, y) {
  const [a, b] = [missing(x), missing(y)];
  if (a || b) return a - b;
  return x > y ? 1 : x < y ? -1 : 0;
}

function sortRows(rows, column, down) {
  const sign = down ? -1 : 1;
  return rows
    .map((row) => [column.get(row), row])
    .sort(([x], [y]) => {
      const gone = missing(x) - missing(y);
      return gone || sign * ordered(x, y);
    })
    .map(([, row]) => row);
}

function cell(column, row) {
  const value = (column.show || column.get)(row);
  return h(
    'td',
    { class: column.number ? 'number' : null },
    column.link ? link(column.link(row), value) : value,
  );
}

function heading(column, i, order, change) {
  if (!column.name) return h('td', {}); // of buttons: nothing to sort by
  const mine = order.by === i;
  const arrow = mine ? (order.down ? ' \u2193' : ' \u2191') : '';
  const sorted = { 'aria-sort': order.down ? 'descending' : 'ascending' };
  const name = button(column.name + arrow, () => change(i), { class: 'sort' });
  if (column.hint) hint(name, column.hint);
  return h(
    'th',
    { class: column.number ? 'number' : null, ...(mine ? sorted : {}) },
    name,
  );
}

// {node, draw(rows, chosen)}; `order` is {by, down} at the first visit.
function sortable(key, columns, order, most = Infinity) {
  const state = (tableOrders[key] ||= { ...order });
  const node = h('div', { class: 'scroll', tabindex: '0' });
  let rows = [];
  let here = -1;
  const change = (i) => {
    const same = state.by === i;
    Object.assign(state, {
      by: i,
      down: same ? !state.down : Boolean(columns[i].number),
    });
    draw(rows, here);
  };
  const draw = (given, chosen = -1) => {
    [rows, here] = [given, chosen];
    const sorted = sortRows(rows, columns[state.by], state.down);
    const line = (row, n) =>
      h(
        'tr',
        { class: n === chosen ? 'here' : null },
        columns.map((c) => cell(c, row)),
      );
    fill(
      node,
      h(
        'table',
        {},
        h(
          'thead',
          {},
          h(
            'tr',
            {},
            columns.map((c, i) => heading(c, i, state, change)),
          ),
        ),
        h('tbody', {}, sorted.slice(0, most).map(line)),
      ),
      saver('Save CSV', () =>
        download(`${key}.csv`, 'text/csv', csvText(columns, sorted)),
      ),
    );
    return sorted;
  };
  return { node, draw };
}

function table(key, columns, rows, order, most) {
  const made = sortable(key, columns, order, most);
  made.draw(rows);
  return made.node;
}
