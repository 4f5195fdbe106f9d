"""Writes the fixtures of Gemma 4 beside it, by `transformers` itself.

  python tests/language_model/gemma_fixtures/make_gemma4.py [FOLDER]

It needs torch and a transformers with Gemma 4. Each folder is what
`save_pretrained` writes for a random text model in bfloat16, and expected.npz:
tokens, and in float32 the logits and every layer's sites.

  gemma4_e      per-layer inputs, keys and values shared by the last four of
                nine layers, MLPs of two widths, a vision and an audio tower to
                be left alone
  gemma4_dense  as 31B: global layers with fewer key heads, values are keys
  gemma4_moe    as 26B-A4B: six experts, two of them a token, a dense branch

All have heads of two widths, a quarter of the pairs rotated in global layers,
and windows shorter than the sequences.
"""

from __future__ import annotations

import json
import pathlib
import sys

import numpy as np
import torch
import transformers

SMALL = dict(
  vocab_size=72,
  hidden_size=16,
  intermediate_size=24,
  num_attention_heads=4,
  head_dim=4,
  global_head_dim=8,
  sliding_window=5,
  final_logit_softcapping=9.0,
)
LOCAL, GLOBAL = 'sliding_attention', 'full_attention'


def gemma4_e():
  text = transformers.Gemma4TextConfig(
    **SMALL,
    num_hidden_layers=9,
    num_key_value_heads=2,
    layer_types=[LOCAL, LOCAL, GLOBAL] * 3,
    num_kv_shared_layers=4,
    use_double_wide_mlp=True,
    hidden_size_per_layer_input=8,
    vocab_size_per_layer_input=72,
  )
  vision = dict(
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    head_dim=4,
    num_attention_heads=2,
    num_key_value_heads=2,
    patch_size=4,
    position_embedding_size=4,
  )
  audio = dict(
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    subsampling_conv_channels=[2, 2],
    output_proj_dims=8,
  )
  config = transformers.Gemma4Config(
    text_config=text, vision_config=vision, audio_config=audio
  )
  return transformers.Gemma4ForConditionalGeneration(config)


def gemma4_dense():
  config = transformers.Gemma4TextConfig(
    **SMALL,
    num_hidden_layers=4,
    num_key_value_heads=2,
    num_global_key_value_heads=1,
    attention_k_eq_v=True,
    layer_types=[LOCAL, GLOBAL] * 2,
    hidden_size_per_layer_input=0,
  )
  return transformers.Gemma4ForCausalLM(config)


def gemma4_moe():
  config = transformers.Gemma4TextConfig(
    **SMALL,
    num_hidden_layers=4,
    num_key_value_heads=2,
    num_global_key_value_heads=1,
    attention_k_eq_v=True,
    layer_types=[LOCAL, GLOBAL] * 2,
    hidden_size_per_layer_input=0,
    enable_moe_block=True,
    num_experts=6,
    top_k_experts=2,
    moe_intermediate_size=12,
  )
  return transformers.Gemma4ForCausalLM(config)


def randomise(model, generator) -> None:
  """Weights at which every part of the model matters."""
  scalars = {n: p for n, p in model.named_buffers() if 'layer_scalar' in n}
  with torch.no_grad():
    for name, p in {**dict(model.named_parameters()), **scalars}.items():
      draw = torch.randn(p.shape, generator=generator)
      if p.ndim > 1 and 'embed_tokens' not in name:
        p.copy_(1.5 / max(p.shape[-1], 1) ** 0.5 * draw)
      elif p.ndim > 1:
        p.copy_(0.3 * draw)
      else:  # gains and scales
        p.copy_(1 + 0.2 * draw)
      p.copy_(p.to(torch.bfloat16).float())  # what bfloat16 keeps


def record(model, tokens) -> dict[str, np.ndarray]:
  """Logits, and every layer's sites, of the text model."""
  found, handles = {}, []

  def keep(name, which):
    def hook(_, inputs, output):
      x = inputs[0] if which == 'input' else output
      x = x[0] if isinstance(x, tuple) else x
      x = x.detach().numpy().copy()
      found[name] = x.reshape(*tokens.shape, -1)

    return hook

  def share(name, experts):
    """What the router gives each expert, before the expert's own scale."""

    def hook(module, _, output):
      _, weight, index = output
      weight = weight / module.per_expert_scale[index]
      full = torch.zeros(*weight.shape[:-1], experts).scatter(-1, index, weight)
      found[name] = full.detach().numpy().reshape(*tokens.shape, -1)

    return hook

  text = model.model
  for i, layer in enumerate(getattr(text, 'language_model', text).layers):
    at = [
      (layer, 'input', 'resid_pre'),
      (layer.input_layernorm, 'output', 'attn_in'),
      (layer.self_attn.o_proj, 'input', 'attn_out'),
      (layer.self_attn.o_proj, 'output', 'attn_raw'),
      (layer.post_attention_layernorm, 'output', 'attn_add'),
      (layer.pre_feedforward_layernorm, 'input', 'resid_mid'),
      (layer.pre_feedforward_layernorm, 'output', 'mlp_in'),
      (layer.mlp.down_proj, 'input', 'mlp_hidden'),
      (layer.post_feedforward_layernorm, 'input', 'mlp_raw'),
      (layer.post_feedforward_layernorm, 'output', 'mlp_out'),
      (layer, 'output', 'resid_post'),
    ]
    if layer.hidden_size_per_layer_input:
      at.append((layer.post_per_layer_input_norm, 'output', 'ple_out'))
    if layer.enable_moe_block:
      at.append((layer.router.norm, 'output', 'mlp_in_ungained'))
      at.append((layer.router.proj, 'output', 'router_logits'))
      branch = layer.post_feedforward_layernorm_2
      at.append((branch, 'output', 'experts_out'))
      hook = share(f'expert_shares/{i}', layer.router.proj.out_features)
      handles.append(layer.router.register_forward_hook(hook))
    for module, which, site in at:
      hook = keep(f'{site}/{i}', which)
      handles.append(module.register_forward_hook(hook))
  with torch.no_grad():
    mask = (tokens != 0).long()
    found['logits'] = model(tokens, attention_mask=mask).logits.numpy().copy()
  for handle in handles:
    handle.remove()
  return found


def main(folder: pathlib.Path) -> None:
  """Writes a folder a model."""
  for seed, make in enumerate((gemma4_e, gemma4_dense, gemma4_moe)):
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = make().eval().float()
    model.set_attn_implementation('eager')
    randomise(model, generator)
    tokens = torch.randint(5, 70, (2, 17), generator=generator)
    tokens[:, 0] = 2
    tokens[1, 13:] = 0
    out = folder / make.__name__
    expected = record(model, tokens)
    model.to(torch.bfloat16).save_pretrained(out)
    for extra in out.glob('generation_config.json'):
      extra.unlink()
    np.savez_compressed(
      out / 'expected.npz', tokens=tokens.numpy().astype(np.int32), **expected
    )
    versions = {'torch': torch.__version__, 'n': len(expected)}
    versions['transformers'] = transformers.__version__
    print(out, json.dumps(versions), sorted(p.name for p in out.iterdir()))


if __name__ == '__main__':
  main(
    pathlib.Path(sys.argv[1] if sys.argv[1:] else pathlib.Path(__file__).parent)
  )
