"""Writes the fixtures beside it: tiny random Gemmas, by `transformers` itself.

  python tests/gemma_fixtures/make.py [FOLDER]     # needs torch, transformers

Each folder is what `save_pretrained` writes for a Gemma in bfloat16, and
expected.npz: tokens, and in float32 the logits and every layer's sites. The
models are small and have what the large ones have: windows shorter than the
sequences, soft-caps, grouped queries or none, scores scaled by head_dim or by
heads, norms of queries and keys, two rotary bases, one of them with a factor,
and a vision tower to be left alone.
"""

from __future__ import annotations

import json
import pathlib
import sys

import numpy as np
import torch
import transformers

SMALL = dict(
  vocab_size=80,
  hidden_size=48,
  intermediate_size=64,
  num_attention_heads=4,
  head_dim=16,
  sliding_window=5,
)


def gemma2():
  config = transformers.Gemma2Config(
    **SMALL,
    num_hidden_layers=4,
    num_key_value_heads=2,
    query_pre_attn_scalar=12,
    attn_logit_softcapping=5.0,
    final_logit_softcapping=3.0,
  )
  return transformers.Gemma2ForCausalLM(config)


def _rope(factor: float) -> dict:
  glob = {'rope_type': 'default', 'rope_theta': 1_000_000.0}
  if factor != 1:
    glob |= {'rope_type': 'linear', 'factor': factor}
  local = {'rope_type': 'default', 'rope_theta': 10_000.0}
  return {'sliding_attention': local, 'full_attention': glob}


def _gemma3(**more) -> transformers.Gemma3TextConfig:
  kinds = ['sliding_attention', 'sliding_attention', 'full_attention'] * 2
  return transformers.Gemma3TextConfig(
    **SMALL, num_hidden_layers=5, layer_types=kinds[:5], **more
  )


def gemma3():
  config = _gemma3(
    num_key_value_heads=1, query_pre_attn_scalar=16, rope_parameters=_rope(1)
  )
  return transformers.Gemma3ForCausalLM(config)


def gemma3_multimodal():
  text = _gemma3(
    num_key_value_heads=4, query_pre_attn_scalar=12, rope_parameters=_rope(8.0)
  )
  vision = dict(
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    image_size=28,
    num_attention_heads=2,
    patch_size=14,
  )
  config = transformers.Gemma3Config(
    text_config=text,
    vision_config=vision,
    mm_tokens_per_image=1,
    image_token_index=79,
    boi_token_index=78,
    eoi_token_index=77,
  )
  return transformers.Gemma3ForConditionalGeneration(config)


def randomise(model, generator) -> None:
  """Weights at which every part of the model matters."""
  with torch.no_grad():
    for name, p in model.named_parameters():
      if p.ndim > 1 and 'embed' not in name:
        scale = 1.5 / p.shape[-1] ** 0.5
      else:
        scale = 0.3
      p.copy_(scale * torch.randn(p.shape, generator=generator))
    for p in model.parameters():  # what bfloat16 keeps
      p.copy_(p.to(torch.bfloat16).float())


def record(model, tokens) -> dict[str, np.ndarray]:
  """Logits, and every layer's sites, of the text model."""
  found, handles = {}, []

  def keep(name, which):
    def hook(_, inputs, output):
      x = inputs[0] if which == 'input' else output
      x = x[0] if isinstance(x, tuple) else x
      found[name] = x.detach().numpy().copy()

    return hook

  text = model.model
  for i, layer in enumerate(getattr(text, 'language_model', text).layers):
    for module, which, site in (
      (layer.self_attn.o_proj, 'input', 'attn_out'),
      (layer.pre_feedforward_layernorm, 'output', 'mlp_in'),
      (layer.post_feedforward_layernorm, 'output', 'mlp_out'),
      (layer, 'output', 'resid_post'),
    ):
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
  for seed, make in enumerate((gemma2, gemma3, gemma3_multimodal)):
    generator = torch.Generator().manual_seed(seed)
    model = make().eval().float()
    model.set_attn_implementation('eager')
    randomise(model, generator)
    tokens = torch.randint(5, 70, (2, 18), generator=generator)
    tokens[:, 0] = 2
    tokens[1, 12:] = 0
    out = folder / make.__name__
    expected = record(model, tokens)
    model.to(torch.bfloat16).save_pretrained(out, max_shard_size='150KB')
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
