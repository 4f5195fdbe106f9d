"""Writes what `transformers` makes of the GGUF file of Gemma 3 270M.

  python make_270m.py FILE.gguf     # needs torch, transformers, gguf

gemma3_270m_tokens.json has for each document the number of tokens and their
SHA-256. gemma3_270m.npz has for each text its tokens and, at some positions,
in float32: the logits of `ids`, the logarithm of the sum of all exponentials,
the ids of the largest logits, and for each layer and site the norm and a few
projections.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import sys

import numpy as np
import torch
import transformers
from corpus_270m import HERE, documents, projections, texts
from make import record

SITES = 'attn_out', 'mlp_out', 'resid_post'


def main(path: pathlib.Path) -> None:
  where = dict(
    pretrained_model_name_or_path=str(path.parent), gguf_file=path.name
  )
  tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
  hashes = {}
  for name, text in documents().items():
    ids = tokenizer(text, add_special_tokens=False)['input_ids']
    data = np.asarray(ids, '<i4').tobytes()
    hashes[name] = [len(ids), hashlib.sha256(data).hexdigest()]
  print({name: count for name, (count, _) in hashes.items()})
  tokens = HERE / 'gemma3_270m_tokens.json'
  tokens.write_text(json.dumps(hashes, indent=1) + '\n')
  if sys.argv[2:] == ['tokens']:
    return
  model = transformers.AutoModelForCausalLM.from_pretrained(
    **where, dtype=torch.float32, attn_implementation='eager'
  ).eval()
  out = {}
  for name, text in texts().items():
    ids = tokenizer(text, add_special_tokens=False)['input_ids']
    tokens = torch.tensor([[tokenizer.bos_token_id, *ids]])
    found = record(model, tokens)
    length = tokens.shape[1]
    at = np.unique(np.linspace(0, length - 1, 10).round().astype(int))
    logits = found['logits'][0, at].astype(np.float64)
    chosen = np.random.default_rng(1).choice(logits.shape[1], 50, replace=False)
    out |= {
      f'{name}/tokens': tokens.numpy().astype(np.int32),
      f'{name}/at': at,
      f'{name}/ids': chosen,
      f'{name}/logits': logits[:, chosen].astype(np.float32),
      f'{name}/log_sum': np.log(np.exp(logits).sum(1)).astype(np.float32),
      f'{name}/largest': logits.argmax(1),
    }
    for site in SITES:
      of_layers = [
        projections(found[f'{site}/{layer}'][0, at])
        for layer in range(model.config.num_hidden_layers)
      ]
      out[f'{name}/{site}'] = np.stack(of_layers)
    print(name, length, tokenizer.convert_ids_to_tokens(ids)[:40])
  np.savez_compressed(HERE / 'gemma3_270m.npz', **out)
  print({'torch': torch.__version__, 'transformers': transformers.__version__})


if __name__ == '__main__':
  main(pathlib.Path(sys.argv[1]).absolute())
