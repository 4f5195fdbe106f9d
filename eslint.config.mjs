// The pages' scripts are classic ones, since a page from a disk cannot load
// modules: they share one global scope, which this config gathers by itself.

import { readdirSync, readFileSync } from 'node:fs';

const FOLDER = 'gemma_scope/microscope/dashboard/assets/';
const DECLARED = /^(?:async )?(?:function|const|let) (\w+)/gm;
const BROWSER = [
  'AbortController',
  'Blob',
  'DecompressionStream',
  'Response',
  'TextDecoder',
  'URL',
  'XMLSerializer',
  'addEventListener',
  'atob',
  'document',
  'fetch',
  'getComputedStyle',
  'history',
  'innerWidth',
  'localStorage',
  'location',
  'matchMedia',
  'scrollTo',
  'scrollY',
  'setTimeout',
  'window',
];

const scripts = readdirSync(FOLDER).filter((name) => name.endsWith('.js'));
const declared = scripts.flatMap((name) => {
  const text = readFileSync(FOLDER + name, 'utf8');
  return [...text.matchAll(DECLARED)].map((match) => match[1]);
});
const twice = declared.filter((name, i) => declared.indexOf(name) !== i);
if (twice.length) throw new Error(`declared in two scripts: ${twice}`);

export default [
  {
    files: [FOLDER + '*.js'],
    languageOptions: {
      ecmaVersion: 2023,
      sourceType: 'script',
      globals: Object.fromEntries(
        [...BROWSER, ...declared].map((name) => [name, 'writable']),
      ),
    },
    rules: {
      'consistent-return': 'error',
      eqeqeq: 'error',
      'max-len': [
        'error',
        { code: 80, ignoreTemplateLiterals: true, ignoreRegExpLiterals: true },
      ],
      'max-lines-per-function': ['error', { max: 80 }],
      'max-params': ['error', 6],
      'no-eval': 'error',
      'no-implied-eval': 'error',
      'no-undef': 'error',
      'no-unused-vars': ['error', { vars: 'local' }],
      'no-var': 'error',
      'prefer-const': 'error',
      'no-restricted-properties': [
        'error',
        ...['innerHTML', 'outerHTML', 'insertAdjacentHTML', 'write'].map(
          (property) => ({ property, message: 'Text goes in as text.' }),
        ),
      ],
    },
  },
];
