"""Hook names of other tools <-> `Site`.

  transformers       model.layers.12.output, ...12.self_attn.o_proj.input
  TransformerLens    blocks.12.hook_resid_post, blocks.12.attn.hook_z
  a module's output  layers.12, layers.12.mlp (sparsify, forward hooks)

The layers of a multimodal model are below `language_model`, alone or beside
`model`. TransformerLens reads `hook_mlp_out` after the post-MLP norm in Gemma,
and `ln2.hook_normalized` before the norm's gain. From its version 3 on it also
has the input and output of every module, as in `blocks.12.ln2.hook_out`; these
names are read, and never written.

In a mixture of experts, Gemma 4's 26B-A4B, transformers' `mlp` is the dense
branch alone: its output is none of our sites, and mlp_raw has no name there.
"""

from __future__ import annotations

import re

from gemma_scope import files, sites
from gemma_scope.release.formats import model_names

_TRANSFORMERS = {
  'output': 'resid_post',
  'self_attn.o_proj.input': 'attn_out',
  'self_attn.o_proj.output': 'attn_raw',
  'pre_feedforward_layernorm.output': 'mlp_in',
  'post_feedforward_layernorm.output': 'mlp_out',
  'post_attention_layernorm.output': 'attn_add',
  'mlp.input': 'mlp_in',
  'mlp.output': 'mlp_raw',
  'self_attn.output': 'attn_raw',
  'post_per_layer_input_norm.output': 'ple_out',
  'router.proj.output': 'router_logits',
  'post_feedforward_layernorm_2.output': 'experts_out',
}
_TRANSFORMER_LENS = {
  'hook_resid_pre': 'resid_pre',
  'hook_resid_mid': 'resid_mid',
  'hook_resid_post': 'resid_post',
  'hook_attn_out': 'attn_add',
  'hook_mlp_out': 'mlp_out',
  'attn.hook_z': 'attn_out',
  'ln2.hook_normalized': 'mlp_in_ungained',
  'hook_mlp_in': 'resid_mid',
}
# Of version 3, where each module of transformers is one of its own.
_BRIDGED = {
  'hook_in': 'resid_pre',
  'hook_out': 'resid_post',
  'attn.hook_out': 'attn_raw',
  'attn.o.hook_in': 'attn_out',
  'attn.o.hook_out': 'attn_raw',
  'ln1_post.hook_out': 'attn_add',
  'ln2.hook_in': 'resid_mid',
  'ln2.hook_out': 'mlp_in',
  'mlp.hook_in': 'mlp_in',
  'mlp.hook_out': 'mlp_raw',
  'ln2_post.hook_out': 'mlp_out',
  'post_per_layer_input_norm.hook_out': 'ple_out',
  'post_feedforward_layernorm_2.hook_out': 'experts_out',
}
_LAYERS = r'(?:(?:model|language_model)\.){0,2}layers'


def parse(name: str, model: str = '') -> sites.Site:
  """Returns the site of a hook name.

  Args:
    model: its name, where known, ours or theirs.

  Raises:
    files.Refused: the name is unknown, or is no site of this model.
  """
  text = str(name)
  dense = re.search(r'\.mlp(\.output|\.hook_out)?$', text)
  if dense and model_names.has_experts(model):
    raise files.Refused(
      f'names the hook point {files.show(name)}, which is a part of the MLP of '
      'a mixture of experts, and no site here'
    )
  for pattern, kinds in (
    (rf'{_LAYERS}\.(\d{{1,4}})\.(.+)', _TRANSFORMERS),
    (r'blocks\.(\d{1,4})\.(.+)', _TRANSFORMER_LENS | _BRIDGED),
  ):
    match = re.fullmatch(pattern, text)
    if match and match[2] in kinds:
      return sites.Site(int(match[1]), kinds[match[2]])
  # A module by its path, as forward hooks name it: its output.
  match = re.fullmatch(rf'{_LAYERS}\.(\d{{1,4}})((?:\.\w+)*)', text)
  if match:
    kind = _TRANSFORMERS.get(f'{match[2][1:]}.output'.lstrip('.'))
    if kind:
      return sites.Site(int(match[1]), kind)
  raise files.Refused(
    f'names the hook point {files.show(name)}, which is no site of Gemma here'
  )


def of_transformers(site: sites.Site, model: str = '') -> str:
  """`Site(12, 'resid_post')` -> 'model.layers.12.output'.

  Raises:
    files.Refused: the site has no name there.
  """
  if site.kind == 'mlp_raw' and model_names.has_experts(model):
    raise files.Refused(_no_name(site))
  return f'model.layers.{site.layer}.{_named(site, _TRANSFORMERS)}'


def of_transformer_lens(site: sites.Site) -> str:
  """`Site(12, 'resid_post')` -> 'blocks.12.hook_resid_post'."""
  return f'blocks.{site.layer}.{_named(site, _TRANSFORMER_LENS)}'


def _named(site: sites.Site, kinds: dict[str, str]) -> str:
  for name, kind in kinds.items():
    if kind == site.kind:
      return name
  raise files.Refused(_no_name(site))


def _no_name(site: sites.Site) -> str:
  return f'is at {site}, for which that format has no name'
