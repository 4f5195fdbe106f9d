"""The terms of the pages' help, each in a sentence or two.

docs/concepts.md has the same sentences, with formulas and sources. A test
compares them.
"""

TERMS = (
  (
    'SAE',
    'A sparse autoencoder: it writes an activation of the language model as a '
    'sum of a few features out of many.',
  ),
  (
    'site',
    'Where an activation is read: resid_post is the residual stream after a '
    'block, attn_out and mlp_out what its two halves compute.',
  ),
  (
    'feature',
    'One of the directions of an SAE, also called latent. Its activation on a '
    'token is 0, or says how strongly it fires there.',
  ),
  ('L0', 'The number of features that fire on a token, on average.'),
  ('density', 'The share of tokens on which a feature fires.'),
  (
    'FVU',
    'Fraction of variance unexplained: the squared error of the '
    "reconstruction over the activation's variance.",
  ),
  (
    'delta loss',
    "How much the language model's loss grows, in nats a token, when the "
    "SAE's reconstruction takes the activation's place.",
  ),
  (
    'control',
    'The same measurement where nothing was learned: a random SAE of the same '
    'shape and sparsity, shuffled decoders, or vectors of the same norm.',
  ),
  ('dead', 'A feature that never fired on this text.'),
  ('dense', 'A feature that fires on more than 10 % of tokens.'),
  (
    'raises, lowers',
    "The tokens whose logits a feature's decoder moves most, read directly "
    'through the unembedding (logit lens).',
  ),
  (
    'label',
    'What a feature seems to stand for, by a rule or a language model, from '
    'half of its examples. The score is its balanced accuracy on the others.',
  ),
  (
    'Jaccard',
    'Of two features: the tokens on which both fire over those on which '
    'either does.',
  ),
  (
    'ablate, add, set to, project out',
    "Changes inside the model: a feature's activation becomes 0, is raised, "
    'is fixed, or its direction is removed.',
  ),
  (
    'KL',
    "How far the model's prediction moves, in nats: Kullback-Leibler "
    'divergence from the unchanged model.',
  ),
  (
    'effect',
    'What an edit of the feature at one token does to the prediction, measured '
    'by running the model again. A feature has an effect if it exceeds edits '
    'of the same norm along other decoders and random directions.',
  ),
  (
    'supernode',
    'Features of an attribution graph that are read, and ablated, as one, '
    'grouped by hand or because they have similar edges.',
  ),
  (
    'outlier tokens',
    'Tokens whose activation has a norm many times that of any other. Nearly '
    'every feature fires on them, so they are left out and listed apart.',
  ),
)
