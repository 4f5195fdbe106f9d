'use strict';
// Questions to launch/microscope.py serve, and buttons that ask them.

const ENDED =
  'The server has ended. Start it again with "gemma-scope microscope serve" ' +
  'and open the address that it prints.';

async function ask(name, question) {
  let reply;
  try {
    reply = await fetch(`api/${name}`, {
      method: 'POST',
      body: JSON.stringify(question),
    });
  } catch {
    throw new Error(ENDED);
  }
  const found = await reply
    .json()
    .catch(() => ({ error: `The server gave no answer (${reply.status}).` }));
  if (!reply.ok) throw new Error(found.error);
  return found;
}

function field(name, node) {
  return h('label', { class: 'soft' }, name, ' ', node);
}

// Asks a question when a button is pressed. An error is shown in place of the
// answer; of several questions only the last one's answer is shown.
function run(target, work, clear = () => {}) {
  return async () => {
    const mine = (target.asked || 0) + 1;
    target.asked = mine;
    const late = () => target.asked !== mine;
    fill(target, h('p', { class: 'soft', role: 'status' }, 'Working \u2026'));
    try {
      const found = await work();
      if (!late()) fill(target, typeof found === 'function' ? found() : found);
    } catch (error) {
      if (late()) return;
      clear();
      fill(target, h('p', { class: 'warn', role: 'status' }, error.message));
    }
  };
}

// Shows that programs are being compiled, until all are.
async function warm(id, node, stale) {
  try {
    for (;;) {
      const state = await ask('warm', { member: id });
      if (stale() || state.done >= state.total) break;
      fill(
        node,
        note(
          `Warming up: ${state.what} (${state.done} of ${state.total}). ` +
            'Questions are answered meanwhile, but slowly.',
        ),
      );
      await new Promise((resolve) => setTimeout(resolve, 1000));
    }
    fill(node);
  } catch (error) {
    fill(node, warning(error.message));
  }
}

// A box for one token: leading spaces are marked, pieces are completed.
function tokenBox(label, value, set) {
  const options = h('datalist', { id: 'pieces-' + label });
  const box = h('input', {
    size: '12',
    'aria-label': label,
    list: options.id,
    autocomplete: 'off',
    spellcheck: 'false',
  });
  const mark = (text) =>
    text.replace(/^[ \u2581]+/, (s) => '\u2423'.repeat(s.length));
  const plain = (text) => text.replace(/\u2423/g, ' ');
  box.value = mark(value);
  box.addEventListener('input', async () => {
    box.value = mark(box.value);
    set(plain(box.value));
    try {
      const found = await ask('complete', { text: plain(box.value) });
      fill(
        options,
        found.pieces.map((p) => h('option', { value: mark(shown(p)) })),
      );
    } catch {
      fill(options); // the question itself will say what is wrong
    }
  });
  return [box, options];
}
